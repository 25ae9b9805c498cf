"""The fbanks of a row group straight from its Parquet pages, as one array.

A general reader also decodes the repetition level of each of the 128,000 values of a clip, to learn what `num_frames`
says already; that takes it twice as long as decompressing them. The pages are as `pq.write_table` makes them: data
pages of version 1, PLAIN values after the run-length encoded levels, each with the CRC-32 of its compressed bytes.
Formats: https://parquet.apache.org/docs/file-format/data-pages and thrift-compact-protocol.md of Apache Thrift.
"""

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

FIXED_LEN_BYTE_ARRAY, ZSTD = 7, 6
"""Numbers of a physical type and a codec in a footer."""

DATA_PAGE, PLAIN = 0, 0

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, _MAP, STRUCT = range(1, 13)
"""Types of Thrift's compact protocol."""


class UnknownLayoutError(Exception):
    """Pages of another kind; a general reader may read them."""


@dataclass(frozen=True)
class ColumnChunk:
    """Where a column of a row group lies, by the footer."""

    name: str
    physical_type: int
    codec: int
    compressed_bytes: int
    uncompressed_bytes: int
    data_page_offset: int
    dictionary_page_offset: int | None

    @property
    def begin(self) -> int:
        offsets = (self.dictionary_page_offset, self.data_page_offset)
        return min(offset for offset in offsets if offset is not None)

    @property
    def end(self) -> int:
        return self.begin + self.compressed_bytes


def column_chunks(source: pa.NativeFile) -> list[list[ColumnChunk]]:
    """The column chunks of each row group.

    pyarrow's own `RowGroupMetaData.column` is not asked: some flipped bits of a footer make it end the process.

    Raises:
        ValueError, LookupError or UnknownLayoutError: bytes that are no footer.
    """
    size = source.size()
    tail = source.read_at(8, max(0, size - 8))
    footer_bytes = int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or footer_bytes + 8 > size:
        raise ValueError("no footer of a Parquet file")
    footer, _ = _struct(source.read_at(footer_bytes, size - 8 - footer_bytes), 0)
    return [[_column_chunk(column[3]) for column in group[1]] for group in footer[4]]


def _column_chunk(fields: Any) -> ColumnChunk:
    numbers = [fields.get(number) for number in (1, 4, 7, 6, 9, 11)]
    if not isinstance(fields[3], list) or not all(isinstance(n, int) for n in numbers[:5]):
        raise ValueError("a column chunk without its place")
    return ColumnChunk(b".".join(fields[3]).decode(), *numbers)


def read_values(source: pa.NativeFile, column: ColumnChunk) -> np.ndarray:
    """float16 `[values]` of a column chunk of lists, without its nulls and empty lists.

    Raises:
        UnknownLayoutError: also for a page without a checksum.
        ValueError or LookupError: bytes that are no pages, or not those of their checksum.
    """
    has_dictionary = column.dictionary_page_offset is not None
    if column.codec != ZSTD or has_dictionary or column.physical_type != FIXED_LEN_BYTE_ARRAY:
        raise UnknownLayoutError(f"codec {column.codec}, type {column.physical_type}")
    size, begin = column.compressed_bytes, column.data_page_offset
    if not 0 <= begin <= begin + size <= source.size():  # before memory is asked for
        raise ValueError(f"{size} bytes from {begin} on are beyond its end")
    chunk = source.read_at(size, begin)
    codec = pa.Codec("zstd")
    pages, position = [], 0
    while position < len(chunk):
        header, position = _page_header(chunk, position)
        compressed = memoryview(chunk)[position : position + header.compressed_bytes]
        if header.num_bytes > column.uncompressed_bytes:  # before memory is asked for
            raise ValueError(f"a page of {header.num_bytes} bytes")
        if zlib.crc32(compressed) != header.crc32:
            raise ValueError(f"a page before byte {begin + position} is not that of its checksum")
        try:
            page = codec.decompress(compressed, header.num_bytes)
        except OSError as err:  # Arrow's word for it, though no file is read
            raise ValueError(str(err)) from err
        position += header.compressed_bytes
        pages.append(np.frombuffer(page, np.float16, offset=_levels_end(page)))
    return pages[0] if len(pages) == 1 else np.concatenate(pages)


def _levels_end(page: pa.Buffer) -> int:
    view, position = memoryview(page), 0
    for _ in ("repetition", "definition"):  # lists have levels of both kinds
        position += 4 + int.from_bytes(view[position : position + 4], "little")
    return position


@dataclass(frozen=True)
class _PageHeader:
    num_bytes: int
    compressed_bytes: int
    crc32: int


def _page_header(chunk: bytes, position: int) -> tuple[_PageHeader, int]:
    """The header at a position, and the position after it."""
    fields, position = _struct(chunk, position)
    data_page = fields.get(5)
    if fields.get(1) != DATA_PAGE or not isinstance(data_page, dict) or data_page.get(2) != PLAIN:
        raise UnknownLayoutError(f"a page of type {fields.get(1)}")
    if 4 not in fields:
        raise UnknownLayoutError("a page without a checksum")
    if fields[2] < 0 or fields[3] < 0:
        raise ValueError(f"a page of {fields[2]} bytes, of {fields[3]} when compressed")
    return _PageHeader(num_bytes=fields[2], compressed_bytes=fields[3], crc32=fields[4] & 0xFFFFFFFF), position


def _struct(data: bytes, position: int) -> tuple[dict[int, Any], int]:
    """Fields by number."""
    fields: dict[int, Any] = {}
    number = 0
    while (head := data[position]) != 0:
        position += 1
        kind, delta = head & 0x0F, head >> 4
        if delta:
            number += delta
        else:
            number, position = _varint(data, position)
            number = _signed(number)
        fields[number], position = _value(data, position, kind)
    return fields, position + 1


def _value(data: bytes, position: int, kind: int) -> tuple[Any, int]:
    if kind in (TRUE, FALSE):
        return kind == TRUE, position
    if kind in (I16, I32, I64):
        value, position = _varint(data, position)
        return _signed(value), position
    if kind == BINARY:
        size, position = _varint(data, position)
        return data[position : position + size], position + size
    if kind == STRUCT:
        return _struct(data, position)
    if kind in (LIST, SET):
        return _list(data, position)
    if kind == BYTE:
        return data[position], position + 1
    if kind == DOUBLE:
        return data[position : position + 8], position + 8
    raise UnknownLayoutError(f"a header with a field of Thrift type {kind}")


def _list(data: bytes, position: int) -> tuple[list[Any], int]:
    head, position = data[position], position + 1
    size, kind = head >> 4, head & 0x0F
    if size == 15:
        size, position = _varint(data, position)
    if size > len(data) - position:  # an element takes a byte at least
        raise ValueError(f"a list of {size} elements in {len(data)} bytes")
    values = []
    for _ in range(size):
        # In a list a truth value is a byte; as a field it is the field's type.
        value, position = _value(data, position, BYTE if kind in (TRUE, FALSE) else kind)
        values.append(value)
    return values, position


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _signed(value: int) -> int:
    return (value >> 1) ^ -(value & 1)
