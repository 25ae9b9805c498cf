"""Archives of audio: Parquet files as written by Hugging Face `datasets`, and tars as in WebDataset.

The position of a clip in an archive is its `member`, a short text next to the archive's URI. Its numbers are padded
with zeros, so that members sort by position.

| archive   | member                     | the audio is                                                         |
|-----------|----------------------------|----------------------------------------------------------------------|
| `.parquet`| `row 000000000017`         | `audio.bytes` of that row of the file, counted from 0                |
| `.tar`    | `bytes 000000001536 204800`| 204,800 bytes from offset 1,536 on                                   |

An archive is listed only by its small columns or its headers, never by its audio. Tars that are compressed as a whole
cannot be read from the middle, so they are refused.
"""

import io
import json
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from posixpath import basename, splitext
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ast_core.errors import DataError, one_line
from ast_core.text_files import decode_text
from pipeline import storage
from pipeline.parquet import DAMAGE, column_chunks

T = TypeVar("T")

SUFFIXES = (".parquet", ".tar")

THREADS = 16
"""Number of archives that are listed at a time. Most of the time is spent waiting for storage."""

READ_AHEAD_BYTES = 1 << 14
"""A tar's small members are next to their audio's header, so one request of this size reads both."""

MAX_SIDECAR_BYTES = 1 << 20
"""Limit of a JSON file next to a clip."""


def is_archive(path: str) -> bool:
    return path.lower().endswith(SUFFIXES)


ROW = "row "


def row_member(row: int) -> str:
    return f"{ROW}{row:012d}"


def bytes_member(offset: int, size: int) -> str:
    return f"bytes {offset:012d} {size}"


class TarMember(NamedTuple):
    name: str
    offset: int
    size: int
    sidecar: Any
    """The content of a `.json` member, {"label": …} for the only class in a `.cls` member, None for any other."""


def tar_members(uri: str, *, sidecars: bool = False) -> Iterator[TarMember]:
    """The files of a tar according to its headers; with `sidecars`, also the contents of its JSON files.

    Raises:
        DataError: the file cannot be opened, is not an uncompressed tar, or is damaged.
    """
    try:
        fs, path = storage.resolve(uri)
        with (
            fs.open_input_file(path) as raw,
            io.BufferedReader(raw, READ_AHEAD_BYTES) as file,
            tarfile.open(fileobj=file, mode="r:") as tar,  # names that are not UTF-8 get lone surrogates
        ):
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # otherwise it remembers all of them
                if info.isreg() and not info.issparse() and not storage.is_stray(info.name):
                    is_sidecar = info.name.lower().endswith((".json", ".cls"))
                    sidecar = _sidecar(tar, info) if sidecars and is_sidecar else None
                    yield TarMember(info.name, info.offset_data, info.size, sidecar)
            _check_end(file, tar.offset)
    except FileNotFoundError as err:
        raise DataError(f"there is no file {uri}") from err
    except (OSError, ValueError, tarfile.TarError) as err:
        raise DataError(
            f"{uri} is no tar or damaged ({one_line(err)}); fetch it again, and unpack it if it is compressed"
        ) from err


def _check_end(file: BinaryIO, offset: int) -> None:
    """Raise ValueError if anything but zeros follows the last member: tarfile takes a damaged header for the end."""
    file.seek(offset)
    while block := file.read(READ_AHEAD_BYTES):
        if block.count(0) < len(block):
            raise ValueError(f"there are other bytes behind byte {offset:,}, where its list of members ends")


def _sidecar(tar: tarfile.TarFile, info: tarfile.TarInfo) -> Any:
    """Parse a sidecar; None if it is not valid. Its clip then has no label, and is refused for that."""
    file = tar.extractfile(info)
    if file is None or info.size > MAX_SIDECAR_BYTES:
        return None
    try:
        text = decode_text(file.read(), info.name)
        if info.name.lower().endswith(".json"):
            return json.loads(text)
        text = text.strip()
        if text.isdecimal():
            return {"label": int(text)}
        return {"label": text if text.startswith(("[", "(", "{", "'", '"')) else [text]}  # a list in text may be one
    except (DataError, ValueError, RecursionError):
        return None


@contextmanager
def open_parquet(uri: str) -> Iterator[pq.ParquetFile]:
    """Raises DataError if the file does not exist or is damaged."""
    try:
        fs, path = storage.resolve(uri)
        with fs.open_input_file(path) as file, pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            yield parquet
    except FileNotFoundError as err:
        raise DataError(f"there is no file {uri}") from err
    except DAMAGE as err:
        raise DataError(f"cannot read {uri} ({one_line(err)}); if it is damaged, fetch it again") from err


class OtherAudioError(DataError):
    """A Parquet file whose column `audio` has another type. In a folder it is skipped with a line for the user."""


def has_audio(parquet: pq.ParquetFile, uri: str) -> bool:
    """Whether a Parquet file has a column `audio` with bytes.

    Raises:
        OtherAudioError: the column has another type, or contains only paths.
    """
    schema = parquet.schema_arrow
    if "audio" not in schema.names:
        return False
    kind = schema.field("audio").type
    if not (pa.types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}):
        raise OtherAudioError(
            f"the column `audio` of {uri} is {kind}, not struct<bytes, path> as Hugging Face's Audio is"
        )
    if len(parquet.schema_arrow) and parquet.metadata.num_rows and _all_null(uri, "audio.bytes"):
        raise OtherAudioError(
            f"{uri} contains paths of audio files, not their bytes; embed them (datasets: embed_external_files)"
        )
    return True


def _all_null(uri: str, leaf: str) -> bool:
    """Whether a column is all null according to the statistics; False without statistics."""
    fs, path = storage.resolve(uri)
    with fs.open_input_file(path) as file:
        chunks = [chunk for group in column_chunks(file) for chunk in group if chunk.name == leaf]
    return all(chunk.null_count is not None and chunk.null_count >= chunk.num_values for chunk in chunks)


@dataclass(frozen=True)
class Archive:
    """What is kept in memory of a listed archive."""

    uri: str
    num_members: int
    ranges: np.ndarray | None
    """`[members, 2]`: offset and size in a tar; None in Parquet, whose members are its rows."""

    def member(self, i: int) -> str:
        return row_member(i) if self.ranges is None else bytes_member(*self.ranges[i].tolist())


class Names(NamedTuple):
    """The names of an archive's members. A member may have several."""

    names: pa.Array
    of: np.ndarray
    """`[names]`: the member of each name."""


def list_archive(uri: str, is_media: Callable[[str], bool]) -> tuple[Archive, Names] | None:
    """List the audio in an archive by name. A Parquet file without a column `audio` gives None.

    The name of a tar's member is its file name without folder and suffix. `row_names` gives those of a Parquet row.
    """
    if uri.lower().endswith(".tar"):
        members = [m for m in tar_members(uri) if is_media(m.name) and storage.is_text(m.name)]
        ranges = np.array([(member.offset, member.size) for member in members], np.int64).reshape(-1, 2)
        names = pa.array([_stem(member.name) for member in members], pa.string())
        return Archive(uri, len(members), ranges), Names(names, np.arange(len(members)))
    with open_parquet(uri) as parquet:
        if not has_audio(parquet, uri):
            return None
        pairs = [(row, name) for row, values in enumerate(small_rows(parquet)) for name in row_names(values)]
        names = pa.array([name for _, name in pairs], pa.string())
        of = np.array([row for row, _ in pairs], np.int32)
        return Archive(uri, parquet.metadata.num_rows, None), Names(names, of)


_NAMING = ("clip_id", "video_id", "start_s")


def small_rows(parquet: pq.ParquetFile, columns: Iterable[str] = _NAMING) -> Iterator[dict[str, Any]]:
    """These columns of every row, as far as the file has them in any case, and the `path` of its audio."""
    names = {name.strip().lower(): name for name in reversed(parquet.schema_arrow.names)}
    present = {column: names[column] for column in columns if column in names}
    for batch in parquet.iter_batches(batch_size=4096, columns=[*present.values(), "audio.path"]):
        for row in batch.to_pylist():
            audio = row["audio"]
            found = {column: row[name] for column, name in present.items()}
            yield found | {"path": audio["path"] if audio else None}


def row_names(row: dict[str, Any]) -> list[str]:
    """The names of a Parquet row: `video_id`, the stem of `audio.path` and `clip_id`.

    If the row has a `start_s`, its audio is a section that was cut out, and each name becomes `NAME_START`. If
    `start_s` is not a number, the row has no name.
    """
    start_s = row.get("start_s")
    if not isinstance(start_s, int | float | None):
        return []
    names = [row.get("video_id"), _stem(row["path"]) if row["path"] else None, row.get("clip_id")]
    texts = [name for name in names if isinstance(name, str) and name]
    return list(dict.fromkeys(texts if start_s is None else (with_start(name, start_s) for name in texts)))


def with_start(name: str, start_s: float) -> str:
    """`NAME_START` with three decimals, unless `name` already ends in that start."""
    stem, _, last = name.rpartition("_")
    try:
        has_it = bool(stem) and float(last) == start_s
    except ValueError:
        has_it = False
    return f"{stem if has_it else name}_{start_s:.3f}"


def ahead(work: Callable[[str], T], uris: Iterable[str]) -> Iterator[T]:
    """`work` for every URI, in order, by threads that work a few URIs ahead of the reader."""
    with ThreadPoolExecutor(THREADS) as pool:
        running: deque[Future[T]] = deque()
        try:
            for uri in uris:
                running.append(pool.submit(work, uri))
                if len(running) > THREADS:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def first_rows(uri: str) -> list[int]:
    """The first row of each row group of a Parquet file; [0] if the file cannot be read now."""
    try:
        with open_parquet(uri) as parquet:
            sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)]
    except DataError:
        return [0]  # its clips will fail with the reason
    return list(accumulate(sizes, initial=0))[:-1] or [0]


def _stem(path: str) -> str:
    return splitext(basename(path))[0]
