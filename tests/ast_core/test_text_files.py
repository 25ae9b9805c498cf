"""Text is read in common encodings, or refused with line and byte."""

import codecs
import gzip
import io
import zipfile

import pytest

from ast_core.errors import DataError
from ast_core.text_files import decode_text, is_spreadsheet_damage, read_table

TEXT = "path,labels\nå.wav,mål\nb.wav,日本\n"


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        codecs.BOM_UTF8 + TEXT.encode(),
        codecs.BOM_UTF8 * 2 + TEXT.encode(),
        codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    ],
    ids=["utf-8", "bom", "two-boms", "utf-16-le", "utf-16-be"],
)
def test_case_27_utf_8_and_utf_16_with_a_byte_order_mark_are_read(data: bytes):
    assert decode_text(data, "x") == TEXT


def a_zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("xl/workbook.xml", "<x/>")
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("path,labels\nx.wav,mål\n".encode("cp1252"), r"not UTF-8: line 2, byte 19 \(0xe5\); save it as UTF-8"),
        ("a\r\nb\r\nmål".encode("latin-1"), r"line 3, byte 7 \(0xe5\)"),
        ("a\rb\rmål".encode("latin-1"), r"line 3, byte 5 \(0xe5\)"),
        (TEXT.encode("shift-jis", "replace"), r"not UTF-8: line"),
        (codecs.BOM_UTF16_LE + "ab\ncd".encode("utf-16-le")[:-1], r"not UTF-16: line 2, byte 10"),
        (codecs.BOM_UTF16_LE + b"a\0\n\0" + b"\x00\xd8a\0", r"not UTF-16: line 2, byte 6"),
        ("ab\n".encode("utf-16-le"), r"NUL characters, so it is not text, or UTF-16 without .*: line 1, byte 1"),
        (TEXT.encode("utf-32"), "UTF-32"),
        ("a\nb\ufffdc\n".encode(), r"U\+FFFD.*: line 2, byte 3"),
        (codecs.BOM_UTF16_LE + "a\nb\ufffdc\n".encode("utf-16-le"), r"U\+FFFD.*: line 2, byte 8"),
        (a_zip(), "it is a ZIP archive, as .xlsx"),
        (gzip.compress(TEXT.encode(), mtime=0), "compressed by gzip"),
        (b"PAR1\x15", "a Parquet file"),
    ],
)
def test_case_11_other_encodings_are_refused_with_line_and_byte(data: bytes, message: str):
    with pytest.raises(DataError, match=message) as refused:
        decode_text(data, "mine.csv")
    assert str(refused.value).startswith("mine.csv ")
    assert "\n" not in str(refused.value)


def rows(text: str) -> list[tuple[int, dict[str, str]]]:
    return list(read_table(text, origin="m.csv", columns=["path", "labels"], is_header={"path"}.issubset, needs="path"))


def test_a_row_has_the_number_of_its_first_line():
    text = '\n"Path", LABELS \nx.wav,"dog\nbark"\n\n , \ny.wav, "cat, too"\nz.wav\n'
    assert rows(text) == [
        (3, {"path": "x.wav", "labels": "dog\nbark"}),
        (7, {"path": "y.wav", "labels": "cat, too"}),
        (8, {"path": "z.wav", "labels": ""}),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "m.csv needs path; its first line has: nothing"),
        ("x.wav,dog\n", "needs path; its first line has: x.wav, dog"),
        ("path,Path,labels\n", "has the column path twice"),
        ('path,labels\na,b\nx.wav,"dog\ny.wav,cat\n', "line 3: a quote that opens there is never closed"),
        ('path,labels\nx.wav,"dog"y\n', "cannot read m.csv, line 2"),
        ("path,labels\nx.wav,dog,cat\n", "line 2 has more fields than the header"),
        ('"path,labels"\n"x.wav,dog"\n', "m.csv: each line is one quoted cell; save it again with a cell for each"),
        ('"path;""labels"""\n"x.wav;dog"\n', "each line is one quoted cell"),
    ],
)
def test_an_invalid_table_is_refused_with_the_line(text: str, message: str):
    with pytest.raises(DataError, match=message):
        rows(text)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("path,split,labels,note\na.wav,train,dog,\nb.wav,train,dog,cat,\n", 3),
        ("path,labels,split\na.wav,dog,train,\nb.wav,dog,cat,\nc.wav,dog,train\n", 2),
        ("path,labels,split,\na.wav,dog,train,\nb.wav,dog,cat,,\n", 3),
    ],
)
def test_labels_moved_into_empty_cells_are_refused(text: str, line: int):
    with pytest.raises(DataError, match=f"m.csv, line {line} has more fields than other rows; remove the separators"):
        rows(text)


@pytest.mark.parametrize(
    "text",
    [
        "path,labels\na.wav,dog,\nb.wav,cat\n",
        "path,labels,split\na.wav,dog,,\nb.wav,cat,,\n,,,,,,\npath,labels,split\n",
    ],
)
def test_separators_at_the_end_that_can_hide_no_label_are_read(text: str):
    assert rows(text) == [(2, {"path": "a.wav", "labels": "dog"}), (3, {"path": "b.wav", "labels": "cat"})]


def test_invisible_characters_in_a_column_name_do_not_matter():
    text = "\u200bpath\u2060,la\u200bbels\nx.wav,dog\n\ufeffpath,labels\ny.wav,cat\n"
    assert [row for _, row in rows(text)] == [{"path": "x.wav", "labels": "dog"}, {"path": "y.wav", "labels": "cat"}]


def test_a_text_that_excel_keeps_as_a_formula_is_that_text():
    text = 'path,labels\n="001.wav",="dog"\n"=""a"""".wav""","=B2"\n'
    assert [row for _, row in rows(text)] == [
        {"path": "001.wav", "labels": "dog"},
        {"path": 'a".wav', "labels": "=B2"},
    ]


@pytest.mark.parametrize(
    "text",
    [
        "#NAME?",
        "#REF!",
        "#VALUE!",
        "#N/A",
        "#DIV/0!",
        "#BEZUG!",
        "#NV",
        "####",
        "Err:508",
        "1.23E+05",
        "3-Feb",
        "Feb-03",
        "#¿NOMBRE?",
        "#ИМЯ?",
        "#N/D",
        "#GETTING_DATA",
        "1,2E+05",
        "03. Feb",
        "03-févr",
        "Mrz 05",
        "=B2",
        "=VLOOKUP(A2,\nB:C,2)",
        "#N/B",
        "#I/T",
        "#Н/Д",
        "#YOK",
        "#HIÁNYZIK",
        "#ΌΝΟΜΑ?",
    ],
)
def test_case_9_damage_by_a_spreadsheet_is_recognised(text: str):
    assert is_spreadsheet_damage(text)


@pytest.mark.parametrize(
    "text",
    [
        "#1",
        "# hash",
        "hashtag",
        "#dog",
        "1e5",
        "E+05",
        "3-February",
        "May",
        "2021-02-03",
        "Feb",
        "-rf",
        "C#",
        "set-01",
        "Mars 03",
        "#wow!",
        "a=b",
        "#AC/DC",
        "#DOG",
    ],
)
def test_similar_names_are_not_taken_for_spreadsheet_damage(text: str):
    assert not is_spreadsheet_damage(text)


def test_dates_false_accepts_dates_but_not_errors():
    assert [is_spreadsheet_damage(text, dates=False) for text in ("3-Feb", "Feb-03", "#NAME?")] == [False, False, True]
