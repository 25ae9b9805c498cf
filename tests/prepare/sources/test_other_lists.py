"""Lists as spreadsheets, data frames and other data sets write them: read as meant, or refused with the line."""

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ast_core.errors import DataError
from ast_core.labels import LabelVocabulary
from pipeline.prepare.output.membership import refuse_repeated_sections
from pipeline.prepare.sources.fsd50k import read_fsd50k
from pipeline.prepare.sources.label_text import cells_of, indices_as_labels
from pipeline.prepare.sources.locate import AudioFolder
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


@pytest.mark.parametrize("text", ["[null]", "[None]", "[nan]", "set()", "character(0)", "list()"])
def test_lists_without_a_label_are_no_classes(text: str):
    assert cells_of(text, ()) == []


@pytest.mark.parametrize("text", ["dogs'", "engine (idling)", "Vehicle(4 wheels)", "baby laughter (b')"])
def test_names_that_look_a_little_like_lists_stay_names(text: str):
    assert cells_of(text, ()) == [text]


def test_a_class_that_is_called_by_a_number_is_meant_by_1_0_too():
    vocabulary = LabelVocabulary.from_csv("index,mid,display_name\n0,1,one\n1,2,two\n2,0,zero\n", origin="l.csv")
    assert indices_as_labels(["1", "1.0", "2.0"], vocabulary) == ["1", "1", "2"]


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
    assert len(listed(tmp_path, text.format(2, "a", "b")).refused) == 1  # the same recording twice


def test_splits_of_the_command_and_the_list_and_odd_ones_are_pointed_out(tmp_path: Path):
    (tmp_path / "m.csv").write_text(
        "path,labels,split\na.wav,dog,train\nb.wav,cat,Train\nc.wav,dog,cat\nd.wav,cat,NA\n"
    )
    out = read_manifest(str(tmp_path / "m.csv"), split="eval")
    assert out.clips["split"].to_pylist() == ["train", "Train", "cat", "eval"]
    assert any("3 rows of" in line and "have another split than eval" in line for line in out.notes)
    assert any(line.startswith("the splits 'train' and 'Train' of") for line in out.notes)
    assert any("has a split 'cat', which is a class too" in line for line in out.notes)
