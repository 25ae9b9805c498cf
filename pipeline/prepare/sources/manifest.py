"""Manifests: lists of files as CSV, TSV or Parquet, or archives that contain the audio (`archive_manifest`)."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ast_core.errors import DataError, one_line
from ast_core.labels import LabelVocabulary
from ast_core.text_files import column_name, read_table
from pipeline import storage
from pipeline.prepare.clip import ClipError, Reason
from pipeline.prepare.sources import archive_manifest
from pipeline.prepare.sources.archive_manifest import Entry
from pipeline.prepare.sources.archives import with_start
from pipeline.prepare.sources.checks import (
    MISSING,
    VIDEO_ID,
    WEB,
    check_split,
    check_times,
    checked_split,
    folder_of,
    media_in,
    name_of,
    seconds,
    show,
    value_of,
    without_query,
)
from pipeline.prepare.sources.label_text import (
    Separator,
    are_zeros_and_ones,
    cells_of,
    indices_as_labels,
    may_be_one_hot_of_two,
    may_name_a_class,
    mids_by_index,
    suspicious_classes,
)
from pipeline.prepare.sources.rows import ClipList, Rows
from pipeline.prepare.sources.split_names import split_or_fold_of
from pipeline.prepare.sources.unread_columns import unread_column_lines
from pipeline.prepare.sources.web_lists import fetched, read_text

COLUMNS = ("path", "url", "labels", "clip_id", "start_s", "end_s", "split")


def read_manifest(
    uri: str, *, vocabulary: LabelVocabulary | None = None, split: str | None = None, indices: bool = True
) -> ClipList:
    """Read a manifest. A list has `path` or `url`, `labels`, and optionally `clip_id`, `start_s`, `end_s`, `split`.

    `split` is for rows without their own. Without `vocabulary` the archives' own one is used, or else the sorted labels
    found. A label that is a number is an index into the vocabulary. It is refused if the vocabulary is made from labels
    found, now or earlier (`indices=False`), because it would mean another class in another list.
    """
    default_split, notes = checked_split(split or "train"), list[str]()
    packed = archive_manifest.find(uri, notes)
    own = archive_manifest.own_labels(uri, packed) if packed else None

    copy = uri if packed else fetched(uri, notes)

    def entries() -> Iterator[Entry]:
        return archive_manifest.entries(uri, packed, own) if packed else _rows_of(uri, copy, notes)

    vocabulary, separator = vocabulary or own, None
    if vocabulary is None:
        indices = False
        vocabulary, separator = _found(uri, entries(), in_archives=bool(packed))
        notes += [f"{uri}: {line}" for line in suspicious_classes(vocabulary.names)]
    by_index = mids_by_index(vocabulary) if indices else {}
    rows = Rows(vocabulary, _on_numbers(vocabulary, by_index, indices=indices))
    folder, remarks = folder_of(uri), _Remarks(uri, split)
    num_rows = num_of_two = 0
    widths = Counter[int]()
    for entry in map(_without_missing, entries()):
        row_split, cells, num_rows = default_split, list[str](), num_rows + 1
        name = str((entry.path or entry.url or entry.stem) if entry.clip_id is None else entry.clip_id)
        try:
            row_split = _split_of(entry, split, default_split)
            entry = remarks.add(entry, row_split)
            cells = cells_of(entry.labels, rows.vocabulary.index_of, separator)
            if entry.lacking:
                raise ClipError(Reason.MISSING_FILE, entry.lacking)
            widths[entry.num_zeros_and_ones] += entry.num_zeros_and_ones > 0
            if indices and are_zeros_and_ones(cells):
                widths[len(cells)] += 1
                if len(cells) == len(vocabulary):
                    raise DataError(
                        f"{uri}, {entry.place}: labels are zeros and ones with a place for each class; {_WRITE_NAMES}"
                    )
            num_of_two += entry.may_be_zeros_and_ones or (
                indices and len(vocabulary) == 2 and may_be_one_hot_of_two(cells)
            )
            cells = indices_as_labels(cells, vocabulary.index_of, by_index) if indices else cells
            start_s = 0.0 if entry.start_s is None else seconds(entry.start_s, "start_s")
            end_s = None if entry.end_s is None else seconds(entry.end_s, "end_s")
            media, media_start_s = _media_of(entry, folder, start_s)
            check_times(start_s, end_s)
            if not isinstance(entry.clip_id, str | int | float | None):
                raise ClipError(Reason.BAD_ID, f"clip_id is {show(entry.clip_id)}, not a text")
            if entry.clip_id is None:
                name = _name_of(entry, media, start_s)
            classes = rows.indices(cells)
            row = (name, row_split, entry.video_id, media, entry.member, media_start_s, start_s, end_s, classes)
            if entry.clip_id is None:
                rows.keep_named(*row, path=_named_by(entry))
            else:
                rows.reserve(name, row_split)
                rows.keep(*row)
        except ClipError as err:
            rows.refuse(name or entry.place, row_split, err, cells, entry.place)
    if num_rows == num_of_two > 1:
        raise DataError(
            f"all rows of {uri} have the labels 0 and 1 of two classes; if these are zeros and ones with a place for "
            f"each class, {_WRITE_NAMES}"
        )
    [(width, num_of_width)] = widths.most_common(1) or [(0, 0)]
    if num_rows > 1 and width > 2 and 2 * num_of_width > num_rows:  # two may be one index twice
        raise DataError(
            f"the labels of {num_of_width:,} of {num_rows:,} rows of {uri} are {width} zeros and ones, but there are "
            f"{len(vocabulary)} classes; if they have a place for each class, {_WRITE_NAMES}"
        )
    return rows.done(uri, dict.fromkeys([*notes, *remarks.lines()]))  # without a vocabulary a list is read twice


_WRITE_NAMES = "write the names or the indices of the classes that are 1"


def _on_numbers(vocabulary: LabelVocabulary, by_index: Mapping[str, str], *, indices: bool) -> str:
    """What the user should know about a number that is no class."""
    if not indices:
        return "for an index, --labels says of which class it is"
    if not by_index:
        return "its classes are called by numbers, so other numbers are not indices"
    return f"its indices are 0 to {len(vocabulary) - 1}"


class _Remarks:
    """What the user should know about the rows of a manifest."""

    def __init__(self, uri: str, split: str | None) -> None:
        self.uri, self.split = uri, split
        self.num_of_other_split = 0
        self.of_archives, self.ignored = Counter[str | None](), Counter[str]()
        """Rows by the split that the names of archives and folders give, or may give."""
        self.of_paths = Counter[str]()
        """Rows by the split that their path names, which is not read."""
        self.num_of_one_key, self.of_one_key = 0, ""
        """Number of keys with several audio files, and the files of the first one."""
        self.num_without_video_id, self.no_video_id = 0, None
        """Number of rows whose `video_id` is none, and the first of these."""
        self.of_videos = Counter[str]()
        """Rows by the video that names them, without a start."""

    def add(self, entry: Entry, split: str) -> Entry:
        """Count a row. Return it without a `video_id` that is none."""
        self.num_of_other_split += bool(self.split) and split != self.split
        if entry.split is None and not self.split:
            if entry.media is not None:
                self.of_archives[entry.file_split] += 1
            elif named := split_or_fold_of(str(entry.path or entry.url or "")):
                self.of_paths[named] += 1
            if len(entry.possible_splits) == 1:
                self.ignored[entry.possible_splits[0]] += 1
            elif entry.possible_splits:
                possible = " or ".join(entry.possible_splits)
                raise DataError(
                    f"{self.uri}: the split of {entry.place} may be {possible}, by its folders' names; give --split"
                )
        if entry.of_one_key:
            self.num_of_one_key += 1
            self.of_one_key = self.of_one_key or entry.of_one_key
        if entry.video_id is None or (isinstance(entry.video_id, str) and VIDEO_ID.fullmatch(entry.video_id)):
            if entry.video_id is not None and entry.clip_id is None and entry.start_s is None:
                self.of_videos[entry.video_id] += 1
            return entry
        self.no_video_id = self.no_video_id if self.num_without_video_id else entry.video_id
        self.num_without_video_id += 1
        return entry._replace(video_id=None)

    def lines(self) -> Iterator[str]:
        if self.num_of_other_split:
            yield (
                f"{self.num_of_other_split:,} rows of {self.uri} have another split than {self.split}, and keep it: "
                "--split is for rows without one"
            )
        if self.of_archives.keys() - {None, "train"}:
            yield f"splits by the names of archives or their folders, in rows: {_counted(self.of_archives)}"
        if self.ignored:
            yield (
                "splits by the names of folders are not used, because not all audio is in such a folder; in rows: "
                f"{_counted(self.ignored)}"
            )
        if len(self.of_paths) > 1:
            yield (
                f"the paths of {self.uri} name splits ({_counted(self.of_paths)}) that are not read; add a column split"
            )
        if self.num_of_one_key:
            yield (
                f"{self.num_of_one_key:,} keys have several audio files ({self.of_one_key}); each is a clip, but video "
                "next to sound is not read"
            )
        if self.of_videos and (num_again := self.of_videos.total() - len(self.of_videos)):
            video_id, num = self.of_videos.most_common(1)[0]
            yield (
                f"{num_again:,} rows of {self.uri} have the video_id of another row and no start_s, {num:,} have "
                f"{show(video_id)} for one; each is a clip of its own"
            )
        if self.num_without_video_id:
            yield (
                f"{self.num_without_video_id:,} rows of {self.uri} have a video_id that is not read, "
                f"{show(self.no_video_id)} for one: it is not 1 to 64 of A-Za-z0-9_-"
            )


def _counted(splits: Counter[Any]) -> str:
    return ", ".join(f"{split or 'no split'} ({num:,})" for split, num in splits.items())


_ZEROS_AND_ONES = {"0", "1", "0.0", "1.0", "0.", "1."}


def _found(uri: str, entries: Iterable[Entry], *, in_archives: bool) -> tuple[LabelVocabulary, str]:
    """The vocabulary made from the labels found, and their separator."""
    found, has_rows = Separator(in_archives=in_archives), False
    for entry in entries:
        has_rows = True
        if not entry.lacking:
            found.add(entry.labels, entry.place)
    if not has_rows:
        raise DataError(f"{uri} has no rows; give a list with at least one clip")
    separator, labels = found.decide(uri)
    if not labels:
        raise DataError(f"no row of {uri} has a label")
    if labels <= _ZEROS_AND_ONES:
        raise DataError(
            f"the labels of {uri} are zeros and ones; if they have a place for each class, write the names of the "
            "classes that are 1; if they are indices, give --labels too"
        )
    names = sorted(filter(may_name_a_class, labels))
    if not 0 < len(names) <= 2**15:
        raise DataError(f"{uri} has {len(names)} different label names; if its labels are indices, give --labels too")
    return LabelVocabulary.from_names(names), separator


def _split_of(entry: Entry, given: str | None, default: str) -> str:
    """The split of a row: its own, the one given, or that of its archive's name."""
    split = entry.split if entry.split is not None or given else entry.file_split
    if split is None:
        return default
    check_split(str(split))
    return str(split)


def _without_missing(entry: Entry) -> Entry:
    """A row whose texts and times without a value are None, whatever the list or its data frame wrote for them."""
    texts = (entry.clip_id, entry.split, entry.path, entry.url, entry.video_id)
    clip_id, split, path, url, video_id = map(value_of, texts)
    clip_id, split = map(_without_point, (clip_id, split))
    start_s, end_s = (
        None if isinstance(time, str) and time in _NO_TIME else time for time in (entry.start_s, entry.end_s)
    )
    return entry._replace(
        clip_id=clip_id, split=split, path=path, url=url, video_id=video_id, start_s=start_s, end_s=end_s
    )


_NO_TIME = MISSING - {"nan", "NaN"}  # these may be the result of a calculation


def _without_point(value: Any) -> Any:
    """17 in place of 17.0. A data frame turns a column of whole numbers into floats if one of its cells is empty."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _media_of(entry: Entry, folder: str, start_s: float) -> tuple[str, float | None]:
    """The media, and the clip's start in it. Audio in an archive is the section itself. If a section's end is known,
    the decoder notices whether the audio is longer, and so the recording.
    """
    if entry.media is not None:
        return entry.media, None if start_s > 0 and entry.end_s is not None else 0.0
    path, url = entry.path, entry.url
    if bool(path) == bool(url):
        raise ClipError(Reason.BAD_ID, "a row needs a path or a url" + (", not both" if path else ""))
    if url and not WEB.fullmatch(str(url)):
        raise ClipError(Reason.BAD_ID, f"{show(url)} is not an http(s) URL")
    return media_in(folder, path or url, "path" if path else "url"), start_s


def _name_of(entry: Entry, media: str, start_s: float) -> str:
    """The clip_id of a row that gives none."""
    if entry.media is not None:
        name = entry.video_id or unicodedata.normalize("NFC", entry.stem)
        return name if entry.start_s is None else with_start(name, start_s)
    name = unicodedata.normalize("NFC", name_of(media))
    return name if entry.start_s is None or not name else f"{name}_{start_s:.3f}"


def _named_by(entry: Entry) -> str:
    """The path that tells the row's clip from others of its name; "" for its media itself.

    Rows with the same video id and start are copies of one section. Without a start, they are parts of one video.
    """
    if entry.video_id is None:
        return entry.inner_path
    return entry.video_id if entry.start_s is not None else f"{os.path.splitext(entry.inner_path)[0]}/{entry.video_id}"


def _rows_of(uri: str, copy: str, notes: list[str]) -> Iterator[Entry]:
    """The rows of a list, which are read from its local copy."""

    def point_out(names: list[str]) -> None:
        notes.extend(unread_column_lines(uri, names, COLUMNS))

    kind = os.path.splitext(without_query(uri))[1].lower()
    if kind not in (".csv", ".tsv", ".parquet"):
        raise DataError(f"{uri} is not a manifest: give a .csv, .tsv, .parquet or .tar, or a folder of the last two")
    if kind == ".parquet":
        yield from _of_parquet(uri, copy, point_out)
        return
    table = partial(
        read_table,
        read_text(copy, uri),
        origin=uri,
        columns=COLUMNS,
        is_header=_is_header,
        needs=NEEDS,
        separators="\t,;|" if kind == ".tsv" else ",;\t|",
    )
    floats = _columns_of_floats(cells for _, cells in table())
    notes += [f"the numbers in the column {column} of {uri} are read without their .0" for column in floats]
    for line, cells in table(on_header=point_out):
        cells |= {column: cells[column].partition(".")[0] for column in floats}
        yield Entry(place=f"line {line}", **{column: cell or None for column, cell in cells.items()})  # type: ignore[arg-type]


_FLOAT = re.compile(r"[0-9]+\.0*")


def _columns_of_floats(rows: Iterable[dict[str, str]]) -> list[str]:
    """Those of the columns `clip_id` and `split` of which each value is a whole number that was written as a float.

    The first rows usually show that there is no such column, and the others are not read.
    """
    possible, found = {"clip_id", "split"}, set[str]()
    for cells in rows:
        values = {column: value_of(cells[column]) for column in possible & cells.keys()}
        possible = {column for column, value in values.items() if value is None or _FLOAT.fullmatch(value)}
        found |= {column for column in possible if values[column] is not None}
        if not possible:
            break
    return sorted(found & possible)


NEEDS = "the columns `labels` and `path` or `url`, or `audio` with bytes"


def _is_header(names: set[str]) -> bool:
    return "labels" in names and not names.isdisjoint(("path", "url"))


def _of_parquet(uri: str, copy: str, on_header: Callable[[list[str]], None]) -> Iterator[Entry]:
    row = 0
    try:
        fs, path = storage.resolve(copy)
        with pq.ParquetFile(fs.open_input_file(path)) as file:
            names = file.schema_arrow.names
            lowered = [column_name(name).lower() for name in names]
            if not _is_header(set(lowered)):
                raise DataError(f"{uri} needs {NEEDS}; it has: {show(', '.join(names) or 'none')}")
            if twice := next((column for column in COLUMNS if lowered.count(column) > 1), None):
                raise DataError(f"{uri} has the column {twice} twice; rename or remove one of them")
            on_header(lowered)
            present = {column: names[lowered.index(column)] for column in COLUMNS if column in lowered}
            for batch in file.iter_batches(columns=list(present.values())):
                columns = (batch[name].to_pylist() for name in present.values())
                for values in zip(*columns, strict=True):
                    row += 1
                    yield Entry(**dict(zip(present, values, strict=True)), place=f"row {row}")
    except (OSError, UnicodeDecodeError, pa.ArrowException) as err:
        raise DataError(f"cannot read the manifest {uri}: {one_line(err)}") from err
