"""The audio store: its content, who can read it, and that each clip is stored once after any crash."""

import io
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ast_core.errors import DataError
from ast_core.labels import LabelVocabulary
from pipeline import dataset
from pipeline.prepare.audio.decode import Decode, decode_section
from pipeline.prepare.audio.features import features
from pipeline.prepare.clip import WAVEFORM, in_progress, ragged
from pipeline.prepare.output.audio_store import STORED, AudioStore, flac_bytes, keep_audio, to_16_bit
from pipeline.prepare.output.origins import record_origin
from pipeline.prepare.output.publish import publish, start_output
from pipeline.prepare.output.shards import WriteShards
from pipeline.prepare.output.split_state import load_split
from pipeline.prepare.sources.archives import row_member
from tests import fakes
from tests.s3 import S3Server

PETS = LabelVocabulary(("/m/dog", "/m/cat"), ("Dog", "Cat, meowing"))


def decoded(*names: str, split: str = "train") -> pa.Table:
    """Rows as after Decode, with a second of noise each. A name that begins with "bad" failed."""
    rows = record_origin(
        in_progress(
            fakes.clips(
                *(
                    {
                        "clip_id": n,
                        "split": split,
                        "media": "m",
                        "video_id": "v",
                        "start_s": 2.0,
                        "end_s": 3.0,
                        "labels": [1],
                    }
                    for n in names
                )
            )
        )
    )
    bad = [name.startswith("bad") for name in names]
    for name, value in {"reason": "silent", "stage": "decode", "message": "", "attempts": 1}.items():
        place = rows.column_names.index(name)
        values = pa.array([value if b else None for b in bad], rows.schema.field(place).type)
        rows = rows.set_column(place, name, values)
    waveforms = [None if b else fakes.noise(1, seed=sum(name.encode())) for b, name in zip(bad, names, strict=True)]
    rows = rows.append_column("num_clipped", pa.array([3] * len(rows), pa.int32()))
    return rows.append_column("waveform", ragged(waveforms, WAVEFORM))


def store_at(folder: Path) -> AudioStore:
    store = AudioStore(str(folder), PETS)
    store.reserve()
    return store


def files_of(folder: Path, split: str = "train") -> dict[str, list[str]]:
    return {
        path.name: pq.read_table(path)["clip_id"].to_pylist() for path in sorted((folder / split / "audio").iterdir())
    }


@pytest.mark.parametrize("duration_s", [0.025, 0.3, 10.0, 10.00001])
def test_flac_has_every_sample_rounded_to_16_bit(duration_s: float):
    waveform = np.clip(3 * fakes.noise(duration_s), -1, 1)
    back = decode_section(io.BytesIO(flac_bytes(waveform)), 0.0, None)
    np.testing.assert_array_equal(back, to_16_bit(waveform) / np.float32(32768))
    assert np.abs(back - waveform).max() <= 1 / 32768


def test_full_scale_stays_within_16_bit():
    assert to_16_bit(np.array([-1, -0.99999, 0, 0.99999, 1], np.float32)).tolist() == [-32768, -32768, 0, 32767, 32767]


def test_later_stages_get_the_stored_audio_and_failed_clips_store_nothing():
    rows = keep_audio(decoded("a", "bad", "b"))
    encoded, waveforms = rows["flac"].to_pylist(), rows["waveform"].to_pylist()
    assert (encoded[1], waveforms[1]) == (None, [])
    for i in (0, 2):
        np.testing.assert_array_equal(
            decode_section(io.BytesIO(encoded[i]), 0.0, None), np.array(waveforms[i], np.float32)
        )
    before = decoded("a")["waveform"][0].as_py()
    assert waveforms[0] != before
    assert features(rows)["flac"].to_pylist() == encoded


def test_hugging_face_opens_the_store_and_recognises_audio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = keep_audio(decoded("Word/a", "b"))
    store_at(tmp_path / "store").write("train", "name", rows)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    opened = datasets.load_dataset(
        "parquet",
        data_files=f"{tmp_path}/store/train/audio/*.parquet",
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert opened.features["audio"] == datasets.Audio(sampling_rate=16_000)
    assert opened.features["labels"] == datasets.List(datasets.Value("int16"))
    first = opened.cast_column("audio", datasets.Audio(decode=False))[0]
    assert first["audio"] == {"bytes": rows["flac"][0].as_py(), "path": "Word/a.flac"}
    del first["audio"]
    assert first == {
        "clip_id": "Word/a",
        "split": "train",
        "video_id": "v",
        "start_s": 2.0,
        "end_s": 3.0,
        "labels": [1],
        "label_names": ["Cat, meowing"],
        "num_clipped": 3,
    }


def test_a_stored_clip_decodes_to_its_own_row(tmp_path: Path):
    rows = keep_audio(decoded("a", "b"))
    store_at(tmp_path).write("train", "name", rows)
    where = {"media": f"{tmp_path}/train/audio/name.parquet", "video_id": "v", "start_s": 2.0, "end_s": 3.0}
    again = Decode()(
        in_progress(fakes.clips(*({"clip_id": n, "member": row_member(i)} | where for i, n in enumerate("ab"))))
    )
    for column in ("clip_id", "start_s", "end_s", "num_clipped", "waveform"):
        assert again[column].to_pylist() == rows[column].to_pylist(), column


def test_row_groups_are_small(tmp_path: Path):
    store_at(tmp_path).write("train", "name", keep_audio(decoded(*(f"c{i}" for i in range(40)))))
    file = pq.ParquetFile(tmp_path / "train" / "audio" / "name.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)] == [16, 16, 8]
    assert file.schema_arrow.equals(STORED)


def test_audio_is_stored_before_its_shard_under_the_same_name(tmp_path: Path):
    store, output = store_at(tmp_path / "store"), str(tmp_path / "data")
    start_output(output, PETS)
    rows = features(keep_audio(decoded("a", "bad", "b")))
    shards = tmp_path / "data" / "train" / "shards"

    def keep(split: str, name: str, rows: pa.Table) -> None:
        assert not shards.exists()
        store.write(split, name, rows)

    WriteShards(output, keep=keep)(rows)
    assert files_of(tmp_path / "store") == {shard.name: ["a", "b"] for shard in shards.iterdir()}


def test_each_clip_is_stored_once_after_crashes_and_with_other_shards(tmp_path: Path):
    store, output = store_at(tmp_path / "store"), str(tmp_path / "data")
    start_output(output, PETS)

    def write(*names: str, shards_too: bool = True) -> None:
        rows = features(keep_audio(decoded(*names)))
        if shards_too:
            WriteShards(output, keep=store.write)(rows)
        else:  # killed between the two files
            WriteShards(str(tmp_path / "lost"), keep=store.write)(rows)

    write("a", "b", "c", shards_too=False)
    write("d", "e", shards_too=False)
    write("a", "b")
    write("c", "d")
    write("x", "y", shards_too=False)  # not listed again, but readers of the store may still need them
    publish(output, PETS, {"train": fakes.FAILURES.empty_table()})
    prepared = load_split(output, "train").prepared
    store.remove_duplicates("train", prepared)
    files = files_of(tmp_path / "store")
    assert sorted(clip_id for clip_ids in files.values() for clip_id in clip_ids) == list("abcdexy")
    shards = dict(zip(prepared["clip_id"].to_pylist(), prepared["shard"].to_pylist(), strict=True))
    for clip_id, shard in shards.items():
        assert clip_id in files[shard]
    for path in (tmp_path / "store" / "train" / "audio").iterdir():
        for row in pq.read_table(path).to_pylist():
            waveform = decode_section(io.BytesIO(row["audio"]["bytes"]), 0.0, None)
            np.testing.assert_array_equal(
                waveform, np.array(keep_audio(decoded(row["clip_id"]))["waveform"][0].as_py())
            )
        assert b"huggingface" in pq.read_schema(path).metadata

    store.remove_duplicates("train", prepared)
    assert files_of(tmp_path / "store") == files


def test_a_crash_while_duplicates_are_removed_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = store_at(tmp_path)
    for names in (("a", "b"), ("b", "c")):
        rows = keep_audio(decoded(*names))
        store.write("train", "".join(names), rows)
    prepared = pa.table({"clip_id": ["a", "b"], "shard": ["ab.parquet", "ab.parquet"]})
    monkeypatch.setattr("pipeline.storage.delete", lambda uri: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.remove_duplicates("train", prepared)
    assert {clip_id for clip_ids in files_of(tmp_path).values() for clip_id in clip_ids} == set("abc")
    monkeypatch.undo()
    store.remove_duplicates("train", prepared)
    assert sorted(clip_id for clip_ids in files_of(tmp_path).values() for clip_id in clip_ids) == list("abc")


@pytest.mark.parametrize("seed", range(12))
def test_a_file_that_is_the_rest_of_another_one_loses_no_audio(seed: int, tmp_path: Path):
    """As after a crash between writing the rest and deleting the whole. The seeds give other orders of the names."""
    store, ids = store_at(tmp_path), [f"{seed}-{name}" for name in "abc"]
    for names in (ids[:2], ids, ids[2:]):
        store.write("train", dataset.name_of(pa.chunked_array([names])), keep_audio(decoded(*names)))
    store.remove_duplicates(
        "train", pa.table({"clip_id": pa.array([], pa.string()), "shard": pa.array([], pa.string())})
    )
    assert sorted(clip_id for clip_ids in files_of(tmp_path).values() for clip_id in clip_ids) == ids


def test_a_store_with_other_labels_or_other_files_is_refused(tmp_path: Path):
    other = AudioStore(str(tmp_path / "store"), LabelVocabulary.from_names(["dog"]))
    other.reserve()  # a first run that stored nothing
    store = store_at(tmp_path / "store")
    store_at(tmp_path / "store")  # reserving it again is allowed
    store.write("train", "a", keep_audio(decoded("a")))
    with pytest.raises(DataError, match="keeps audio with other labels"):
        other.reserve()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(DataError, match="is not empty and keeps no audio"):
        AudioStore(str(tmp_path / "other"), PETS).reserve()
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.tex"]


def none_prepared() -> pa.ChunkedArray:
    return pa.chunked_array([[]], pa.string())


def asked(*names: str, **columns: object) -> pa.Table:
    """Rows of CLIPS as those of `decoded`, or with other values."""
    usual = {"media": "m", "video_id": "v", "start_s": 2.0, "end_s": 3.0, "labels": [1]}
    return fakes.clips(*({"clip_id": name} | usual | columns for name in names))


def test_clips_prepared_without_stored_audio_are_reported_at_once(tmp_path: Path):
    store = store_at(tmp_path)
    store.write("train", "ab", keep_audio(decoded("a", "b")))
    store.check_clips("train", pa.chunked_array([["a", "b"]]), asked("e"))
    store.check_clips("other", none_prepared(), asked())
    with pytest.raises(DataError, match="2 clips of split 'train' are prepared and their audio is not in"):
        store.check_clips("train", pa.chunked_array([["a", "c", "d"]]), asked())


def test_audio_of_other_sections_under_the_same_ids_is_refused(tmp_path: Path):
    store = store_at(tmp_path)
    store.write("train", "ab", keep_audio(decoded("a", "b")))
    store.write("train", "c", keep_audio(decoded("c")))
    assert not store.check_clips("train", none_prepared(), asked("a", "b", "c", "d"))  # as in a run that continues
    assert not store.check_clips("other", none_prepared(), asked("a", video_id="w"))
    for other in ({"start_s": 1.5}, {"end_s": 2.9}):
        with pytest.raises(
            DataError, match=r"audio of other sections under the ids of 2 clips of split 'train', [bc] for"
        ):
            store.check_clips("train", none_prepared(), asked("x", "b", "c", **other))


def test_audio_of_other_files_under_the_same_ids_is_announced(tmp_path: Path):
    """They may be the same files in another folder."""
    store = store_at(tmp_path)
    store.write("train", "ab", keep_audio(decoded("a", "b")))
    for other in ({"video_id": "w"}, {"video_id": None}):
        [line] = store.check_clips("train", none_prepared(), asked("x", "b", **other))
        assert "keeps audio of other files or URLs under the ids of 1 clips of split 'train', b for one" in line


def test_a_store_still_knows_where_its_clips_are_from_without_duplicates(tmp_path: Path):
    store = store_at(tmp_path)
    for names in (("a", "b"), ("b", "c")):
        store.write("train", "".join(names), keep_audio(decoded(*names)))
    store.remove_duplicates("train", pa.table({"clip_id": ["b"], "shard": ["ab.parquet"]}))
    assert sorted(files_of(tmp_path).values()) == [["a", "b"], ["c"]]
    [line] = store.check_clips("train", none_prepared(), asked("c", video_id="w"))
    assert "under the ids of 1 clips of split 'train', c for one" in line


def test_a_store_of_an_earlier_version_knows_only_sections(tmp_path: Path):
    store = store_at(tmp_path)
    store.write("train", "a", keep_audio(decoded("a")))
    file = tmp_path / "train" / "audio" / "a.parquet"
    table = pq.read_table(file)
    metadata = {key: value for key, value in table.schema.metadata.items() if key != b"origins"}
    pq.write_table(table.replace_schema_metadata(metadata), file)
    assert not store.check_clips("train", none_prepared(), asked("a", video_id="w"))
    with pytest.raises(DataError, match="audio of other sections"):
        store.check_clips("train", none_prepared(), asked("a", start_s=1.5))


def test_a_store_is_the_output_however_the_folder_is_spelled(s3: S3Server, tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path)
    store = AudioStore(str(tmp_path), PETS)
    assert store.is_at(f"{tmp_path}/link/x/..")
    assert store.is_at(f"file://{tmp_path}/")
    assert not store.is_at(f"{tmp_path}/kept")
    assert AudioStore(s3.uri("kept"), PETS).is_at(f"{s3.uri('kept')}/")
    assert not AudioStore(s3.uri("kept"), PETS).is_at(s3.uri("other"))


def test_the_store_may_be_the_output_folder_itself(tmp_path: Path):
    start_output(str(tmp_path), PETS)
    store_at(tmp_path).write("train", "ab", keep_audio(decoded("a")))
    assert dataset.labels_csv(str(tmp_path)) == f"{tmp_path}/labels.csv"
    assert files_of(tmp_path) == {"ab.parquet": ["a"]}
