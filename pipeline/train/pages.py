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
import pyarrow.parquet as pq

DATA_PAGE, PLAIN = 0, 0

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, _MAP, STRUCT = range(1, 13)
"""Types of Thrift's compact protocol."""


class UnknownLayoutError(Exception):
    """Pages of another kind; a general reader may read them."""


def read_values(source: pa.NativeFile, column: pq.ColumnChunkMetaData) -> np.ndarray:
    """float16 `[values]` of a column chunk of lists, without its nulls and empty lists.

    Raises:
        UnknownLayoutError: also for a page without a checksum.
        ValueError or LookupError: bytes that are no pages, or not those of their checksum.
    """
    if column.compression != "ZSTD" or column.has_dictionary_page or column.physical_type != "FIXED_LEN_BYTE_ARRAY":
        raise UnknownLayoutError(f"{column.compression}, {column.physical_type}")
    size, begin = column.total_compressed_size, column.data_page_offset
    if not 0 <= begin <= begin + size <= source.size():  # before memory is asked for
        raise ValueError(f"{size} bytes from {begin} on are beyond its end")
    chunk = source.read_at(size, begin)
    codec = pa.Codec("zstd")
    pages, position = [], 0
    while position < len(chunk):
        header, position = _page_header(chunk, position)
        compressed = memoryview(chunk)[position : position + header.compressed_bytes]
        if header.num_bytes > column.total_uncompressed_size:  # before memory is asked for
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
    raise UnknownLayoutError(f"a header with a field of Thrift type {kind}")


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
