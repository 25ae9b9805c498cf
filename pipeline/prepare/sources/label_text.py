"""Reads the labels of a row.

| in the row                                              | is read as                                                |
|---------------------------------------------------------|-----------------------------------------------------------|
| a list (JSON, Parquet)                                  | its entries                                               |
| `['dog', 'cat']`, `["dog"]`, `{'dog'}`, `('dog',)`,     | the list that a data frame, JSON or NumPy wrote as text   |
| `['dog' 'cat']`, `[0, 3]`, `'dog', 'cat'`               |                                                           |
| a text that is the name of a class                      | that class, commas and all                                |
| another text with `;`                                   | labels between the `;`                                    |
| another text                                            | labels between the commas                                 |
| `3.0`, where 3 is an index of the vocabulary            | that class, unless classes are called by numbers          |
| empty, `nan`, `<NA>`                                    | no label                                                  |
| `=B2`, a spreadsheet's formula                          | that text, which is no class                              |

Empty labels at either end (`dog;`) are dropped. If the vocabulary is made from the labels found, `;` and comma have the
same meaning in every row of a list: see `Separator`.
"""

import ast
import json
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ast_core.errors import DataError
from ast_core.labels import LabelVocabulary
from ast_core.text_files import is_spreadsheet_damage
from pipeline.prepare.clip import ClipError, Reason
from pipeline.prepare.sources.checks import CONTROL, LONGEST_ID, show

_QUOTED = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_ITEM = rf"(?:{_QUOTED}|[+-]?\d+(?:\.\d*)?)"
_LIST = re.compile(rf"[\[({{]\s*(?:{_ITEM}(?:(?:\s*,\s*|\s+){_ITEM})*\s*,?\s*)?[\])}}]", re.DOTALL)
_QUOTED_LIST = re.compile(rf"{_QUOTED}(?:\s*[,;]\s*{_QUOTED})*\s*[,;]?", re.DOTALL)
_LIKE_A_LIST = re.compile(
    r"""[\[{]\s*["'“‘„\[{].*|.*["'”’]\s*[\]}]|\[[^\[\]]*,[^\[\]]*\]|\{[^{}]*,[^{}]*\}|\([^()]*,[^()]*\)"""
    # What R, Scala, NumPy, PyTorch and Python write: c("dog"), WrappedArray(dog), [np.str_('dog')], tensor(3), b'dog'.
    r"""|[a-z_.]+\(\s*[\[({"'].*|(wrappedarray|arraybuffer|list|set|c|tensor|array|np\.\w+)\(.*\)"""
    r"""|\[\s*[a-z0-9_.]+\(.*\]|b(["']).*\2""",
    re.DOTALL | re.IGNORECASE,
)
_EMPTY_LIST = re.compile(r"\[\s*(null|none|nan|<na>)\s*\]|(set|frozenset|list|tuple|character|c)\(0?\)", re.IGNORECASE)
_CLOSING = {"[": "]", "(": ")", "{": "}"}
_IN_BRACKETS = re.compile(r"\[[^\[\]]+\]|\{[^{}]+\}|\([^()]+\)")
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_NUMBERS = re.compile(rf"{_NUMBER}(?:\s+{_NUMBER})*")
_INDEX = re.compile(r"([0-9]{1,5})(\.0*)?")
_SIGNS = "_\"'`“”‘’„«»−"
_LATIN = str.maketrans("авеѕіјкмнорстух", "abesijkmhopctyx")
"""Cyrillic letters that look like Latin ones, as capitals or always, and that a keyboard of two layouts mixes in."""
_OF_OTHER_SCRIPTS = "｜；，、・،؛"
_OTHER_SEPARATORS = re.compile(rf"[,|{_OF_OTHER_SCRIPTS}]")
_EITHER = re.compile(rf",\s|[|{_OF_OTHER_SCRIPTS}]")
_JOINING_SIGN = re.compile(r"\s*[/+&／＋＆]+\s*")
"""What separates labels in some lists, and belongs to names in more: `Pop/Rock`, `Drum & bass`."""
_BETWEEN = re.compile(r"[\W_]+(?:and[\W_]+)?")
"""What may separate two labels: anything but letters and digits, or `and`."""
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]+(?:\.0*)?")
_MID = re.compile(r"/[a-z]/[0-9a-z_]+")
_HTML = re.compile(
    r"&(?:amp|lt|gt|quot|apos|nbsp|szlig|[A-Za-z]{1,2}(?:acute|grave|circ|tilde|uml|ring|cedil|slash|lig)"
    r"|#[0-9]{1,7}|#[xX][0-9A-Fa-f]{1,6});"
)
_MISSING = frozenset({"nan", "NaN", "<NA>", "NaT"})
_INVISIBLE = "\ufeff\u200b\u2060"
"""A byte order mark, and spaces of zero width."""


def cells_of(value: Any, known: Collection[str], separator: str | None = None) -> list[str]:
    """The labels of a row as texts; empty if it has none.

    `known` are the names of classes. Without `separator`, the separator is found from the row itself.

    Raises:
        ClipError: the value is not a text, number or list, or looks like a list but cannot be read as one.
    """
    if isinstance(value, list | tuple):
        return _without_empty_ends([_clean(_text(cell, value)) for cell in value])
    text = "" if value is None else _clean(_text(value, value))
    if text in known or text.startswith("="):  # a formula, whose separators are its own
        return [text]
    if not text or text in _MISSING:
        return []
    listed = _listed(text)
    if listed is not None:
        return _without_empty_ends([_clean(cell) for cell in listed])
    return _split(text, separator or (";" if ";" in text else ","))


def mids_by_index(vocabulary: LabelVocabulary) -> dict[str, str]:
    """The class ids by their indices as texts. Empty if classes are called by numbers, which are no indices then."""
    if any(map(_WHOLE_NUMBER.fullmatch, (*vocabulary.mids, *vocabulary.names))):
        return {}
    return {str(index): mid for index, mid in enumerate(vocabulary.mids)}


def indices_as_labels(cells: Iterable[str], known: Collection[str], by_index: Mapping[str, str]) -> list[str]:
    """`cells`, with class ids in place of indices, by `mids_by_index`. `known` are the names of classes."""
    labels = []
    for cell in cells:
        match = None if cell in known else _INDEX.fullmatch(cell)
        if match and match[1] in known:  # a class that is called by a number, which pandas wrote as 1.0
            cell = match[1]
        elif match:
            cell = by_index.get(match[1], cell)
        labels.append(cell)
    return labels


def are_zeros_and_ones(cells: Sequence[Any]) -> bool:
    """Whether labels are zeros and ones, one of them repeatedly, as if there were a place for each class."""
    digits = _digits(cells)
    return len(digits) == len(cells) > len(set(digits)) and set(digits) <= {"0", "1"}


def may_be_one_hot_of_two(cells: Sequence[Any]) -> bool:
    """Whether labels are 0 and 1: one of two classes as zeros and ones, or the indices of both."""
    return len(cells) == 2 and sorted(_digits(cells)) == ["0", "1"]


def _digits(cells: Sequence[Any]) -> list[str]:
    return [match[1] for match in map(_INDEX.fullmatch, map(str, cells)) if match]


def may_name_a_class(text: str) -> bool:
    """Whether a label may become a class. Numbers may not, because they are indices into an unknown vocabulary."""
    if text.isascii() and text.replace(" ", "").replace("_", "").isalpha() and text not in _MISSING:
        return True
    return not (
        not text
        or text in _MISSING
        or "\ufffd" in text
        or _NUMBERS.fullmatch(text)
        or CONTROL.search(text)
        or is_spreadsheet_damage(text)
    )


def _damage_in(cell: str) -> str:
    """Why a label is not what its author wrote; empty if it may be."""
    if is_spreadsheet_damage(cell):
        return f"{show(cell)} is what a spreadsheet writes in place of a text; take the labels from before that"
    if "\ufffd" in cell:
        return f"{show(cell)} has lost characters in a conversion; take the labels from before that"
    return ""


class UnknownLabels:
    """Messages on labels that a vocabulary lacks.

    Args:
        on_numbers: what the user should know about a number that is no class of this list.
    """

    def __init__(self, vocabulary: LabelVocabulary, on_numbers: str) -> None:
        self._on_numbers = on_numbers
        self._known = vocabulary.index_of
        self._of_several = set(vocabulary.names) - self._known.keys()
        self._alike = {_without_signs(name): name for name in self._known}

    def message(self, cell: str) -> str:
        if not cell:
            return "there is an empty label between two others"
        if damage := _damage_in(cell):
            return damage
        if cell in self._of_several:
            return f"{show(cell)} is the name of several classes; write their MIDs"
        if _NUMBERS.fullmatch(cell):
            hint = f"; {self._on_numbers}" + (", and several are separated by `;`" if len(cell.split()) > 1 else "")
        elif sign := _sign_between(cell, self._known):
            hint = f"; if the {sign} separates labels, write `;` there"
        elif alike := self._alike.get(_without_signs(cell)):
            hint = f", but {show(alike)} is"
        else:
            hint = "; labels are separated by `;`, not by line breaks" if "\n" in cell else ""
        return f"{show(cell)} is not in the label vocabulary{hint}"


class Separator:
    """Finds the separator of a list without a vocabulary.

    If any row has a `;`, it separates in all rows, and a comma belongs to the name, as in "Male speech, man speaking".
    If none has, a comma without a space after it separates. These lists are refused, because a row has two readings:

    - no row has a `;`, and one has a comma with a space, a `|`, or a separator of Chinese, Japanese or Arabic;
    - no row has a `;`, and one has a `/`, `+` or `&` between the only labels of other rows: `dog/cat`;
    - a row has `[dog]`, which may be a list of one, and another is a list in such brackets;
    - a row has HTML such as `&amp;`, whose `;` is no separator.
    """

    def __init__(self, *, in_archives: bool = False) -> None:
        self._how = "separate labels by `;`, also behind a single name that has a comma (`Inside, small room;`)"
        self._how_for_signs = "write `a;b` for two labels, `a/b;` for one"
        self._how_without_html = "write the characters that it stands for"
        if in_archives:
            self._how = self._how_for_signs = self._how_without_html = (
                "give the names of the classes with --labels FILE"
            )
        self._place_of: dict[str, str] = {}
        self._names: set[str] = set()
        self._first_error = self._first_bad_list = ""
        """Position and error of the first value that cannot be read, and position of the first list in a text."""
        self._first_list: dict[str, str] = {}
        """Position and text of the first list that can be read, by its opening bracket."""

    def add(self, value: Any, place: str) -> None:
        """Record the labels of the row at `place`."""
        try:
            if isinstance(value, str):
                text = _clean(value)
                if text in self._place_of or text in _MISSING:
                    return
                if text.startswith("="):  # a formula, which may have any separator
                    self._first_error = (
                        self._first_error or f"{place}: {_damage_in(text) or f'{show(text)} is no label'}"
                    )
                    return
                if _listed(text) is None:
                    self._place_of[text] = place
                    return
                self._first_list.setdefault(text[0], f"{place}: {show(text)} is a list")
            self._names.update(cells_of(value, ()))
        except ClipError as err:  # the row is refused when it is read
            self._first_error = self._first_error or f"{place}: {err.message}"
            if isinstance(value, str):
                self._first_bad_list = self._first_bad_list or f"{place}: {err.message}"

    def decide(self, origin: str) -> tuple[str, set[str]]:
        """Return the separator, and all labels found.

        Raises:
            DataError: a row has two readings, or no row has labels that can be read.
        """
        if self._first_error and not self._place_of and not self._names:
            raise DataError(f"{origin}, {self._first_error}")
        self._refuse_first(origin, self._html_or_bracket)
        separator = ";" if any(";" in text for text in self._place_of) else ","
        cells_of_text = {text: _split(text, separator) for text in self._place_of}
        names = self._names.union(*cells_of_text.values())
        if separator == ";":
            self._refuse_first(origin, lambda text: self._parts_that_are_labels(cells_of_text[text], names))
        else:
            alone = {cells[0] for cells in cells_of_text.values() if len(cells) == 1 and cells[0]}
            self._refuse_first(origin, lambda text: self._two_readings(text, alone))
        return separator, names

    def _refuse_first(self, origin: str, problem_of: Callable[[str], str]) -> None:
        for text, place in self._place_of.items():
            if problem := problem_of(text):
                raise DataError(f"{origin}, {place}: {problem}")

    def _html_or_bracket(self, text: str) -> str:
        if html := _HTML.search(text):
            return f"labels contain HTML (`{html[0]}`), as in {show(text)}; {self._how_without_html}"
        if _IN_BRACKETS.fullmatch(text) and (other := self._first_bad_list or self._first_list.get(text[0])):
            return f"{show(text)} may be a list of one label or a name in brackets, as {other}"
        return ""

    def _two_readings(self, text: str, alone: set[str]) -> str:
        """Why a text may be one label or several if a comma separates. `alone` are the only labels of their rows."""
        if either := _EITHER.search(text.rstrip(", ")):
            what = "comma" if either[0].startswith(",") else either[0]
            return f"the {what} in {show(text)} may separate two labels or belong to one; {self._how}"
        for name in _split(text, ","):
            if (sign := _JOINING_SIGN.search(name)) and alone.issuperset(_JOINING_SIGN.split(name)):
                return (
                    f"the {sign[0].strip()} in {show(name)} may separate two labels or belong to one, as its parts are "
                    f"the labels of other rows; {self._how_for_signs}"
                )
        return ""

    def _parts_that_are_labels(self, cells: list[str], names: set[str]) -> str:
        """Why a label may be several if `;` separates."""
        for name in cells:
            parts = [part.strip() for part in _OTHER_SEPARATORS.split(name)]
            if len(parts) > 1 and not names.isdisjoint(parts):
                return (
                    f"{show(name)} is one label, as other rows separate theirs by `;`, but its parts are labels too; "
                    f"{self._how}"
                )
        return ""


def suspicious_classes(names: Sequence[str]) -> list[str]:
    """Lines for the user on classes that may be errors, or that may be one class under two names."""
    seen: dict[str, str] = {}
    pairs = [(other, name) for name in names if (other := seen.setdefault(_without_signs(name), name)) != name]
    lines = []
    if pairs:
        lines.append(
            f"{len(pairs)} pairs of classes differ only in case, spaces, signs or lookalikes: {show(pairs[0])}"
        )
    all_names = set(names)
    if joined := [(name, sign) for name in names if (sign := _sign_between(name, all_names))]:
        name, sign = joined[0]
        lines.append(
            f"{len(joined):,} classes consist of the names of others, as {show(name)}; if the {sign} separates labels, "
            "write `;` there"
        )
    mids = list(filter(_MID.fullmatch, names))
    if 0 < len(mids) < len(names):
        name = next(name for name in names if not _MID.fullmatch(name))
        lines.append(
            f"{len(mids):,} classes are MIDs, as {show(mids[0])}, and others are names, as {show(name)}; without "
            "--labels the MID and the name of a class are two classes"
        )
    if all(map(_IN_BRACKETS.fullmatch, names)):
        lines.append(
            f"all classes are in brackets, as {show(names[0])}; if these are lists of one, remove the brackets"
        )
    if of_html := next(filter(_HTML.search, names), None):
        lines.append(f"the class {show(of_html)} contains HTML; take the labels from before that")
    if garbled := next(((name, meant) for name in names if (meant := _as_utf8(name)) != name), None):
        lines.append(
            f"the class {show(garbled[0])} is probably {show(garbled[1])}, whose UTF-8 was read as another encoding; "
            "take the labels from before that"
        )
    if missing := [name for name in names if name.lower() in ("none", "null", "n/a", "na", "\\n", "unknown", "-")]:
        lines.append(
            f"there is a class {show(missing[0])}; rows without a label are left out, so if it stands for them, empty "
            "their labels; to train on background, give it a class such as `background`"
        )
    return lines


def _without_signs(name: str) -> str:
    """What is left of a name without case, spaces, quotes, dashes, invisible characters and a full stop at its end."""
    plain = unicodedata.normalize("NFKC", name).casefold().translate(_LATIN).rstrip(". ")
    return "".join(
        c
        for c in plain
        if c.isprintable()
        and not c.isspace()
        and c not in _SIGNS
        and unicodedata.category(c) != "Pd"
        and not "\ufe00" <= c <= "\ufe0f"  # variation selectors, as behind an emoji
    )


def _sign_between(name: str, names: Collection[str]) -> str:
    """What separates names of classes that together are `name`, as in `dog cat` or `dog:cat`; empty if it is none."""
    if len(name) > LONGEST_ID:  # its parts may be thousands
        return ""
    starts = [0]  # of a part, with names of classes before it
    for between in _BETWEEN.finditer(name):
        if any(name[start : between.start()] in names for start in starts):
            if name[between.end() :] in names:
                return "line break" if "\n" in between[0] else between[0].strip() or "space"
            starts.append(between.end())
    return ""


def _as_utf8(name: str) -> str:
    """Undo a conversion that read UTF-8 as a Windows encoding; any other name is returned unchanged."""
    if not name.isascii():
        with suppress(UnicodeError):
            return name.encode("cp1252").decode("utf-8")
    return name


def _text(value: Any, whole: Any) -> str:
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    if value is None:
        return ""
    raise ClipError(Reason.UNKNOWN_LABEL, f"labels is {show(whole)}, not a text or a list of texts")


def _clean(text: str) -> str:
    """Remove invisible characters around a text, and compose its accents (NFC)."""
    if text.isascii():
        return text.strip()
    return unicodedata.normalize("NFC", text.strip().strip(_INVISIBLE).strip())


def _listed(text: str) -> list[str] | None:
    """The entries of a list in a text; None if the text is not a list."""
    if not text or (text[0] not in "[({'\"" and text[-1] not in "]})'\""):
        return None
    if _EMPTY_LIST.fullmatch(text):
        return []
    if text[0] == "[":
        try:
            entries = json.loads(text)
        except (ValueError, RecursionError):
            entries = [None]
        if all(isinstance(entry, str | int | float) and not isinstance(entry, bool) for entry in entries):
            return [str(entry) for entry in entries]
    is_list = _LIST.fullmatch(text) and text[-1] == _CLOSING[text[0]]
    if is_list or _QUOTED_LIST.fullmatch(text):
        try:
            return [_unquoted(item) for item in re.findall(_ITEM, text, re.DOTALL)]
        except (ValueError, SyntaxError):
            pass
    if _LIKE_A_LIST.fullmatch(text):
        raise ClipError(
            Reason.UNKNOWN_LABEL,
            f"labels is {show(text)}, which looks like a list and cannot be read as one; separate labels by `;`",
        )
    return None


def _unquoted(item: str) -> str:
    if item[0] not in "'\"":
        return item
    return str(ast.literal_eval(item)) if "\\" in item else item[1:-1]


def _split(text: str, separator: str) -> list[str]:
    if separator not in text:
        return [text]
    return _without_empty_ends([_clean(cell) for cell in text.split(separator)])


def _without_empty_ends(cells: list[str]) -> list[str]:
    while cells and not cells[0]:
        cells.pop(0)
    while cells and not cells[-1]:
        cells.pop()
    return cells
