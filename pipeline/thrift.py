"""Reader for the part of Apache Thrift's compact protocol that Parquet's footers and page headers use.

Source: thrift-compact-protocol.md of Apache Thrift. Only the requested fields become Python values: a footer describes
each column of each row group by about thirty values, of which a reader needs eight, and skipping a value is much
cheaper than creating it.
"""

from collections.abc import Mapping
from typing import Any

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, _MAP, STRUCT = range(1, 13)
"""The type numbers of the protocol."""

MAX_VARINT_BITS = 64

Fields = Mapping[int, Any]
"""The requested fields of a struct, by field number, each with its type: `int`, `bytes`, the `Fields` of a nested
struct, or a list of one of these."""


def read_struct(data: bytes, position: int, wanted: Fields) -> tuple[dict[int, Any], int]:
    """Return the requested fields by number, and the position after the struct.

    Raises:
        ValueError or LookupError: the bytes are not a struct, or fields have other types.
    """
    try:
        return _struct(data, position, wanted)
    except RecursionError as err:
        raise ValueError("structs are nested too deeply") from err


def _struct(data: bytes, position: int, wanted: Fields) -> tuple[dict[int, Any], int]:
    fields: dict[int, Any] = {}
    number = 0
    while head := data[position]:
        position += 1
        if head > 15:
            number += head >> 4
        else:
            number, position = _integer(data, position)
        if number in wanted:
            fields[number], position = _value(data, position, head & 15, wanted[number])
        else:
            position = _after(data, position, head & 15)
    return fields, position + 1


def _value(data: bytes, position: int, kind: int, wanted: Any) -> tuple[Any, int]:
    if wanted is int and I16 <= kind <= I64:
        return _integer(data, position)
    if wanted is bytes and kind == BINARY:
        size, position = _varint(data, position)
        return data[position : position + size], position + size
    if isinstance(wanted, dict) and kind == STRUCT:
        return _struct(data, position, wanted)
    if isinstance(wanted, list) and kind == LIST:
        size, element, position = _list_head(data, position)
        values = []
        for _ in range(size):
            value, position = _value(data, position, element, wanted[0])
            values.append(value)
        return values, position
    raise ValueError(f"a field of Thrift type {kind}")


def _after(data: bytes, position: int, kind: int) -> int:
    """Return the position after a value of any type."""
    if kind == STRUCT:
        while head := data[position]:
            kind, position = head & 15, position + 1
            if head < 16:
                position = _after_varint(data, position)
            if kind == BINARY and data[position] < 0x80:  # inlined: most values are short, and a call costs more
                position += 1 + data[position]
            elif I16 <= kind <= I64 and data[position] < 0x80:
                position += 1
            else:
                position = _after(data, position, kind)
        return position + 1
    if kind in (LIST, SET):
        size, element, position = _list_head(data, position)
        for _ in range(size):
            position = _after(data, position, element)
        return position
    if I16 <= kind <= I64:
        return _after_varint(data, position)
    if kind == BINARY:
        size, position = _varint(data, position)
        return position + size
    if kind in (TRUE, FALSE):
        return position
    if kind in (BYTE, DOUBLE):
        return position + (1 if kind == BYTE else 8)
    raise ValueError(f"a field of Thrift type {kind}")


def _after_varint(data: bytes, position: int) -> int:
    while data[position] > 0x7F:
        position += 1
    return position + 1


def _list_head(data: bytes, position: int) -> tuple[int, int, int]:
    """Return the number of elements, their type, and the position of the first."""
    head, position = data[position], position + 1
    size, kind = head >> 4, head & 15
    if size == 15:
        size, position = _varint(data, position)
    if size > len(data) - position:  # an element takes at least one byte
        raise ValueError(f"a list of {size} elements in {len(data)} bytes")
    # In a list a boolean is a byte; in a struct it is part of the field's type.
    return size, BYTE if kind in (TRUE, FALSE) else kind, position


def _integer(data: bytes, position: int) -> tuple[int, int]:
    value, position = _varint(data, position)
    return (value >> 1) ^ -(value & 1), position


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while (byte := data[position]) > 0x7F:
        value |= (byte & 0x7F) << shift
        shift += 7
        position += 1
        if shift > MAX_VARINT_BITS:
            raise ValueError(f"an integer of more than {MAX_VARINT_BITS} bits")
    return value | byte << shift, position + 1
