"""Sources: each reads a list of clips into one table, and the rows that cannot be prepared into another.

| source             | split                         | clip_id                          | labels                      |
|--------------------|-------------------------------|----------------------------------|-----------------------------|
| segment list       | its name, without `_segments` | `VIDEO_START`, three decimals    | MIDs                        |
| AST's data file    | its name                      | stem of `wav`                    | MIDs                        |
| ESC-50, ESC-10     | `fold1` … `fold5`             | file stem                        | the category                |
| Speech Commands V2 | `train`, `validation`, `test` | `WORD/STEM`                      | the word                    |
| manifest           | column `split`, else `train`  | column, else stem (and `_START`) | MIDs, names or indices      |
| archives' manifest | see `pipeline.prepare.embedded`                                  | the same                    |

A *list* is refused whole, by a `DataError`, if it cannot be read, is not of its format, has no row, or none of its rows
has a known label. A *row* is refused alone and never quietly altered; only a label said twice in it is taken once:

| reason          | what is refused                                                                                 |
|-----------------|-------------------------------------------------------------------------------------------------|
| `bad_id`        | a video id that is not 1 to 64 of `A-Za-z0-9_-` (on YouTube: 11)                                |
| `bad_id`        | a clip_id that is empty, longer than 200 or holds control characters                            |
| `bad_id`        | a path or URL that is missing, doubled or unusable, or is a URI that a row may not name         |
| `bad_id`        | a row's split of other than `A-Za-z0-9_.-`, or that is called as a file of a data set is        |
| `bad_time`      | no finite number, a start below 0 or above 1e6 s, an end not after it or more than 300 s later  |
| `no_label`      | a row without a label                                                                           |
| `unknown_label` | a row with any label that the vocabulary lacks                                                  |
| `duplicate`     | a clip_id for the second time in its split; the first stays                                     |
| `missing_file`  | a clip whose file is not in the folder; data files and manifests are not checked for this here  |

Relative paths in a list are relative to the list. A row may name files, objects, URLs and what the list's own file
system has; neither options of a store nor other file systems of fsspec, which reach for any host. A list from the web
is fetched once and kept in the user's cache.
"""

import csv
import hashlib
import http.client
import io
import json
import math
import os
import re
import urllib.request
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from posixpath import basename
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from ast_core.errors import DataError
from ast_core.labels import LabelVocabulary, audioset_labels
from pipeline import storage
from pipeline.prepare import embedded
from pipeline.prepare.archives import with_start
from pipeline.prepare.clip import CLIPS, FAILURES, MAX_CLIP_S, ClipError, Reason
from pipeline.prepare.embedded import Entry
from pipeline.prepare.media import Locate, is_media, stem
from pipeline.versions import in_words

OFFICIAL_LISTS = {
    name: f"http://storage.googleapis.com/us_audioset/youtube_corpus/v1/csv/{name}_segments.csv"
    for name in ("balanced_train", "unbalanced_train", "eval")
}
LONGEST_ID = 200
MAX_START_S = 1e6  # eleven days; beyond any recording, and within what FFmpeg can seek

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # lone surrogates too: Arrow cannot store them
_VIDEO_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_SPLIT = re.compile(r"(?!(?i:dataset\.json|labels\.csv|report\.html)$)[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
"""A folder beside these files and _work."""

_OF_THE_WEB = {"http", "https"}
_SCHEMES = storage.PYARROW_SCHEMES | _OF_THE_WEB
"""What a row may name. fsspec has file systems that ask any host, keep copies or read through one another."""

_WEB = re.compile(r"https?://[^\s/]\S*", re.IGNORECASE)


@dataclass(frozen=True)
class ClipList:
    clips: pa.Table
    """`CLIPS`; a clip_id is unique within its split."""
    refused: pa.Table
    """`FAILURES` of the stage "source"."""
    vocabulary: LabelVocabulary


def read_segments(
    uri: str, *, locate: Locate, vocabulary: LabelVocabulary | None = None, split: str | None = None
) -> ClipList:
    """An AudioSet segment list: an official name, a URL, or a file of lines `YTID, start, end, "mid,mid"`."""
    split = _checked_split(split or (uri if uri in OFFICIAL_LISTS else _name(uri).removesuffix("_segments")))
    rows = _Rows(vocabulary or audioset_labels())
    of_four_fields = 0
    # Each line is a row: with the csv module, one quote left open would swallow the good rows after it.
    with io.TextIOWrapper(io.BytesIO(_read_list(uri)), "utf-8-sig", "replace", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if line.startswith("#") or not line.strip():
                continue
            fields = [field.strip() for field in line.split(",", 3)]
            of_four_fields += len(fields) == 4
            video_id, start, end, quoted = (*fields, "", "", "")[:4]
            cells = _split_cells(quoted.strip('"'), ",")
            name = video_id or f"line {number}"
            try:
                if not _VIDEO_ID.fullmatch(video_id):
                    raise ClipError(Reason.BAD_ID, f"{_show(video_id)} is not a video id")
                start_s, end_s = _seconds(start, "start"), _seconds(end, "end")
                _check_times(start_s, end_s)
                name = f"{video_id}_{start_s:.3f}"
                labels = rows.indices(cells)
                rows.claim(name, split)
                if (found := locate(video_id, start_s, end_s)) is None:
                    raise ClipError(Reason.MISSING_FILE, f"no file for {video_id} from {start_s:g} s to {end_s:g} s")
                rows.keep(name, split, video_id, *found, start_s, end_s, labels)
            except ClipError as err:
                rows.refuse(name, split, err, cells)
    if not of_four_fields:
        raise DataError(f'{uri} has no line of the form `YTID, start, end, "mid,mid"`; give an AudioSet segment list')
    return rows.done(uri)


def read_datafile(uri: str, *, vocabulary: LabelVocabulary | None = None, split: str | None = None) -> ClipList:
    """AST's data file, `{"data": [{"wav": path, "labels": "mid,mid"}]}`, with or without its comment line on top.

    A stem that ends in `_20.000` says where in the recording the file was cut; a bare `_20` may belong to the name.
    """
    split = _checked_split(split or _name(uri))
    text = _read_list(uri).decode("utf-8-sig", "replace")
    try:
        entries = json.loads(text[max(text.find("{"), 0) :])["data"]
    except (ValueError, KeyError, TypeError, RecursionError) as err:
        raise DataError(f'{uri} is not a data file {{"data": [{{"wav": …, "labels": …}}, …]}}: {_line(err)}') from err
    if not isinstance(entries, list):
        raise DataError(f'{uri} is not a data file: "data" holds {type(entries).__name__}, not a list')
    rows, folder = _Rows(vocabulary or audioset_labels()), _folder(uri)
    for number, entry in enumerate(entries, start=1):
        wav, labels, video_id = map((entry if isinstance(entry, dict) else {}).get, ("wav", "labels", "video_id"))
        cells = _split_cells(labels, ",") if isinstance(labels, str) else []
        name = ""
        try:
            media = _beside(folder, wav, '"wav"')
            name = stem(media)
            if video_id is not None and not (isinstance(video_id, str) and _VIDEO_ID.fullmatch(video_id)):
                raise ClipError(Reason.BAD_ID, f"{_show(video_id)} is not a video id")
            cut = re.fullmatch(r".+_(\d+\.\d+)", name)
            start_s = _seconds(cut[1], "start") if cut else 0.0
            _check_times(start_s, None)
            indices = rows.indices(cells)
            rows.claim(name, split, "to keep both, list them in a manifest with a clip_id column")
            rows.keep(name, split, video_id, media, None, 0.0, start_s, None, indices)
        except ClipError as err:
            rows.refuse(name or f"entry {number}", split, err, cells)
    return rows.done(uri)


def read_esc(folder: str) -> ClipList:
    """ESC-50 as shipped (`audio/`, `meta/esc50.csv`), or category folders `NNN - Name` as in ESC-10."""
    root, files = _tree(folder)
    if "meta/esc50.csv" in files:
        return _read_esc50(root, files)
    named = re.compile(r"(?P<category>\d{3} - (?P<label>[^/]+))/(?P<name>[^/]+)")
    found = [match for match in map(named.fullmatch, sorted(files)) if match and is_media(match["name"])]
    if not found:
        raise DataError(f"{folder} holds neither meta/esc50.csv (ESC-50) nor audio in folders `NNN - Name` (ESC-10)")
    name_of = {match["category"]: match["label"] for match in found}  # in the order of NNN, as `found` is sorted
    vocabulary = LabelVocabulary.from_names(name_of.values())
    listed = [(stem(match["name"]), _esc_fold(match["name"]), match[0], match["label"]) for match in found]
    return _shipped(folder, root, files, listed, vocabulary)


def _esc_fold(name: str) -> str | None:
    match = re.fullmatch(r"([1-9])-\d+-[A-Z]+\.\w+", name)
    return f"fold{match[1]}" if match else None


def _read_esc50(root: str, files: set[str]) -> ClipList:
    uri = f"{root}/meta/esc50.csv"
    table = csv.DictReader(io.StringIO(_read_list(uri).decode("utf-8-sig", "replace")))
    try:
        rows = [
            (row["filename"].strip(), int(row["fold"]), int(row["target"]), row["category"].strip()) for row in table
        ]
    except (KeyError, TypeError, ValueError, AttributeError, csv.Error) as err:
        raise DataError(f"{uri}: each row needs filename, category, and whole numbers for fold and target") from err
    pairs = {(target, category) for _, _, target, category in rows}
    category_of = dict(sorted(pairs))
    if not rows or not len(pairs) == len(category_of) == len({category for _, category in pairs}):
        raise DataError(f"{uri} has no row, or a category and its target do not always go together")
    listed = [(stem(name), f"fold{fold}", f"audio/{name}", category) for name, fold, _, category in rows]
    return _shipped(uri, root, files, listed, LabelVocabulary.from_names(category_of.values()))


def read_speechcommands(folder: str) -> ClipList:
    """Speech Commands V2 as shipped: `WORD/HASH_nohash_N.wav`, and lists of what is for validation and for testing."""
    root, files = _tree(folder)
    split_of: dict[str, str] = {}
    for split, name in (("validation", "validation_list.txt"), ("test", "testing_list.txt")):
        if name not in files:
            raise DataError(f"{folder} holds no {name}; give the folder of Speech Commands V2 as unpacked")
        split_of |= dict.fromkeys(_read_list(f"{root}/{name}").decode("utf-8", "replace").split(), split)
    spoken = {file for file in files if re.fullmatch(r"[^/_][^/]*/[^/]+\.wav", file)}  # not _background_noise_
    if not spoken:
        raise DataError(f"{folder} holds no WORD/*.wav; give the folder of Speech Commands V2 as unpacked")
    word_of = {file: file.partition("/")[0] for file in sorted(spoken | split_of.keys())}
    vocabulary = LabelVocabulary.from_names(sorted({word_of[file] for file in spoken}))
    listed = [(file.removesuffix(".wav"), split_of.get(file, "train"), file, word) for file, word in word_of.items()]
    return _shipped(folder, root, files, listed, vocabulary)


_Listed = tuple[str, str | None, str, str]
"""clip_id, split, file, label"""


def _shipped(
    origin: str, root: str, files: set[str], listed: Sequence[_Listed], vocabulary: LabelVocabulary
) -> ClipList:
    """The clips of a data set that is one whole file a clip."""
    rows = _Rows(vocabulary)
    for clip_id, split, file, label in listed:
        try:
            if split is None:
                raise ClipError(Reason.BAD_ID, f"{_show(file)} is not named FOLD-ID-TAKE")
            if not _SPLIT.fullmatch(split):
                raise ClipError(Reason.BAD_ID, f"{_show(split)} is not a split's name")
            labels = rows.indices([label])
            rows.claim(clip_id, split)
            if file not in files:
                raise ClipError(Reason.MISSING_FILE, f"it is listed, but there is no file {_show(file)}")
            rows.keep(clip_id, split, None, f"{root}/{file}", None, 0.0, 0.0, None, labels)
        except ClipError as err:
            rows.refuse(clip_id or file, split if split and _SPLIT.fullmatch(split) else "unassigned", err, [label])
    return rows.done(origin)


def read_manifest(uri: str, *, vocabulary: LabelVocabulary | None = None, split: str | None = None) -> ClipList:
    """A list of files, as CSV, TSV or Parquet, or archives that hold the audio itself (`pipeline.prepare.embedded`).

    A list has `path` or `url`, `labels`, and where wanted `clip_id`, `start_s`, `end_s`, `split`.
    `split` is for the rows without their own. Without a vocabulary it is what the archives bring, else the labels
    found make it, sorted.
    """
    default_split = _checked_split(split or "train")
    packed = embedded.find(uri)
    own = embedded.own_labels(uri, packed) if packed else None

    def entries() -> Iterator[Entry]:
        return embedded.entries(uri, packed, own) if packed else _manifest(uri)

    vocabulary = vocabulary or own
    if vocabulary is None:
        found = {cell for entry in entries() for cell in _label_cells(entry.labels, None)}
        names = sorted(cell for cell in found if cell and not cell.isdecimal() and not _CONTROL.search(cell))
        if not 0 < len(names) <= 2**15:
            raise DataError(
                f"{uri} has {len(names)} different label names; if its labels are indices, give --labels too"
            )
        vocabulary = LabelVocabulary.from_names(names)
    rows, folder = _Rows(vocabulary), _folder(uri)
    for number, entry in enumerate(entries(), start=1):
        row_split, cells = default_split, _label_cells(entry.labels, vocabulary)
        name = str((entry.path or entry.url or entry.stem) if entry.clip_id is None else entry.clip_id)
        try:
            start_s = 0.0 if entry.start_s is None else _seconds(entry.start_s, "start_s")
            end_s = None if entry.end_s is None else _seconds(entry.end_s, "end_s")
            media, media_start_s = _media_of(entry, folder, start_s)
            _check_times(start_s, end_s)
            if not isinstance(entry.clip_id, str | int | float | None):
                raise ClipError(Reason.BAD_ID, f"clip_id is {_show(entry.clip_id)}, not a text")
            if entry.clip_id is None:
                name = _name_of(entry, media, start_s)
            own_split = entry.split
            if own_split is None and not split:
                own_split = entry.file_split
            if own_split is not None and not _SPLIT.fullmatch(str(own_split)):
                raise ClipError(Reason.BAD_ID, f"{_show(own_split)} is not a split's name")
            row_split = default_split if own_split is None else str(own_split)
            indices = rows.indices(cells)
            rows.claim(name, row_split, "" if entry.clip_id is not None else "to keep both, add a clip_id column")
            rows.keep(name, row_split, entry.video_id, media, entry.member, media_start_s, start_s, end_s, indices)
        except ClipError as err:
            rows.refuse(name or f"row {number}", row_split, err, cells)
    return rows.done(uri)


def _media_of(entry: Entry, folder: str, start_s: float) -> tuple[str, float]:
    """The media, and where in it the clip begins: audio within an archive is the section itself."""
    if entry.media is not None:
        if entry.video_id is not None and not (isinstance(entry.video_id, str) and _VIDEO_ID.fullmatch(entry.video_id)):
            raise ClipError(Reason.BAD_ID, f"{_show(entry.video_id)} is not a video id")
        return entry.media, 0.0
    path, url = entry.path, entry.url
    if bool(path) == bool(url):
        raise ClipError(Reason.BAD_ID, "a row needs a path or a url" + (", not both" if path else ""))
    if url and not _WEB.fullmatch(str(url)):
        raise ClipError(Reason.BAD_ID, f"{_show(url)} is not an http(s) URL")
    return _beside(folder, path or url, "path" if path else "url"), start_s


def _name_of(entry: Entry, media: str, start_s: float) -> str:
    """The clip_id of a row without one."""
    if entry.media is not None:
        name = entry.video_id or entry.stem
        return name if entry.start_s is None else with_start(name, start_s)
    name = _name(media)
    return name if entry.start_s is None or not name else f"{name}_{start_s:.3f}"


_MANIFEST_COLUMNS = ("path", "url", "labels", "clip_id", "start_s", "end_s", "split")


def _manifest(uri: str) -> Iterator[Entry]:
    kind = os.path.splitext(uri)[1].lower()
    try:
        if kind == ".parquet":
            fs, path = storage.resolve(_fetched(uri))
            with pq.ParquetFile(fs.open_input_file(path)) as file:
                present = _present(uri, file.schema_arrow.names)
                for batch in file.iter_batches(columns=list(present)):
                    columns = (batch[column].to_pylist() for column in present)
                    for values in zip(*columns, strict=True):
                        yield Entry(**dict(zip(present, values, strict=True)))
        elif kind in (".csv", ".tsv"):
            text = io.TextIOWrapper(io.BytesIO(_read_list(uri)), "utf-8-sig", "replace", newline="")
            reader = csv.reader(text, delimiter="\t" if kind == ".tsv" else ",", strict=True)
            header = next(reader, [])
            present = _present(uri, header)
            for row in filter(None, reader):
                if len(row) > len(header):  # bare commas between labels: half of them would be lost
                    raise DataError(f"{uri}, line {reader.line_num} has more fields than the header; quote the labels")
                row += [""] * (len(header) - len(row))
                cells: dict[str, Any] = {column: row[place].strip() or None for column, place in present.items()}
                yield Entry(**cells)
        else:
            raise DataError(
                f"{uri} is not a manifest: give a .csv, .tsv, .parquet or .tar, or a folder of the last two"
            )
    except (csv.Error, OSError, UnicodeDecodeError, pa.ArrowException) as err:
        raise DataError(f"cannot read the manifest {uri}: {_line(err)}") from err


def _present(uri: str, columns: Iterable[str]) -> dict[str, int]:
    place_of = {column.strip(): place for place, column in enumerate(columns)}
    if "labels" not in place_of or not {"path", "url"} & place_of.keys():
        found = ", ".join(place_of) or "none"
        raise DataError(
            f"{uri} needs the columns `labels` and `path` or `url`, or `audio` with bytes; it has: {_show(found)}"
        )
    return {column: place_of[column] for column in _MANIFEST_COLUMNS if column in place_of}


def _label_cells(value: Any, vocabulary: LabelVocabulary | None) -> list[str]:
    known = vocabulary.index_of if vocabulary else {}
    if isinstance(value, list):
        cells = ["" if cell is None else str(cell).strip() for cell in value]
    elif (text := "" if value is None else str(value).strip()) in known:
        cells = [text]  # "Male speech, man speaking" is one name
    else:
        cells = _split_cells(text, ";" if ";" in text else ",")
    if vocabulary is None:
        return cells

    def is_index(cell: str) -> bool:
        return cell not in known and re.fullmatch("[0-9]{1,5}", cell) is not None and int(cell) < len(vocabulary)

    return [vocabulary.mids[int(cell)] if is_index(cell) else cell for cell in cells]


class _Rows:
    """The rows read so far. Two million fit in a gigabyte: what is complete turns to Arrow a piece at a time."""

    def __init__(self, vocabulary: LabelVocabulary) -> None:
        if len(vocabulary) > 2**15:
            raise DataError(f"{len(vocabulary)} labels are too many; up to {2**15} can be stored")
        self.vocabulary, self._index_of = vocabulary, vocabulary.index_of
        self._clips, self._refused = _Pieces(CLIPS), _Pieces(FAILURES)
        self._claimed: defaultdict[str, set[str]] = defaultdict(set)
        self._any_known = False
        self._unknown = ""

    def indices(self, cells: list[str]) -> tuple[int, ...]:
        if not cells:
            raise ClipError(Reason.NO_LABEL, "the row has no label")
        try:
            # A tuple: unlike lists, tuples of numbers do not slow down garbage collection.
            return tuple(sorted({self._index_of[cell] for cell in cells}))
        except KeyError as err:
            self._unknown = self._unknown or _show(err.args[0])
            raise ClipError(Reason.UNKNOWN_LABEL, f"{_show(err.args[0])} is not in the label vocabulary") from None

    def claim(self, clip_id: str, split: str, advice: str = "") -> None:
        """Take `clip_id` for this row."""
        if not 0 < len(clip_id) <= LONGEST_ID or (not clip_id.isprintable() and _CONTROL.search(clip_id)):
            raise ClipError(Reason.BAD_ID, f"{_show(clip_id)} is not 1 to {LONGEST_ID} characters, none for control")
        claimed = self._claimed[split]
        if clip_id in claimed:
            raise ClipError(Reason.DUPLICATE, "; ".join(filter(None, [f"{clip_id} is in {split} already", advice])))
        claimed.add(clip_id)

    def keep(self, *row: Any) -> None:
        """One row of `CLIPS`, its clip_id claimed before."""
        self._clips.add(row)

    def refuse(self, name: str, split: str, err: ClipError, cells: Iterable[str]) -> None:
        labels = tuple(sorted({self._index_of[cell] for cell in cells if cell in self._index_of})) or None
        self._any_known = self._any_known or labels is not None
        if len(name) > LONGEST_ID:
            name = name[: LONGEST_ID - 1] + "…"  # else it might be the name of a clip that is well
        safe_name = _CONTROL.sub("\ufffd", name)
        why = (err.reason.value, err.message, 1, err.reason.retry)
        self._refused.add((safe_name, split, "source", *why, in_words(), labels))

    def done(self, origin: str) -> ClipList:
        clips, refused = self._clips.table(), self._refused.table()
        if not len(clips) + len(refused):
            raise DataError(f"{origin} has no rows; give a list with at least one clip")
        if not len(clips) and not self._any_known:
            first = f" (the first unknown one: {self._unknown})" if self._unknown else ""
            raise DataError(f"no row of {origin} has a known label{first}; give its own label file with --labels")
        return ClipList(clips, refused, self.vocabulary)


class _Pieces:
    """A table that grows by rows."""

    def __init__(self, schema: pa.Schema, rows_a_piece: int = 1 << 14) -> None:
        self._schema, self._rows_a_piece = schema, rows_a_piece
        self._pieces: list[pa.RecordBatch] = []
        self._columns: list[list[Any]] = [[] for _ in schema]

    def add(self, row: tuple[Any, ...]) -> None:
        for column, value in zip(self._columns, row, strict=True):
            column.append(value)
        if len(self._columns[0]) == self._rows_a_piece:
            self._close_piece()

    def _close_piece(self) -> None:
        arrays = [pa.array(column, field.type) for column, field in zip(self._columns, self._schema, strict=True)]
        self._pieces.append(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
        for column in self._columns:
            column.clear()

    def table(self) -> pa.Table:
        self._close_piece()
        return pa.Table.from_batches(self._pieces, schema=self._schema)


def _seconds(value: Any, what: str) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not math.isfinite(seconds) or (isinstance(value, str) and "_" in value):  # Python reads "1_0" as 10
        raise ClipError(Reason.BAD_TIME, f"{what} is {_show(value)}, not a number of seconds")
    return seconds + 0.0  # -0.0 becomes 0.0


def _check_times(start_s: float, end_s: float | None) -> None:
    if not 0 <= start_s <= MAX_START_S:
        raise ClipError(Reason.BAD_TIME, f"the start, {start_s:g} s, is not within 0 to {MAX_START_S:g} s")
    if end_s is not None and not 0 < end_s - start_s <= MAX_CLIP_S:
        problem = "not after" if end_s <= start_s else f"more than {MAX_CLIP_S:g} s after"
        raise ClipError(Reason.BAD_TIME, f"the end, {end_s:g} s, is {problem} the start, {start_s:g} s")


def _split_cells(text: str, separator: str) -> list[str]:
    return [cell.strip() for cell in text.split(separator)] if text and not text.isspace() else []


def _show(value: Any) -> str:
    """`value` in a message: on one line, printable and short."""
    text = repr(value if not isinstance(value, str) else value[:LONGEST_ID])
    return text if len(text) <= 80 else text[:79] + "…"


def _line(err: BaseException) -> str:
    """What `err` says, on one line."""
    return " ".join(f"{err}".split())[:300] or type(err).__name__


def _checked_split(split: str) -> str:
    if not _SPLIT.fullmatch(split):
        raise DataError(
            f"{_show(split)} cannot name a split; give --split letters, digits, _, - and ., a letter or digit first"
        )
    return split


def _name(uri: str) -> str:
    """The stem of a path or URL."""
    return stem(unquote(re.split("[?#]", uri)[0]) if _WEB.match(uri) else uri)


def _folder(uri: str) -> str:
    return storage.absolute(uri).rpartition("/")[0]


def _beside(folder: str, path: Any, what: str) -> str:
    """`path`, which a list in `folder` names."""
    if not isinstance(path, str) or not path or _CONTROL.search(path):
        raise ClipError(Reason.BAD_ID, f"{what} is {_show(path)}, not a path")
    scheme, is_uri, rest = path.partition("://")
    if not is_uri:
        return path if path.startswith("/") else f"{folder}/{path}"
    if (scheme := scheme.lower()) not in _SCHEMES | {folder.partition("://")[0]}:
        raise ClipError(Reason.BAD_ID, f"{what} is {_show(path)}; use {', '.join(sorted(_SCHEMES))}, or a path")
    if "?" in rest and scheme not in _OF_THE_WEB:
        raise ClipError(Reason.BAD_ID, f"{what} is {_show(path)}; no options in a row, and a ? in a name is %3F")
    return f"{scheme}://{rest}"


def _tree(folder: str) -> tuple[str, set[str]]:
    root = storage.absolute(folder).rstrip("/")
    try:
        return root, {file.removeprefix(f"{root}/") for file in storage.list_files(root, recursive=True)}
    except (OSError, ValueError) as err:
        raise DataError(f"cannot list the folder {folder}: {_line(err)}") from err


def _read_list(uri: str) -> bytes:
    try:
        return storage.read_bytes(_fetched(uri))
    except (OSError, ValueError) as err:
        raise DataError(f"cannot read {uri}: {_line(err)}") from err


def _fetched(uri: str) -> str:
    """`uri`, or for the name of an official list or a URL the copy of it in the user's cache."""
    url = OFFICIAL_LISTS.get(uri, uri)
    if not _WEB.match(url):
        return uri
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ast-ray"
    safe_basename = re.sub(r"[^A-Za-z0-9_.-]", "_", basename(re.split("[?#]", url)[0]))[-100:]
    copy = cache / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{safe_basename}"
    if not copy.exists():
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                data = response.read()
            if data.lstrip()[:1] in (b"", b"<"):  # a sign-in page must not stay in the cache as the list
                raise ValueError("the answer is a web page or empty")
            storage.write_bytes(copy, data)
        except (OSError, ValueError, http.client.HTTPException) as err:
            raise DataError(f"cannot fetch {url} ({_line(err)}); download it by hand and give its path") from err
    return str(copy)
