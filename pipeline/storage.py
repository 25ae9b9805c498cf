"""Files by URI: a local path, s3://, gs:// or any file system that pyarrow or fsspec knows."""

import io
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import pyarrow.fs as pafs

from ast_core.errors import DataError

URI_CHARACTERS = ":/?=&@%+,;~!$'()*[]"
"""Left as they are in a URI; anything else, such as a space in a file name, is quoted for pyarrow's parser."""


UNFINISHED = ".tmp"
"""How a file on disk ends that is being written; one that a kill left behind may be deleted."""


def resolve(uri: str | os.PathLike[str]) -> tuple[pafs.FileSystem, str]:
    """The file system that holds `uri`, and the path within it. Relative paths are of the current folder."""
    text = os.fspath(uri)
    try:
        if "://" in text:
            return pafs.FileSystem.from_uri(quote(text, safe=URI_CHARACTERS))
        return pafs.LocalFileSystem(), str(Path(text).expanduser().absolute())
    except (OSError, ValueError) as err:
        raise DataError(f"cannot open {text}: {err}") from err


def join(uri: str | os.PathLike[str], *parts: str) -> str:
    return "/".join([os.fspath(uri).rstrip("/"), *parts])


def absolute(uri: str | os.PathLike[str]) -> str:
    """`uri` such that another process, in another folder, finds the same place."""
    text = os.fspath(uri)
    return text if "://" in text else str(Path(text).expanduser().absolute())


def exists(uri: str | os.PathLike[str]) -> bool:
    fs, path = resolve(uri)
    return fs.get_file_info(path).type != pafs.FileType.NotFound


def list_files(uri: str | os.PathLike[str], *, suffix: str = "", recursive: bool = False) -> list[str]:
    """URIs of the files below a folder, sorted; none if there is no such folder."""
    fs, path = resolve(uri)
    infos = fs.get_file_info(pafs.FileSelector(path, recursive=recursive, allow_not_found=True))
    files = sorted(info.path for info in infos if info.is_file and info.path.endswith(suffix))
    return [join(uri, os.path.relpath(file, path)) for file in files]


def modified_s(uri: str | os.PathLike[str], *, suffix: str = "") -> dict[str, float]:
    """When each file of a folder was written last, by its name, in seconds since 1970; not all file systems know."""
    fs, path = resolve(uri)
    infos = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    files = [info for info in infos if info.is_file and info.path.endswith(suffix)]
    return {info.base_name: info.mtime_ns / 1e9 for info in files if info.mtime_ns is not None}


def is_empty(uri: str | os.PathLike[str]) -> bool:
    """Whether there is no folder, or one with neither files nor folders in it."""
    fs, path = resolve(uri)
    return not fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))


def read_bytes(uri: str | os.PathLike[str]) -> bytes:
    fs, path = resolve(uri)
    try:
        with fs.open_input_stream(path) as file:
            return file.read()
    except FileNotFoundError as err:
        raise DataError(f"there is no file {os.fspath(uri)}") from err


def read_json(uri: str | os.PathLike[str]) -> Any:
    try:
        return json.loads(read_bytes(uri))
    except ValueError as err:
        raise DataError(f"{os.fspath(uri)} is not valid JSON: {err}") from err


def write_file(uri: str | os.PathLike[str], write: Callable[[IO[bytes]], object]) -> None:
    """Write so that a reader sees the whole file or none: by a rename on disk, as one object elsewhere.

    Closing a remote stream publishes it, even on the way out of an error; so nothing is opened before all is there.
    """
    fs, path = resolve(uri)
    if not isinstance(fs, pafs.LocalFileSystem):
        whole = io.BytesIO()
        write(whole)
        with fs.open_output_stream(path) as file:
            file.write(whole.getbuffer())
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    unfinished = f"{path}.{uuid.uuid4().hex}{UNFINISHED}"
    try:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # a power cut must not leave an empty file under the final name
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)


def write_bytes(uri: str | os.PathLike[str], data: bytes) -> None:
    write_file(uri, lambda file: file.write(data))


def write_json(uri: str | os.PathLike[str], value: Any) -> None:
    write_bytes(uri, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def delete(uri: str | os.PathLike[str]) -> None:
    """Remove a file, or a folder with all that is in it. Nothing happens if it is not there."""
    fs, path = resolve(uri)
    kind = fs.get_file_info(path).type
    if kind == pafs.FileType.Directory:
        fs.delete_dir(path)
    elif kind == pafs.FileType.File:
        fs.delete_file(path)
