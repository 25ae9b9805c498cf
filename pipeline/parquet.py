"""Parquet files with a checksum on every page, and errors that name a damaged file.

Headers and footers have no checksums. Files that must not change at all also have a SHA-256 that is recorded elsewhere.
"""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from ast_core.errors import DataError, one_line
from pipeline import storage
from pipeline.thrift import Fields, read_struct

CHECKSUMS: dict[str, Any] = {"write_page_checksum": True}
"""Options of every Parquet file that we write."""

DAMAGE = (pa.ArrowException, OSError, ValueError, LookupError, ArithmeticError, MemoryError)
"""Errors that Arrow raises for damaged files. MemoryError is one because sizes are read from the file."""

T = TypeVar("T")


def open_checked(source: pa.NativeFile, **options: Any) -> pq.ParquetFile:
    """A reader that verifies the checksums of the pages that have one."""
    return pq.ParquetFile(source, page_checksum_verification=True, **options)


def read_table(
    uri: str, columns: list[str] | None = None, *, sha256: str | None = None, remedy: str = "restore it", **options: Any
) -> pa.Table:
    """All rows of a small file.

    Args:
        sha256: The SHA-256 of the whole file, if it is known.
        remedy: What the user can do about a damaged file.

    Raises:
        DataError: the file does not exist, is damaged, has another SHA-256, or lacks a column.
    """
    whole = storage.read_bytes(uri)
    if sha256 is not None and hashlib.sha256(whole).hexdigest() != sha256:
        raise DataError(f"{uri} is damaged, or another file than was recorded (its SHA-256 differs); {remedy}")
    try:
        with open_checked(pa.BufferReader(whole), **options) as file:
            if missing := sorted(set(columns or ()) - set(file.schema_arrow.names)):
                raise DataError(f"{uri} lacks the column {missing[0]}; {remedy}")
            return file.read(columns)
    except DAMAGE as err:
        raise DataError(f"{uri} is damaged or no Parquet file ({one_line(err)}); {remedy}") from err


def parse_file(uri: str, parse: Callable[[pa.NativeFile], T], *, damaged: str) -> T:
    """The result of `parse` on an open file, of which it need not read all.

    Raises:
        DataError: the file does not exist, or it is damaged. Then the text is `damaged`, with `{}` for the reason.
        OSError: the file cannot be read.
    """
    fs, path = storage.resolve(uri)
    try:
        with fs.open_input_file(path) as file:
            return parse(file)
    except FileNotFoundError as err:
        raise DataError(f"there is no file {uri}") from err
    except DAMAGE:
        return parse_from_memory(uri, parse, damaged=damaged)


def parse_from_memory(uri: str, parse: Callable[[pa.NativeFile], T], *, damaged: str) -> T:
    """The result of `parse` on a copy of a file in memory.

    This tells damage from storage that does not answer, for both of which Arrow raises OSError: a file whose bytes can
    be read but not parsed is damaged. Raises as `parse_file`.
    """
    whole = storage.read_bytes(uri)
    try:
        with pa.BufferReader(whole) as file:
            return parse(file)
    except DAMAGE as err:
        raise DataError(damaged.format(one_line(err))) from err


class ColumnChunk(NamedTuple):
    """What a footer says of a column of a row group."""

    name: str
    """Its path in the schema, with dots."""
    physical_type: int
    codec: int
    num_values: int
    compressed_bytes: int
    uncompressed_bytes: int
    data_page_offset: int
    dictionary_page_offset: int | None
    null_count: int | None
    """None where the file has no statistics of the column."""

    @property
    def begin(self) -> int:
        offsets = (self.dictionary_page_offset, self.data_page_offset)
        return min(offset for offset in offsets if offset is not None)

    @property
    def end(self) -> int:
        return self.begin + self.compressed_bytes


_OF_CHUNK: Fields = {1: int, 3: [bytes], 4: int, 5: int, 6: int, 7: int, 9: int, 11: int, 12: {3: int}}
_OF_FOOTER: Fields = {4: [{1: [{3: _OF_CHUNK}]}]}
"""The row groups of a file, their columns, and the metadata of each."""


def column_chunks(source: pa.NativeFile) -> list[list[ColumnChunk]]:
    """The column chunks of each row group.

    pyarrow's own `RowGroupMetaData.column` is not asked: some flipped bits of a footer make it end the process.

    Raises:
        ValueError or LookupError: bytes that are no footer.
    """
    size = source.size()
    tail = source.read_at(8, max(0, size - 8))
    footer_bytes = int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or footer_bytes + 8 > size:
        raise ValueError("no footer of a Parquet file")
    footer, _ = read_struct(source.read_at(footer_bytes, size - 8 - footer_bytes), 0, _OF_FOOTER)
    return [[_column_chunk(column[3]) for column in group[1]] for group in footer[4]]


def _column_chunk(fields: dict[int, Any]) -> ColumnChunk:
    return ColumnChunk(
        name=b".".join(fields[3]).decode(),
        physical_type=fields[1],
        codec=fields[4],
        num_values=fields[5],
        compressed_bytes=fields[7],
        uncompressed_bytes=fields[6],
        data_page_offset=fields[9],
        dictionary_page_offset=fields.get(11),
        null_count=fields.get(12, {}).get(3),
    )
