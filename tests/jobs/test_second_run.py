"""A second run of the preparation: afterwards the data set has the clips of the last list."""

import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ast_core.errors import DataError
from ast_core.features import KALDI128
from jobs.prepare_audioset import main
from pipeline import dataset
from pipeline.dataset import PreparedDataset
from pipeline.locks import exclusive
from pipeline.prepare.output.shards import WriteShards
from pipeline.prepare.sources.locate import AudioFolder
from tests import fakes
from tests.s3 import S3Server


class Folder:
    """A folder with sounds of half a second, lists of them, and a data set."""

    def __init__(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.path, self.data, self._capsys = path, path / "data", capsys

    def sounds(self, *names: str) -> None:
        for name in names:
            fakes.write_media(self.path / f"{name}.wav", fakes.noise(0.5, seed=sum(name.encode())))

    def run(self, rows: Sequence[tuple[str, str]], *options: str, status: int = 0) -> str:
        """Prepare a list of (name of a sound, split). Returns what the job printed."""
        lines = ["path,labels,split", *(f"{name}.wav,a,{split}" for name, split in rows)]
        (self.path / "list.csv").write_text("\n".join(lines))
        return self.run_with("--manifest", str(self.path / "list.csv"), *options, status=status)

    def run_with(self, *options: str, status: int = 0) -> str:
        self._capsys.readouterr()
        try:
            ended = main([*options, "--output", str(self.data)])
        except DataError as err:
            ended = 2
            print(f"error: {err}")
        printed = self._capsys.readouterr().out
        assert ended == status, printed
        return printed

    def index(self) -> dict[str, list[str]]:
        """The clips of each split, from the index as pandas reads it."""
        splits = json.loads((self.data / "dataset.json").read_text())["splits"]
        read = {split: pd.read_parquet(self.data / split / "index.parquet") for split in splits}
        assert {split: len(index) for split, index in read.items()} == {s: i["clips"] for s, i in splits.items()}
        return {split: list(index["clip_id"]) for split, index in read.items()}

    def failures(self, split: str = "train") -> dict[str, str]:
        read = pd.read_parquet(self.data / split / "failures.parquet")
        return dict(zip(read["clip_id"], read["reason"], strict=True))

    def shards(self) -> Mapping[Path, Any]:
        return {file: file.stat().st_mtime_ns for file in self.data.glob("*/shards/*.parquet")}


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Folder:
    return Folder(tmp_path, capsys)


def in_train(names: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, "train") for name in names]


def row_of(split: str, printed: str) -> list[str]:
    """A split's cells in the table at the end: listed, prepared, failed and the rest."""
    (line,) = (line for line in printed.splitlines() if line.startswith(f"{split} "))
    return line.split(maxsplit=4)[1:]


def test_case_16_clips_no_longer_listed_leave_the_index(local_ray: None, folder: Folder):
    folder.sounds(*"abcde")
    folder.run(in_train("abcde"))
    shards = folder.shards()
    printed = folder.run(in_train("abc"))
    assert row_of("train", printed) == ["3", "3", "0", "no longer listed 2"]
    assert folder.index() == {"train": ["a", "b", "c"]}
    clips = PreparedDataset.open(str(folder.data)).clips(["train"])
    assert clips.clip_id.to_pylist() == ["a", "b", "c"]
    assert json.loads((folder.data / "dataset.json").read_text())["splits"]["train"]["frames"] == 3 * 48

    printed = folder.run(in_train("abcde"))  # listed again, they come back without any work
    assert (row_of("train", printed), folder.shards()) == (["5", "5", "0"], shards)
    assert folder.index() == {"train": list("abcde")}


def test_failures_of_clips_no_longer_listed_are_removed(local_ray: None, folder: Folder):
    folder.sounds("a")
    printed = folder.run(in_train("abc"))
    assert folder.failures() == {"b": "missing_file", "c": "missing_file"}
    printed = folder.run(in_train("ab"))
    assert (row_of("train", printed)[:3], folder.failures()) == (["2", "1", "1"], {"b": "missing_file"})


def test_split_that_the_list_does_not_name_is_unchanged(local_ray: None, folder: Folder):
    folder.sounds(*"abc")
    folder.run([("a", "train"), ("b", "train")])
    folder.run([("c", "test")])
    assert folder.index() == {"train": ["a", "b"], "test": ["c"]}


def test_limit_keeps_prepared_clips_beyond_it(local_ray: None, folder: Folder):
    folder.sounds(*"abc")
    folder.run(in_train("abcx"))
    printed = folder.run(in_train("abcx"), "--limit", "1")
    assert row_of("train", printed)[:3] == ["4", "3", "1"]
    assert folder.index() == {"train": ["a", "b", "c"]}
    assert folder.failures() == {"x": "missing_file"}


def test_limit_on_a_new_output_limits_the_listed_clips(local_ray: None, folder: Folder):
    folder.sounds(*"abc")
    printed = folder.run(in_train("abc"), "--limit", "2")
    assert (row_of("train", printed), folder.index()) == (["2", "2", "0"], {"train": ["a", "b"]})


def test_list_that_grows_or_shrinks_may_change_ids(local_ray: None, folder: Folder):
    for name in ("dog", "cat"):
        (folder.path / name).mkdir()
    folder.sounds("dog/0", "dog/1", "cat/0", "cat/1")
    dogs, cats = in_train(["dog/0", "dog/1"]), in_train(["cat/0", "cat/1"])
    folder.run(dogs)
    assert folder.index() == {"train": ["0", "1"]}
    printed = folder.run([*dogs, *cats])
    assert "2 clips of split 'train' are prepared under other ids (0 for one, which is dog/0 in this list)" in printed
    assert sorted(folder.index()["train"]) == ["cat/0", "cat/1", "dog/0", "dog/1"]
    printed = folder.run(dogs)  # the clips of the first run come back
    assert "under other ids" not in printed
    assert (row_of("train", printed)[:2], folder.index()) == (["2", "2"], {"train": ["0", "1"]})
    folder.sounds("dog/2", "cat/2", "other")
    folder.run([("dog/2", "test"), ("cat/2", "test")])
    printed = folder.run([("cat/2", "test")])
    assert "1 clips of split 'test' are prepared under other ids (cat/2 for one, which is 2 in this list)" in printed
    assert folder.index() == {"train": ["0", "1"], "test": ["2"]}
    assert "none of them in this list" in folder.run(in_train(["other"]), status=2)


def test_clip_that_moves_to_another_split_leaves_the_first(local_ray: None, folder: Folder):
    folder.sounds(*"abc")
    folder.run([("a", "train"), ("b", "train"), ("c", "test")])
    printed = folder.run([("a", "train"), ("b", "test"), ("c", "test")])
    assert row_of("train", printed) == ["1", "1", "0", "moved 1"]
    assert "1 clips moved from train to test" in printed
    assert folder.index() == {"train": ["a"], "test": ["b", "c"]}


def test_clip_moves_out_of_a_split_that_the_list_does_not_name(local_ray: None, folder: Folder):
    folder.sounds(*"abc")
    folder.run(in_train("ab"))
    printed = folder.run([("b", "test"), ("c", "test")])
    assert "1 clips moved from train to test" in printed
    assert folder.index() == {"train": ["a"], "test": ["b", "c"]}
    folder.run(in_train("ab"))  # and back, without any work
    assert folder.index() == {"train": ["a", "b"], "test": ["c"]}


def test_equal_ids_with_different_sound_stay_in_both_splits(local_ray: None, folder: Folder):
    folder.sounds("a", "b")
    folder.run(in_train("a"))
    fakes.write_media(folder.path / "a.wav", fakes.noise(0.5, seed=7))
    printed = folder.run([("a", "test")])
    assert "1 clip ids occur in train and in test with different sound; both clips stay" in printed
    assert folder.index() == {"train": ["a"], "test": ["a"]}


def test_section_listed_in_two_splits_stays_in_the_first(local_ray: None, folder: Folder):
    folder.sounds(*"ab")
    printed = folder.run([("a", "train"), ("b", "train"), ("a", "test")])
    assert folder.index() == {"train": ["a", "b"], "test": []}
    assert row_of("test", printed) == ["1", "0", "1", "1 duplicate"]
    (message,) = pd.read_parquet(folder.data / "test" / "failures.parquet")["message"]
    assert message == "its sound is in the split train too, as a; it stays there and leaves test"


def test_copy_of_a_clip_in_two_splits_of_a_list_stays_in_the_first(local_ray: None, folder: Folder):
    for split in ("train", "test"):
        (folder.path / split).mkdir()
    folder.sounds("train/a", "train/b", "test/b")
    (folder.path / "test" / "a.wav").write_bytes((folder.path / "train" / "a.wav").read_bytes())
    (folder.path / "list.csv").write_text(
        "clip_id,path,labels,split\n"
        "a,train/a.wav,x,train\nb,train/b.wav,x,train\na,test/a.wav,x,test\nb,test/b.wav,x,test\n"
    )
    printed = folder.run_with("--manifest", str(folder.path / "list.csv"))
    assert folder.index() == {"train": ["a", "b"], "test": ["b"]}
    assert row_of("test", printed) == ["2", "1", "1", "1 duplicate"]
    assert "1 clip ids occur in train and in test with different sound" in printed


def test_case_19_failed_file_that_has_changed_is_tried_again(local_ray: None, folder: Folder):
    folder.sounds("a")
    (folder.path / "b.wav").write_bytes(b"")
    (folder.path / "c.wav").write_bytes(b"RIFF" + bytes(26))
    printed = folder.run(in_train("abc"))
    assert row_of("train", printed)[:3] == ["3", "1", "2"]
    printed = folder.run(in_train("abc"))  # nothing has changed
    assert "2 of those done have failed (2 not_audio): --retry REASON tries them again" in printed
    folder.sounds("b", "c")
    printed = folder.run(in_train("abc"))
    assert "2 of these had failed, and their files have changed since" in printed
    assert (row_of("train", printed), folder.index()) == (["3", "3", "0"], {"train": ["a", "b", "c"]})


def test_failed_file_with_a_new_modification_time_is_tried_again(local_ray: None, folder: Folder):
    folder.sounds("a", "b")
    whole = (folder.path / "b.wav").read_bytes()
    (folder.path / "b.wav").write_bytes(bytes(len(whole)))
    folder.run(in_train("ab"))
    then_ns = (folder.path / "b.wav").stat().st_mtime_ns
    while (folder.path / "b.wav").stat().st_mtime_ns // 1000 == then_ns // 1000:
        (folder.path / "b.wav").write_bytes(whole)
        time.sleep(0.001)
    folder.run(in_train("ab"))
    assert folder.index() == {"train": ["a", "b"]}


def test_other_section_with_the_name_of_a_prepared_clip_is_refused(local_ray: None, folder: Folder):
    """The shards record each clip's section. Without this check the sound of the earlier section would stay."""
    fakes.write_media(folder.path / "long.wav", fakes.noise(2.0))
    header = "clip_id,path,labels,start_s,end_s"
    manifest = folder.path / "list.csv"
    manifest.write_text(f"{header}\na,long.wav,x,0,1\nb,long.wav,x,0.5,2.02\n")  # the recording is a little shorter
    folder.run_with("--manifest", str(manifest))
    assert "2 clips are done" in folder.run_with("--manifest", str(manifest))
    for section in ("0.5,1.5", "0,0.9", "0,1.2"):
        manifest.write_text(f"{header}\na,long.wav,x,{section}\nb,long.wav,x,0.5,2\n")
        printed = folder.run_with("--manifest", str(manifest), status=2)
        assert "error: 1 clips of split 'train' are prepared from another section than this list names, a" in printed


def test_file_put_in_place_after_its_clip_was_prepared_is_pointed_out(local_ray: None, folder: Folder):
    folder.sounds(*"abc")
    old = fakes.write_media(folder.path.parent / "old.wav", fakes.noise(0.5, seed=7))
    assert "copied later" not in folder.run(in_train("abc"))
    shutil.copy2(old, folder.path / "b.wav")  # its time of writing is before the preparation
    (shard,) = folder.shards()
    printed = folder.run(in_train("abc"))
    assert "1 prepared clips of split 'train' have files that were written or copied later (b for one) and" in printed
    index = folder.data / "train" / "index.parquet"
    assert f"delete {index} and the clips' shards ({shard} for one)" in printed
    before = pd.read_parquet(index)["fbank_hash"]
    shard.unlink()
    index.unlink()
    assert "copied later" not in folder.run(in_train("abc"))
    after = pd.read_parquet(index)["fbank_hash"]
    assert (before == after).tolist() == [True, False, True]


def test_end_that_was_taken_out_of_the_list_is_refused(local_ray: None, folder: Folder):
    fakes.write_media(folder.path / "long.wav", fakes.noise(2.0))
    manifest = folder.path / "list.csv"
    header = "clip_id,path,labels,start_s,end_s"
    manifest.write_text(f"{header}\na,long.wav,x,0,1\nb,long.wav,x,1,\n")
    folder.run_with("--manifest", str(manifest))
    manifest.write_text(f"{header}\na,long.wav,x,0,1\nb,long.wav,x,1,2\n")  # the end that b has anyway
    folder.run_with("--manifest", str(manifest))
    manifest.write_text(f"{header}\na,long.wav,x,0,\nb,long.wav,x,1,\n")
    printed = folder.run_with("--manifest", str(manifest), status=2)
    assert "error: 1 clips of split 'train' are prepared from another section than this list names, a" in printed


def test_other_file_under_the_id_of_a_prepared_clip_is_pointed_out(local_ray: None, folder: Folder):
    """The other file is older than the shard, so its times do not show it."""
    folder.sounds("a", "b", "c")
    manifest = folder.path / "list.csv"
    rows = "clip_id,path,labels\none,a.wav,x\ntwo,{},x\n"
    manifest.write_text(rows.format("b.wav"))
    folder.run_with("--manifest", str(manifest))
    for same in ("b.wav", "./b.wav", str(folder.path / "b.wav")):
        manifest.write_text(rows.format(same))
        assert "not read again" not in folder.run_with("--manifest", str(manifest))
    manifest.write_text(rows.format("c.wav"))
    printed = folder.run_with("--manifest", str(manifest))
    (shard,) = folder.shards()
    assert (
        "1 prepared clips of split 'train' are prepared from other files or URLs than this list names (two for one) and"
        f" are not read again; if they are other sounds now, delete {folder.data}/train/index.parquet and the clips' "
        f"shards ({shard} for one)" in printed
    )


def test_ends_beyond_the_recording_are_the_same_and_others_are_not(local_ray: None, folder: Folder):
    """5 % is allowed for a recording that is shorter than its list says, not for a list that says another end."""
    fakes.write_media(folder.path / "long.wav", fakes.noise(2.0))
    manifest = folder.path / "list.csv"
    rows = "clip_id,path,labels,start_s,end_s\na,long.wav,x,0,{}\nb,long.wav,x,0.5,{}\n"
    manifest.write_text(rows.format(1, 2.02))
    folder.run_with("--manifest", str(manifest))
    for same in (2.03, 2):
        manifest.write_text(rows.format(1, same))
        folder.run_with("--manifest", str(manifest))
    for a, b in ((0.97, 2.02), (1.03, 2.02), (1, 1.97)):
        manifest.write_text(rows.format(a, b))
        assert "another section" in folder.run_with("--manifest", str(manifest), status=2)


def test_labels_of_clips_beyond_the_limit_may_not_change(local_ray: None, folder: Folder):
    folder.sounds("a", "b")
    manifest = folder.path / "list.csv"
    manifest.write_text("path,labels\na.wav,x\nb.wav,y\n")
    folder.run_with("--manifest", str(manifest))
    manifest.write_text("path,labels\na.wav,x\nb.wav,x\n")
    options = ("--manifest", str(manifest), "--labels", str(folder.data / "labels.csv"), "--limit", "1")
    printed = folder.run_with(*options, status=2)
    assert "1 clips of split 'train' are prepared with other labels, b for one" in printed


def test_failed_clip_is_tried_again_once_the_list_is_corrected(local_ray: None, folder: Folder):
    fakes.write_media(folder.path / "long.wav", np.concatenate([np.zeros(16_000, np.float32), fakes.noise(1.0)]))
    manifest = folder.path / "list.csv"
    rows = "clip_id,path,labels,start_s,end_s\na,long.wav,x,{},{}\nb,long.wav,x,1,2\n"
    manifest.write_text(rows.format(0, 0.5))
    folder.run_with("--manifest", str(manifest))
    assert folder.failures() == {"a": "silent"}
    assert "1 of those done have failed (1 silent)" in folder.run_with("--manifest", str(manifest))
    manifest.write_text(rows.format(1, 1.5))
    folder.run_with("--manifest", str(manifest))
    assert (folder.index(), folder.failures()) == ({"train": ["a", "b"]}, {})


def test_shards_of_an_earlier_version_know_no_origin(local_ray: None, folder: Folder):
    folder.sounds("a", "b", "c")
    manifest = folder.path / "list.csv"
    manifest.write_text("clip_id,path,labels\none,a.wav,x\n")
    folder.run_with("--manifest", str(manifest))
    (shard,) = folder.shards()
    metadata = pq.read_schema(shard).metadata
    assert metadata.pop(b"origins").startswith(b'{"source_hash":[')
    pq.write_table(pq.read_table(shard).replace_schema_metadata(metadata), shard)
    manifest.write_text("clip_id,path,labels\none,c.wav,x\ntwo,b.wav,x\n")
    assert "not read again" not in folder.run_with("--manifest", str(manifest))
    assert folder.index() == {"train": ["one", "two"]}


def test_list_in_another_order_gives_shards_equal_to_the_byte(local_ray: None, folder: Folder):
    names = [f"{i:02}" for i in range(40)]
    folder.sounds(*names)
    shards = []
    for number, order in enumerate((names, names[::-1])):
        folder.data = folder.path / f"data{number}"
        folder.run([(name, "train") for name in order])
        shards.append({file.name: file.read_bytes() for file in folder.data.glob("train/shards/*.parquet")})
    assert (len(shards[0]) > 1, shards[0] == shards[1]) == (True, True)
    stored = [clip_id for file in folder.data.glob("train/shards/*") for clip_id in pd.read_parquet(file)["clip_id"]]
    assert sorted(stored) == names


# Lists of sections, with folders that have their files or not


def sections(folder: Path, *rows: str) -> tuple[str, str]:
    """Write a list of sections from 0 s on: the id's first letter, the end and the label. Returns its option."""
    lines = (f'{name:_<11}, 0.000, {end}, "{label}"' for name, end, label in map(str.split, rows))
    (folder / "few_segments.csv").write_text("\n".join(lines))
    return "--segments", str(folder / "few_segments.csv")


def disk(folder: Folder, name: str, *names: str) -> tuple[str, str]:
    """Make an audio folder with these sounds of half a second. Returns its option."""
    for sound in names:
        (folder.path / name).mkdir(exist_ok=True)
        folder.sounds(f"{name}/{sound:_<11}")
    return "--audio-dir", str(folder.path / name)


SPEECH, DOG = "/m/09x0r", "/m/0bt9lr"


@pytest.mark.parametrize("limit", [(), ("--limit", "1")])
@pytest.mark.parametrize(
    ("changed", "refused"),
    [
        (f"b 0.500 {DOG}", "1 clips of split 'few' are prepared with other labels, b___________0.000 for one"),
        (f"b 0.300 {SPEECH}", "1 clips of split 'few' are prepared from another section than this list names, b_"),
    ],
    ids=["label", "end"],
)
def test_other_label_or_end_of_a_clip_without_a_file_is_refused(
    local_ray: None, folder: Folder, changed: str, refused: str, limit: tuple[str, ...]
):
    of_a = f"a 0.500 {SPEECH}"
    both, neither = disk(folder, "both", "a", "b"), disk(folder, "other", "z")
    folder.run_with(*sections(folder.path, of_a, f"b 0.500 {SPEECH}"), *both)
    folder.run_with(*sections(folder.path, of_a, f"b 0.500 {SPEECH}"), *neither, *limit)
    assert folder.index() == {"few": ["a___________0.000", "b___________0.000"]}
    assert refused in folder.run_with(*sections(folder.path, of_a, changed), *neither, *limit, status=2)


def test_limit_keeps_prepared_clips_beyond_it_whose_files_are_missing(local_ray: None, folder: Folder):
    option = sections(folder.path, *(f"{name} 0.500 {SPEECH}" for name in "abcde"))
    folder.run_with(*option, *disk(folder, "most", "a", "b", "c", "d"))
    printed = folder.run_with(*option, *disk(folder, "other", "e"), "--limit", "2")
    assert row_of("few", printed) == ["5", "5", "0"]
    assert folder.index() == {"few": [f"{name}___________0.000" for name in "abcde"]}
    assert folder.failures("few") == {}


def test_clips_of_files_that_are_read_in_another_way_are_pointed_out(local_ray: None, folder: Folder):
    """The recording of `silent` is silent in its section, and not at its beginning."""
    silent = np.concatenate([fakes.noise(0.4), np.zeros(9_600, np.float32)])
    for name, waveform in (("sound", fakes.noise(1.0)), ("silent", silent), ("begin", fakes.noise(1.0, seed=1))):
        (folder.path / "audio").mkdir(exist_ok=True)
        fakes.write_media(folder.path / "audio" / f"{name:_<11}.wav", waveform)
    times = {"sound": "0.500, 1.000", "silent": "0.500, 1.000", "begin": "0.000, 0.500"}
    lines = (f'{name:_<11}, {section}, "{SPEECH}"' for name, section in times.items())
    (folder.path / "few_segments.csv").write_text("\n".join(lines))
    options = ("--segments", str(folder.path / "few_segments.csv"), "--audio-dir", str(folder.path / "audio"))
    folder.run_with(*options)
    assert folder.failures("few") == {"silent______0.500": "silent"}
    assert "not read again" not in folder.run_with(*options)
    printed = folder.run_with(*options, "--files-are-clips")
    assert (
        "1 prepared clips of split 'few' are of files that only one of the two runs reads with --files-are-clips "
        "(sound_______0.500 for one) and are not read again" in printed
    )
    assert "1 of these had failed, and their files have changed since" in printed
    assert folder.failures("few") == {}
    printed = folder.run_with(*options)  # now `silent` has the wrong section
    assert "2 prepared clips" not in printed
    assert "(silent______0.500 for one)" in printed


def test_shards_of_other_features_in_an_unfinished_output_are_refused(local_ray: None, folder: Folder):
    folder.sounds("a", "b")
    folder.run(in_train("a"))
    (folder.data / "dataset.json").unlink()
    (own,) = folder.shards()
    others = replace(KALDI128, low_freq_hz=50.0)
    name = next(n for i in range(100) if f"{dataset.name_of(pa.chunked_array([[n := f'b{i}']]))}.parquet" > own.name)
    WriteShards(str(folder.data), features=others)(fakes.prepared_rows(name))
    (other,) = folder.shards().keys() - {own}
    printed = folder.run(in_train("ab"), status=2)
    assert f"error: {other} contains other features than these: low_freq_hz is 20.0, not 50.0; delete it" in printed
    other.unlink()
    folder.run(in_train("ab"))
    assert folder.index() == {"train": ["a", "b"]}


# One audio store for several outputs


def kept(folder: Folder) -> dict[str, bytes]:
    read = [pd.read_parquet(file) for file in (folder.path / "kept").glob("*/audio/*.parquet")]
    return {row.clip_id: row.audio["bytes"] for table in read for row in table.itertuples()}


def test_audio_of_equal_names_in_another_folder_is_replaced_with_a_warning(local_ray: None, folder: Folder):
    store = ("--keep-audio", str(folder.path / "kept"))
    for part, names in (("one", "12"), ("two", "23")):
        (folder.path / part).mkdir()
        folder.sounds(*(f"{part}/{name}" for name in names))
        rows = "".join(f"{name}.wav,x\n" for name in names)
        (folder.path / part / "list.csv").write_text(f"path,labels\n{rows}")
    folder.run_with("--manifest", str(folder.path / "one" / "list.csv"), *store)
    before, folder.data = kept(folder), folder.path / "data2"  # the same clips again, for example for other features
    printed = folder.run_with("--manifest", str(folder.path / "one" / "list.csv"), *store)
    assert "keeps audio of other files" not in printed
    assert kept(folder) == before
    folder.data = folder.path / "data3"
    printed = folder.run_with("--manifest", str(folder.path / "two" / "list.csv"), *store)
    assert (
        f"warning: {folder.path}/kept keeps audio of other files or URLs under the ids of 1 clips of split 'train', 2 "
        "for one, which is replaced; if it is that of another data set, give another --keep-audio" in printed
    )
    assert kept(folder)["1"] == before["1"]
    assert kept(folder)["2"] != before["2"]


def test_one_job_at_a_time_writes_to_an_audio_store(local_ray: None, folder: Folder):
    folder.sounds("a")
    store = str(folder.path / "kept")
    with exclusive("prepare", store):
        printed = folder.run(in_train("a"), "--keep-audio", store, status=2)
    assert f"error: another job is preparing {store}" in printed
    folder.run(in_train("a"), "--keep-audio", store)
    assert list(kept(folder)) == ["a"]


@pytest.mark.parametrize("place", [".", "kept"])
def test_an_audio_store_may_be_the_output_or_in_it(local_ray: None, folder: Folder, place: str):
    folder.sounds("a")
    store = folder.data / place
    for _ in range(2):
        folder.run(in_train("a"), "--keep-audio", str(store))
    assert folder.index() == {"train": ["a"]}
    assert len(list(store.glob("train/audio/*.parquet"))) == 1


# Files that the job wrote are not read as sources


def of_archive(folder: Folder) -> str:
    """Make a folder with a tar of two labelled sounds. Returns its path."""
    folder.sounds("a", "b")
    members: dict[str, bytes | dict[str, object]] = {}
    for name in "ab":
        members |= {f"{name}.wav": (folder.path / f"{name}.wav").read_bytes(), f"{name}.json": {"labels": ["x"]}}
        (folder.path / f"{name}.wav").unlink()
    fakes.write_tar(folder.path / "in" / "0.tar", members)
    return str(folder.path / "in")


def test_case_18_output_below_the_manifest_is_not_read(local_ray: None, folder: Folder):
    source = of_archive(folder)
    folder.data = folder.path / "in" / "out"
    options = ("--manifest", source, "--keep-audio", str(folder.path / "in" / "kept"))
    folder.run_with(*options)
    assert (folder.data / "_report").exists()
    printed = folder.run_with(*options)
    assert folder.index() == {"train": ["a", "b"]}
    for name in ("out", "kept"):
        assert f"{source}/{name} was written by a preparation and is not read" in printed


def test_case_18_output_below_the_audio_folder_is_not_read(local_ray: None, folder: Folder):
    (folder.path / "in").mkdir()
    folder.sounds("in/abcdefghijk")
    (folder.path / "few_segments.csv").write_text('abcdefghijk, 0.000, 0.500, "/m/09x0r"\n')
    folder.data = folder.path / "in" / "deep" / "out"
    options = ("--segments", str(folder.path / "few_segments.csv"), "--audio-dir", str(folder.path / "in"))
    for _ in range(2):
        printed = folder.run_with(*options)
        assert folder.index() == {"few": ["abcdefghijk_0.000"]}
    assert "is not read" in printed


def test_audio_store_is_read_if_the_command_names_it(local_ray: None, folder: Folder):
    folder.run_with("--manifest", of_archive(folder), "--keep-audio", str(folder.path / "stores" / "kept"))
    folder.data = folder.path / "again"
    folder.run_with("--manifest", str(folder.path / "stores" / "kept"))
    assert folder.index() == {"train": ["a", "b"]}
    assert AudioFolder(str(folder.path / "stores"))("a", 0.0, 0.5)


def test_data_set_is_not_read_as_a_manifest(local_ray: None, folder: Folder):
    folder.run_with("--manifest", of_archive(folder))
    folder.data, made = folder.path / "again", folder.data
    printed = folder.run_with("--manifest", str(made), status=2)
    assert f"{made} was written by a preparation and is not read" in printed


def test_file_with_another_audio_column_is_left_out(local_ray: None, folder: Folder):
    source = of_archive(folder)
    odd = Path(source, "odd.parquet")
    pd.DataFrame({"audio": [b"bytes"], "labels": ["x"]}).to_parquet(odd)
    printed = folder.run_with("--manifest", source)
    assert f"note: not read: the column `audio` of {odd} is binary" in printed
    assert folder.index() == {"train": ["a", "b"]}
    folder.data = folder.path / "of the file itself"
    printed = folder.run_with("--manifest", str(odd), status=2)
    assert f"error: the column `audio` of {odd} is binary, not struct<bytes, path>" in printed


# The vocabulary of the first run


def labelled(folder: Folder, *labels: str) -> tuple[str, str]:
    """Write a manifest of sounds a, b, … with these labels. Returns its option."""
    rows = [f"{name}.wav,{label}" for name, label in zip("abcdef", labels, strict=False)]
    (folder.path / "list.csv").write_text("\n".join(["path,labels", *rows]))
    return "--manifest", str(folder.path / "list.csv")


def test_case_43_refusal_names_the_vocabulary_of_the_first_run(local_ray: None, folder: Folder):
    folder.sounds("a", "b")
    folder.run_with(*labelled(folder, "dgo", "cta"))
    printed = folder.run_with(*labelled(folder, "dog", "cat"), status=2)
    assert f"compared with {folder.data}/labels.csv, with which an earlier run prepared clips" in printed
    assert "give another --output" in printed
    printed = folder.run_with(*labelled(folder, "dgo", "cat"))  # some rows of the list fit
    assert f"note: 1 unknown labels: the labels are compared with {folder.data}/labels.csv" in printed
    assert (folder.index(), folder.failures()) == ({"train": ["a"]}, {"b": "unknown_label"})


def test_vocabulary_without_any_prepared_clip_is_replaced(local_ray: None, folder: Folder):
    folder.run_with(*labelled(folder, "dgo", "cta"), status=2)  # there is no file yet
    folder.sounds("a", "b")
    printed = folder.run_with(*labelled(folder, "dog", "cat"))
    assert f"no clip was prepared with the labels in {folder.data}/labels.csv" in printed
    opened = PreparedDataset.open(str(folder.data))
    assert (opened.labels.names, folder.index()) == (("cat", "dog"), {"train": ["a", "b"]})
    assert opened.clips(["train"]).labels.to_pylist() == [[1], [0]]


@pytest.mark.slow
def test_part_3_2_two_clusters_with_different_lists_lose_no_clip_silently(
    s3: S3Server, tmp_path: Path, local_ray: None
):
    """Two jobs, each with its own Ray, write to the same output on object storage at the same time."""
    lists = {"one": range(0, 60), "two": range(30, 90)}
    for i in range(90):
        fakes.write_media(tmp_path / f"{i:02}.wav", fakes.noise(0.5, seed=i))
    jobs = {}
    for name, clips in lists.items():
        rows = ["path,labels,split", *(f"{i:02}.wav,a,train" for i in clips)]
        (tmp_path / f"{name}.csv").write_text("\n".join(rows))
        argv = ["--manifest", str(tmp_path / f"{name}.csv"), "--output", s3.uri("two-clusters"), "--num-cpus", "1"]
        command = [sys.executable, "jobs/prepare_audioset.py", *argv, "--address", "local"]
        jobs[name] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for name, job in jobs.items():
        printed, errors = job.communicate(timeout=300)
        if job.returncode == 0:
            assert row_of("train", printed)[:3] == ["60", "60", "0"], printed
        else:
            assert (job.returncode, errors.strip().splitlines()[-1][:7]) == (2, "error: "), (name, printed, errors)
    assert main(["--manifest", str(tmp_path / "one.csv"), "--output", s3.uri("two-clusters")]) == 0
    index = PreparedDataset.open(s3.uri("two-clusters")).clips(["train"])
    assert sorted(index.clip_id.to_pylist()) == [f"{i:02}" for i in lists["one"]]


def openings(shards: Path, run: Callable[[], object]) -> Counter[str]:
    """Count how often any process opens each file of a folder while `run` runs."""
    inotify_simple = pytest.importorskip("inotify_simple", reason="inotify exists only on Linux")
    with inotify_simple.INotify() as inotify:
        inotify.add_watch(shards, inotify_simple.flags.OPEN)
        run()
        return Counter(event.name for event in inotify.read(timeout=0) if event.name.endswith(".parquet"))


def test_run_with_nothing_to_do_opens_each_shard_once(local_ray: None, folder: Folder):
    rows = in_train("abcdefghijklmnopqrstuvwxyz")
    folder.sounds(*(name for name, _ in rows))
    folder.run(rows)
    shards = folder.data / "train" / "shards"
    names = {file.name for file in shards.iterdir()}
    assert len(names) > 1
    assert openings(shards, lambda: folder.run(rows)) == Counter(names)


def test_run_opens_each_new_shard_once_after_writing_it(local_ray: None, folder: Folder):
    rows = in_train("abcdefghijklmnopqrstuvwxyz")
    folder.sounds(*(name for name, _ in rows))
    folder.run(rows[:20])
    shards = folder.data / "train" / "shards"
    opened = openings(shards, lambda: folder.run(rows))
    assert {file.name for file in shards.iterdir()} == set(opened)
    assert set(opened.values()) == {1}
