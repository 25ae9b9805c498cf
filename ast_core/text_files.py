"""Read text files: accepted encodings, and tables with a separator character.

All text files are decoded here: lists, labels, recipes and JSON.
"""

import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence

from ast_core.errors import DataError

_NOT_TEXT = (
    (b"PK\x03\x04", "a ZIP archive, as .xlsx and .ods workbooks are"),
    (b"\xd0\xcf\x11\xe0", "an old Office file, as .xls workbooks are"),
    (b"\x1f\x8b", "compressed by gzip"),
    (b"BZh", "compressed by bzip2"),
    (b"\xfd7zXZ", "compressed by xz"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"%PDF", "a PDF"),
    (b"SQLite format 3", "an SQLite database"),
    (b"\x89HDF", "an HDF5 file"),
    (b"RIFF", "a RIFF file, as WAV is"),
    (b"\x80\x04\x95", "a pickle"),
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
)
csv.field_size_limit(1 << 26)  # an embedding as text is longer than the module's limit

_SAVE_AGAIN = "save it as UTF-8 (in a spreadsheet: CSV UTF-8)"

LINE_END = re.compile(r"\r\n|\r|\n")
"""The ends of a line. `str.splitlines` also splits at characters that may be part of a name."""

_CAPITAL = "A-ZÀ-ÝĄ-ŽΆ-ΩА-Я"
_SPREADSHEET_ERROR = re.compile(
    rf"#[¿¡]?[{_CAPITAL}0-9_/.]+[!?]"  # an error's name in any language
    rf"|#[{_CAPITAL}]{{1,2}}/[{_CAPITAL}]|#NV|#YOK|#HIÁNYZIK"  # "not available": #N/A, #I/T, #Н/Д
    r"|#GETTING_DATA|#{3,}|Err:\d{3}"  # an error that passes; a column that is too narrow; LibreOffice's errors
    r"|[+-]?\d([.,]\d+)?E\+\d{2,}"  # a number in place of an id
    r"|=.+",  # a formula
    re.DOTALL,
)
_TEXT_AS_FORMULA = re.compile(r'="((?:[^"]|"")*)"')
"""`="001"`: how Excel's users keep a text from being read as a number."""
_MONTH = "Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec|Mrz|Mär|Mai|Okt|Dez"  # English and German
_MONTH_BEHIND = (  # also French, Spanish, Italian, Portuguese and Dutch
    f"{_MONTH}|janv|févr|mars|avr|mai|juin|juil|août|sept|oct|nov|déc|ene|feb|mar|abr|may|jun|jul|ago|sep|dic|gen|apr"
    "|mag|giu|lug|set|ott|jan|fev|out|dez|mrt|mei|aug|okt|dec"
)
_SPREADSHEET_DATE = re.compile(
    rf"\d{{1,2}}(-|/|\. )({_MONTH_BEHIND})\.?|({_MONTH})[- ]\d{{2}}|\d{{4}}-\d{{2}}-\d{{2}} 00:00:00"
)


UNNAMED = re.compile(r"unnamed: [0-9]+(_level_[0-9]+)?")
"""What pandas calls a column without a name."""

_INVISIBLE = re.compile("[\ufeff\u200b\u2060]")
"""A byte order mark, and spaces of zero width."""


def decode_text(data: bytes, origin: object) -> str:
    """The text of a file in UTF-8, with or without a byte order mark, or in UTF-16 with one.

    Raises:
        DataError: the file has another encoding, is not text, or lost characters in a conversion. The message has byte
            and line.
    """
    for magic, kind in _NOT_TEXT:
        if data.startswith(magic):
            raise DataError(f"{origin} is not a text file: it is {kind}; {_SAVE_AGAIN}")
    is_utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    encoding = "utf-16" if is_utf16 else "utf-8"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as err:
        line, byte = _line_number(data[: err.start].decode(encoding, "ignore")), err.start
        raise DataError(
            f"{origin} is not {encoding.upper()}: line {line}, byte {byte} (0x{data[byte]:02x}); {_SAVE_AGAIN}"
        ) from err
    if lost := re.search("[\0\ufffd]", text):
        before = text[: lost.start()]
        num_bytes = 2 * is_utf16 + len(before.encode("utf-16-le" if is_utf16 else "utf-8", "surrogatepass"))
        what = (
            "NUL characters, so it is not text, or UTF-16 without a byte order mark"
            if lost[0] == "\0"
            else "U+FFFD, which replaces a character that a conversion lost; use the file from before the conversion"
        )
        raise DataError(f"{origin} contains {what}: line {_line_number(before)}, byte {num_bytes}; {_SAVE_AGAIN}")
    return re.sub(r"(?:^|(?<=[\r\n]))\ufeff+", "", text) if "\ufeff" in text else text


def is_spreadsheet_damage(text: str, *, dates: bool = True) -> bool:
    """Whether a spreadsheet wrote `text` in place of the original value: `#NAME?`, `=B2`, `1.2E+05`, `3-Feb`.

    Files or ids may be named by dates; `dates=False` accepts them.
    """
    return bool(_SPREADSHEET_ERROR.fullmatch(text) or (dates and _SPREADSHEET_DATE.fullmatch(text)))


def column_name(cell: str) -> str:
    """A cell of the header as the name of a column, without characters that nobody sees."""
    return _INVISIBLE.sub("", cell).strip()


def read_table(
    text: str,
    *,
    origin: object,
    columns: Sequence[str],
    is_header: Callable[[set[str]], bool],
    needs: str,
    separators: str = ",;\t|",
    on_header: Callable[[list[str]], None] = lambda names: None,
) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a text table: the number of a row's first line, and its stripped cells by column.

    The separator is the first of `separators` for which `is_header` accepts the column names. Case and outer spaces of
    the names do not matter. Only `columns` are read, if present; `on_header` is called with all names. Missing cells at
    the end of a row are empty. Empty rows are skipped, and so are repeated headers, as in joined files. Excel's
    `="001"` is read as 001.

    Raises:
        DataError: no separator gives an accepted header (`needs` describes it), a column is repeated, a row has more
            cells than the header has names, some rows have more empty cells at their end than others although a column
            follows the labels, a quote is wrong or takes in the next row, or a header with other columns follows.
    """
    skipped = re.match(r"sep=(.)(\r\n|\r|\n)", text, re.IGNORECASE)  # a hint that only Excel reads
    if skipped:
        separators = skipped[1]
    first: list[str] = []
    for separator in separators:
        names = _first_row(text, skipped.end() if skipped else 0, separator)
        first = first or names
        if is_header({name.lower() for name in names}):
            break
    else:
        inner = [_first_row(cell, 0, separator) for cell in first[:1] for separator in separators if not skipped]
        if any(is_header({name.lower() for name in names}) for names in inner):
            raise DataError(f"{origin}: each line is one quoted cell; save it again with a cell for each column")
        found = ", ".join(filter(None, first))
        shown = f"{found[:80]}…" if len(found) > 80 else found or "nothing"
        raise DataError(f"{origin} needs {needs}; its first line has: {' '.join(shown.split())}")
    lowered = [name.lower() for name in names]
    spellings = {variant(name) for name in filter(None, names) for variant in (str, str.lower, str.upper, str.title)}
    for column in columns:
        if lowered.count(column) > 1:
            raise DataError(f"{origin} has the column {column} twice; rename or remove one of them")
    on_header(lowered)
    places = {column: lowered.index(column) for column in columns if column in lowered}
    width = 1 + max(i for i, name in enumerate(lowered) if name and not UNNAMED.fullmatch(name))
    # A comma in labels without quotes moves the cells behind them. If those are empty, only the row's length shows it.
    can_move = separator != "\t" and "labels" in places and places["labels"] < width - 1
    of_first_row: tuple[int, int] | None = None  # its line, and by how many cells it is longer than the header
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=separator != "\t"
    )
    if skipped:
        next(reader)
    line, past_header = reader.line_num + 1, False
    try:
        for row in reader:
            begins, line = line, reader.line_num + 1
            if not any(cell and not cell.isspace() for cell in row):
                continue
            if not past_header:
                past_header = True
                continue
            if not spellings.isdisjoint(row) and is_header(set(again := [column_name(cell).lower() for cell in row])):
                if again != lowered:
                    raise DataError(f"{origin}, line {begins} is a header with other columns; give each list by itself")
                continue
            if line > begins + 1 and (_takes_in_a_row(row, len(names), separator) or _takes_in_a_file(row, separator)):
                raise DataError(
                    f"{origin}, line {begins}: a quote opens there and takes in the next row; remove it, or double the "
                    "quotes within a cell"
                )
            if any(cell and not cell.isspace() for cell in row[width:]):  # its labels would be lost
                raise DataError(f"{origin}, line {begins} has more fields than the header; quote the labels")
            excess = max(0, len(row) - len(names))
            of_first_row = of_first_row or (begins, excess)
            if can_move and excess != of_first_row[1]:
                longer = begins if excess > of_first_row[1] else of_first_row[0]
                raise DataError(
                    f"{origin}, line {longer} has more fields than other rows; remove the separators at its end, or "
                    "quote the labels if they have a separator"
                )
            yield begins, {column: _value(row[i]) if i < len(row) else "" for column, i in places.items()}
    except csv.Error as err:
        why = "a quote that opens there is never closed" if "unexpected end" in str(err) else str(err)
        raise DataError(f"cannot read {origin}, line {line}: {why}") from err


def _value(cell: str) -> str:
    cell = cell.strip()
    match = _TEXT_AS_FORMULA.fullmatch(cell) if cell.startswith("=") else None
    return match[1].replace('""', '"').strip() if match else cell


def _takes_in_a_row(row: Sequence[str], width: int, separator: str) -> bool:
    """Whether a cell of several lines contains the end of one row and the beginning of another.

    A quote that belongs to the text (an inch, a caption) opens a cell that ends at the next quote, rows below. A cell
    of several lines of text rarely has just the separators that complete both rows.
    """
    for column, cell in enumerate(row):
        lines = LINE_END.split(cell)
        if len(lines) > 1:
            num_behind, num_before = lines[0].count(separator), lines[-1].count(separator)
            if column + 1 + num_behind == width == num_before + len(row) - column:
                return True
    return False


def _takes_in_a_file(row: Sequence[str], separator: str) -> bool:
    """Whether a line within a cell has a file name, of the same type, where the row itself has one before that cell."""
    suffixes = list(map(_suffix, row))
    for column, cell in enumerate(row):
        for line in LINE_END.split(cell)[1:]:
            fields = map(_suffix, line.split(separator)[:-1])
            if any(suffix and suffix == own for suffix, own in zip(fields, suffixes[:column], strict=False)):
                return True
    return False


def _suffix(cell: str) -> str:
    match = re.search(r"\.(?=[^.]*[A-Za-z])[A-Za-z0-9]{2,5}$", cell.strip(' "'))
    return match[0].lower() if match else ""


def _first_row(text: str, begin: int, separator: str) -> list[str]:
    reader = csv.reader(
        io.StringIO(text[begin : begin + (1 << 16)], newline=""), delimiter=separator, skipinitialspace=True
    )
    try:
        return next((list(map(column_name, row)) for row in reader if any(row)), [])
    except csv.Error:
        return []


def _line_number(before: str) -> int:
    return len(LINE_END.findall(before)) + 1
