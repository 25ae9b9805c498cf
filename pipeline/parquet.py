"""Parquet files with a checksum on every page, and errors that name a damaged file.

Headers and footers have no checksums. Files that must not change at all also have a SHA-256 that is recorded elsewhere.
"""

import hashlib
from collections.abc import Callable
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from ast_core.errors import DataError
from pipeline import storage

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
        raise DataError(f"{uri} is damaged or no Parquet file ({_in_one_line(err)}); {remedy}") from err


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
        raise DataError(damaged.format(_in_one_line(err))) from err


def _in_one_line(err: BaseException) -> str:
    return " ".join(str(err).split())[:200] or type(err).__name__
