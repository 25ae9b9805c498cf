import csv
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ast_core.errors import ConfigError, DataError
from ast_core.labels import LabelVocabulary, audioset_labels
from pipeline.prepare.audio.archive_members import read_member
from pipeline.prepare.clip import CLIPS, FAILURES, Reason
from pipeline.prepare.sources import (
    ClipList,
    read_datafile,
    read_esc,
    read_manifest,
    read_segments,
    read_speechcommands,
)
from pipeline.prepare.sources.archives import row_member
from pipeline.prepare.sources.locate import AudioFolder, url_template, youtube
from pipeline.versions import VERSION
from tests import conftest, fakes

SHARED = conftest.SHARED / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="the real lists and recordings are not here")

HEADER = "# Segments csv\n# num_ytids=1\n# YTID, start_seconds, end_seconds, positive_labels\n"
SPEECH, MUSIC = "/m/09x0r", "/m/04rlf"
GOOD = f'--BfvyPmVMo, 20.000, 30.000, "{SPEECH}"'
PETS = LabelVocabulary(("/m/dog", "/m/cat"), ("Dog", "Cat, meowing"))


def segments(folder: Path, *lines: str, name: str = "mine_segments.csv", header: str = HEADER) -> str:
    path = folder / name
    path.write_bytes((header + "\n".join(lines) + "\n").encode("utf-8", "surrogatepass"))
    return str(path)


def read(folder: Path, *lines: str, locate=youtube) -> ClipList:
    return read_segments(segments(folder, *lines), locate=locate)


def reasons(clip_list: ClipList) -> list[str]:
    return clip_list.refused["reason"].to_pylist()


def manifest(folder: Path, text: str, name: str = "list.csv") -> str:
    (folder / name).write_text(text, encoding="utf-8", newline="")
    return str(folder / name)


def touch(folder: Path, *names: str) -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return str(folder)


# Segment lists


def test_a_segment_becomes_a_clip_on_youtube(tmp_path):
    out = read(tmp_path, f'--BfvyPmVMo, 20.000, 30.000, "{MUSIC},{SPEECH}"')
    assert (out.clips.schema, out.refused.schema, len(out.refused)) == (CLIPS, FAILURES, 0)
    assert out.clips.to_pylist() == [
        {
            "clip_id": "--BfvyPmVMo_20.000",
            "split": "mine",
            "video_id": "--BfvyPmVMo",
            "media": "https://www.youtube.com/watch?v=--BfvyPmVMo",
            "member": None,
            "media_start_s": 20.0,
            "start_s": 20.0,
            "end_s": 30.0,
            "labels": sorted(audioset_labels().mids.index(mid) for mid in (MUSIC, SPEECH)),
        }
    ]


def test_crlf_byte_order_mark_and_blank_lines_change_nothing(tmp_path):
    plain = read(tmp_path, GOOD, f'abcdefghijk, 0, 9, "{MUSIC}"')
    text = f'\ufeff{HEADER}{GOOD}\n\nabcdefghijk, 0, 9, "{MUSIC}"\n\n'.replace("\n", "\r\n")
    other = read_segments(segments(tmp_path, header=text), locate=youtube)
    assert other.clips.equals(plain.clips)


def test_a_repeated_label_counts_once(tmp_path):
    assert read(tmp_path, f'abcdefghijk, 0, 9, "{SPEECH},{SPEECH}"').clips["labels"].to_pylist() == [[0]]


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        (f'abc/efghijk, 0, 10, "{SPEECH}"', Reason.BAD_ID, "not a video id"),
        (f'abc, 0, 10, "{SPEECH}"', Reason.BAD_ID, "11 characters"),
        (f', 0, 10, "{SPEECH}"', Reason.BAD_ID, "not a video id"),
        (f'abcdefghijk, nan, 10, "{SPEECH}"', Reason.BAD_TIME, "start is 'nan'"),
        (f'abcdefghijk, 0, inf, "{SPEECH}"', Reason.BAD_TIME, "end is 'inf'"),
        (f'abcdefghijk, 1_0, 20, "{SPEECH}"', Reason.BAD_TIME, "'1_0'"),
        (f'abcdefghijk, , 20, "{SPEECH}"', Reason.BAD_TIME, "start is ''"),
        (f'abcdefghijk, -1, 10, "{SPEECH}"', Reason.BAD_TIME, "not within 0 to"),
        (f'abcdefghijk, 10, 10, "{SPEECH}"', Reason.BAD_TIME, "not after"),
        (f'abcdefghijk, 0, 300.5, "{SPEECH}"', Reason.BAD_TIME, "more than 300 s"),
        ('abcdefghijk, 0, 10, ""', Reason.NO_LABEL, "no label"),
        ("abcdefghijk, 0, 10", Reason.NO_LABEL, "no label"),
        (f'abcdefghijk, 0, 10, "{SPEECH},/m/nothing"', Reason.UNKNOWN_LABEL, "'/m/nothing'"),
        (f'abcdefghijk, 0, 10, "{SPEECH}", 1', Reason.UNKNOWN_LABEL, "is not in the label vocabulary"),
        (GOOD, Reason.DUPLICATE, "--BfvyPmVMo_20.000"),
    ],
)
def test_a_bad_row_is_refused_with_its_reason_and_the_good_one_stays(tmp_path, line, reason, message):
    out = read(tmp_path, GOOD, line)
    assert out.clips["clip_id"].to_pylist() == ["--BfvyPmVMo_20.000"]
    (row,) = out.refused.to_pylist()
    assert (row["reason"], row["stage"], row["split"], row["retry"]) == (reason, "source", "mine", False)
    assert message in row["message"]
    assert row["clip_id"]


def test_a_refused_row_leaves_its_clip_id_to_a_later_good_row(tmp_path):
    out = read(tmp_path, '--BfvyPmVMo, 20.000, 30.000, "/m/nothing"', GOOD)
    assert (len(out.clips), reasons(out)) == (1, ["unknown_label"])


def test_hostile_rows_are_all_refused_under_safe_names(tmp_path):
    ids = [
        "../../etc/passwd",
        "a\rb",
        "two\nlines",
        "x" * 10_000,
        "$(rm -rf ~)",
        "`id`;&|",
        "\u2028",
        "a b",
        '"',
        "\x1b[2J",
    ]
    good = [f'good{i:07}, 0, 10, "{SPEECH}"' for i in range(len(ids))]
    out = read(tmp_path, *good, *(f'{hostile}, 0, 10, "{SPEECH}"' for hostile in ids))
    assert len(out.clips) == len(good)
    assert len(out.refused) == len(ids) + 1  # a line is a row, so the id with a line break makes two
    assert set(reasons(out)) == {"bad_id", "bad_time"}  # "two", the first half of that id, has no times
    for row in out.refused.to_pylist():
        assert 0 < len(row["clip_id"]) <= 200
        assert row["clip_id"].isprintable()
        assert row["message"].isprintable()
        assert len(row["message"]) < 300


def test_an_unclosed_quote_affects_only_its_own_row(tmp_path):
    out = read(tmp_path, f'abcdefghijk, 0, 10, "{SPEECH},"x', GOOD)
    assert (out.clips["clip_id"].to_pylist(), reasons(out)) == (["--BfvyPmVMo_20.000"], ["unknown_label"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no line of the form"),
        (HEADER.encode(), "no line of the form"),
        (b"<html>\n<body>Not found</body></html>\n", "no line of the form"),
        (bytes(range(256)) * 20, "is not UTF-8"),
        ((HEADER + 'abcdefghijk, 0, 10, "/m/nothing"\n').encode(), "the first: '/m/nothing' is not"),
    ],
)
def test_a_list_without_clips_is_refused_as_a_whole_in_one_line(tmp_path, content, message):
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_segments(str(tmp_path / "list.csv"), locate=youtube)
    assert "\n" not in str(caught.value)


def test_a_missing_list_or_a_folder_is_a_user_error(tmp_path):
    for uri in (str(tmp_path / "none.csv"), str(tmp_path)):
        with pytest.raises(DataError):
            read_segments(uri, locate=youtube, split="x")


@pytest.mark.parametrize("split", ["..", ".", "a/b", "a b", "x\n", "_work"])
def test_a_split_that_cannot_be_a_folder_is_refused(tmp_path, split):
    with pytest.raises(DataError, match="cannot name a split"):
        read_segments(segments(tmp_path, GOOD), locate=youtube, split=split)


@needs_shared
@pytest.mark.parametrize(("name", "rows"), [("balanced_train", 22_160), ("eval", 20_371)])
def test_every_row_of_an_official_list_becomes_a_clip(name, rows):
    path = SHARED / "audioset" / f"{name}_segments.csv"
    out = read_segments(str(path), locate=youtube, vocabulary=audioset_labels(), split=None)
    assert (len(out.clips), len(out.refused)) == (rows, 0)
    assert set(out.clips["split"].to_pylist()) == {name}
    assert len(set(out.clips["clip_id"].to_pylist())) == rows
    positives = int(path.read_text().partition("num_positive_labels=")[2].split()[0])
    assert sum(map(len, out.clips["labels"].to_pylist())) == positives


# Where the media is


@pytest.mark.parametrize(
    ("file", "media_start_s"),
    [
        ("-a_b-c_12_3.wav", None),
        ("deep/er/Y-a_b-c_12_3.webm", None),
        ("-a_b-c_12_3_20.000.flac", 0.0),
        ("-a_b-c_12_3_20.WAV", 0.0),
        ("Y-a_b-c_12_3_20.000.opus", 0.0),
        ("-a_b-c_12_3_20.000_30.000.ogg", 0.0),
        ("x/Y-a_b-c_12_3_20_30.m4a", 0.0),
    ],
)
def test_every_usual_file_name_is_found_at_any_depth(tmp_path, file, media_start_s):
    locate = AudioFolder(touch(tmp_path, file))
    assert locate("-a_b-c_12_3", 20.0, 30.0) == (str(tmp_path / file), None, media_start_s)


@pytest.mark.parametrize("file", ["-a_b-c_12_3_30.wav", "-a_b-c_12_3_20_25.wav", "a_b-c_12_3.wav", "-a_b-c_12.wav"])
def test_a_file_of_another_section_or_recording_is_not_taken(tmp_path, file):
    assert AudioFolder(touch(tmp_path, file))("-a_b-c_12_3", 20.0, 30.0) is None


def test_a_cut_file_is_preferred_over_a_whole_recording(tmp_path):
    locate = AudioFolder(touch(tmp_path, "abcdefghijk.wav", "z/Yabcdefghijk_20.000.wav"))
    assert locate("abcdefghijk", 20.0, 30.0) == (str(tmp_path / "z/Yabcdefghijk_20.000.wav"), None, 0.0)
    assert locate("abcdefghijk", 50.0, 60.0) == (str(tmp_path / "abcdefghijk.wav"), None, None)
    assert locate("abcdefghijk", 0.0, 10.0) == (str(tmp_path / "abcdefghijk.wav"), None, 0.0)


def test_files_cut_before_start_at_zero_when_the_caller_says_so(tmp_path):
    folder = touch(tmp_path, "abcdefghijk.wav")
    assert AudioFolder(folder, files_are_clips=True)("abcdefghijk", 20.0, 30.0) == (
        f"{folder}/abcdefghijk.wav",
        None,
        0.0,
    )


def test_a_clip_without_a_file_is_missing_and_may_be_tried_again(tmp_path):
    folder = touch(tmp_path / "audio", "--BfvyPmVMo_20.000.wav", "abcdefghijk.txt")
    out = read(tmp_path, GOOD, f'abcdefghijk, 0, 10, "{SPEECH}"', locate=AudioFolder(folder))
    assert out.clips["media"].to_pylist() == [f"{folder}/--BfvyPmVMo_20.000.wav"]
    assert (reasons(out), out.refused["clip_id"].to_pylist()) == (["missing_file"], ["abcdefghijk_0.000"])
    assert out.refused["retry"].to_pylist() == [True]
    assert out.refused["tool_versions"].to_pylist() == [f"ast-ray {VERSION}"]


def test_ids_of_files_need_not_be_youtube_ids(tmp_path):
    folder = touch(tmp_path / "audio", "abc.wav")
    assert len(read(tmp_path, f'abc, 0, 10, "{SPEECH}"', locate=AudioFolder(folder)).clips) == 1


def test_an_audio_folder_without_audio_is_a_user_error(tmp_path):
    for folder in (touch(tmp_path, "notes.txt"), str(tmp_path / "none")):
        with pytest.raises(DataError, match="no audio file below"):
            AudioFolder(folder)


def test_a_url_template_is_filled_in():
    assert url_template("http://host:8/{video_id}.webm")("-a", 20.0, 30.0) == ("http://host:8/-a.webm", None, 20.0)
    cutting = url_template("https://host/{video_id}?from={start_s}&to={end_s}")
    assert cutting("a/ b", 20.0, 30.0) == ("https://host/a%2F%20b?from=20.000&to=30.000", None, 0.0)


@pytest.mark.parametrize(
    "template", ["http://host/x.webm", "host/{video_id}", "http://h/{video_id}{x}", "file:///{video_id}"]
)
def test_an_unusable_url_template_is_refused(template):
    with pytest.raises(ConfigError, match="the media URL"):
        url_template(template)


# AST's data file


def datafile(folder: Path, *entries: object, comment: str = "") -> str:
    (folder / "train_data.json").write_text(comment + json.dumps({"data": entries}))
    return str(folder / "train_data.json")


def test_a_data_file_entry_is_a_clip_that_begins_where_its_file_does(tmp_path):
    entries = [
        {"wav": "/data/a/--BfvyPmVMo_20.000.flac", "labels": f"{MUSIC},{SPEECH}", "video_id": "--BfvyPmVMo"},
        {"wav": "sub/yes_nohash_3.wav", "labels": SPEECH},
    ]
    clips = read_datafile(datafile(tmp_path, *entries, comment="# a sample, not JSON\n")).clips
    assert clips["clip_id"].to_pylist() == ["--BfvyPmVMo_20.000", "yes_nohash_3"]
    assert clips["media"].to_pylist() == ["/data/a/--BfvyPmVMo_20.000.flac", f"{tmp_path}/sub/yes_nohash_3.wav"]
    assert clips["start_s"].to_pylist() == [20.0, 0.0]
    assert clips["media_start_s"].to_pylist() == [0.0, 0.0]
    assert clips["end_s"].to_pylist() == [None, None]
    assert clips["video_id"].to_pylist() == ["--BfvyPmVMo", None]
    assert clips["split"].to_pylist() == ["train_data"] * 2


def test_keys_of_a_data_file_that_are_not_read_are_named(tmp_path):
    entries = [{"wav": "a.wav", "labels": SPEECH, "split": "eval"}, {"wav": "b.wav", "labels": SPEECH, "\ud800": 1}]
    assert read_datafile(datafile(tmp_path, *entries)).notes == (
        f"keys of {tmp_path}/train_data.json that are not read: 'split, \\ud800'",
    )
    assert not read_datafile(datafile(tmp_path, {"wav": "a.wav", "labels": SPEECH, "video_id": "x"})).notes


def test_bad_data_file_entries_are_refused_one_by_one(tmp_path):
    good = [{"wav": f"a{i}.wav", "labels": SPEECH} for i in range(9)]
    bad = [
        "text", {}, {"wav": 3, "labels": SPEECH}, {"wav": "folder/", "labels": SPEECH},
        {"wav": "b.wav"}, {"wav": "c.wav", "labels": ""},
        {"wav": "d.wav", "labels": "/m/nothing"}, {"wav": "./x/../a0.wav", "labels": SPEECH},
        {"wav": "e\ud800.wav", "labels": SPEECH},
        {"wav": "f.wav", "labels": SPEECH, "video_id": "../x"},
    ]  # fmt: skip
    out = read_datafile(datafile(tmp_path, *good, *bad), split="train")
    assert out.clips["clip_id"].to_pylist() == [f"a{i}" for i in range(9)]
    labels = ["no_label", "no_label", "unknown_label"]
    assert reasons(out) == ["bad_id"] * 4 + labels + ["bad_id", "bad_id", "duplicate"]
    assert out.refused["clip_id"].to_pylist()[:4] == ["entry 10", "entry 11", "entry 12", "entry 13"]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"data": 3}', '{"clips": []}', '{"data": []}', '{"a":' * 9000])
def test_an_invalid_data_file_is_refused_as_a_whole(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError) as caught:
        read_datafile(str(tmp_path / "x.json"))
    assert "\n" not in str(caught.value)


@needs_shared
def test_the_reference_sample_is_read_with_its_comment():
    out = read_datafile(str(SHARED / "audioset" / "ast_sample_train_data.json"))
    assert (out.clips["clip_id"].to_pylist()[1], len(out.refused)) == ("--BfvyPmVMo_20.000", 0)


# Data sets as published by their authors


def esc50(folder: Path, *rows: str) -> str:
    touch(folder, *(f"audio/{row.split(',')[0]}" for row in rows if "missing" not in row))
    (folder / "meta").mkdir()
    (folder / "meta/esc50.csv").write_text("filename,fold,target,category,esc10\n" + "\n".join(rows) + "\n")
    return str(folder)


def test_esc50_has_a_split_per_fold_and_categories_in_target_order(tmp_path):
    rows = ["1-1-A-2.wav,1,2,zebra,x", "5-2-A-0.wav,5,0,dog,x", "2-missing-A-2.wav,2,2,zebra,x"]
    out = read_esc(esc50(tmp_path, *rows))
    assert out.vocabulary == LabelVocabulary.from_names(["dog", "zebra"])
    assert out.clips.select(["clip_id", "split", "media", "labels", "end_s"]).to_pylist() == [
        {
            "clip_id": "1-1-A-2",
            "split": "fold1",
            "media": f"{tmp_path}/audio/1-1-A-2.wav",
            "labels": [1],
            "end_s": None,
        },
        {
            "clip_id": "5-2-A-0",
            "split": "fold5",
            "media": f"{tmp_path}/audio/5-2-A-0.wav",
            "labels": [0],
            "end_s": None,
        },
    ]
    assert out.refused.select(["clip_id", "split", "reason"]).to_pylist() == [
        {"clip_id": "2-missing-A-2", "split": "fold2", "reason": "missing_file"}
    ]


@pytest.mark.parametrize(
    "row", ["a.wav,x,0,dog", "a.wav,1", "a.wav,1,0,dog,\nb.wav,1,0,cat,", "a.wav,1,0,dog,\nb.wav,1,1,dog,"]
)
def test_contradictory_esc50_metadata_is_refused_as_a_whole(tmp_path, row):
    with pytest.raises(DataError, match=r"esc50\.csv"):
        read_esc(esc50(tmp_path, row))


def test_esc10_folders_give_names_and_folds(tmp_path):
    files = [
        "010 - Fire/5-9-B.ogg",
        "001 - Dog bark/1-3-A.ogg",
        "001 - Dog bark/copy.ogg",
        "README.md",
        "001 - Dog bark/.x",
    ]
    out = read_esc(touch(tmp_path, *files))
    assert out.vocabulary.names == ("Dog bark", "Fire")
    assert out.clips["split"].to_pylist() == ["fold1", "fold5"]
    assert out.clips["labels"].to_pylist() == [[0], [1]]
    assert (reasons(out), out.refused["clip_id"].to_pylist()) == (["bad_id"], ["copy"])


def test_the_error_for_another_folder_names_what_esc_needs(tmp_path):
    with pytest.raises(DataError, match=r"meta/esc50\.csv.*NNN - Name"):
        read_esc(str(tmp_path))


@needs_shared
def test_esc10_has_400_clips_ten_classes_and_five_folds():
    out = read_esc(str(SHARED / "esc10"))
    assert (len(out.clips), len(out.refused), len(out.vocabulary)) == (400, 0, 10)
    assert out.vocabulary.names[0] == "Dog bark"
    assert {fold: out.clips["split"].to_pylist().count(fold) for fold in set(out.clips["split"].to_pylist())} == {
        f"fold{i}": 80 for i in range(1, 6)
    }
    assert all(Path(media).is_file() for media in out.clips["media"].to_pylist())


def test_speech_commands_are_split_by_their_lists_and_noise_is_left_out(tmp_path):
    touch(
        tmp_path,
        "yes/a_nohash_0.wav",
        "yes/b_nohash_0.wav",
        "no/a_nohash_0.wav",
        "_background_noise_/hum.wav",
        "LICENSE",
    )
    (tmp_path / "validation_list.txt").write_text("yes/b_nohash_0.wav\n")
    (tmp_path / "testing_list.txt").write_text("no/a_nohash_0.wav\nno/gone_nohash_1.wav\n")
    out = read_speechcommands(str(tmp_path))
    assert out.vocabulary.names == ("no", "yes")
    assert dict(zip(out.clips["clip_id"].to_pylist(), out.clips["split"].to_pylist(), strict=True)) == {
        "no/a_nohash_0": "test",
        "yes/a_nohash_0": "train",
        "yes/b_nohash_0": "validation",
    }
    assert out.clips["labels"].to_pylist() == [[0], [1], [1]]
    assert (reasons(out), out.refused["split"].to_pylist()) == (["missing_file"], ["test"])


def test_speech_commands_without_lists_or_words_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"validation_list\.txt"):
        read_speechcommands(touch(tmp_path, "yes/a.wav"))
    with pytest.raises(DataError, match=r"WORD/HASH_nohash_N\.wav"):
        read_speechcommands(touch(tmp_path / "x", "validation_list.txt", "testing_list.txt"))


# Manifests


def test_a_manifest_accepts_paths_urls_times_and_splits(tmp_path):
    text = (
        "clip_id,path,url,labels,start_s,end_s,split,note\n"
        "first,a/x.wav,,/m/dog,,,,hello\n"
        ',/abs/y.flac,,"Dog;Cat, meowing",20,30.5,eval,\n'
        ',,https://host/z%20z.mp3?q=1,"Cat, meowing",,,,\n'
        ",s3://bucket/w.ogg,,1,,,,\n"
    )
    out = read_manifest(manifest(tmp_path, text), vocabulary=PETS, split="train")
    assert out.clips.select(["clip_id", "split", "media", "media_start_s", "end_s", "labels"]).to_pylist() == [
        dict(zip(("clip_id", "split", "media", "media_start_s", "end_s", "labels"), row, strict=True))
        for row in [
            ("first", "train", f"{tmp_path}/a/x.wav", 0.0, None, [0]),
            ("y_20.000", "eval", "/abs/y.flac", 20.0, 30.5, [0, 1]),
            ("z z", "train", "https://host/z%20z.mp3?q=1", 0.0, None, [1]),
            ("w", "train", "s3://bucket/w.ogg", 0.0, None, [1]),
        ]
    ]
    assert len(out.refused) == 0


def test_csv_tsv_and_parquet_manifests_give_the_same_clips(tmp_path):
    rows = [("x.wav", "Dog,/m/cat", 1.0), ("y.wav", "Dog", None)]
    outs = []
    for name, delimiter in (("a.csv", ","), ("b.tsv", "\t")):
        with open(tmp_path / name, "w", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows([("path", "labels", "start_s"), *rows])
        outs.append(read_manifest(str(tmp_path / name), vocabulary=PETS))
    path, labels, start = zip(*rows, strict=True)
    for name, column in (
        ("c.parquet", list(labels)),
        ("d.parquet", [["Dog", "/m/cat"], ["Dog"]]),
        ("e.parquet", [[0, 1], [0]]),
    ):
        pq.write_table(pa.table({"path": path, "labels": column, "start_s": start, "more": [0, 0]}), tmp_path / name)
        outs.append(read_manifest(str(tmp_path / name), vocabulary=PETS))
    assert outs[0].clips["labels"].to_pylist() == [[0, 1], [0]]
    assert all(out.clips.equals(outs[0].clips) for out in outs)


def test_without_a_vocabulary_the_labels_found_are_sorted_into_one(tmp_path):
    out = read_manifest(manifest(tmp_path, "path,labels\nx.wav,rain;dog\ny.wav,cat\n"))
    assert out.vocabulary == LabelVocabulary.from_names(["cat", "dog", "rain"])
    assert out.clips["labels"].to_pylist() == [[1, 2], [0]]


def test_without_a_vocabulary_an_index_has_no_meaning(tmp_path):
    out = read_manifest(manifest(tmp_path, "path,labels\nx.wav,dog\ny.wav,0\nz.wav,3\n"))
    assert (reasons(out), out.vocabulary.names) == (["unknown_label"] * 2, ("dog",))
    again = read_manifest(str(tmp_path / "list.csv"), vocabulary=out.vocabulary, indices=False)  # in a second run
    assert again.refused.equals(out.refused)
    with pytest.raises(DataError, match="--labels"):
        read_manifest(manifest(tmp_path, "path,labels\nx.wav,0\ny.wav,1\n"))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (",,Dog,,,,", Reason.BAD_ID),
        ("a.wav,http://h/a.wav,Dog,,,,", Reason.BAD_ID),
        (",ftp://h/a.wav,Dog,,,,", Reason.BAD_ID),
        (",http://[h/a b.wav,Dog,,,,", Reason.BAD_ID),
        ("a\x07.wav,,Dog,,,,", Reason.BAD_ID),
        ("a.wav,,Dog,a\x07b,,,", Reason.BAD_ID),
        (f"a.wav,,Dog,{'x' * 201},,,", Reason.BAD_ID),
        ("a.wav,,Dog,,,,../up", Reason.BAD_ID),
        ("a.wav,,Dog,,,,..", Reason.BAD_ID),
        ("a.wav,,Dog,,soon,,", Reason.BAD_TIME),
        ("a.wav,,Dog,,5,5,", Reason.BAD_TIME),
        ("a.wav,,,,,,", Reason.NO_LABEL),
        ("a.wav,,Dog;Wolf,,,,", Reason.UNKNOWN_LABEL),
        ("a.wav,,2,,,,", Reason.UNKNOWN_LABEL),
        ("good.wav,,Dog,,,,", Reason.DUPLICATE),
    ],
)
def test_a_bad_manifest_row_is_refused_under_a_safe_split(tmp_path, row, reason):
    text = f"path,url,labels,clip_id,start_s,end_s,split\ngood.wav,,Dog,,,,\n{row}\n"
    out = read_manifest(manifest(tmp_path, text), vocabulary=PETS)
    assert out.clips["clip_id"].to_pylist() == ["good"]
    assert (reasons(out), out.refused["split"].to_pylist()) == ([reason], ["train"])
    assert out.refused["clip_id"][0].as_py().isprintable()


def test_manifest_columns_that_are_missing_are_named_with_those_found(tmp_path):
    with pytest.raises(DataError, match=r"`labels` and `path` or `url`.*file, label"):
        read_manifest(manifest(tmp_path, "file,label\nx.wav,Dog\n"))


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("path,labels\n", "list.csv", "different label names|no rows"),
        ("", "list.csv", "needs the columns"),
        ("path,labels\nx.wav,Dog,Cat\n", "list.csv", "line 2 has more fields"),
        ('path,labels\nx.wav,"Dog\n', "list.csv", "cannot read"),
        ("not parquet", "list.parquet", "cannot read"),
        ("path,labels\nx.wav,Dog\n", "list.xlsx", r"\.csv, \.tsv, \.parquet or \.tar"),
        ("path,labels\nx.wav,Wolf\n", "pets.csv", "no row of .*'Wolf'"),
    ],
)
def test_an_invalid_manifest_is_refused_as_a_whole(tmp_path, text, name, message):
    with pytest.raises(DataError, match=message) as caught:
        read_manifest(manifest(tmp_path, text, name), vocabulary=PETS if name == "pets.csv" else None)
    assert "\n" not in str(caught.value)


# Manifests that contain their audio


def audio_table(rows: list[dict[str, object]], path: Path, metadata: dict[str, object] | None = None) -> str:
    """Parquet in the layout of `datasets`. A row without `audio` gets three bytes under its file's name."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    audio = [row.get("audio", {"bytes": b"abc", "path": f"a/file{i}.flac"}) for i, row in enumerate(rows)]
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "audio"}
    table = pa.table(columns | {"audio": pa.array(audio, kind)})
    if metadata:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": metadata}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return str(path)


def read_clips(out: ClipList, *columns: str) -> list[tuple[object, ...]]:
    return list(zip(*(out.clips[column].to_pylist() for column in columns), strict=True))


def test_labels_of_every_type_in_parquet_give_the_same_clips(tmp_path):
    class_label = {"names": list(PETS.names), "_type": "ClassLabel"}
    for i, (column, labels, metadata) in enumerate(
        [
            ("labels", [["/m/dog"], ["/m/cat", "Dog"]], None),
            ("labels", [[0], [1, 0]], None),
            ("labels", ["/m/dog", "/m/cat,/m/dog"], None),
            ("labels", [[0], [1, 0]], {"labels": {"feature": class_label, "_type": "List"}}),
            ("label", [[0], [1, 0]], {"label": [class_label]}),
        ]
    ):
        rows = [{"video_id": "-_345678901", column: labels[0]}, {"video_id": "bbb", column: labels[1]}]
        out = read_manifest(audio_table(rows, tmp_path / f"{i}.parquet", metadata), vocabulary=PETS)
        assert read_clips(out, "clip_id", "video_id", "media", "member", "media_start_s", "end_s", "labels") == [
            ("-_345678901", "-_345678901", f"{tmp_path}/{i}.parquet", row_member(0), 0.0, None, [0]),
            ("bbb", "bbb", f"{tmp_path}/{i}.parquet", row_member(1), 0.0, None, [0, 1]),
        ]


def test_class_labels_are_the_vocabulary_if_none_is_given(tmp_path):
    metadata = {"label": {"names": ["zebra", "ant"], "_type": "ClassLabel"}}
    out = read_manifest(audio_table([{"label": 0}, {"label": 1}], tmp_path / "a.parquet", metadata))
    assert out.vocabulary == LabelVocabulary.from_names(["zebra", "ant"])
    assert out.clips["labels"].to_pylist() == [[0], [1]]
    turned = {"label": {"names": ["ant", "zebra"], "_type": "ClassLabel"}}  # indices are relative to their file
    audio_table([{"label": 0, "video_id": "other"}], tmp_path / "b.parquet", turned)
    assert read_manifest(str(tmp_path)).clips["labels"].to_pylist() == [[0], [1], [1]]
    out = read_manifest(audio_table([{"labels": ["x"]}, {"labels": ["c"]}], tmp_path / "c.parquet"))
    assert out.vocabulary == LabelVocabulary.from_names(["c", "x"])


def test_columns_give_a_clips_id_times_and_split(tmp_path):
    rows = [
        {"clip_id": "first", "video_id": "v", "start_s": 3.0, "end_s": 13.0, "split": "eval"},
        {"clip_id": None, "video_id": "v", "start_s": 3.0, "end_s": None, "split": None},
        {"clip_id": None, "video_id": None, "start_s": None, "end_s": None, "split": None},
        {"clip_id": None, "video_id": None, "start_s": 2.0, "end_s": None, "split": None}
        | {"audio": {"bytes": b"x", "path": "w_2.flac"}},
        {"clip_id": None, "video_id": None, "start_s": None, "end_s": None, "split": None}
        | {"audio": {"bytes": b"x", "path": None}},
    ]
    uri = audio_table([row | {"labels": "Dog"} for row in rows], tmp_path / "mine.parquet")
    out = read_manifest(uri, vocabulary=PETS)
    assert len(out.refused) == 0
    assert read_clips(out, "clip_id", "split", "media_start_s", "start_s", "end_s") == [
        ("first", "eval", None, 3.0, 13.0),
        ("v_3.000", "train", 0.0, 3.0, None),
        ("file2", "train", 0.0, 0.0, None),
        ("w_2.000", "train", 0.0, 2.0, None),
        ("mine_4", "train", 0.0, 0.0, None),
    ]


def test_a_folder_or_glob_of_parquet_is_one_list(tmp_path):
    names = ["train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001-0123456789abcdef", "other"]
    for i, name in enumerate(names):
        audio_table([{"clip_id": f"c{i}", "labels": "Dog"}], tmp_path / "data" / f"{name}.parquet")
    pq.write_table(pa.table({"fbank": [1.0]}), tmp_path / "data" / "shard.parquet")
    expected = {("c0", "train"), ("c1", "train"), ("c2", "test"), ("c3", "train")}
    assert set(read_clips(read_manifest(str(tmp_path), vocabulary=PETS), "clip_id", "split")) == expected
    glob = read_manifest(f"{tmp_path}/*/tr*-0000?-*.parquet", vocabulary=PETS)
    assert read_clips(glob, "clip_id") == [("c0",), ("c1",)]
    assert len(read_manifest(f"{tmp_path}/**/*.parquet", vocabulary=PETS).clips) == 4
    assert set(read_clips(read_manifest(str(tmp_path), vocabulary=PETS, split="s"), "split")) == {("s",)}
    with pytest.raises(DataError, match=r"no \.parquet or \.tar file matches"):
        read_manifest(f"{tmp_path}/*.parquet", vocabulary=PETS)  # `*` does not match subfolders


def test_a_store_has_its_own_vocabulary_for_its_indices(tmp_path):
    for i in (0, 1):
        audio_table([{"clip_id": f"c{i}", "labels": [i]}], tmp_path / "train" / "audio" / f"{i}.parquet")
    (tmp_path / "labels.csv").write_text(PETS.to_csv())
    out = read_manifest(str(tmp_path))
    assert (out.vocabulary, out.clips["labels"].to_pylist()) == (PETS, [[0], [1]])
    turned = LabelVocabulary(PETS.mids[::-1], PETS.names[::-1])
    assert read_manifest(str(tmp_path), vocabulary=turned).clips["labels"].to_pylist() == [[1], [0]]


def test_a_webdataset_tar_is_a_list(tmp_path):
    uri = fakes.write_tar(
        tmp_path / "0.tar",
        {
            "a/x.flac": b"1",
            "a/x.json": {"labels": ["Dog"], "split": "eval"},
            "a/y_20.500.wav": b"22",
            "a/y_20.500.json": {"labels": "Cat, meowing", "video_id": "y", "start_s": 20.5, "end_s": 30.5, "more": {}},
            "b/z.mic1.ogg": b"333",
            "b/z.json": {"label": 1},
            "b/x.json": {"labels": ["Dog"]},
            "b/none.mp3": b"4",
            "readme.txt": b"hello",
        },
    )
    out = read_manifest(uri, vocabulary=PETS)
    assert read_clips(out, "clip_id", "split", "video_id", "start_s", "end_s", "labels") == [
        ("x", "eval", None, 0.0, None, [0]),
        ("y_20.500", "train", "y", 20.5, 30.5, [1]),
        ("z.mic1", "train", None, 0.0, None, [1]),
    ]
    assert [read_member(uri, member).audio for (member,) in read_clips(out, "member")] == [b"1", b"22", b"333"]
    refused = [(row["clip_id"], row["reason"]) for row in out.refused.to_pylist()]
    assert refused == [("none", "no_label"), ("b/x", "missing_file")]


def test_tars_without_labels_or_compressed_are_refused_as_a_whole(tmp_path):
    uri = fakes.write_tar(tmp_path / "0.tar", {"x.flac": b"1", "x.json": {"caption": "a dog"}})
    for vocabulary in (None, PETS):
        with pytest.raises(DataError, match=r"has no labels: .*KEY\.json"):
            read_manifest(uri, vocabulary=vocabulary)
    with pytest.raises(DataError, match="contains no audio"):
        read_manifest(fakes.write_tar(tmp_path / "1.tar", {"x.txt": b"1"}))
    for name in ("x.tar.gz", "x.tgz", "x.tar.zst"):
        with pytest.raises(DataError, match="unpack it"):
            read_manifest(str(tmp_path / name))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"neither \.parquet nor \.tar"):
        read_manifest(str(tmp_path / "empty"))
    with pytest.raises(DataError, match="there is no file"):
        read_manifest(str(tmp_path / "gone.tar"))


@pytest.mark.parametrize("kind", ["large", "dictionary", "class of its own", "class in a list"])
def test_case_40_hugging_face_parquet_of_every_layout_is_read(tmp_path, kind):
    names = ["zebra", "ant"]
    class_label = {"names": names, "_type": "ClassLabel"}
    bytes_kind, text_kind = (pa.large_binary(), pa.large_string()) if kind == "large" else (pa.binary(), pa.string())
    audio = [{"bytes": b"abc", "path": f"a/{name}.flac"} for name in "xyz"]
    labels = {
        "large": pa.array([["ant"], ["zebra"], []], pa.large_list(pa.large_string())),
        "dictionary": pa.array(["ant", "zebra", None]).dictionary_encode(),
        "class of its own": pa.array([1, 0, -1]),
        "class in a list": pa.array([[1], [0], [-1]]),
    }[kind]
    feature = {"class of its own": class_label, "class in a list": {"feature": class_label, "_type": "List"}}.get(kind)
    table = pa.table(
        {"audio": pa.array(audio, pa.struct([("bytes", bytes_kind), ("path", text_kind)])), "labels": labels}
    )
    metadata = {"huggingface": json.dumps({"info": {"features": {"labels": feature}}})} if feature else None
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "a.parquet")
    out = read_manifest(str(tmp_path / "a.parquet"))
    assert [(clip_id, out.vocabulary.names[i]) for clip_id, (i,) in read_clips(out, "clip_id", "labels")] == [
        ("x", "ant"),
        ("y", "zebra"),
    ]
    assert out.refused.select(["clip_id", "reason"]).to_pylist() == [
        {"clip_id": "z", "reason": "unknown_label" if feature else "no_label"}  # -1 is Hugging Face's "unknown"
    ]


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        ([{"bytes": None, "path": "a/x.flac"}], "contains paths of audio files, not their bytes; embed them"),
        ([{"array": [0.1], "sampling_rate": 16_000}], "is struct<array: .*, not struct<bytes, path> as Hugging Face's"),
        ([b"abc"], "is binary, not struct<bytes, path> as Hugging Face's Audio is"),
    ],
)
def test_case_40_audio_of_another_type_is_refused(tmp_path, audio, message):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if "embed" in message else None
    pq.write_table(pa.table({"audio": pa.array(audio, kind), "labels": ["dog"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        read_manifest(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_case_40_tars_with_long_names_and_json_in_any_order(tmp_path, form):
    long = f"{'d' * 90}/{'x' * 120}"
    members = {f"{long}.json": {"labels": ["dog"]}, f"{long}.flac": b"1", "k.flac": b"2", "k.json": {"labels": "cat"}}
    out = read_manifest(fakes.write_tar(tmp_path / "a.tar", members, format=form))
    assert [(clip_id, out.vocabulary.names[i]) for clip_id, (i,) in read_clips(out, "clip_id", "labels")] == [
        ("x" * 120, "dog"),
        ("k", "cat"),
    ]
    assert [read_member(f"{tmp_path}/a.tar", member).audio for (member,) in read_clips(out, "member")] == [b"1", b"2"]


HOSTILE = [
    ({"labels": {"a": ["Dog"]}}, Reason.UNKNOWN_LABEL),
    ({"labels": [["Dog"]]}, Reason.UNKNOWN_LABEL),
    ({"labels": [7, "Dog"]}, Reason.UNKNOWN_LABEL),
    ({"labels": ["Dog"], "clip_id": "a\nb"}, Reason.BAD_ID),
    ({"labels": ["Dog"], "split": "../up"}, Reason.BAD_ID),
    ({"labels": ["Dog"], "start_s": [1]}, Reason.BAD_TIME),
    ({"labels": ["Dog"], "start_s": "NaN"}, Reason.BAD_TIME),
    ({"labels": ["Dog"], "end_s": 1e9}, Reason.BAD_TIME),
    (b"[1, 2]", Reason.NO_LABEL),
    (b"{", Reason.NO_LABEL),
    (b"[" * 100_000, Reason.NO_LABEL),
]


def test_hostile_json_next_to_a_clip_affects_only_that_clip(tmp_path):
    members: dict[str, bytes | dict[str, object]] = {"good.flac": b"x", "good.json": {"labels": ["Dog"]}}
    for i, (held, _) in enumerate(HOSTILE):
        members |= {f"{i:02d}.flac": b"x", f"{i:02d}.json": held}
    out = read_manifest(fakes.write_tar(tmp_path / "0.tar", members), vocabulary=PETS)
    assert read_clips(out, "clip_id") == [("good",)]
    assert reasons(out) == [reason for _, reason in HOSTILE]
    assert all(row["clip_id"].isprintable() and row["message"].isprintable() for row in out.refused.to_pylist())
