"""Reads the audio of one clip out of an archive, in the sandbox. `sources.archives` defines what `member` means.

A module of its own because each process that decodes imports it, and `sources` takes a fifth of a second to import.
"""

import functools
from bisect import bisect_right
from itertools import accumulate
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ast_core.errors import DataError, one_line
from pipeline import storage
from pipeline.parquet import DAMAGE
from pipeline.prepare.clip import ClipError, Reason


class Member(NamedTuple):
    audio: bytes
    num_clipped: int
    """Samples that were beyond full scale before the audio was stored, if the archive records it."""


def read_member(uri: str, member: str) -> Member:
    """Raises ClipError: missing_file, too_large, not_audio, or network for an archive on another machine."""
    kind, *numbers = member.split(" ")
    try:
        if kind == "bytes":
            return Member(_read_range(uri, *map(int, numbers)), 0)
        return _read_row(uri, int(numbers[0]))
    except (FileNotFoundError, PermissionError, DataError) as err:
        raise ClipError(Reason.MISSING_FILE, f"cannot open the archive {uri}: {one_line(err)}") from err
    except MemoryError as err:  # DAMAGE has it too, but a large row group is no damage
        remedy = "" if kind == "bytes" else "; write the file with smaller row groups"
        problem = f"cannot read {member} of {uri}: it takes more memory than a clip may{remedy}"
        raise ClipError(Reason.TOO_LARGE, problem) from err
    except DAMAGE as err:
        reason = Reason.NETWORK if "://" in uri else Reason.NOT_AUDIO
        raise ClipError(reason, f"cannot read {member} of {uri}: {one_line(err)}") from err


def _read_range(uri: str, offset: int, size: int) -> bytes:
    fs, path = storage.resolve(uri)
    with fs.open_input_file(path) as file:
        data: bytes = file.read_at(size, offset)
    if len(data) < size:
        raise ClipError(Reason.MISSING_FILE, f"{uri} ends before its member does; it has changed since it was listed")
    return data


def _read_row(uri: str, row: int) -> Member:
    _, first_rows = _opened(uri)
    group = bisect_right(first_rows, row) - 1
    if row >= first_rows[-1]:
        raise ClipError(Reason.MISSING_FILE, f"{uri} has no row {row}; it has changed since it was listed")
    try:
        audio, num_clipped = _row_group(uri, group)
    except DAMAGE:  # there may be no room for a second row group, which Arrow says in several ways
        if not _row_group.cache_info().currsize:
            raise
        _row_group.cache_clear()
        pa.default_memory_pool().release_unused()
        audio, num_clipped = _row_group(uri, group)
    value = audio[row - first_rows[group]].as_py()
    if not value:
        raise ClipError(Reason.MISSING_FILE, f"row {row} of {uri} contains no audio")
    return Member(value, 0 if num_clipped is None else num_clipped[row - first_rows[group]].as_py() or 0)


@functools.lru_cache(maxsize=2)
def _opened(uri: str) -> tuple[pq.ParquetFile, list[int]]:
    """The file, and the first row of each row group, followed by the number of rows."""
    fs, path = storage.resolve(uri)
    parquet = pq.ParquetFile(fs.open_input_file(path), page_checksum_verification=True)
    sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)]
    return parquet, list(accumulate(sizes, initial=0))


@functools.lru_cache(maxsize=1)  # while a row group is read, the one before is in memory too
def _row_group(uri: str, group: int) -> tuple[pa.ChunkedArray, pa.ChunkedArray | None]:
    """The audio of a row group. It is cached, because consecutive clips are in one row group."""
    parquet, _ = _opened(uri)
    counted = ["num_clipped"] if "num_clipped" in parquet.schema_arrow.names else []
    table = parquet.read_row_group(group, columns=["audio.bytes", *counted], use_threads=False)
    audio = pa.chunked_array([chunk.field("bytes") for chunk in table["audio"].chunks])
    return audio, table["num_clipped"] if counted else None
