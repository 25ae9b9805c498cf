"""The fbanks of a row group straight from its Parquet pages, as one array.

A general reader also decodes the repetition level of each of the 128,000 values of a clip, to learn what `num_frames`
says already; that takes it twice as long as decompressing them. The pages are as `pq.write_table` makes them: data
pages of version 1, PLAIN values after the run-length encoded levels, each with the CRC-32 of its compressed bytes.
The format: https://parquet.apache.org/docs/file-format/data-pages.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

try:
    from zlib_ng.zlib_ng import crc32  # a quarter of the time: zlib's takes a seventh of what reading a clip does
except ImportError:  # on a bare GPU machine
    from zlib import crc32

from pipeline.parquet import ColumnChunk
from pipeline.thrift import Fields, read_struct

FIXED_LEN_BYTE_ARRAY, ZSTD = 7, 6
"""Numbers of a physical type and a codec in a footer."""

DATA_PAGE, PLAIN = 0, 0

HEADER: Fields = {1: int, 2: int, 3: int, 4: int, 5: {2: int}}
"""What is read of a page header: its type, its sizes, its checksum, and the encoding of a data page."""


class UnknownLayoutError(Exception):
    """Pages of another kind; a general reader may read them."""


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
        if crc32(compressed) != header.crc32:
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
    fields, position = read_struct(chunk, position, HEADER)
    if fields[1] != DATA_PAGE or fields.get(5, {}).get(2) != PLAIN:
        raise UnknownLayoutError(f"a page of type {fields[1]}")
    if 4 not in fields:
        raise UnknownLayoutError("a page without a checksum")
    if fields[2] < 0 or fields[3] < 0:
        raise ValueError(f"a page of {fields[2]} bytes, of {fields[3]} when compressed")
    return _PageHeader(num_bytes=fields[2], compressed_bytes=fields[3], crc32=fields[4] & 0xFFFFFFFF), position
