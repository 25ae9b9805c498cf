"""What is tagged: recordings from files, folders, globs, archives, lists and URLs, and clips of prepared data sets.

`pipeline.recording_names` says how recordings are named.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from posixpath import basename
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ast_core.errors import ConfigError, DataError
from ast_core.text_files import read_table
from pipeline import storage
from pipeline.dataset import PreparedDataset, dataset_json
from pipeline.prepare.clip import ClipError, Reason
from pipeline.prepare.sources import archives
from pipeline.prepare.sources.archive_manifest import PACKED, is_folder, is_glob, matching_files
from pipeline.prepare.sources.checks import MAX_START_S, WEB, folder_of, media_in, seconds, show, value_of
from pipeline.prepare.sources.locate import is_media, passed_over_lines
from pipeline.prepare.sources.own_outputs import without_outputs
from pipeline.prepare.sources.unread_columns import unread_column_lines
from pipeline.prepare.sources.web_lists import fetched, read_text
from pipeline.recording_names import recording_name
from pipeline.redaction import without_secrets

RECORDINGS = pa.schema(
    [
        pa.field("recording", pa.string(), nullable=False),  # its name
        pa.field("media", pa.string(), nullable=False),
        pa.field("member", pa.string()),  # position in `media` if that is an archive
        pa.field("start_s", pa.float64(), nullable=False),  # of the section
        pa.field("end_s", pa.float64()),
        pa.field("is_own", pa.bool_(), nullable=False),  # named on the command line: its host may be private
    ]
)

REFUSED = pa.schema([("recording", pa.string()), ("reason", pa.string()), ("message", pa.string())])
"""Rows of lists that name no recording."""

LISTS = (".csv", ".tsv")
COLUMNS = ("path", "url", "start_s", "end_s")
NEEDS = "a column `path` or `url`"


@dataclass
class Inputs:
    recordings: pa.Table
    refused: pa.Table
    datasets: list[tuple[PreparedDataset, list[str]]] = field(default_factory=list)
    """Prepared data sets, with their splits to tag."""
    notes: list[str] = field(default_factory=list)
    """Lines for the user."""
    lists: list[str] = field(default_factory=list)
    """The names of the lists that were read, without secrets."""


def find_inputs(uris: Sequence[str], splits: Sequence[str] | None = None) -> Inputs:
    """Find everything to tag, without opening a recording.

    Args:
        splits: the splits of prepared data sets; None takes all of them.

    Raises:
        DataError: an input does not exist, contains nothing to tag, or cannot be read.
        ConfigError: `splits` are given without a prepared data set.
    """
    found = _Found()
    for uri in uris:
        before, num_notes = found.count, len(found.notes)
        _add(uri, splits, found)
        if found.count == before:
            why = f" ({found.notes[-1]})" if len(found.notes) > num_notes else ""
            raise DataError(
                f"{uri} contains no recording{why}; give audio, archives or lists of it, or a prepared data set"
            )
    if splits and not found.datasets:
        raise ConfigError("--split is for prepared data sets, and none is given")
    if found.num_repeated:
        found.notes.append(f"{found.num_repeated:,} recordings are given more than once, and tagged once")
    recordings = pa.Table.from_pylist(list(found.recordings.values()), schema=RECORDINGS)
    return Inputs(
        recordings, pa.Table.from_pylist(found.refused, schema=REFUSED), found.datasets, found.notes, found.lists
    )


@dataclass
class _Found:
    recordings: dict[str, dict[str, Any]] = field(default_factory=dict)
    refused: list[dict[str, Any]] = field(default_factory=list)
    datasets: list[tuple[PreparedDataset, list[str]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lists: list[str] = field(default_factory=list)
    num_repeated: int = 0

    @property
    def count(self) -> int:
        return len(self.recordings) + len(self.refused) + len(self.datasets) + self.num_repeated

    def add(
        self,
        media: str,
        member: str | None = None,
        *,
        name_in_archive: str | None = None,
        start_s: float = 0.0,
        end_s: float | None = None,
        is_own: bool = False,
    ) -> None:
        name = recording_name(media, start_s, end_s, member=name_in_archive)
        if name in self.recordings:
            self.num_repeated += 1
            return
        row = {"recording": name, "media": media, "member": member, "start_s": start_s, "end_s": end_s}
        self.recordings[name] = row | {"is_own": is_own}


def _add(uri: str, splits: Sequence[str] | None, found: _Found) -> None:
    if not uri.strip():  # as of a variable of the shell that is not set
        raise ConfigError("a path of --input is empty")
    if not storage.is_text(uri):
        raise ConfigError(f"--input {uri!a} is not UTF-8, as names of recordings are; rename it")
    if WEB.match(uri):
        _add_list(uri, found) if _is_list(uri) else found.add(uri, is_own=True)
    elif is_glob(uri) and _is_list(uri):
        for listed in matching_files(uri)[1]:
            _add_list(listed, found)
    elif is_glob(uri):
        _add_files(*matching_files(uri), found)
    elif is_folder(uri) and storage.exists(dataset_json(uri)):
        _add_dataset(uri, splits, found)
    elif is_folder(uri):
        files = storage.list_files(storage.absolute(uri), recursive=True)
        _add_files(files, files, found)
    elif not storage.exists(uri):
        raise DataError(f"there is no file or folder {uri}; see --input")
    elif _is_list(uri) or (uri.lower().endswith(".parquet") and not _has_audio(uri)):
        _add_list(uri, found)
    elif archives.is_archive(uri):
        _add_archives([storage.absolute(uri)], found)
    elif PACKED.fullmatch(uri):
        raise DataError(f"{uri} is packed or compressed as a whole; unpack it, and give its folder")
    elif uri.lower().endswith(".txt"):
        raise DataError(f"{uri} is no recording; a list of them ends in .csv, .tsv or .parquet")
    else:
        found.add(storage.absolute(uri))


def _add_files(files: Sequence[str], wanted: Sequence[str], found: _Found) -> None:
    """The media and archives among the files of a folder, without what a preparation has written there."""
    candidates = [file for file in wanted if is_media(file) or archives.is_archive(file)]
    sources, notes = without_outputs(files, candidates)
    found.notes += notes
    if packed := list(filter(PACKED.fullmatch, wanted)):
        found.notes.append(f"not read: {len(packed):,} packed files, {packed[0]} for one; unpack them")
    found.notes += passed_over_lines(file for file in wanted if not PACKED.fullmatch(file))
    for file in filter(is_media, sources):
        found.add(file)
    _add_archives(list(filter(archives.is_archive, sources)), found)


def _add_archives(uris: Sequence[str], found: _Found) -> None:
    for uri, members in zip(uris, archives.ahead(_members, uris), strict=True):
        if isinstance(members, archives.OtherAudioError):
            found.notes.append(f"not read: {members}")
            continue
        for member, name in members:
            found.add(uri, member, name_in_archive=name)


def _members(uri: str) -> list[tuple[str, str]] | archives.OtherAudioError:
    """Position and name of each recording in an archive. Names that repeat have their row as a suffix."""
    if uri.lower().endswith(".tar"):
        members = [m for m in archives.tar_members(uri) if is_media(m.name) and storage.is_text(m.name)]
        last = {m.name: m for m in members}  # `tar -r` appends a file again under the same name
        return [(archives.bytes_member(m.offset, m.size), m.name) for m in last.values()]
    try:
        with archives.open_parquet(uri) as parquet:
            if not archives.has_audio(parquet, uri):
                return []
            rows = list(archives.small_rows(parquet, ["clip_id"]))
    except archives.OtherAudioError as err:
        return err
    names: list[tuple[str, str]] = []
    seen: set[str] = set()
    for number, row in enumerate(rows):
        given = row.get("clip_id") or row["path"] or f"row {number}"
        name = f"{given} row {number}" if given in seen else str(given)
        seen.add(name)
        names.append((archives.row_member(number), name))
    return names


def _add_dataset(uri: str, splits: Sequence[str] | None, found: _Found) -> None:
    data = PreparedDataset.open(uri)
    there = list(data.info["splits"])
    if unknown := sorted({*(splits or ())} - {*there}):
        raise ConfigError(f"{uri} has no split {unknown[0]}; it has: {', '.join(there)}")
    found.datasets.append((data, list(splits or there)))


def _is_list(uri: str) -> bool:
    path = re.split("[?#]", uri)[0] if "://" in uri else uri
    return path.lower().endswith(LISTS)


def _has_audio(uri: str) -> bool:
    with archives.open_parquet(uri) as parquet:
        return archives.has_audio(parquet, uri)


def _add_list(uri: str, found: _Found) -> None:
    """The recordings that a CSV, TSV or Parquet list names. Relative paths are relative to the list."""
    folder = folder_of(uri)
    list_name = without_secrets(uri if WEB.match(uri) else storage.absolute(uri))
    found.lists.append(list_name)
    for place, row in _rows(uri, found.notes):
        path, url = value_of(row.get("path")), value_of(row.get("url"))
        try:
            if bool(path) == bool(url):
                raise ClipError(Reason.BAD_ID, "a row needs a path or a url" + (", not both" if path else ""))
            if url and not WEB.fullmatch(str(url)):
                raise ClipError(Reason.BAD_ID, f"{show(url)} is not an http(s) URL")
            start_s = seconds(row["start_s"], "start_s") if _is_given(row.get("start_s")) else 0.0
            end_s = seconds(row["end_s"], "end_s") if _is_given(row.get("end_s")) else None
            if not 0 <= start_s <= MAX_START_S or (end_s is not None and end_s <= start_s):
                raise ClipError(Reason.BAD_TIME, f"a section from {start_s:g} s to {end_s} s")
            media = media_in(folder, path or url, "path" if path else "url")
            found.add(media, start_s=start_s, end_s=end_s)
        except ClipError as err:
            found.refused.append(
                {"recording": f"{list_name}: {place}", "reason": str(err.reason), "message": err.message}
            )


def _is_given(cell: Any) -> bool:
    return cell is not None and cell != ""


def _rows(uri: str, notes: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    copy = fetched(uri, notes)
    if uri.lower().endswith(".parquet"):
        fs, path = storage.resolve(copy)
        with fs.open_input_file(path) as file, pq.ParquetFile(file) as parquet:
            names = {name.strip().lower(): name for name in parquet.schema_arrow.names}
            if names.keys().isdisjoint(("path", "url")):
                raise DataError(f"{uri} needs {NEEDS}, or `audio` with bytes; it has: {', '.join(names) or 'none'}")
            present = {column: names[column] for column in COLUMNS if column in names}
            number = 0
            for batch in parquet.iter_batches(columns=list(present.values())):
                for row in batch.rename_columns(list(present)).to_pylist():
                    number += 1
                    yield f"row {number} of {basename(uri)}", row
        return
    rows = read_table(
        read_text(copy, uri),
        origin=uri,
        columns=COLUMNS,
        is_header=lambda header: not header.isdisjoint(("path", "url")),
        needs=NEEDS,
        on_header=lambda names: notes.extend(unread_column_lines(uri, names, COLUMNS, all_others=False)),
    )
    for line, cells in rows:
        yield f"line {line}", dict(cells)
