"""Lists as spreadsheets, data frames and other data sets write them: read as meant, or refused with the line."""

from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ast_core.errors import DataError
from ast_core.labels import LabelVocabulary
from pipeline import storage
from pipeline.prepare.output.membership import refuse_repeated_sections
from pipeline.prepare.sources.checks import media_in
from pipeline.prepare.sources.folders import read_speechcommands
from pipeline.prepare.sources.fsd50k import read_fsd50k
from pipeline.prepare.sources.label_text import cells_of, indices_as_labels, mids_by_index
from pipeline.prepare.sources.locate import AudioFolder, unread_start_lines
from pipeline.prepare.sources.manifest import read_manifest
from pipeline.prepare.sources.rows import ClipList
from pipeline.prepare.sources.segments import read_segments
from tests import fakes


def listed(folder: Path, text: str, name: str = "m.csv") -> ClipList:
    (folder / name).write_text(text)
    return read_manifest(str(folder / name))


def named(out: ClipList) -> dict[str, list[str]]:
    rows = zip(out.clips["clip_id"].to_pylist(), out.clips["labels"].to_pylist(), strict=True)
    return {clip_id: [out.vocabulary.names[label] for label in labels] for clip_id, labels in rows}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('path\tsentence\tlabels\nb.wav\t"hello there\tdog\nc.wav\tbye now"\tcat\nd.wav\tok\tdog\n', "m.tsv"),
        ('path,labels,note\nrex.wav,dog,"loud\nx.wav,cat,clipped"\n', "m.csv"),
        ('path,note,labels\na.wav,5" disk,dog\nb.wav,"7 inch,cat\nc.wav,mid,cat\nd.wav,9 inch",dog\n', "m.csv"),
    ],
)
def test_a_quote_that_takes_in_the_next_row_is_refused_with_its_line(tmp_path: Path, text: str, name: str):
    with pytest.raises(DataError, match=r"line [23]: a quote opens there and takes in the next row"):
        listed(tmp_path, text, name)


def test_a_cell_of_several_lines_of_text_is_read(tmp_path: Path):
    out = listed(tmp_path, 'path,note,labels\na.wav,"a dog,\nloud, near, then far,\nand a bell",dog\nb.wav,,cat\n')
    assert named(out) == {"a": ["dog"], "b": ["cat"]}


@pytest.mark.parametrize("header", ["path,labels,,", "path,labels,Unnamed: 2,Unnamed: 3"])
def test_labels_behind_the_last_named_column_are_refused(tmp_path: Path, header: str):
    with pytest.raises(DataError, match=r"line 2 has more fields than the header; quote the labels"):
        listed(tmp_path, f"{header}\nrex.wav,dog,cat,\n001.wav,cat,dog,cow\n")
    assert named(listed(tmp_path, "Unnamed: 0,path,labels,\n0,rex.wav,dog,\n")) == {"rex": ["dog"]}


def test_columns_of_other_names_are_pointed_out(tmp_path: Path):
    text = "path,labels,subset,onset,start_ms,duration,label2\na.wav,dog,test,0.5,500,1,cat\n"
    split, onset, start, end, others = listed(tmp_path, text).notes
    assert split.endswith("if split is meant, rename it")
    assert onset.endswith("if start_s is meant, give start_s in seconds")
    assert "'start_ms'" in start
    assert start.endswith("if start_s is meant, give start_s in seconds")
    assert end.endswith("if end_s is meant, give end_s in seconds")
    assert others.endswith("that are not read: 'label2'")


def test_an_offset_beside_a_duration_is_the_start(tmp_path: Path):
    start, end = listed(tmp_path, "path,labels,offset,duration\na.wav,dog,0.5,1\n").notes
    assert start.startswith("the column 'offset'")
    assert start.endswith("if start_s is meant, give start_s in seconds")
    assert end.endswith("if end_s is meant, give end_s in seconds")
    onset, offset = listed(tmp_path, "path,labels,onset,offset\na.wav,dog,0.5,1\n").notes
    assert (onset.count("start_s"), offset.count("end_s")) == (2, 2)


def test_an_id_that_is_too_long_names_the_column_for_another(tmp_path: Path):
    out = listed(tmp_path, f"path,labels\n{'x' * 201}.wav,dog\na.wav,dog\n")
    assert out.refused["message"][0].as_py().endswith("; a --manifest can give another in the column clip_id")


@pytest.mark.parametrize(
    ("audio", "sidecar"),
    [
        ("\u00e9.wav", "e\u0301.json"),
        ("e\u0301.wav", "\u00e9.json"),
        ("./a.wav", "a.json"),
        ("d/a.b.wav", "./d/a.json"),
    ],
)
def test_audio_in_a_tar_has_labels_that_are_spelled_in_another_way(tmp_path: Path, audio: str, sidecar: str):
    held = fakes.write_media(tmp_path / "x.wav", fakes.noise(0.1)).read_bytes()
    out = read_manifest(fakes.write_tar(tmp_path / "a.tar", {audio: held, sidecar: {"label": "dog"}}))
    assert (list(named(out).values()), len(out.refused)) == ([["dog"]], 0)


def test_audio_in_a_tar_has_its_own_labels_first(tmp_path: Path):
    held = fakes.write_media(tmp_path / "x.wav", fakes.noise(0.1)).read_bytes()
    members = {
        "\u00e9.wav": held,
        "\u00e9.json": {"label": "dog"},
        "e\u0301.wav": held,
        "e\u0301.json": {"label": "cat"},
    }
    out = read_manifest(fakes.write_tar(tmp_path / "a.tar", members))
    assert (named(out), out.vocabulary.names) == ({"\u00e9": ["dog"]}, ("cat", "dog"))
    assert out.refused.select(["reason", "labels"]).to_pylist() == [{"reason": "duplicate", "labels": [0]}]


def test_columns_of_parquet_with_audio_are_pointed_out(tmp_path: Path):
    audio = [{"bytes": fakes.write_media(tmp_path / "a.wav", fakes.noise(0.1)).read_bytes(), "path": "a.wav"}]
    table = {"audio": audio, "labels": [["dog"]], "subset": ["test"], "speaker": ["x"]}
    pq.write_table(pa.table(table), tmp_path / "m.parquet")
    split, others = read_manifest(str(tmp_path / "m.parquet")).notes
    assert split == f"the column 'subset' of {tmp_path}/m.parquet is not read; if split is meant, rename it"
    assert others == f"columns of {tmp_path}/m.parquet that are not read: 'speaker'"


@pytest.mark.parametrize(
    "text",
    [
        *("b'dog'", 'b"dog"', "[np.str_('dog')]", "[np.int64(3)]", "np.str_('dog')", "tensor(3)", "WrappedArray(dog)"),
        *('list("dog")', 'c("dog","cat")', 'c("dog")', "array(['dog'], dtype=object)"),
    ],
)
def test_texts_of_other_programs_are_no_classes(tmp_path: Path, text: str):
    pd.DataFrame({"path": ["a.wav", "b.wav"], "labels": [text, "cat"]}).to_csv(tmp_path / "m.csv", index=False)
    out = read_manifest(str(tmp_path / "m.csv"))
    assert named(out) == {"b": ["cat"]}
    assert "looks like a list and cannot be read as one" in out.refused["message"][0].as_py()


@pytest.mark.parametrize("name", ["m.csv", "m.parquet"])
def test_whole_numbers_that_a_data_frame_made_floats_are_read_as_such(tmp_path: Path, name: str):
    """pandas does so with each value of a column if a cell is empty."""
    frame = pd.DataFrame({"clip_id": [17, None, 5], "path": list("abc"), "labels": "x", "split": [None, 2, 1]})
    frame.to_csv(tmp_path / "m.csv", index=False)
    frame.to_parquet(tmp_path / "m.parquet")
    assert "17.0,a,x,\n" in (tmp_path / "m.csv").read_text()
    out = read_manifest(str(tmp_path / name))
    rows = zip(out.clips["clip_id"].to_pylist(), out.clips["split"].to_pylist(), strict=True)
    assert list(rows) == [("17", "train"), ("b", "2"), ("5", "1")]
    line = f"the numbers in the column {{}} of {tmp_path}/m.csv are read without their .0"
    assert list(out.notes) == ([line.format("clip_id"), line.format("split")] if name == "m.csv" else [])


@pytest.mark.parametrize("others", ["2.5", "v2", "3"])
def test_texts_that_look_like_floats_stay_if_others_of_their_column_do_not(tmp_path: Path, others: str):
    out = listed(tmp_path, f"clip_id,path,labels,split\n1.0,a.wav,x,1.0\n{others},b.wav,x,{others}\n")
    assert out.clips["clip_id"].to_pylist() == ["1.0", others]
    assert out.clips["split"].to_pylist() == ["1.0", others]
    assert not out.notes


@pytest.mark.parametrize("text", ["[null]", "[None]", "[nan]", "set()", "character(0)", "list()"])
def test_lists_without_a_label_are_no_classes(text: str):
    assert cells_of(text, ()) == []


@pytest.mark.parametrize("text", ["dogs'", "engine (idling)", "Vehicle(4 wheels)", "baby laughter (b')"])
def test_names_that_look_a_little_like_lists_stay_names(text: str):
    assert cells_of(text, ()) == [text]


def test_a_video_is_in_one_split_however_its_url_is_written(tmp_path: Path):
    spellings = [
        "https://www.youtube.com/watch?v=AbCdEfGhIjK", "https://youtu.be/AbCdEfGhIjK?si=x",
        "https://m.youtube.com/watch?v=AbCdEfGhIjK&t=3", "http://www.youtube.com/watch?app=x&v=AbCdEfGhIjK#t",
        "HTTPS://YouTube.com/shorts/AbCdEfGhIjK", "https://www.youtube-nocookie.com/embed/AbCdEfGhIjK",
    ]  # fmt: skip
    others = [
        "https://youtu.be/abCdEfGhIjK", "https://host.org/watch?v=AbCdEfGhIjK", "https://youtube.com.host/watch?v=AbCdEfGhIjK",
        "https://www.youtube.com/watch?v=AbCdEfGhIjKL", "https://www.youtube.com/watch?list=AbCdEfGhIjK",
    ]  # fmt: skip
    rows = [f"{url},d,s{i},0,10" for i, url in enumerate(spellings + others)]
    read = listed(tmp_path, "url,labels,split,start_s,end_s\n" + "\n".join(rows) + "\n")
    out = refuse_repeated_sections(read)
    assert out.refused["split"].to_pylist() == [f"s{i}" for i in range(1, len(spellings))]
    assert out.clips["media"].to_pylist()[1:] == others
    (line,) = unread_start_lines(read.clips)
    assert line.startswith(
        "the start in 1 URLs (t=, https://m.youtube.com/watch?v=AbCdEfGhIjK&t=3 for one) is not read"
    )
    assert unread_start_lines(out.clips) == []


def test_a_class_that_is_called_by_a_number_is_meant_by_1_0_too():
    vocabulary = LabelVocabulary.from_csv("index,mid,display_name\n0,1,one\n1,2,two\n2,0,zero\n", origin="l.csv")
    by_index = mids_by_index(vocabulary)
    assert indices_as_labels(["1", "1.0", "2.0"], vocabulary.index_of, by_index) == ["1", "1", "2"]


@pytest.mark.parametrize("name", ["m.csv", "m.parquet"])
def test_cells_without_a_value_are_no_split_and_no_id(tmp_path: Path, name: str):
    frame = pd.DataFrame({"path": ["a.wav", "b.wav"], "labels": "dog", "split": ["nan", "test"], "clip_id": "None"})
    frame.to_parquet(tmp_path / name) if name.endswith("parquet") else frame.to_csv(tmp_path / name, index=False)
    clips = read_manifest(str(tmp_path / name)).clips
    assert clips["clip_id"].to_pylist() == ["a", "b"]
    assert clips["split"].to_pylist() == ["train", "test"]


def test_sections_of_one_start_have_their_end_in_the_id(tmp_path: Path):
    out = listed(tmp_path, "path,labels,start_s,end_s\nrex.wav,dog,0.1,0.2\nrex.wav,cat,0.1,0.4\nx.wav,cat,0.1,0.4\n")
    assert named(out) == {"rex_0.100_0.200": ["dog"], "rex_0.100_0.400": ["cat"], "x_0.100": ["cat"]}
    assert not len(out.refused)


def test_one_file_of_several_spellings_is_in_one_split(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    paths = ["real/a.wav", "./real/a.wav", "link/a.wav", f"file://{tmp_path}/real/a.wav", "real/b.wav"]
    rows = [f"{path},dog,{'test' if i else 'train'},c{i}" for i, path in enumerate(paths)]
    out = refuse_repeated_sections(listed(tmp_path, "path,labels,split,clip_id\n" + "\n".join(rows) + "\n"))
    assert out.clips["clip_id"].to_pylist() == ["c0", "c4"]
    assert (
        out.refused["message"][0].as_py()
        == "its sound is in the split train too, as c0; it stays there and leaves test"
    )


def test_the_last_of_two_members_of_one_name_counts(tmp_path: Path):
    members: dict[str, bytes | dict[str, object]] = {"k.wav": b"first", "k.json": {"labels": ["dog"]}}
    again = fakes.write_tar(tmp_path / "again.tar", {"k.wav": b"the second", "k.json": {"labels": ["cat"]}})
    blocks = [Path(fakes.write_tar(tmp_path / "one.tar", members)).read_bytes(), Path(again).read_bytes()]
    (tmp_path / "both.tar").write_bytes(blocks[0][: 4 * 512] + blocks[1])  # as `tar -A` joins them
    out = read_manifest(str(tmp_path / "both.tar"))
    assert named(out) == {"k": ["cat"]}
    assert out.clips["member"][0].as_py().endswith(" 10")


@pytest.mark.parametrize(
    ("archives", "splits"),
    [
        (["train.tar", "test.tar"], ["test", "train"]),
        (["train/000.tar", "valid/000.tar"], ["train", "valid"]),
        (["train-000.tar", "valid-000.tar"], ["train", "valid"]),
        (["data/a.tar", "data/contest.tar"], ["train", "train"]),
    ],
)
def test_archives_named_by_their_split_are_of_that_split(tmp_path: Path, archives: list[str], splits: list[str]):
    for i, archive in enumerate(archives):
        (tmp_path / archive).parent.mkdir(exist_ok=True)
        fakes.write_tar(tmp_path / archive, {f"{i}.wav": b"x", f"{i}.json": {"labels": ["dog"]}})
    assert sorted(read_manifest(str(tmp_path)).clips["split"].to_pylist()) == splits
    assert set(read_manifest(str(tmp_path), split="all").clips["split"].to_pylist()) == {"all"}


@pytest.mark.parametrize("given", ["test", "test/", "test/0.tar", "test/*.tar"])
def test_a_folder_that_the_user_names_gives_no_split(tmp_path: Path, given: str):
    (tmp_path / "test").mkdir()
    fakes.write_tar(tmp_path / "test" / "0.tar", {"0.wav": b"x", "0.json": {"labels": ["dog"]}})
    assert read_manifest(f"{tmp_path}/{given}").clips["split"].to_pylist() == ["train"]


def test_a_list_without_rows_or_labels_says_so(tmp_path: Path):
    with pytest.raises(DataError, match=r"m\.csv has no rows; give a list with at least one clip"):
        listed(tmp_path, "path,labels\n")
    with pytest.raises(DataError, match=r"no row of .*m\.csv has a label"):
        listed(tmp_path, "path,labels\na.wav,\nb.wav,nan\n")


def test_a_segment_list_with_other_columns_says_what_is_wrong_with_its_first_row(tmp_path: Path):
    (tmp_path / "x.wav").touch()
    (tmp_path / "vggsound.csv").write_text('"--0PQM4-hqg",30,"waterfall burbling","train"\n' * 3)
    with pytest.raises(DataError, match=r"no row of .*vggsound\.csv can be read, the first: line 1"):
        read_segments(str(tmp_path / "vggsound.csv"), locate=AudioFolder(str(tmp_path)))


def test_fsd50ks_list_of_training_needs_its_splits(tmp_path: Path):
    truth = tmp_path / "FSD50K.ground_truth"
    truth.mkdir()
    (truth / "vocabulary.csv").write_text("0,Dog,/m/0bt9lr\n")
    for part in ("dev", "eval"):
        (truth / f"{part}.csv").write_text("fname,labels,mids\n1,Dog,/m/0bt9lr\n")
    with pytest.raises(DataError, match=r"dev\.csv needs the columns fname, labels, mids, split"):
        read_fsd50k(str(tmp_path))


def tar_of(folder: Path, *numbers: int, name: str = "a.tar") -> Path:
    audio = fakes.write_media(folder / "x.wav", fakes.noise(0.1)).read_bytes()
    members = {f"{i}.{kind}": held for i in numbers for kind, held in (("wav", audio), ("json", {"labels": ["dog"]}))}
    return Path(fakes.write_tar(folder / name, members))


@pytest.mark.parametrize("damage", ["flipped", "zeroed", "cut", "joined"])
def test_a_tar_that_ends_before_its_last_member_is_refused(tmp_path: Path, damage: str):
    """tarfile takes a damaged header and a block of zeros for the end, and says nothing."""
    path = tar_of(tmp_path, 0, 1, 2, 3)
    assert len(read_manifest(str(path)).clips) == 4
    whole = bytearray(path.read_bytes())
    begin = whole.index(b"2.wav")
    if damage == "flipped":
        whole[begin + 148] ^= 1
    elif damage == "zeroed":
        whole[begin : begin + 2048] = bytes(2048)
    elif damage == "cut":
        del whole[begin + 100 :]
    else:
        whole += tar_of(tmp_path, 4, 5, name="b.tar").read_bytes()
    path.write_bytes(whole)
    with pytest.raises(DataError, match=r"a\.tar is no tar or damaged \(.*\); fetch it again"):
        read_manifest(str(path))


@pytest.mark.parametrize(
    ("first", "second", "splits"),
    [
        ("partial-train/0.tar", "partial-test/0.tar", {"train", "test"}),
        ("pets_train.tar", "pets_test.tar", {"train", "test"}),
        ("train_data/0.tar", "test_data/0.tar", {"train", "test"}),
        ("fold/a.tar", "fold/b.tar", {"train"}),
    ],
)
def test_splits_that_archives_and_their_folders_are_called_by(
    tmp_path: Path, first: str, second: str, splits: set[str]
):
    for number, name in enumerate((first, second)):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        tar_of(tmp_path, number, name="made.tar").rename(tmp_path / "in" / name)
    assert set(read_manifest(str(tmp_path / "in")).clips["split"].to_pylist()) == splits


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (["esc/train/dog", "esc/test/dog"], ["train", "test"]),
        (["esc/val", "."], ["train", "train"]),
        (["train", "bus"], ["train", "train"]),  # classes
    ],
)
def test_folders_within_a_tar_give_splits_if_all_audio_is_in_one(tmp_path: Path, folders: list[str], splits: list[str]):
    audio = fakes.write_media(tmp_path / "x.wav", fakes.noise(0.1)).read_bytes()
    members = {f"{folder}/{name}": held for folder in folders for name, held in (("0.wav", audio), ("0.cls", b"dog"))}
    uri = fakes.write_tar(tmp_path / "a.tar", members)
    assert read_manifest(uri).clips["split"].to_pylist() == splits


def test_files_of_a_data_set_that_are_missing_or_packed_are_counted(tmp_path: Path):
    audio = [{"bytes": b"x", "path": "a.wav"}]
    (tmp_path / "in" / "test").mkdir(parents=True)
    pq.write_table(
        pa.table({"Audio": [1], "audio": audio, "Labels": [["dog"]], "Split": ["eval"]}),
        tmp_path / "in" / "test" / "data-00001-of-00003.parquet",
    )
    (tmp_path / "in" / "b.tar.gz").write_bytes(b"")
    out = read_manifest(str(tmp_path / "in"))
    assert out.clips["split"].to_pylist() == ["eval"]
    assert f"not read: 1 packed files, {tmp_path}/in/b.tar.gz for one; unpack them" in out.notes
    prefix = f"{tmp_path}/in/test/data"
    assert f"2 of the 3 files {prefix}-…-of-00003.parquet are missing" in out.notes


def test_zeros_and_ones_of_two_classes_are_refused(tmp_path: Path):
    two = LabelVocabulary.from_names(["cat", "dog"])
    for rows in ('a.wav,"[1, 0]"\nb.wav,"[0, 1]"\n', 'a.wav,"0,1"\nb.wav,"0,1"\n'):
        (tmp_path / "m.csv").write_text(f"path,labels\n{rows}")
        with pytest.raises(
            DataError, match=r"all rows of .* have the labels 0 and 1 of two classes; if these are zeros"
        ):
            read_manifest(str(tmp_path / "m.csv"), vocabulary=two)
    (tmp_path / "m.csv").write_text('path,labels\na.wav,"[0, 1]"\nb.wav,0\n')
    assert read_manifest(str(tmp_path / "m.csv"), vocabulary=two).clips["labels"].to_pylist() == [[0, 1], [0]]


def test_names_from_urls_have_no_keys_and_do_not_change_with_them(tmp_path: Path):
    text = "url,labels\nhttp://h/dl?id={}&token={},dog\nhttp://h/dl?id=2&X-Amz-Date={}&X-Amz-Signature=s,dog\n"
    names = [named(listed(tmp_path, text.format(1, key, key))).keys() for key in ("SECRET", "OTHER")]
    assert names[0] == names[1] == {"dl?id=1", "dl?id=2"}
    twice = "url,labels\n" + 2 * "http://h/a.wav?id=2&X-Amz-Date={}&X-Amz-Signature={},dog\n"
    assert len(listed(tmp_path, twice.format(1, 2, 3, 4)).refused) == 1


def test_options_called_like_keys_tell_recordings_apart_but_are_not_shown(tmp_path: Path):
    urls = [f"http://h/get?{option}" for option in ("key=a/dog.wav", "key=a/cat.wav", "session=1", "id=1&st=3&token=t")]
    out = listed(tmp_path, "url,labels\n" + "".join(f"{url},dog\n" for url in urls))
    assert len(out.refused) == 0
    names = list(named(out))
    assert len({*names}) == 4
    assert not any("dog" in name or "session" in name or "token" in name for name in names)
    assert names[3].startswith("get?id=1&st=3")


def test_splits_of_the_command_and_the_list_and_odd_ones_are_pointed_out(tmp_path: Path):
    (tmp_path / "m.csv").write_text(
        "path,labels,split\na.wav,dog,train\nb.wav,cat,Train\nc.wav,dog,cat\nd.wav,cat,NA\n"
    )
    out = read_manifest(str(tmp_path / "m.csv"), split="eval")
    assert out.clips["split"].to_pylist() == ["train", "Train", "cat", "eval"]
    assert any("3 rows of" in line and "have another split than eval" in line for line in out.notes)
    assert any(line.startswith("the splits 'train' and 'Train' of") for line in out.notes)
    assert any("has a split 'cat', which is a class too" in line for line in out.notes)


@pytest.mark.parametrize(
    "text",
    [
        'path,caption,labels\na.wav,"5 inch, old,dog\nb.wav,x,cat\nc.wav,y",bird\nd.wav,z,cat\n',
        'path,caption,labels\na.wav,"5 inch,dog,\nb.wav,x,cat,\nc.wav,y",bird,\n',
        'path,caption,labels,split\na.wav,"5 inch,dog\nb.wav,x,cat\nc.wav,y",bird\n',
        'path,labels\na.wav,"dog\nb.wav,cat\nc.wav,bird"\nd.wav,cat\n',
    ],
)
def test_a_quote_that_takes_in_rows_of_any_length_is_refused(tmp_path: Path, text: str):
    with pytest.raises(DataError, match=r"line 2: a quote opens there and takes in the next row"):
        listed(tmp_path, text)


def test_marks_of_joined_files_and_long_cells_are_read(tmp_path: Path):
    text = f"clip_id,path,labels,note\n001,a.wav,dog,{'x' * 200_000}\n\ufeff002,b.wav,cat,\n"
    assert listed(tmp_path, text).clips["clip_id"].to_pylist() == ["001", "002"]


def test_zeros_and_ones_of_two_classes_in_archives_are_refused(tmp_path: Path):
    two = datasets.Features(
        {"audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}}
        | {"labels": datasets.Sequence(datasets.ClassLabel(names=["dog", "cat"]))}
    )
    rows = [{"audio": {"bytes": b"x", "path": f"{i}.wav"}, "labels": [i, 1 - i]} for i in range(2)]
    datasets.Dataset.from_list(rows, features=two).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(DataError, match=r"all rows of .* have the labels 0 and 1 of two classes"):
        read_manifest(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *(("train_shard_000.tar", "train"), ("test-clean.tar", "test"), ("testset.tar", "test")),
        *(("test_wav/0.tar", "test"), ("bal_train/0.tar", "train"), ("valid_part_1.tar", "valid")),
        *(("test/en/0.tar", "test"), ("train_test_1.tar", "train"), ("contest.tar", "train"), ("devices.tar", "train")),
    ],
)
def test_the_only_split_in_an_archives_name_is_its_split(tmp_path: Path, name: str, split: str):
    (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
    tar_of(tmp_path, 0, name="made.tar").rename(tmp_path / "in" / name)
    out = read_manifest(str(tmp_path / "in"))
    assert out.clips["split"].to_pylist() == [split]
    line = f"splits by the names of archives or their folders, in rows: {split} (1)"
    assert (line in out.notes) == (split != "train")


def test_what_is_not_read_of_a_tar_is_named_or_refused(tmp_path: Path):
    audio = fakes.write_media(tmp_path / "x.wav", fakes.noise(0.1)).read_bytes()
    labelled = {"label": "dog", "subset": "test", "onset": 3}
    members = {"0.wav": audio, "0.json": labelled, "1.shn": audio, "1.json": labelled, "info.json": {"version": 3}}
    out = read_manifest(fakes.write_tar(tmp_path / "a.tar", members))
    assert [line.partition(" of ")[0] for line in out.notes] == ["the key 'subset'", "the key 'onset'"]
    assert out.clips["clip_id"].to_pylist() == ["0"]
    (refused,) = out.refused.to_pylist()
    assert (refused["clip_id"], refused["reason"]) == ("1", "missing_file")
    assert refused["message"] == "a.tar has labels of '1', but no audio of this name in a format that is read"


def test_a_refused_row_is_in_its_own_split_and_adds_no_class(tmp_path: Path):
    audio = fakes.write_media(tmp_path / "x.wav", fakes.noise(0.1)).read_bytes()
    lists = {"c.json": {"label": "cat"}, "caf\udce9.json": {"label": "dog"}, "info.json": {"labels": ["All animals"]}}
    members = {"a.wav": audio, "a.json": {"label": "dog"}, "a.meta.json": {"label": "x"}} | lists
    out = read_manifest(fakes.write_tar(tmp_path / "test.tar", members))
    assert out.vocabulary.names == ("dog",)
    assert out.refused["split"].to_pylist() == ["test"] * 3
    assert read_manifest(fakes.write_tar(tmp_path / "test.tar", members), split="eval").notes == ()
    bad = listed(tmp_path, "path,labels,split,end_s\na.wav,dog,test,3\nb.wav,dog,test,x\n")
    assert bad.refused["split"].to_pylist() == ["test"]


def test_folders_called_as_splits_beside_other_audio_are_pointed_out(tmp_path: Path):
    audio = fakes.write_media(tmp_path / "x.wav", fakes.noise(0.1)).read_bytes()
    names = ("train/a", "test/b", "test/c", "intro")
    members = {f"{name}.{kind}": held for name in names for kind, held in (("wav", audio), ("cls", b"dog"))}
    out = read_manifest(fakes.write_tar(tmp_path / "w.tar", members))
    line = (
        "splits by the names of folders are not used, because not all audio is in such a folder; in "
        "rows: train (1), test (2)"
    )
    assert (set(out.clips["split"].to_pylist()), out.notes) == ({"train"}, (line,))


def test_a_tars_folder_that_is_not_utf8_refuses_its_clip_alone(tmp_path: Path):
    audio = fakes.write_media(tmp_path / "x.wav", fakes.noise(0.1)).read_bytes()
    folders = ("caf\udce9", "ok")
    members = {
        f"{folder}/a.{kind}": held for folder in folders for kind, held in (("wav", audio), ("json", {"label": "dog"}))
    }
    out = read_manifest(fakes.write_tar(tmp_path / "a.tar", members))
    assert out.clips["clip_id"].to_pylist() == ["a"]
    assert out.refused["reason"].to_pylist() == ["bad_id"]


def test_parquet_without_audio_and_two_columns_of_labels_are_named(tmp_path: Path):
    (tmp_path / "in").mkdir()
    audio = [{"bytes": b"x", "path": "a.wav"}]
    pq.write_table(pa.table({"audio": audio, "label": ["dog"], "labels": [["cat"]]}), tmp_path / "in" / "a.parquet")
    pq.write_table(pa.table({"speech": audio, "label": ["dog"]}), tmp_path / "in" / "b.parquet")
    out = read_manifest(str(tmp_path / "in"))
    assert len(out.clips) == 1
    uri = tmp_path / "in"
    assert f"not read: 1 Parquet files without a column `audio`, {uri}/b.parquet for one" in out.notes
    assert f"{uri}/a.parquet has columns label and labels: labels are those of labels" in out.notes


def test_a_relative_path_in_a_list_of_a_bucket_is_a_file_name_without_options(tmp_path: Path):
    for name in ("a b.wav", "a%20b.wav", "q", "q?x.wav"):
        (tmp_path / name).write_bytes(name.encode())
    rows = "a%20b.wav,dog\nq?x.wav,dog\na b.wav,dog\n"
    (tmp_path / "m.csv").write_text(f"path,labels\n{rows}")
    media = read_manifest((tmp_path / "m.csv").as_uri()).clips["media"].to_pylist()
    assert [storage.read_bytes(uri) for uri in media] == [b"a%20b.wav", b"q?x.wav", b"a b.wav"]
    options = "x.wav?endpoint_override=evil.example:9000&scheme=http"
    assert "?" not in media_in("s3://bucket/dir", options, "path")
    assert media_in("https://h/d", "track #1.wav", "path") == "https://h/d/track%20%231.wav"
    assert media_in("https://h/d", "get?id=5", "path") == "https://h/d/get?id=5"
    assert media_in("memory://d", "track #1.wav", "path") == "memory://d/track #1.wav"


def test_speech_commands_in_capitals_keep_their_split(tmp_path: Path):
    for word, name in (("bed", "a_nohash_0.WAV"), ("bed", "b_nohash_0.wav"), ("cat", "c_nohash_0.flac")):
        (tmp_path / word).mkdir(exist_ok=True)
        (tmp_path / word / name).write_bytes(b"x")
    (tmp_path / "testing_list.txt").write_text("bed/a_nohash_0.wav\n")
    (tmp_path / "validation_list.txt").write_text("")
    out = read_speechcommands(str(tmp_path))
    assert sorted(zip(out.clips["clip_id"].to_pylist(), out.clips["split"].to_pylist(), strict=True)) == [
        ("bed/a_nohash_0", "test"),
        ("bed/b_nohash_0", "train"),
    ]
    assert out.clips["media"].to_pylist()[0] == f"{tmp_path}/bed/a_nohash_0.WAV"
    assert any("1 audio files of" in line and "'cat/c_nohash_0.flac' for one" in line for line in out.notes)


def test_splits_that_are_one_number_are_pointed_out(tmp_path: Path):
    out = listed(tmp_path, "path,labels,split\na.wav,dog,1\nb.wav,cat,1.0\nc.wav,cat,2\n")
    assert [line for line in out.notes if "spelling" in line] == [
        f"the splits '1' and '1.0' of {tmp_path}/m.csv differ only in spelling"
    ]


def splits_by_name(out: ClipList) -> dict[str, str]:
    return dict(zip(out.clips["clip_id"].to_pylist(), out.clips["split"].to_pylist(), strict=True))


def tar_with(folder: Path, *names: str, name: str = "a.tar") -> str:
    """A tar with audio of these names, each with a class."""
    members = {f"{of}.{kind}": held for of in names for kind, held in (("wav", b"x"), ("cls", b"dog"))}
    return fakes.write_tar(folder / name, members)


@pytest.mark.parametrize(
    "folders",
    [
        ["train/dog", "train/train", "test/dog", "test/train"],
        ["x/train/dog", "x/test/dog", "x/test/train_horn/more"],
        ["test/train", "train/train"],  # one class, so its folders do not tell the clips apart
        ["test_train/train/test_tone", "test_train/test/test_tone"],
    ],
)
def test_a_class_called_as_a_split_does_not_decide_the_split(tmp_path: Path, folders: list[str]):
    out = read_manifest(tar_with(tmp_path, *(f"{folder}/{i}" for i, folder in enumerate(folders))))
    depth = next(i for i in range(3) if all(folder.split("/")[i] in ("train", "test") for folder in folders))
    assert splits_by_name(out) == {str(i): folder.split("/")[depth] for i, folder in enumerate(folders)}


@pytest.mark.parametrize("names", [["test/train/1"], ["test/train/1", "x/y/test/2"]])
def test_folders_that_give_two_splits_are_refused_unless_the_split_is_given(tmp_path: Path, names: list[str]):
    tar = tar_with(tmp_path, *names)
    with pytest.raises(DataError, match=r"the split of test/train/1.wav of a.tar may be test or train, by its folders"):
        read_manifest(tar)
    out = read_manifest(tar, split="eval")
    assert set(splits_by_name(out).values()) == {"eval"}
    assert out.notes == ()


@pytest.mark.parametrize(
    ("archives", "split_of"),
    [
        (["train/dog", "train/train", "test/dog", "test/train"], ["train", "train", "test", "test"]),
        (["train/train_horn/0", "test/train_horn/0", "test/dog/more/0"], ["train", "test", "test"]),
        (["training/train_0", "validation/val_0"], ["train", "val"]),
        (["dev/train", "dev/val", "eval/test"], ["train", "val", "test"]),
        (["dev/train", "dev/val", "eval"], ["train", "val", "eval"]),
        (["test/train-00000-of-00001"], ["train"]),
    ],
)
def test_the_folders_of_archives_at_one_depth_decide_the_split(
    tmp_path: Path, archives: list[str], split_of: list[str]
):
    for number, archive in enumerate(archives):
        if "-of-" in archive:
            (tmp_path / archive).parent.mkdir(parents=True)
            audio = [{"bytes": b"x", "path": f"{number}.wav"}]
            pq.write_table(pa.table({"audio": audio, "labels": [["dog"]]}), tmp_path / f"{archive}.parquet")
        else:
            tar_with(tmp_path, str(number), name=f"{archive}.tar")
    out = read_manifest(str(tmp_path))
    assert splits_by_name(out) == {str(number): split for number, split in enumerate(split_of)}


@pytest.mark.parametrize("name", ["m.csv", "m.parquet"])
def test_splits_in_the_paths_of_a_list_are_pointed_out(tmp_path: Path, name: str):
    def notes_of(*paths: str, **columns: str) -> tuple[str, ...]:
        frame = pd.DataFrame({"path": paths, "labels": "dog"} | columns)
        frame.to_parquet(tmp_path / name) if name.endswith("parquet") else frame.to_csv(tmp_path / name, index=False)
        return read_manifest(str(tmp_path / name)).notes

    line = f"the paths of {tmp_path}/{name} name splits ({{}}) that are not read; add a column split"
    assert notes_of("train/dog/a.wav", "test/dog/b.wav") == (line.format("train (1), test (1)"),)
    assert notes_of("/data/fold1/a.wav", "/data/fold10/b.wav", "c.wav") == (line.format("fold1 (1), fold10 (1)"),)
    assert notes_of("in\\val\\a.wav", "in\\eval\\b.wav") == (line.format("val (1), eval (1)"),)
    assert notes_of("train/dog/a.wav", "test/dog/b.wav", split="all") == ()
    assert notes_of("/test/train/a.wav", "/test/bus/b.wav") == (line.format("train (1), test (1)"),)
    assert notes_of("train/a.wav", "bus/b.wav") == notes_of("/test/a.wav", "/test/b.wav") == ()
    assert read_manifest(str(tmp_path / name), split="eval").notes == ()


@pytest.mark.parametrize(
    ("names", "clips"),
    [
        (["k.mp4", "k.wav"], ["k"]),
        (["k.video.mp4", "k.audio.wav"], ["k.audio"]),
        (["k.flac", "k.wav"], ["k.flac", "k.wav"]),
        (["k.mp4", "k.webm"], ["k.mp4", "k.webm"]),
    ],
)
def test_several_audio_files_of_a_key_are_pointed_out(tmp_path: Path, names: list[str], clips: list[str]):
    members: dict[str, bytes | dict[str, object]] = dict.fromkeys((*names, "l.mp4"), b"x")
    members |= {"k.json": {"label": "dog"}, "l.json": {"label": "dog"}}
    out = read_manifest(fakes.write_tar(tmp_path / "a.tar", members))
    assert list(named(out)) == [*clips, "l"]
    line = f"1 keys have several audio files ({', '.join(names)}); each is a clip, but video next to sound is not read"
    assert out.notes == (line,)


def with_audio(path: Path, rows: list[dict[str, object]]) -> str:
    audio = [{"bytes": b"x", "path": f"s{i}.wav"} for i in range(len(rows))]
    pq.write_table(pa.table({"audio": audio} | {name: [row[name] for row in rows] for name in rows[0]}), path)
    return str(path)


def test_clips_of_one_video_without_start_are_several_clips(tmp_path: Path):
    rows = [{"label": "dog", "video_id": video_id} for video_id in ("P01_01", "P01_01", "P02_07")]
    out = read_manifest(with_audio(tmp_path / "a.parquet", rows))
    assert out.clips["clip_id"].to_pylist() == ["s0/P01_01", "s1/P01_01", "P02_07"]
    assert (out.clips["video_id"].to_pylist(), len(out.refused)) == (["P01_01", "P01_01", "P02_07"], 0)
    assert any(
        "1 rows of" in line and "2 have 'P01_01' for one; each is a clip of its own" in line for line in out.notes
    )
    sections = [{"label": "dog", "video_id": "P01_01", "start_s": start_s} for start_s in (3.0, 3.0, 4.0)]
    out = read_manifest(with_audio(tmp_path / "b.parquet", sections))
    assert out.clips["clip_id"].to_pylist() == ["P01_01_3.000", "P01_01_4.000"]
    assert out.refused["reason"].to_pylist() == ["duplicate"]


@pytest.mark.parametrize("video_ids", [[5, 6], ["a.b", "a.b"], ["a/b c", "\n"], [["x"], []]])
def test_video_ids_of_other_kinds_are_left_out_with_a_line(tmp_path: Path, video_ids: list[object]):
    uri = with_audio(tmp_path / "a.parquet", [{"label": "dog", "video_id": video_id} for video_id in video_ids])
    out = read_manifest(uri)
    assert (out.clips["clip_id"].to_pylist(), out.clips["video_id"].to_pylist()) == (["s0", "s1"], [None, None])
    (line,) = out.notes
    assert line.startswith(f"2 rows of {uri} have a video_id that is not read, {video_ids[0]!r} for one")


def test_a_video_id_without_a_value_is_none(tmp_path: Path):
    out = read_manifest(with_audio(tmp_path / "a.parquet", [{"label": "dog", "video_id": v} for v in ("", "None")]))
    assert (out.clips["clip_id"].to_pylist(), out.notes) == (["s0", "s1"], ())


def test_a_cls_file_has_one_class_commas_and_all(tmp_path: Path):
    classes = {"0": b"Male speech, man speaking", "1": b"Dog\n", "2": b"Rain;storm", "3": b"['a', 'b']"}
    members = {
        f"{key}.{kind}": held for key, label in classes.items() for kind, held in (("wav", b"x"), ("cls", label))
    }
    out = read_manifest(fakes.write_tar(tmp_path / "a.tar", members))
    assert named(out) == {"0": ["Male speech, man speaking"], "1": ["Dog"], "2": ["Rain;storm"], "3": ["a", "b"]}


@pytest.mark.parametrize("label", ["Male speech, man speaking", "Drum &amp; bass"])
def test_labels_of_archives_with_two_readings_name_the_labels_file(tmp_path: Path, label: str):
    uri = with_audio(tmp_path / "a.parquet", [{"label": "Dog"}, {"label": label}])
    with pytest.raises(DataError, match=r"row 2 of a\.parquet: .*; give the names of the classes with --labels FILE$"):
        read_manifest(uri)
    out = read_manifest(uri, vocabulary=LabelVocabulary.from_names(["Dog", label]))
    assert named(out) == {"s0": ["Dog"], "s1": [label]}


def test_a_repeated_index_of_a_class_label_is_that_class(tmp_path: Path):
    names = [f"class {i}" for i in range(10)]
    features = datasets.Features(
        {"audio": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}}
        | {"labels": datasets.Sequence(datasets.ClassLabel(names=names))}
    )
    rows = [{"audio": {"bytes": b"x", "path": f"{i}.wav"}, "labels": labels} for i, labels in enumerate(([0, 0], [3]))]
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "a.parquet"))
    assert named(read_manifest(str(tmp_path / "a.parquet"))) == {"0": ["class 0"], "1": ["class 3"]}


def test_copies_that_file_managers_made_are_no_speech_commands(tmp_path: Path):
    names = ["bed/0a7c2a8d_nohash_0.wav", "cat/0a7c2a8d_nohash_0.wav", "cat/mine.wav"]
    copies = ["bed/0a7c2a8d_nohash_0 (1).wav", "bed/0a7c2a8d_nohash_0 - Copy.wav", "bed/Copy of 0a7c2a8d_nohash_0.wav"]
    folders = ["bed 2", "bed (2)", "bed - Kopie", "bed copy", "big bed"]
    for name in (*names, *copies, *(f"{folder}/0a7c2a8d_nohash_0.wav" for folder in folders)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "testing_list.txt").write_text("bed/0a7c2a8d_nohash_0.wav\ncat/mine.wav\n")
    (tmp_path / "validation_list.txt").write_text("")
    out = read_speechcommands(str(tmp_path))
    assert splits_by_name(out) == {
        "bed/0a7c2a8d_nohash_0": "test",
        "big bed/0a7c2a8d_nohash_0": "train",
        "cat/0a7c2a8d_nohash_0": "train",
        "cat/mine": "test",
    }
    assert any(
        line.startswith(f"3 audio files of {tmp_path} are not read, 'bed/0a7c2a8d_nohash_0 (1)") for line in out.notes
    )
    for folder in folders[:4]:
        assert f"{tmp_path}/{folder} is not read: it is a copy of bed, by its name" in out.notes


def test_a_listed_file_that_is_missing_takes_no_clips_id(tmp_path: Path):
    (tmp_path / "bed").mkdir()
    (tmp_path / "bed" / "a_nohash_0.wav").touch()
    (tmp_path / "validation_list.txt").write_text("")
    (tmp_path / "testing_list.txt").write_text('bed/a_nohash_0.wav\nbed/a_nohash_0.wa"v\n')
    assert splits_by_name(read_speechcommands(str(tmp_path))) == {"bed/a_nohash_0": "test"}
