"""AST's data files: `{"data": [{"wav": path, "labels": "mid,mid"}]}`."""

import json
import re
import unicodedata
from typing import Any

from ast_core.errors import DataError, one_line
from ast_core.labels import LabelVocabulary, audioset_labels
from pipeline.prepare.clip import ClipError
from pipeline.prepare.sources.checks import (
    check_times,
    check_video_id,
    checked_split,
    folder_of,
    media_in,
    name_of,
    seconds,
)
from pipeline.prepare.sources.label_text import cells_of
from pipeline.prepare.sources.locate import stem
from pipeline.prepare.sources.rows import ClipList, Rows
from pipeline.prepare.sources.unread_columns import unread_column_lines
from pipeline.prepare.sources.web_lists import read_list

_KEYS = ("wav", "labels", "video_id")


def read_datafile(uri: str, *, vocabulary: LabelVocabulary | None = None, split: str | None = None) -> ClipList:
    """Read an AST data file, with or without its comment line at the top. `labels` may also be a list.

    A stem that ends in `_20.000` gives the section's start in the recording. A bare `_20` may belong to the name.
    """
    split = checked_split(split or name_of(uri))
    notes = list[str]()
    entries = _entries(uri, read_list(uri, notes))
    keys = dict.fromkeys(key for entry in entries if isinstance(entry, dict) for key in entry)
    notes += unread_column_lines(uri, [str(key) for key in keys], _KEYS, what="key")
    rows, folder = Rows(vocabulary or audioset_labels()), folder_of(uri)
    for number, entry in enumerate(entries, start=1):
        wav, labels, video_id = map((entry if isinstance(entry, dict) else {}).get, _KEYS)
        cells: list[str] = []
        name = ""
        try:
            cells = cells_of(labels, rows.vocabulary.index_of)
            media = media_in(folder, wav, '"wav"')
            name = unicodedata.normalize("NFC", stem(media))
            if video_id is not None:
                check_video_id(video_id)
            cut = re.fullmatch(r".+_(\d+\.\d+)", name)
            start_s = seconds(cut[1], "start") if cut else 0.0
            check_times(start_s, None)
            rows.keep_named(name, split, video_id, media, None, 0.0, start_s, None, rows.indices(cells))
        except ClipError as err:
            rows.refuse(name or f"entry {number}", split, err, cells, f"entry {number}")
    return rows.done(uri, notes)


def _entries(uri: str, text: str) -> list[Any]:
    try:
        entries = json.loads(text[max(text.find("{"), 0) :], object_pairs_hook=_no_key_twice)["data"]
    except (ValueError, KeyError, TypeError, RecursionError) as err:
        raise DataError(
            f'{uri} is not a data file {{"data": [{{"wav": …, "labels": …}}, …]}}: {one_line(err)}'
        ) from err
    if not isinstance(entries, list):
        raise DataError(f'{uri} is not a data file: "data" is {type(entries).__name__}, not a list')
    return entries


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice in one entry")
    return values
