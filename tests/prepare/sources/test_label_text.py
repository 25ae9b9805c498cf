"""A row's labels are read as intended, or the row or list is refused."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ast_core.errors import DataError
from ast_core.labels import LabelVocabulary, audioset_labels
from pipeline.prepare.clip import ClipError, Reason
from pipeline.prepare.sources import ClipList, read_datafile, read_manifest, read_segments
from pipeline.prepare.sources.label_text import cells_of, may_name_a_class
from pipeline.prepare.sources.locate import youtube

SPEECH_BY_A_MAN = "Male speech, man speaking"


def manifest(folder: Path, labels: list[object], name: str = "m.csv", encoding: str = "utf-8") -> str:
    frame = pd.DataFrame({"path": [f"x{i}.wav" for i in range(len(labels))], "labels": labels})
    if name.endswith("parquet"):
        frame.to_parquet(folder / name)
    else:
        frame.to_csv(folder / name, index=False, encoding=encoding)
    return str(folder / name)


def labels_of(out: ClipList) -> list[list[str]]:
    return [[out.vocabulary.names[i] for i in row] for row in out.clips["labels"].to_pylist()]


def messages(out: ClipList) -> list[tuple[str, str]]:
    return list(zip(out.refused["reason"].to_pylist(), out.refused["message"].to_pylist(), strict=True))


LISTS = [["dog", "cat"], ["dog"], ["rain", "it's raining", 'a "bang"', "Male speech, man"]]


@pytest.mark.parametrize(
    "as_text",
    [str, json.dumps, lambda row: str(tuple(row)), lambda row: str(np.array(row)), lambda row: repr(row)[1:-1] + ","],
    ids=["python", "json", "tuple", "numpy", "no-brackets"],
)
def test_case_10_a_list_written_as_text_is_read_as_a_list(tmp_path: Path, as_text):
    out = read_manifest(manifest(tmp_path, [as_text(row) for row in LISTS]))
    assert labels_of(out) == [sorted(row) for row in LISTS]
    assert out.vocabulary.names == tuple(sorted({name for row in LISTS for name in row}))
    assert len(out.refused) == 0


def test_case_10_sets_numbers_and_empty_lists_are_read_too():
    assert cells_of("{'dog'}", ()) == ["dog"]
    assert cells_of("[0, 3]", ()) == cells_of("[0 3]", ()) == ["0", "3"]
    assert cells_of("[0. 3.]", ()) == ["0.", "3."]
    assert cells_of("[]", ()) == cells_of("{}", ()) == cells_of("['']", ()) == []
    assert cells_of(r"['a\'b', '\xe9']", ()) == ["a'b", "é"]
    assert cells_of('["\\u00e9", "a/b"]', ()) == ["é", "a/b"]
    assert cells_of("'dog'", ()) == ["dog"]


@pytest.mark.parametrize(
    "text",
    [
        "['dog', 'cat'", "'dog', 'cat']", "['dog', 'c", "['dog' 'cat' ... 'rain']", "[['dog']]", "[{'label': 'dog'}]",
        "{'dog': 1}", "[dog, cat]", "{dog, cat}", "array(['dog'], dtype=object)", "['dog')", "['dog'; 'cat']",
        "['it's']", "[“dog”]", "[‘dog’, ‘cat’]", "Index(['dog'], dtype='object')",
    ],
)  # fmt: skip
def test_case_10_text_that_only_looks_like_a_list_is_refused(text: str):
    with pytest.raises(ClipError) as refused:
        cells_of(text, ())
    assert refused.value.reason == Reason.UNKNOWN_LABEL
    assert "looks like a list" in refused.value.message


@pytest.mark.parametrize(
    "text", ["[laughter]", "(Speech)", "<unk>", "dog's bark", "'Til dawn", 'Song ("Happy")', "C#", '12" disc', "f(x)"]
)
def test_case_10_names_with_brackets_and_quotes_stay_names(text: str):
    assert cells_of(text, ()) == [text]
    assert may_name_a_class(text)


@pytest.mark.parametrize(
    "labels",
    [
        ["[dog]", "[cat, rain]"], ["{cat,rain}", "{dog}"], ["(dog,cat)", "(dog)"],
        ["{Dog}", '{"Male speech, man speaking"}'], ['["a, b"]', "[dog]"], ["{}", "{Dog}"],
    ],
)  # fmt: skip
def test_case_10_a_bracketed_name_with_a_bracketed_list_is_refused(tmp_path: Path, labels: list[str]):
    """PostgreSQL writes arrays without quotes: the list of one would become a class of its own."""
    with pytest.raises(DataError, match=r"m\.csv, line \d: .* may be a list of one label or a name in brackets"):
        read_manifest(manifest(tmp_path, labels))


def test_classes_that_are_all_in_brackets_are_pointed_out(tmp_path: Path):
    (note,) = read_manifest(manifest(tmp_path, ["{Dog}", "{Cat}"])).notes
    assert note.endswith("all classes are in brackets, as '{Cat}'; if these are lists of one, remove the brackets")
    assert read_manifest(manifest(tmp_path, ["[laughter]", "Dog", "{'Cat'}"])).notes == ()


@pytest.mark.parametrize("name", ["m.csv", "m.parquet"])
def test_a_repeated_index_is_not_a_place_for_each_class(tmp_path: Path, name: str):
    ten = LabelVocabulary.from_names("abcdefghij")
    labels = [[0, 0], [3], [1, 0, 1]]
    uri = manifest(tmp_path, [str(row) for row in labels] if name == "m.csv" else labels, name)
    assert labels_of(read_manifest(uri, vocabulary=ten)) == [["a"], ["d"], ["a", "b"]]
    assert labels_of(read_manifest(manifest(tmp_path, ["[0, 0]", "[1, 1]"]), vocabulary=ten)) == [["a"], ["b"]]
    with pytest.raises(
        DataError, match=r"the labels of 2 of 2 rows of .* are 3 zeros and ones, but there are 10 classes"
    ):
        read_manifest(manifest(tmp_path, ["[0, 0, 1]", "[1, 0, 0]"]), vocabulary=ten)


@pytest.mark.parametrize(
    ("labels", "name"),
    [
        (["[1, 2]", "[0, 1, 0]"], "m.csv"),
        (["[1 2]", "[0. 0. 1.]"], "m.csv"),
        (["1;2", "1;0;0"], "m.csv"),
        ([[1, 2], [0, 0, 1]], "m.parquet"),
        ([[1.0, 2.0], [0.0, 1.0, 1.0]], "m.parquet"),
    ],
)
def test_case_10_one_hot_labels_are_not_indices(tmp_path: Path, labels: list[object], name: str):
    """Read as indices, they would give every clip the first two classes."""
    letters = LabelVocabulary.from_names("abc")
    with pytest.raises(DataError, match=r"(line 3|row 2): labels are zeros and ones with a place for each class"):
        read_manifest(manifest(tmp_path, labels, name), vocabulary=letters)
    assert labels_of(read_manifest(manifest(tmp_path, labels[:1], name), vocabulary=letters)) == [["b", "c"]]


def test_case_12_a_name_with_a_comma_is_one_class_in_every_row(tmp_path: Path):
    out = read_manifest(manifest(tmp_path, [SPEECH_BY_A_MAN, f"{SPEECH_BY_A_MAN};Dog", "Dog"]))
    assert out.vocabulary.names == ("Dog", SPEECH_BY_A_MAN)
    assert labels_of(out) == [[SPEECH_BY_A_MAN], ["Dog", SPEECH_BY_A_MAN], ["Dog"]]


def test_case_12_a_comma_and_space_without_semicolons_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"m\.csv, line 3: the comma in 'Male speech, man speaking' may.*by `;`"):
        read_manifest(manifest(tmp_path, ["Dog", SPEECH_BY_A_MAN]))
    assert labels_of(read_manifest(manifest(tmp_path, ["Dog", f"{SPEECH_BY_A_MAN};"]))) == [["Dog"], [SPEECH_BY_A_MAN]]
    assert labels_of(read_manifest(manifest(tmp_path, ["Dog,Cat", "Dog"]))) == [["Cat", "Dog"], ["Dog"]]


@pytest.mark.parametrize("text", ["Dog|Cat", "Dog；Cat", "犬、猫", "Dog，Cat"])
def test_case_12_other_separators_are_refused_with_the_line(tmp_path: Path, text: str):
    with pytest.raises(
        DataError, match=rf"m\.csv, line 3: the {re.escape(text.strip('DogCat犬猫'))} in .* may separate"
    ):
        read_manifest(manifest(tmp_path, ["Dog", text]))
    assert read_manifest(manifest(tmp_path, ["Bird", f"{text};"])).vocabulary.names == ("Bird", text)
    with pytest.raises(DataError, match="its parts are labels too"):
        read_manifest(manifest(tmp_path, ["Bird;Dog;犬", text]))


@pytest.mark.parametrize("sign", [*"،؛｜・", ";|", "،،"])
def test_separators_of_any_script_are_refused_with_the_line(tmp_path: Path, sign: str):
    with pytest.raises(DataError, match=r"m\.csv, line 3: "):
        read_manifest(manifest(tmp_path, ["Dog", f"Dog{sign}Cat", "Cat"]))


@pytest.mark.parametrize(("text", "sign"), [("dog/cat", "/"), ("dog + rock music", "+"), ("bird,dog & cat", "&")])
def test_a_sign_between_the_only_labels_of_other_rows_is_refused(tmp_path: Path, text: str, sign: str):
    labels = ["dog", "cat", "rock music", text]
    with pytest.raises(DataError, match=rf"m\.csv, line 5: the {re.escape(sign)} in 'dog.*may separate two labels"):
        read_manifest(manifest(tmp_path, labels))
    out = read_manifest(manifest(tmp_path, [*labels[:3], f"{text};"]))  # says that it is one name
    assert text in out.vocabulary.names
    assert bool(out.notes) == (sign != "&")  # bird is no class


@pytest.mark.parametrize("names", [["Pop/Rock", "Pop"], ["C++", "C"], ["R&B", "A/C", "Drum & bass"], ["bass,R/B", "R"]])
def test_signs_that_belong_to_names_are_read(tmp_path: Path, names: list[str]):
    out = read_manifest(manifest(tmp_path, names))
    assert set(out.vocabulary.names) == set(",".join(names).split(","))
    assert out.notes == ()


@pytest.mark.parametrize(
    ("text", "sign"),
    [
        *((f"dog{sign}rock music", sign) for sign in ":\\~•>_⁄"),
        *((f"dog {sign} rock music", sign) for sign in ("-", "–", ":", "and", ">", "->")),
        *(("dog:rock music:dog", ":"), ("dog rock music", "space")),
    ],
)
def test_classes_joined_by_any_sign_are_pointed_out(tmp_path: Path, text: str, sign: str):
    (note,) = read_manifest(manifest(tmp_path, ["dog", "rock music", f"{text};"])).notes
    assert note.endswith(
        f"m.csv: 1 classes consist of the names of others, as {text!r}; if the {sign} separates labels, write `;` there"
    )


def test_names_that_only_have_parts_of_others_are_not_pointed_out(tmp_path: Path):
    names = [
        "rock",
        "rock:pop",
        "hot dog",
        "dog-eared",
        "dog",
        "C",
        "C++",
        "rock and roll",
        "dogs",
        " ".join(["x"] * 999),
    ]
    assert read_manifest(manifest(tmp_path, names)).notes == ()


def test_mids_beside_names_are_pointed_out(tmp_path: Path):
    (note,) = read_manifest(manifest(tmp_path, ["/m/09x0r", "Speech"])).notes
    assert "1 classes are MIDs, as '/m/09x0r', and others are names, as 'Speech'" in note
    assert read_manifest(manifest(tmp_path, ["/m/09x0r", "/t/dd00003"])).notes == ()


def test_classes_that_consist_of_other_classes_are_pointed_out(tmp_path: Path):
    out = read_manifest(manifest(tmp_path, ["rucwar", "sthwoo1", "rucwar sthwoo1", "dog bark"]))
    assert out.vocabulary.names == ("dog bark", "rucwar", "rucwar sthwoo1", "sthwoo1")
    assert out.notes == (
        f"{tmp_path}/m.csv: 1 classes consist of the names of others, as 'rucwar sthwoo1'; if the space separates "
        "labels, write `;` there",
    )


@pytest.mark.parametrize("text", ["3 17", "0 1 0", "1.0 2.0", "0\t1"])
def test_numbers_with_spaces_between_are_no_class(tmp_path: Path, text: str):
    out = read_manifest(manifest(tmp_path, ["dog", text]))
    assert out.vocabulary.names == ("dog",)
    assert out.refused["reason"].to_pylist() == ["unknown_label"]
    assert may_name_a_class("8 bit music")


@pytest.mark.parametrize("text", ["Drum &amp; bass", "B&eacute;b&#233;", "It&#x27;s raining"])
def test_html_in_labels_is_refused_with_the_line(tmp_path: Path, text: str):
    """The `;` of an entity would separate, and decide what commas mean in all rows."""
    entity = re.escape(re.search("&[^;]+;", text)[0])
    with pytest.raises(DataError, match=rf"m\.csv, line 3: labels contain HTML \(`{entity}`\)"):
        read_manifest(manifest(tmp_path, ["Dog,Cat", text]))
    known = LabelVocabulary.from_names(["Dog", "Cat", text])
    assert labels_of(read_manifest(manifest(tmp_path, ["Dog,Cat", text]), vocabulary=known)) == [["Dog", "Cat"], [text]]
    (note,) = read_manifest(manifest(tmp_path, [["Dog"], [text]], "m.parquet")).notes
    assert "contains HTML" in note
    assert read_manifest(manifest(tmp_path, ["R&B;Soul", "Rock&Roll;"])).vocabulary.names == (
        "R&B",
        "Rock&Roll",
        "Soul",
    )


def test_case_12_two_separators_in_one_list_are_refused_with_the_line(tmp_path: Path):
    with pytest.raises(DataError, match=r"line 3: 'Dog,Rain' is one label, as other rows .*its parts are labels too"):
        read_manifest(manifest(tmp_path, ["Dog;Cat", "Dog,Rain"]))


def test_case_12_with_a_vocabulary_the_whole_text_is_looked_up_first(tmp_path: Path):
    pets = LabelVocabulary.from_names(["Dog", "Cat", SPEECH_BY_A_MAN])
    uri = manifest(tmp_path, [SPEECH_BY_A_MAN, f"Dog;{SPEECH_BY_A_MAN}", "Dog, Cat"])
    assert labels_of(read_manifest(uri, vocabulary=pets)) == [
        [SPEECH_BY_A_MAN],
        ["Dog", SPEECH_BY_A_MAN],
        ["Dog", "Cat"],
    ]


def test_case_12_no_official_name_is_split():
    pieces = {piece.strip() for name in audioset_labels().names if "," in name for piece in name.split(",")}
    assert pieces.isdisjoint(audioset_labels().names)


@pytest.mark.parametrize("text", ["dog;", ";dog", "dog; ;", "dog,", " dog ;; "])
def test_case_28_separators_at_the_ends_are_not_labels(tmp_path: Path, text: str):
    out = read_manifest(manifest(tmp_path, [text, "cat"]))
    assert labels_of(out) == [["dog"], ["cat"]]


def test_case_28_a_separator_after_quoted_labels_is_ignored(tmp_path: Path):
    """Spreadsheets pad all rows to the widest one."""
    (tmp_path / "list.csv").write_text('abcdefghijk,30,40,"/m/09x0r,/m/04rlf",\nabcdefghijl,30,40,/m/09x0r,,\n')
    assert labels_of(read_segments(str(tmp_path / "list.csv"), locate=youtube)) == [["Speech", "Music"], ["Speech"]]


def test_an_empty_label_between_two_is_refused(tmp_path: Path):
    out = read_manifest(manifest(tmp_path, ["dog;;cat", "dog;cat"]))
    assert messages(out) == [("unknown_label", "there is an empty label between two others")]


def test_case_11_a_list_in_windows_encoding_is_refused_with_its_line(tmp_path: Path):
    with pytest.raises(DataError, match=r"m\.csv is not UTF-8: line 2, byte \d+ \(0xe5\)"):
        read_manifest(manifest(tmp_path, ["mål", "mäl", "mál"], encoding="cp1252"))
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        out = read_manifest(manifest(tmp_path, ["mål", "mäl", "mál"], encoding=encoding))
        assert out.vocabulary.names == ("mál", "mäl", "mål")


def test_case_11_every_kind_of_list_names_its_line(tmp_path: Path):
    (tmp_path / "list.csv").write_bytes('abcdefghijk, 0, 10, "/m/09x0r"\nm\xe5l________, 0, 10, x\n'.encode("latin-1"))
    with pytest.raises(DataError, match=r"list\.csv is not UTF-8: line 2"):
        read_segments(str(tmp_path / "list.csv"), locate=youtube)
    (tmp_path / "data.json").write_bytes('{"data": [\n{"wav": "m\xe5l.wav", "labels": "/m/09x0r"}]}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"data\.json is not UTF-8: line 2"):
        read_datafile(str(tmp_path / "data.json"))


def test_case_11_a_class_in_a_wrong_encoding_is_reported(tmp_path: Path):
    """UTF-8 was read in a Windows encoding and saved as UTF-8: nothing is lost, but it is another class."""
    (note,) = read_manifest(manifest(tmp_path, ["BÃ©bÃ©", "Bébé", "Ålesund", "日"])).notes
    assert note.endswith(
        "m.csv: the class 'BÃ©bÃ©' is probably 'Bébé', whose UTF-8 was read as another encoding; take the labels from "
        "before that"
    )


def test_case_9_ids_replaced_by_a_spreadsheet_are_rows_not_comments(tmp_path: Path):
    lines = [
        "# Segments csv", "# YTID, start_seconds, end_seconds, positive_labels", 'abcdefghijk, 0, 10, "/m/09x0r"',
        '#NAME?,10,20,"/m/09x0r"', "# a remark", "#REF!, 10.000, 20.000, /m/09x0r", 'bbbbbbbbbbb,0,10,"/m/09x0r"',
        '# ccccccccccc, 0, 10, "/m/09x0r"',
    ]  # fmt: skip
    (tmp_path / "list.csv").write_text("\n".join(lines))
    out = read_segments(str(tmp_path / "list.csv"), locate=youtube)
    assert out.clips["video_id"].to_pylist() == ["abcdefghijk", "bbbbbbbbbbb"]
    assert messages(out) == [
        ("bad_id", "'#NAME?' is not a video id"),
        ("bad_id", "'#REF!' is not a video id"),
        ("bad_id", "'# ccccccccccc' is not a video id"),
    ]


def test_case_9_spreadsheet_errors_are_not_classes_ids_or_splits(tmp_path: Path):
    (tmp_path / "m.csv").write_text(
        "path,labels,clip_id,split\nx.wav,dog,a,train\nx.wav,#N/A,b,train\nx.wav,dog,1.23E+05,train\n"
        "#VALUE!,dog,d,train\nx.wav,dog,e,5-Jan\nx.wav,cat,f,train\nx.wav,3-Feb,g,train\n"
    )
    out = read_manifest(str(tmp_path / "m.csv"))
    assert (out.clips["clip_id"].to_pylist(), out.vocabulary.names) == (["a", "f"], ("cat", "dog"))
    assert out.refused["clip_id"].to_pylist() == ["b", "1.23E+05", "d", "e", "g"]
    assert out.refused["reason"].to_pylist() == ["unknown_label", "bad_id", "bad_id", "bad_id", "unknown_label"]


@pytest.mark.parametrize("text", ["=B2", "=VLOOKUP(A2,B:C,2,FALSE)", "=SVERWEIS(A2;B:C;2)", "#I/T", "#YOK"])
def test_formulas_are_neither_classes_nor_ids_and_do_not_separate(tmp_path: Path, text: str):
    rows = [("x.wav", "Inside,Dog", "a"), ("x.wav", text, "b"), ("x.wav", "Dog", text), (text, "Dog", "d")]
    pd.DataFrame(rows, columns=["path", "labels", "clip_id"]).to_csv(tmp_path / "m.csv", index=False)
    out = read_manifest(str(tmp_path / "m.csv"))
    assert (out.clips["clip_id"].to_pylist(), out.vocabulary.names) == (["a"], ("Dog", "Inside"))
    assert out.refused["reason"].to_pylist() == ["unknown_label", "bad_id", "bad_id"]
    assert "is what a spreadsheet writes in place of a text" in out.refused["message"][0].as_py()


def test_a_list_of_formulas_alone_is_refused_for_the_first(tmp_path: Path):
    with pytest.raises(DataError, match=r"m\.csv, line 2: '=B2' is what a spreadsheet writes in place of a text"):
        read_manifest(manifest(tmp_path, ["=B2", "=B3"]))


def test_case_29_a_data_files_labels_may_be_a_list(tmp_path: Path):
    entries = [{"wav": "a.wav", "labels": ["/m/09x0r", "Music"]}, {"wav": "b.wav", "labels": "/m/09x0r,/m/04rlf,"}]
    (tmp_path / "data.json").write_text(json.dumps({"data": entries}))
    assert labels_of(read_datafile(str(tmp_path / "data.json"))) == [["Speech", "Music"]] * 2


def test_case_29_labels_of_another_type_are_refused(tmp_path: Path):
    entries = [{"wav": f"{i}.wav", "labels": labels} for i, labels in enumerate([3, {"a": 1}, True, "Music"])]
    (tmp_path / "data.json").write_text(json.dumps({"data": entries}))
    assert messages(read_datafile(str(tmp_path / "data.json"))) == [
        ("unknown_label", "'3' is not in the label vocabulary; indices are read only in a --manifest"),
        ("unknown_label", "labels is {'a': 1}, not a text or a list of texts"),
        ("unknown_label", "labels is True, not a text or a list of texts"),
    ]


def test_a_data_file_with_a_repeated_key_is_refused(tmp_path: Path):
    (tmp_path / "data.json").write_text('{"data": [{"wav": "a.wav", "labels": "/m/09x0r", "labels": "/m/04rlf"}]}')
    with pytest.raises(DataError, match="the key 'labels' occurs twice"):
        read_datafile(str(tmp_path / "data.json"))


def test_case_31_composed_and_decomposed_accents_are_one_class(tmp_path: Path):
    out = read_manifest(manifest(tmp_path, ["B\u00e9b\u00e9", "Be\u0301be\u0301", "\ufeffB\u00e9b\u00e9\u200b"]))
    assert labels_of(out) == [["B\u00e9b\u00e9"]] * 3


def test_case_31_a_file_is_found_with_the_other_accent_form(tmp_path: Path):
    composed, apart = "\u00e9t\u00e9/B\u00e9b\u00e9.wav", "e\u0301te\u0301/Be\u0301be\u0301.wav"
    for there, listed in ((composed, apart), (apart, composed)):
        folder = tmp_path / str(len(there))
        (folder / there).parent.mkdir(parents=True)
        (folder / there).touch()
        (folder / "m.csv").write_text(f"path,labels\n{listed},dog\n", encoding="utf-8")
        out = read_manifest(str(folder / "m.csv"))
        assert out.clips["media"].to_pylist() == [f"{folder}/{there}"]
        assert out.clips["clip_id"].to_pylist() == ["B\u00e9b\u00e9"]


def test_float_labels_are_indices_only_with_a_vocabulary(tmp_path: Path):
    uri = manifest(tmp_path, [0.0, 3.0, None], "m.parquet")
    with pytest.raises(DataError, match="if its labels are indices, give --labels too"):
        read_manifest(uri)
    letters = LabelVocabulary.from_names("abcd")
    for name in ("m.parquet", "m.csv"):
        out = read_manifest(manifest(tmp_path, [0.0, 3.0, None], name), vocabulary=letters)
        assert (labels_of(out), out.refused["reason"].to_pylist()) == ([["a"], ["d"]], ["no_label"])
    out = read_manifest(manifest(tmp_path, [0.0, 0.5, 3.0], "m.parquet"), vocabulary=letters)
    assert (labels_of(out), out.refused["reason"].to_pylist()) == ([["a"], ["d"]], ["unknown_label"])


def test_labels_that_are_not_texts_are_refused(tmp_path: Path):
    for column in ([b"dog", b"cat"], [True, False], [[["dog"]], []], pd.to_datetime(["2021-02-03", "2021-02-04"])):
        with pytest.raises(DataError, match=r"m\.parquet, row 1: labels is .*, not a text or a list of texts"):
            read_manifest(manifest(tmp_path, column, "m.parquet"))


def test_lost_characters_in_parquet_refuse_single_rows(tmp_path: Path):
    rows = [("a.wav", "dog"), ("b.wav", "m\ufffdl"), ("c\ufffd.wav", "dog"), ("d.wav", "dog")]
    pq.write_table(
        pa.table(dict(zip(("path", "labels"), map(list, zip(*rows, strict=True)), strict=True))), tmp_path / "m.parquet"
    )
    out = read_manifest(str(tmp_path / "m.parquet"))
    assert (out.clips["clip_id"].to_pylist(), out.vocabulary.names) == (["a", "d"], ("dog",))
    assert out.refused["reason"].to_pylist() == ["unknown_label", "bad_id"]
    assert not any("\ufffd" in clip_id for clip_id in out.refused["clip_id"].to_pylist())


def test_classes_that_look_alike_are_reported(tmp_path: Path):
    pair, missing = read_manifest(manifest(tmp_path, ["dog", "“Dog”", "cat", "None"])).notes
    assert pair.endswith("m.csv: 1 pairs of classes differ only in case, spaces, signs or lookalikes: ('dog', '“Dog”')")
    assert "there is a class 'None'; rows without a label are left out" in missing
    assert missing.endswith("to train on background, give it a class such as `background`")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        *(("post-rock", f"post{dash}rock") for dash in "‐‑–—−"),
        *(("❤", "❤\ufe0f"), ("dog", "dog."), ("dog", "d\u043eg"), ("Cop", "\u0421\u043e\u0440")),
        *(("Музыка", "музыка"), ("ВЕТЕР", "ветер"), ("KOT", "\u041a\u041e\u0422")),
    ],
)
def test_classes_that_differ_in_a_lookalike_are_pointed_out(tmp_path: Path, one: str, other: str):
    (note,) = read_manifest(manifest(tmp_path, [one, other, "cat"])).notes
    assert "1 pairs of classes differ only in case, spaces, signs or lookalikes" in note


@pytest.mark.parametrize(
    ("label", "hint"),
    [
        ("speech", ", but 'Speech' is"),
        ("Speech\nDog", "; if the line break separates labels, write `;` there"),
        ("Speech|Dog", "; if the | separates labels, write `;` there"),
        ("Speech\nwolf", "; labels are separated by `;`, not by line breaks"),
        ("600", "; its indices are 0 to 526"),
        ("wolf", ""),
    ],
)
def test_an_unknown_label_is_explained(tmp_path: Path, label: str, hint: str):
    out = read_manifest(manifest(tmp_path, ["Speech", label]), vocabulary=audioset_labels())
    assert messages(out) == [("unknown_label", f"{label!r} is not in the label vocabulary{hint}")]


def test_the_name_of_two_classes_needs_their_mids(tmp_path: Path):
    twice = LabelVocabulary(("/m/a", "/m/b"), ("dog", "dog"))
    with pytest.raises(DataError, match=r"has a known label, the first: 'dog' is the name of several classes; write"):
        read_manifest(manifest(tmp_path, ["dog"]), vocabulary=twice)


@pytest.mark.parametrize(
    ("mids", "names", "labels", "read"),
    [
        ("0 1 10 11", "dog rooster rain sea", ["2", "3", "10", "1.0"], [["rain"], ["rooster"]]),
        ("a b c", "10 20 30", ["1", "20", "0"], [["20"]]),
        ("a b c", "dog cat cow", ["001", "1", "02.0", "2.0"], [["cat"], ["cow"]]),
        ("0 1 2", "dog cat cow", ["2", "0.0", "3"], [["cow"], ["dog"]]),
    ],
)
def test_a_number_is_no_index_where_classes_are_called_by_numbers(
    tmp_path: Path, mids: str, names: str, labels: list[str], read: list[list[str]]
):
    vocabulary = LabelVocabulary(tuple(mids.split()), tuple(names.split()))
    out = read_manifest(manifest(tmp_path, labels), vocabulary=vocabulary)
    assert labels_of(out) == read
    assert set(out.refused["reason"].to_pylist()) == {"unknown_label"}
    assert len(out.clips) + len(out.refused) == len(labels)
    assert ("called by numbers" in out.refused["message"][0].as_py()) == (mids != "a b c" or names == "10 20 30")


def test_zeros_and_ones_without_a_vocabulary_are_called_so(tmp_path: Path):
    for labels in ([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]], [[0, 1, 1]], ["[0. 1. 1.]"]):
        uri = manifest(tmp_path, labels, "m.parquet")
        with pytest.raises(
            DataError, match=r"the labels of .* are zeros and ones; if they have a place for each class"
        ):
            read_manifest(uri)


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_the_header_shows_a_manifests_separator(tmp_path: Path, separator: str):
    frame = pd.DataFrame({" Path": ["a.wav", "b.wav"], "Labels": ["dog;cat", "cat"], "start_s ": [1.5, 2]})
    frame.to_csv(tmp_path / "m.csv", index=False, sep=separator)
    out = read_manifest(str(tmp_path / "m.csv"))
    assert labels_of(out) == [["cat", "dog"], ["cat"]]
    assert out.clips["clip_id"].to_pylist() == ["a_1.500", "b_2.000"]


@pytest.mark.parametrize("name", ["m.csv", "m.parquet"])
def test_a_column_with_a_similar_name_is_reported(tmp_path: Path, name: str):
    frame = pd.DataFrame(
        {"path": ["a.wav"], "labels": ["dog"], "start": [1.0], "label": ["x"], "splits": ["eval"], "note": [""]}
    )
    frame.to_parquet(tmp_path / name) if name.endswith("parquet") else frame.to_csv(tmp_path / name, index=False)
    notes = read_manifest(str(tmp_path / name)).notes
    assert [note.partition(" of ")[0] for note in notes] == ["the column 'start'", "the column 'splits'", "columns"]
    assert notes[0].endswith("is not read; if start_s is meant, give start_s in seconds")
    assert notes[1].endswith("is not read; if split is meant, rename it")
    assert notes[2].endswith("that are not read: 'label, note'")


def test_empty_rows_are_skipped(tmp_path: Path):
    (tmp_path / "m.csv").write_text("path,labels,split,\na.wav,dog,,\n,,,\n\n , , ,\nb.wav,cat,,\n")
    out = read_manifest(str(tmp_path / "m.csv"))
    assert (len(out.clips), len(out.refused)) == (2, 0)


@pytest.mark.parametrize("num_bad", [4, 5])
def test_a_list_with_mostly_bad_rows_is_refused_with_reason_and_line(tmp_path: Path, num_bad: int):
    uri = manifest(tmp_path, ["dog"] * 4 + ["wolf"] * num_bad)
    if num_bad == 4:  # half of them
        assert len(read_manifest(uri, vocabulary=LabelVocabulary.from_names(["dog"])).clips) == 4
        return
    with pytest.raises(
        DataError, match=r"5 of 9 rows of .* refused as unknown_label, the first: line 6: 'wolf'.*--labels"
    ):
        read_manifest(uri, vocabulary=LabelVocabulary.from_names(["dog"]))


def test_case_38_a_tilde_in_a_row_is_refused(tmp_path: Path):
    (tmp_path / "m.csv").write_text("path,labels\na.wav,dog\n~/b.wav,dog\n")
    assert messages(read_manifest(str(tmp_path / "m.csv"))) == [
        ("missing_file", "~ is not expanded within a list; write the whole path of '~/b.wav'")
    ]


def test_case_38_windows_paths_are_found(tmp_path: Path):
    for there in ("sub/a.wav", "sub/B\u00e9b\u00e9.wav", "sub\\c.wav"):
        (tmp_path / there).parent.mkdir(exist_ok=True)
        (tmp_path / there).touch()
    (tmp_path / "m.csv").write_text(
        "path,labels\nsub\\a.wav,dog\nsub\\Be\u0301be\u0301.wav,dog\nsub\\c.wav,dog\nC:\\d.wav,x\n"
    )
    media = read_manifest(str(tmp_path / "m.csv")).clips["media"].to_pylist()
    names = ["sub/a.wav", "sub/B\u00e9b\u00e9.wav", "sub\\c.wav", "C:\\d.wav"]
    assert media == [f"{tmp_path}/{name}" for name in names]


def test_a_repeated_header_is_not_a_row(tmp_path: Path):
    """Joined lists: `cat a.csv b.csv`."""
    lists = ["Path,labels\na.wav,dog\n", "\ufeffpath , labels\nb.wav,cat\n"]
    (tmp_path / "m.csv").write_text("".join(lists))
    out = read_manifest(str(tmp_path / "m.csv"))
    assert (out.clips["clip_id"].to_pylist(), out.vocabulary.names, len(out.refused)) == (["a", "b"], ("cat", "dog"), 0)
    (tmp_path / "m.csv").write_text("path,labels\na.wav,dog\nlabels,path\ncat,b.wav\n")
    with pytest.raises(DataError, match=r"m\.csv, line 3 is a header with other columns"):
        read_manifest(str(tmp_path / "m.csv"))


def test_rows_that_repeat_a_clip_with_other_labels_are_reported(tmp_path: Path):
    """In a list with one row per label, only the first would be stored, without a message."""
    rows = ["a.wav,dog", "a.wav,outside", "b/a.wav,cat", "./a.wav,dog", "c.wav,cat;dog", "c.wav,cat"]
    (tmp_path / "m.csv").write_text("\n".join(["path,labels", *rows]))
    out = read_manifest(str(tmp_path / "m.csv"))
    assert out.refused["reason"].to_pylist() == ["duplicate"] * 3
    assert out.notes == (
        f"1 rows of {tmp_path}/m.csv repeat a clip with other labels ('a' first), which are not stored; a clip has one "
        "row, with its labels separated by `;`",
    )
    (tmp_path / "list.csv").write_text("abcdefghijk,30,40,/m/09x0r\nabcdefghijk,30,40,/m/04rlf\n")
    (note,) = read_segments(str(tmp_path / "list.csv"), locate=youtube).notes
    assert "list.csv repeat a clip with other labels (line 2 first)" in note


@pytest.mark.parametrize("value", ["5e-1", " 0.5 ", ".5", "0.50"])
def test_case_41_usual_time_formats_are_read(tmp_path: Path, value: str):
    (tmp_path / "m.csv").write_text(f"path,labels,start_s,end_s\na.wav,dog,{value},1e0\n")
    clips = read_manifest(str(tmp_path / "m.csv")).clips
    assert (clips["start_s"].to_pylist(), clips["end_s"].to_pylist()) == ([0.5], [1.0])


@pytest.mark.parametrize("value", ["NA", "None", "null", "<NA>"])
def test_a_time_without_a_value_is_none(tmp_path: Path, value: str):
    (tmp_path / "m.csv").write_text(f"path,labels,start_s,end_s\na.wav,dog,{value},{value}\nb.wav,dog,0.5,1\n")
    clips = read_manifest(str(tmp_path / "m.csv")).clips
    assert clips.select(["clip_id", "start_s", "end_s"]).to_pylist() == [
        {"clip_id": "a", "start_s": 0.0, "end_s": None},
        {"clip_id": "b_0.500", "start_s": 0.5, "end_s": 1.0},
    ]


@pytest.mark.parametrize("value", ['"0,5"', "00:00:00.5", "0.5s", "1_0", "nan", "inf", "-0.5"])
def test_case_41_other_times_are_refused(tmp_path: Path, value: str):
    (tmp_path / "m.csv").write_text(f"path,labels,start_s\na.wav,dog,{value}\nb.wav,dog,0.5\n")
    out = read_manifest(str(tmp_path / "m.csv"))
    assert (out.clips["clip_id"].to_pylist(), out.refused["reason"].to_pylist()) == (["b_0.500"], ["bad_time"])


@pytest.mark.parametrize(
    "times", [pa.array([float("nan"), 0.5]), pa.array([True, False]), pa.array([1], "duration[s]")]
)
def test_case_41_other_time_types_in_parquet_are_refused(tmp_path: Path, times: pa.Array):
    columns = {"path": ["a.wav", "b.wav"], "labels": ["dog", "dog"]}
    pq.write_table(
        pa.table({name: cells[: len(times)] for name, cells in columns.items()} | {"start_s": times}),
        tmp_path / "m.parquet",
    )
    assert read_manifest(str(tmp_path / "m.parquet")).refused["reason"].to_pylist()[:1] == ["bad_time"]
