"""A vocabulary gives each class its index and is stored in AudioSet's file format."""

import pytest

from ast_core.errors import DataError
from ast_core.labels import LabelVocabulary, audioset_labels
from tests.reference import AUDIOSET, needs_shared

SPEECH, MUSIC = "/m/09x0r", "/m/04rlf"
ODD = LabelVocabulary(("/m/1", "/m/2", "/m/3"), ("Male speech, man", 'The "A"', "Éclair"))


def test_audioset_has_527_classes_each_once():
    labels = audioset_labels()
    assert (len(labels), len(set(labels.mids)), len(labels.names)) == (527, 527, 527)
    assert (labels.index_of[SPEECH], labels.index_of["Speech"], labels.index_of[MUSIC]) == (0, 0, 137)


@needs_shared
def test_audioset_classes_equal_those_of_the_official_file():
    text = (AUDIOSET / "class_labels_indices.csv").read_text(encoding="utf-8")
    assert LabelVocabulary.from_csv(text) == audioset_labels()


@pytest.mark.parametrize("labels", [ODD, audioset_labels()], ids=["odd", "audioset"])
def test_a_vocabulary_is_restored_from_its_file(labels: LabelVocabulary):
    again = LabelVocabulary.from_csv(labels.to_csv())
    assert again == labels
    assert again.sha256 == labels.sha256


def test_commas_and_quotes_are_written_as_in_the_official_file():
    assert ODD.to_csv().splitlines()[:3] == [
        "index,mid,display_name",
        '0,/m/1,"Male speech, man"',
        '1,/m/2,"The ""A"""',
    ]


def test_the_hash_depends_on_names_ids_and_their_order():
    others = [
        LabelVocabulary(("a", "b"), ("x", "y")),
        LabelVocabulary(("b", "a"), ("y", "x")),
        LabelVocabulary(("a", "b"), ("x", "z")),
        LabelVocabulary(("a", "c"), ("x", "y")),
    ]
    assert len({labels.sha256 for labels in others}) == 4


def test_a_name_of_two_classes_finds_neither():
    labels = LabelVocabulary(("a", "b", "c"), ("Bell", "Bell", "Horn"))
    assert labels.index_of == {"a": 0, "b": 1, "c": 2, "Horn": 2}


def test_an_id_wins_over_another_classs_name():
    assert LabelVocabulary(("a", "b"), ("b", "x")).index_of == {"a": 0, "b": 1, "x": 1}


def test_from_names_uses_names_as_ids():
    labels = LabelVocabulary.from_names(name for name in ("yes", "no"))
    assert labels == LabelVocabulary(("yes", "no"), ("yes", "no"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs the header"),
        ("index,mid,display_name\n", "at least one row"),
        ("index,mid,name\n0,a,x\n", "needs the header index,mid,display_name"),
        ("0,a,x\n1,b,y\n", "needs the header index,mid,display_name; its first line has: 0, a, x"),
        ("index,mid,display_name\nzero,a,x\n", "line 2: the index 'zero' is not a whole number"),
        ("index,mid,display_name\n0.0,a,x\n", "line 2: the index '0.0' is not a whole number"),
        ("index,mid,display_name\n0,#NAME?,x\n", "line 2 contains #NAME\\?, which a spreadsheet wrote"),
        ("index,mid,mid,display_name\n0,a,b,x\n", "the column mid twice"),
        ("index,mid,display_name\n1,a,x\n", "line 2: the index is 1, not 0; count 0, 1, 2"),
        ("index,mid,display_name\n1,b,y\n0,a,x\n", "line 2: the index is 1, not 0; count 0"),
        ("index,mid,display_name\n0,a,x\n2,b,y\n", "line 3: the index is 2, not 1; count 0"),
        ("index,mid,display_name\n0,a\n", "mine.csv"),
        ("mid,display_name,index\na,x\n", "mine.csv"),
    ],
)
def test_an_invalid_label_file_is_refused(text: str, message: str):
    with pytest.raises(DataError, match=message) as refused:
        LabelVocabulary.from_csv(text, origin="mine.csv")
    assert str(refused.value).startswith("mine.csv")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        'index, mid, display_name\n0, /m/1, "Male speech, man"\n1, /m/2, B\n',
        "Index;MID;Display_Name\r\n0;/m/1;Male speech, man\r\n1;/m/2;B\r\n",
        "display_name\tindex\tmid\rMale speech, man\t0\t/m/1\rB\t1\t/m/2\r",
        "sep=;\nindex;mid;display_name;\n0;/m/1;Male speech, man;\n;;;\n1;/m/2;B;\n",
    ],
    ids=["spaces", "semicolons", "tabs-and-CR", "sep-line"],
)
def test_case_27_label_files_of_spreadsheets_are_read(text: str):
    assert LabelVocabulary.from_csv(text) == LabelVocabulary(("/m/1", "/m/2"), ("Male speech, man", "B"))


def test_case_31_composed_and_decomposed_accents_find_the_same_class():
    composed, apart = "B\u00e9b\u00e9", "Be\u0301be\u0301"
    assert LabelVocabulary.from_names([apart]).index_of[composed] == 0
    assert LabelVocabulary.from_names([composed, apart]).index_of == {composed: 0, apart: 1}


def test_a_repeated_id_is_refused_by_name():
    with pytest.raises(DataError, match="label 'a' is in the vocabulary more than once"):
        LabelVocabulary(("b", "a", "a"), ("x", "y", "z"))
    with pytest.raises(DataError, match="label '/m/1' is in the vocabulary more than once"):
        LabelVocabulary.from_csv("index,mid,display_name\n0,/m/1,x\n1,/m/1,y\n")


def test_a_vocabulary_without_labels_or_with_missing_names_is_refused():
    with pytest.raises(DataError, match="is empty"):
        LabelVocabulary((), ())
    with pytest.raises(DataError, match="2 ids and 1 names"):
        LabelVocabulary(("a", "b"), ("x",))
