"""Thrift's compact protocol as pyarrow writes it: requested fields, and bytes that are not a struct."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.parquet import column_chunks
from pipeline.thrift import read_struct


def test_column_chunks_equal_those_of_pyarrow(tmp_path: Path):
    columns = {
        "a.b": pa.array([None, 1, 2, None] * 10),
        "list": pa.array([["x", None], [], None, ["y"]] * 10),
        "struct": pa.array([{"u": 1.5, "v": True}, {"u": None, "v": None}, None, {"u": 2.5, "v": False}] * 10),
        "long": pa.array(["z" * 500] * 40),  # a statistic whose size has two bytes
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet", row_group_size=15, use_dictionary=["list"])
    about = pq.ParquetFile(tmp_path / "x.parquet").metadata
    with pa.OSFile(str(tmp_path / "x.parquet")) as file:
        found = column_chunks(file)
    assert (len(found), {len(group) for group in found}) == (3, {about.num_columns})
    for i, group in enumerate(found):
        for j, chunk in enumerate(group):
            expected = about.row_group(i).column(j)
            assert chunk.name == expected.path_in_schema
            assert (chunk.num_values, chunk.null_count) == (expected.num_values, expected.statistics.null_count)
            assert chunk.compressed_bytes == expected.total_compressed_size
            assert chunk.uncompressed_bytes == expected.total_uncompressed_size
            assert chunk.data_page_offset == expected.data_page_offset
            assert chunk.dictionary_page_offset == (
                expected.dictionary_page_offset if expected.has_dictionary_page else None
            )


def test_only_requested_fields_are_read():
    field_1 = b"\x15\x06"  # i32: 3
    between = b"\x11" + b"\x12" + b"\x18\x02hi" + b"\x19\x25\x01\x80\x01" + b"\x1c\x15\x02\x00" + b"\x17" + bytes(8)
    field_8 = b"\x16\xff\xff\x03"  # i64: -32768
    field_600 = b"\x08\xb0\x09\x01!"  # the field number is written out; binary
    data = field_1 + between + field_8 + field_600 + b"\x00"
    assert read_struct(data, 0, {1: int, 8: int, 600: bytes}) == ({1: 3, 8: -32768, 600: b"!"}, len(data))


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (b"", {}),
        (b"\x15", {1: int}),  # ends within a field
        (b"\x15\x06\x00", {1: bytes}),  # of another type
        (b"\x15\x06\x00", {1: {}}),
        (b"\x1d\x00\x00", {}),  # a type that does not exist
        (b"\x15" + b"\xff" * 12 + b"\x01\x00", {1: int}),  # more than 64 bits
        (b"\x19\xf5\xff\xff\xff\xff\x07\x00", {1: [int]}),  # more elements than bytes
        (b"\x1c" * 100_000, {}),
        (b"\x1c" * 100_000, {1: {}}),
    ],
)
def test_bytes_that_are_not_a_struct_raise_an_error(data: bytes, wanted: dict):
    with pytest.raises((ValueError, LookupError)):
        read_struct(data, 0, wanted)


def test_random_bytes_raise_no_other_error():
    rng = np.random.default_rng(0)
    num_read = 0
    for _ in range(5000):
        try:
            read_struct(rng.bytes(40), 0, {1: int, 2: {1: int}, 3: [bytes]})
            num_read += 1
        except (ValueError, LookupError):
            continue
    assert num_read < 5000
