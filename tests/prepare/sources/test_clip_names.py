"""Clips whose files have equal names keep their rows, with names that tell them apart."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ast_core.errors import DataError
from ast_core.labels import LabelVocabulary
from pipeline.prepare.audio.archive_members import read_member
from pipeline.prepare.sources import ClipList, read_datafile, read_esc, read_manifest, read_speechcommands
from pipeline.prepare.sources.clip_names import tell_apart
from tests import fakes

WORDS = LabelVocabulary.from_names(["bed", "bird", "cat", "dog"])


def named(out: ClipList) -> list[tuple[str, str]]:
    classes = [out.vocabulary.names[labels[0]] for labels in out.clips["labels"].to_pylist()]
    return list(zip(out.clips["clip_id"].to_pylist(), classes, strict=True))


def test_case_13_asts_speech_commands_data_file_keeps_all_its_clips(tmp_path: Path):
    words, speakers = ("bed", "bird", "cat", "dog"), ("0a7c2a8d", "00176480")
    entries = [{"wav": f"sc/{word}/{who}_nohash_0.wav", "labels": word} for word in words for who in speakers]
    (tmp_path / "data.json").write_text(json.dumps({"data": entries}))
    out = read_datafile(str(tmp_path / "data.json"), vocabulary=WORDS)
    assert named(out) == [(f"{word}/{who}_nohash_0", word) for word in words for who in speakers]
    assert len(out.refused) == 0


def test_case_14_shards_with_repeated_keys_keep_all_their_clips(tmp_path: Path):
    sound = {"cat": b"a", "dog": b"b"}
    for i, label in enumerate(sound):
        members = {f"{k:04d}.wav": sound[label] + bytes([k]) for k in range(2)}
        members |= {f"{k:04d}.json": {"labels": [label]} for k in range(2)}
        fakes.write_tar(tmp_path / f"shard-{i:06d}.tar", members)
    out = read_manifest(str(tmp_path))
    assert named(out) == [
        ("shard-000000/0000", "cat"), ("shard-000000/0001", "cat"),
        ("shard-000001/0000", "dog"), ("shard-000001/0001", "dog"),
    ]  # fmt: skip
    for media, member, (clip_id, label) in zip(
        out.clips["media"].to_pylist(), out.clips["member"].to_pylist(), named(out), strict=True
    ):
        assert read_member(media, member).audio == sound[label] + bytes([int(clip_id[-1])])


def test_case_14_a_tar_of_class_folders_keeps_all_its_clips(tmp_path: Path):
    members = {f"{word}/{k}.wav": b"x" for word in ("dog", "cat") for k in range(2)}
    members |= {f"{word}/{k}.cls": word.encode() for word in ("dog", "cat") for k in range(2)}
    out = read_manifest(fakes.write_tar(tmp_path / "a.tar", members))
    assert named(out) == [("dog/0", "dog"), ("dog/1", "dog"), ("cat/0", "cat"), ("cat/1", "cat")]


def hugging_face(path: Path, rows: list[tuple[str | None, str]]) -> str:
    audio = pa.array(
        [{"bytes": b"x", "path": name} for name, _ in rows], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    pq.write_table(pa.table({"audio": audio, "label": [label for _, label in rows]}), path)
    return str(path)


def test_case_14_hugging_face_rows_with_equal_file_names_keep_their_clips(tmp_path: Path):
    rows = [
        ("0a_nohash_0.wav", "bed"),
        ("0b_nohash_0.wav", "bed"),
        ("0a_nohash_0.wav", "bird"),
        ("0a_nohash_0.wav", "cat"),
    ]
    out = read_manifest(hugging_face(tmp_path / "train.parquet", rows))
    assert named(out) == [
        ("train_0/0a_nohash_0", "bed"), ("0b_nohash_0", "bed"), ("train_2/0a_nohash_0", "bird"),
        ("train_3/0a_nohash_0", "cat"),
    ]  # fmt: skip
    out = read_manifest(hugging_face(tmp_path / "train.parquet", [(f"{label}/{name}", label) for name, label in rows]))
    assert [clip_id for clip_id, _ in named(out)] == [
        "bed/0a_nohash_0",
        "0b_nohash_0",
        "bird/0a_nohash_0",
        "cat/0a_nohash_0",
    ]


def test_folders_of_classes_in_a_manifest_keep_all_their_clips(tmp_path: Path):
    paths = ["a/dog/1.wav", "a/cat/1.wav", "b/cat/1.wav", "a/dog/2.wav", "a/dog/3.wav", "a/dog/3.flac"]
    (tmp_path / "m.csv").write_text("path,labels\n" + "".join(f"{path},{path.split('/')[1]}\n" for path in paths))
    out = read_manifest(str(tmp_path / "m.csv"))
    assert [clip_id for clip_id, _ in named(out)] == ["a/dog/1", "a/cat/1", "b/cat/1", "2", "3.wav", "3.flac"]


def test_files_named_by_dates_are_clips(tmp_path: Path):
    (tmp_path / "m.csv").write_text("path,labels,clip_id\na/3-Feb.wav,dog,\nb/x.wav,dog,Mar-04\n")
    assert [clip_id for clip_id, _ in named(read_manifest(str(tmp_path / "m.csv")))] == ["3-Feb", "Mar-04"]


def test_names_do_not_depend_on_the_order_of_a_list(tmp_path: Path):
    paths = [f"{a}/{b}/{c}.wav" for a in "xy" for b in "pqr" for c in "123"] + ["solo.wav", "z/4.wav"]
    maps = []
    for seed in range(3):
        random.Random(seed).shuffle(paths)
        (tmp_path / "m.csv").write_text("path,labels\n" + "".join(f"{path},dog\n" for path in paths))
        clips = read_manifest(str(tmp_path / "m.csv")).clips
        maps.append(dict(zip(clips["media"].to_pylist(), clips["clip_id"].to_pylist(), strict=True)))
    assert maps[0] == maps[1] == maps[2]
    assert {maps[0][f"{tmp_path}/{path}"] for path in ("solo.wav", "z/4.wav")} == {"solo", "4"}


def test_a_growing_list_renames_only_clips_that_share_a_new_files_stem():
    before = tell_apart("1", ["/d/a/1.wav", "/d/b/1.wav"])
    assert before == ["a/1", "b/1"]
    assert tell_apart("1", ["/d/a/1.wav", "/d/b/1.wav", "/d/c/1.wav"]) == [*before, "c/1"]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/a/x.wav", "/a/x.wav"], ["x", None]),
        (["/a/x.wav", "/a/./b/../x.wav", "/b/x.wav"], ["a/x", None, "b/x"]),
        (["/a/x.wav", None], ["a/x", "x"]),
        (["http://h/get?id=1", "http://h/get?id=2", "http://h/get?id=1"], ["x?id=1", "x?id=2", None]),
        (["http://h/a/x.wav", "s3://h/b/x.wav"], ["a/x", "b/x"]),
        (["x.wav", "/a/x.wav"], ["x", "a/x"]),
        (["/\u00e9/x.wav", "/e\u0301/x.wav", "/e/x.wav"], ["\u00e9/x", None, "e/x"]),
    ],
)
def test_equal_names_get_folders_first_then_suffixes(paths: list[str | None], names: list[str | None]):
    assert tell_apart("x", paths) == names


def test_true_duplicates_are_refused_and_given_names_stay(tmp_path: Path):
    rows = ["x.wav,dog,,", "./x.wav,dog,,", "a/x.wav,dog,,", "q.wav,dog,x,"]
    rows += ["y.wav,dog,,1", "y.wav,dog,,2", "y.wav,cat,,2"]
    text = "\n".join(["path,labels,clip_id,start_s", *rows])
    (tmp_path / "m.csv").write_text(text)
    out = read_manifest(str(tmp_path / "m.csv"))
    folder = tmp_path.name
    assert [clip_id for clip_id, _ in named(out)] == [f"{folder}/x", "a/x", "x", "y_1.000", "y_2.000"]
    assert out.refused.select(["clip_id", "reason"]).to_pylist() == [
        {"clip_id": "x", "reason": "duplicate"}, {"clip_id": "y_2.000", "reason": "duplicate"},
    ]  # fmt: skip


def test_a_name_that_another_clip_has_stays_with_that_clip(tmp_path: Path):
    (tmp_path / "m.csv").write_text("path,labels,clip_id\na/x.wav,dog,\nb/x.wav,dog,\nc.wav,cat,a/x\n")
    out = read_manifest(str(tmp_path / "m.csv"))
    assert sorted(named(out)) == [("a/x", "cat"), ("b/x", "dog")]
    assert out.refused["reason"].to_pylist() == ["duplicate"]


def test_a_list_that_repeats_one_file_is_refused_as_a_whole(tmp_path: Path):
    (tmp_path / "m.csv").write_text("path,labels\n" + "x.wav,dog\n" * 6)
    with pytest.raises(DataError, match=r"5 of 6 rows of .* refused as duplicate, the first: 'x'"):
        read_manifest(str(tmp_path / "m.csv"))


def touch(folder: Path, *names: str) -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return str(folder)


def test_esc10_takes_with_one_name_in_two_classes_are_two_clips(tmp_path: Path):
    out = read_esc(touch(tmp_path, "001 - Dog bark/1-3-A.ogg", "002 - Rain/1-3-A.ogg", "002 - Rain/1-4-A.ogg"))
    assert named(out) == [("001 - Dog bark/1-3-A", "Dog bark"), ("002 - Rain/1-3-A", "Rain"), ("1-4-A", "Rain")]


def test_case_30_macos_metadata_files_are_not_clips(tmp_path: Path):
    names = [f"{word}/{who}_nohash_0.wav" for word in ("yes", "no") for who in "abc"]
    strays = [f"{word}/._{who}_nohash_0.wav" for word in ("yes", "no") for who in "abc"]
    folder = touch(tmp_path, *names, *strays, "__MACOSX/yes/a.wav", ".DS_Store", "yes/.DS_Store")
    for name in ("validation_list.txt", "testing_list.txt", "._validation_list.txt"):
        (tmp_path / name).write_text("")
    out = read_speechcommands(folder)
    assert (len(out.clips), len(out.refused)) == (6, 0)
    members: dict[str, bytes | dict[str, object]] = dict.fromkeys([*names, *strays, "__MACOSX/._yes/a.wav"], b"x")
    members |= {name.replace(".wav", ".json"): {"labels": ["yes"]} for name in names}
    out = read_manifest(fakes.write_tar(tmp_path / "a.tar", members))
    assert (len(out.clips), len(out.refused)) == (6, 0)
    esc = touch(tmp_path / "esc", "001 - Dog/1-3-A.ogg", "001 - Dog/._1-3-A.ogg")
    assert (len(read_esc(esc).clips), len(read_esc(esc).refused)) == (1, 0)


def test_a_folder_with_one_name_in_two_accent_forms_is_refused(tmp_path: Path):
    folder = touch(tmp_path, "001 - B\u00e9b\u00e9/1-3-A.ogg", "001 - Be\u0301be\u0301/1-3-A.ogg")
    with pytest.raises(DataError, match="accents composed and apart"):
        read_esc(folder)


def test_case_39_speech_commands_lists_are_read_in_several_forms(tmp_path: Path):
    folder = touch(tmp_path, "yes/a_nohash_0.wav", "yes/b_nohash_0.WAV", "no/c_nohash_0.wav", "no/d_nohash_0.wav")
    touch(tmp_path, "_background_noise_/hum.wav")
    (tmp_path / "validation_list.txt").write_bytes("\ufeffyes\\a_nohash_0.wav\r\n".encode())
    (tmp_path / "testing_list.txt").write_bytes("./no/c_nohash_0.wav\r\n\r\n".encode("utf-16"))
    clips = read_speechcommands(folder).clips
    assert dict(zip(clips["clip_id"].to_pylist(), clips["split"].to_pylist(), strict=True)) == {
        "yes/a_nohash_0": "validation", "no/c_nohash_0": "test", "yes/b_nohash_0": "train", "no/d_nohash_0": "train",
    }  # fmt: skip


def test_speech_commands_lists_with_wrong_or_repeated_files_are_refused(tmp_path: Path):
    folder = touch(tmp_path, "yes/a.wav", "no/c.wav")
    (tmp_path / "testing_list.txt").write_text("no/c.wav\n")
    (tmp_path / "validation_list.txt").write_text("data/yes/a.wav\ndata/yes/b.wav\ndata/no/c.wav\n")
    with pytest.raises(DataError, match=r"3 of the 3 files that .*/validation_list\.txt names are not there"):
        read_speechcommands(folder)
    (tmp_path / "validation_list.txt").write_text("yes/a.wav\nno/c.wav\n")
    with pytest.raises(DataError, match=r"testing_list\.txt, line 1: 'no/c\.wav' is in the other list too"):
        read_speechcommands(folder)


def test_case_32_a_cls_file_next_to_a_clip_is_read(tmp_path: Path):
    members = {
        "0.wav": b"x",
        "0.cls": b"1\n",
        "1.wav": b"x",
        "1.cls": b"cat",
        "2.wav": b"x",
        "2.cls": "bir\u00e9".encode("latin-1"),
    }
    out = read_manifest(fakes.write_tar(tmp_path / "a.tar", members), vocabulary=WORDS)
    assert named(out) == [("0", "bird"), ("1", "cat")]
    assert out.refused["reason"].to_pylist() == ["no_label"]
    with pytest.raises(DataError, match=r"KEY\.cls.*a KEY\.txt is read as a caption"):
        read_manifest(fakes.write_tar(tmp_path / "b.tar", {"0.wav": b"x", "0.txt": b"a dog barks"}))
