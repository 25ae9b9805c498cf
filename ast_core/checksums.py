"""Checksums by which a damaged file of ours is known: SHA-256 in hexadecimal."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from ast_core.errors import DataError

KEY = "sha256"
"""The checksum of a JSON object, among its own keys."""


def with_checksum(value: Mapping[str, Any]) -> dict[str, Any]:
    """`value` and the checksum of its content, which does not depend on spaces or on the order of keys."""
    return {**value, KEY: _checksum(value)}


def without_checksum(
    value: Any, *, origin: object, remedy: str, is_required: Callable[[dict[str, Any]], bool] = lambda _: False
) -> dict[str, Any]:
    """The content of a JSON object.

    One without a checksum, which an earlier version wrote, is taken as it is unless the checksum `is_required` of it.

    Raises:
        DataError: it is no object, or not what its checksum is of. The line names `origin` and `remedy`.
    """
    if not isinstance(value, dict):
        raise DataError(f"{origin} is damaged, it holds no JSON object; {remedy}")
    content = {key: item for key, item in value.items() if key != KEY}
    if (KEY in value or is_required(content)) and value.get(KEY) != _checksum(content):
        raise DataError(f"{origin} is damaged or was edited, its checksum is another; {remedy}")
    return content


def file_sha256(path: str | os.PathLike[str]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
