"""SHA-256 checksums, in hexadecimal, that detect damage to files that this project writes."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from ast_core.errors import DataError

KEY = "sha256"
"""The key under which a JSON object stores its own checksum."""


def with_checksum(value: Mapping[str, Any]) -> dict[str, Any]:
    """`value` with the checksum of its content. White space and the order of keys do not change the checksum."""
    return {**value, KEY: _checksum(value)}


def without_checksum(
    value: Any, *, origin: object, remedy: str, is_required: Callable[[dict[str, Any]], bool] = lambda _: False
) -> dict[str, Any]:
    """The content of a JSON object, verified by its checksum.

    An object without a checksum, which an earlier version wrote, is accepted unless `is_required(content)`.

    Raises:
        DataError: `value` is not an object, or does not match its checksum. The message names `origin` and `remedy`.
    """
    if not isinstance(value, dict):
        raise DataError(f"{origin} is damaged: it is not a JSON object; {remedy}")
    content = {key: item for key, item in value.items() if key != KEY}
    if (KEY in value or is_required(content)) and value.get(KEY) != _checksum(content):
        raise DataError(f"{origin} is damaged or was edited: its checksum differs; {remedy}")
    return content


def file_sha256(path: str | os.PathLike[str]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
