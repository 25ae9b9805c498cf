"""Checks of single values of a row. A wrong value raises `ClipError`, which refuses the row."""

import math
import os
import re
import unicodedata
from typing import Any
from urllib.parse import quote, unquote

from ast_core.errors import DataError
from ast_core.text_files import is_spreadsheet_damage
from pipeline import storage
from pipeline.prepare.clip import MAX_CLIP_S, ClipError, Reason
from pipeline.prepare.sources.locate import stem
from pipeline.redaction import without_secrets

LONGEST_ID = 200
MAX_START_S = 1e6  # eleven days: longer than any recording, and FFmpeg can seek that far

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # lone surrogates too: Arrow cannot store them
VIDEO_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
WEB = re.compile(r"https?://[^\s/]\S*", re.IGNORECASE)

_SPLIT = re.compile(r"(?!(?i:dataset\.json|labels\.csv|report\.html)$)[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
"""Names of split folders, which are next to these files and _work."""

MISSING = {"", "nan", "NaN", "<NA>", "NaT", "None", "NA", "N/A", "NULL", "null"}
"""What data frames, R and databases write for a cell without a value."""

_OF_THE_WEB = {"http", "https"}
_SCHEMES = storage.PYARROW_SCHEMES | _OF_THE_WEB
"""Schemes that a row may name. Some file systems of fsspec request any host, keep copies or use one another."""


def seconds(value: Any, what: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or (isinstance(value, str) and "_" in value):  # Python would read "1_0" as 10
        raise ClipError(Reason.BAD_TIME, f"{what} is {show(value)}, not a number of seconds")
    return number + 0.0  # -0.0 becomes 0.0


def check_times(start_s: float, end_s: float | None) -> None:
    if not 0 <= start_s <= MAX_START_S:
        raise ClipError(Reason.BAD_TIME, f"the start, {start_s:g} s, is not within 0 to {MAX_START_S:g} s")
    if end_s is not None and not 0 < end_s - start_s <= MAX_CLIP_S:
        problem = "not after" if end_s <= start_s else f"more than {MAX_CLIP_S:g} s after"
        raise ClipError(Reason.BAD_TIME, f"the end, {end_s:g} s, is {problem} the start, {start_s:g} s")


def value_of(cell: Any) -> Any:
    """A cell of a list; None if it has no value, whatever the list or its data frame wrote for that."""
    is_missing = cell in MISSING if isinstance(cell, str) else cell != cell  # NaN differs from itself
    return None if is_missing else cell


def check_video_id(video_id: Any) -> None:
    if not (isinstance(video_id, str) and VIDEO_ID.fullmatch(video_id)):
        raise ClipError(Reason.BAD_ID, f"{show(video_id)} is not a video id")


def check_clip_id(clip_id: str, *, is_given: bool = True) -> None:
    """Check an id that is given in the list, or one that is made from a file's name."""
    if not 0 < len(clip_id) <= LONGEST_ID or (not clip_id.isprintable() and CONTROL.search(clip_id)):
        remedy = "" if is_given else "; a --manifest can give another in the column clip_id"
        raise ClipError(
            Reason.BAD_ID, f"{show(clip_id)} needs 1 to {LONGEST_ID} characters and no control characters{remedy}"
        )
    if "\ufffd" in clip_id or (is_given and is_spreadsheet_damage(clip_id, dates=False)):
        raise ClipError(Reason.BAD_ID, f"{show(clip_id)} is not an id: a spreadsheet or a conversion replaced it")


def is_split(split: str) -> bool:
    return _SPLIT.fullmatch(split) is not None and not is_spreadsheet_damage(split)


def check_split(split: str) -> None:
    if not is_split(split):
        raise ClipError(Reason.BAD_ID, f"{show(split)} is not a split's name")


def checked_split(split: str) -> str:
    if not _SPLIT.fullmatch(split):
        raise DataError(
            f"{show(split)} cannot name a split; give --split letters, digits, _, - and ., a letter or digit first"
        )
    return split


def name_of(uri: str) -> str:
    """The stem of a path or URL."""
    return stem(unquote(re.split("[?#]", uri)[0]) if WEB.match(uri) else uri)


def folder_of(uri: str) -> str:
    return storage.absolute(without_query(uri)).rpartition("/")[0]


def without_query(uri: str) -> str:
    """A URL up to its `?` or `#`, unless only its end names a file: `https://host/get?file=list.csv`.

    Any other URI is unchanged, because files may have these characters in their names.
    """
    path = re.split("[?#]", uri)[0]
    return path if WEB.match(uri) and (os.path.splitext(path)[1] or not os.path.splitext(uri)[1]) else uri


def media_in(folder: str, path: Any, what: str) -> str:
    """The media that a list in `folder` names with `path`."""
    if not isinstance(path, str) or not path or CONTROL.search(path):
        raise ClipError(Reason.BAD_ID, f"{what} is {show(path)}, not a path")
    if "\ufffd" in path or is_spreadsheet_damage(path, dates=False):
        raise ClipError(Reason.BAD_ID, f"{what} is {show(path)}: a spreadsheet or a conversion replaced it")
    scheme, is_uri, rest = path.partition("://")
    if not is_uri:
        media = path if path.startswith("/") else f"{folder}/{_quoted(path, folder)}"
        if path.startswith("~/") and not os.path.lexists(media):
            raise ClipError(
                Reason.MISSING_FILE, f"~ is not expanded within a list; write the whole path of {show(path)}"
            )
        return media if "://" in media else _as_on_disk(media)
    if (scheme := scheme.lower()) not in _SCHEMES | {folder.partition("://")[0]}:
        raise ClipError(Reason.BAD_ID, f"{what} is {show(path)}; use {', '.join(sorted(_SCHEMES))}, or a path")
    if "?" in rest and scheme not in _OF_THE_WEB:
        raise ClipError(Reason.BAD_ID, f"{what} is {show(path)}; no options in a row, and a ? in a name is %3F")
    return f"{scheme}://{rest}"


def _quoted(path: str, folder: str) -> str:
    """A path without the characters that mean something else in a URI. On the web it may be quoted already."""
    scheme, is_uri, _ = folder.partition("://")
    if not is_uri or scheme not in storage.PYARROW_SCHEMES | _OF_THE_WEB:  # fsspec's paths are not quoted
        return path
    special = "[ #]" if scheme in _OF_THE_WEB else "[%#?]"
    return re.sub(special, lambda match: quote(match[0]), path)


def _as_on_disk(path: str) -> str:
    """`path` as it is on the disk: accents as separate characters on macOS (NFD), `/` in place of Windows' `\\`."""
    if (path.isascii() and "\\" not in path) or os.path.lexists(path):
        return path
    if "\\" in path and os.path.lexists(slashed := _as_on_disk(path.replace("\\", "/"))):
        return slashed
    found = ""
    for part in path.split("/")[1:]:
        forms = dict.fromkeys([part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part)])
        found += "/" + next((form for form in forms if os.path.lexists(f"{found}/{form}")), part)
    return found if os.path.lexists(found) else path


def show(value: Any) -> str:
    """`value` for a message: one line, printable and short."""
    text = repr(value if not isinstance(value, str) else without_secrets(value)[:LONGEST_ID])
    return text if len(text) <= 80 else text[:79] + "…"
