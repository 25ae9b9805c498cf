"""Messages from the sandbox to its parent: JSON and raw bytes, never pickled objects.

A hostile file may take over the sandboxed process, and unpickling its data would then run its code. So an answer is
read as data: a header of fixed size, JSON of limited size, and the bytes of arrays and files, also of limited size.
"""

import json
import struct
from typing import Any

import numpy as np

from ast_core.errors import ConfigError, DataError, UserError
from pipeline.prepare.clip import ClipError, Reason

HEAD = struct.Struct(">IQ")
"""Number of bytes of the JSON, and of the raw bytes after it."""

MAX_JSON_BYTES = 1 << 16
MAX_MESSAGE_CHARS = 4000

USER_ERRORS = {kind.__name__: kind for kind in (UserError, ConfigError, DataError)}


class BadAnswerError(Exception):
    """The bytes are not an answer in this format."""


def pack_result(result: Any) -> tuple[bytes, bytearray]:
    """Encode a function's result: header with JSON, and raw bytes.

    A result may consist of numbers, text, None, bytes, 1-D float32 arrays, and tuples or lists of these.

    Raises:
        TypeError: another type, or more JSON than an answer may have.
    """
    raw = bytearray()
    text = json.dumps({"result": _packed(result, raw)}).encode()
    if len(text) > MAX_JSON_BYTES:
        raise TypeError(f"a result with {len(text)} bytes of JSON; {MAX_JSON_BYTES} are allowed")
    return HEAD.pack(len(text), len(raw)) + text, raw


def _packed(value: Any, raw: bytearray) -> Any:
    match value:
        case None | bool() | int() | float() | str():
            return value
        case tuple() | list():
            return [_packed(item, raw) for item in value]
        case bytes():
            kind, data = "bytes", value
        case np.ndarray() if value.dtype == np.float32 and value.ndim == 1:
            kind, data = "float32", value.tobytes()
        case _:
            raise TypeError(f"a result of type {type(value).__name__} cannot be sent as JSON and bytes")
    begin = len(raw)
    raw += data
    return {kind: [begin, len(raw)]}


def pack_error(error: ClipError | UserError) -> tuple[bytes, bytearray]:
    """Encode an error: its kind, its message, and a clip's reason."""
    message = error.message if isinstance(error, ClipError) else str(error)
    answer = {"error": type(error).__name__, "message": message[:MAX_MESSAGE_CHARS]}
    if isinstance(error, ClipError):
        answer["reason"] = str(error.reason)
    text = json.dumps(answer).encode()
    return HEAD.pack(len(text), 0) + text, bytearray()


def sizes_of(head: bytes | bytearray, max_raw_bytes: int) -> tuple[int, int]:
    """Read from a header how many bytes of JSON and of raw data follow.

    Raises:
        BadAnswerError: more bytes than allowed.
    """
    json_bytes, raw_bytes = HEAD.unpack(head)
    if json_bytes > MAX_JSON_BYTES or raw_bytes > max_raw_bytes:
        raise BadAnswerError(f"an answer of {json_bytes} + {raw_bytes} bytes")
    return json_bytes, raw_bytes


def unpack(text: bytes | bytearray, raw: bytearray) -> Any:
    """Decode a result, or raise the error that was encoded. Tuples become lists; arrays are writable.

    Raises:
        BadAnswerError: the JSON is neither a result nor an error, or refers to bytes that do not exist.
    """
    try:
        answer = json.loads(text)
        if "error" not in answer:
            return _unpacked(answer["result"], memoryview(raw))
        if answer["error"] == ClipError.__name__:
            error: Exception = ClipError(Reason(answer["reason"]), str(answer["message"]))
        else:
            error = USER_ERRORS.get(answer["error"], UserError)(str(answer["message"]))
    except (ValueError, KeyError, TypeError, RecursionError) as err:
        raise BadAnswerError(f"an answer that is malformed ({type(err).__name__})") from err
    raise error


def _unpacked(value: Any, raw: memoryview) -> Any:
    match value:
        case list():
            return [_unpacked(item, raw) for item in value]
        case {"bytes": [int(begin), int(end)]} if 0 <= begin <= end <= len(raw):
            return bytes(raw[begin:end])
        case {"float32": [int(begin), int(end)]} if 0 <= begin <= end <= len(raw):
            return np.frombuffer(raw[begin:end], np.float32)
        case dict():
            raise ValueError("an object that names no bytes")
        case _:
            return value
