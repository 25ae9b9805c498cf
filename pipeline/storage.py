"""Files by URI: a local path, s3://, gs:// or any file system that pyarrow or fsspec knows.

The module is long because nothing else may open a file of an output: it has each way to read, write, list and delete.
"""

import errno
import hashlib
import io
import json
import logging
import os
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, unquote

import pyarrow.fs as pafs

from ast_core.checksums import with_checksum, without_checksum
from ast_core.errors import DataError
from ast_core.text_files import decode_text
from pipeline.s3 import PatientS3

logger = logging.getLogger(__name__)

URI_CHARACTERS = ":/?=&@%+,;~!$'()*[]"
"""Left as they are in a URI; anything else, such as a space in a file name, is quoted for pyarrow's parser."""

PYARROW_SCHEMES = {"file", "s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs", "mock"}
"""Schemes that pyarrow opens. Others go to fsspec."""

_BUCKET_URI = re.compile(r"(?P<scheme>s3|gs|gcs|abfss?)://(?P<bucket>[^/?]*)(?P<rest>.*)", re.DOTALL)

_STRAY = re.compile(
    r"(^|/)(\._[^/]*$|\.DS_Store$|(__MACOSX|\.AppleDouble|\.Trash[^/]*|\.Spotlight-V100|\.ipynb_checkpoints|@eaDir)/)"
)

UNFINISHED = ".tmp"
"""Suffix of a file that is being written on disk. If a crash left one, it may be deleted."""

LOCKS = "_lock"
"""Folder in an output with the locks of running jobs (`pipeline.locks`)."""

_UNFINISHED_FILE = re.compile(rf"\.[0-9a-f]{{32}}{re.escape(UNFINISHED)}$")


def resolve(uri: str | os.PathLike[str]) -> tuple[pafs.FileSystem, str]:
    """The file system that contains `uri`, and the path in it. Relative paths start at the current folder."""
    text = os.fspath(uri)
    scheme, is_uri, _ = text.partition("://")
    try:
        if not is_uri:
            return pafs.LocalFileSystem(), str(Path(text).expanduser().absolute())
        if scheme not in PYARROW_SCHEMES:
            return pafs.FileSystem.from_uri(text if scheme == "hf" else f"fsspec+{text.removeprefix('fsspec+')}")
        if bucket_uri := _split(text):
            root, options, path = bucket_uri
            if scheme == "s3":
                settings = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
                bucket = root.removeprefix("s3://").rpartition("@")[2]
                fs = _s3(f"{root}{options}", os.getpid(), settings)
                _opened_buckets[bucket] = fs
                return fs, f"{bucket}{unquote(path)}".rstrip("/")
            text = f"{root}{path}{options}"
        return pafs.FileSystem.from_uri(quote(text, safe=URI_CHARACTERS))
    except (OSError, ValueError, ImportError, TypeError) as err:  # TypeError: some fsspec schemes need arguments
        raise DataError(f"cannot open {text}: {err}") from err


_opened_buckets: dict[str, pafs.FileSystem] = {}


def opened_bucket(name: str) -> pafs.FileSystem | None:
    """The file system with which this process last opened a bucket."""
    return _opened_buckets.get(name)


@lru_cache(maxsize=64)
def _s3(bucket_uri: str, _pid: int, _settings: tuple[tuple[str, str], ...]) -> pafs.FileSystem:
    """The file system of a bucket, cached because each has its own connections and credentials.

    The process id is a key of the cache, because a forked process must open its own.
    """
    from_uri, path = pafs.FileSystem.from_uri(quote(bucket_uri, safe=URI_CHARACTERS))
    _, (options,) = from_uri.__reduce__()  # from_uri knows the region, AWS_ENDPOINT_URL and the options, but no retries
    fs = PatientS3(**options)
    if options["allow_bucket_creation"]:
        fs.create_dir(path)
    return fs


def _split(uri: str) -> tuple[str, str, str] | None:
    """`s3://bucket`, `?options` and `/path` of an object store's URI, with options at the end or after the bucket."""
    match = _BUCKET_URI.fullmatch(uri)
    if match is None:
        return None
    root, rest = f"{match['scheme']}://{match['bucket']}", match["rest"]
    if rest.startswith("?"):
        options, slash, path = rest.partition("/")
        return root, options, slash + path
    path, mark, options = rest.partition("?")
    return root, mark + options.replace("/", "%2F"), path


def options_first(uri: str) -> str:
    """Move the options of a URI in front of its path: `s3://bucket/a?region=x` becomes `s3://bucket?region=x/a`.

    The path can then be extended and split at its slashes. `resolve` reads both forms.
    """
    root_options_path = _split(uri)
    return uri if root_options_path is None else "".join(root_options_path)


def join(uri: str | os.PathLike[str], *parts: str) -> str:
    return "/".join([options_first(os.fspath(uri)).rstrip("/"), *parts])


def absolute(uri: str | os.PathLike[str]) -> str:
    """`uri` as an absolute path or URI with `options_first`, valid for a process in another folder."""
    text = os.fspath(uri)
    return options_first(text) if "://" in text else str(Path(text).expanduser().absolute())


def local_path(uri: str) -> str:
    """The path that a `file://` URI names. Paths and other URIs stay as they are."""
    return unquote(uri[len("file://") :]) if uri.lower().startswith("file://") else uri


def exists(uri: str | os.PathLike[str]) -> bool:
    fs, path = resolve(uri)
    is_found = _exists_at(fs, path)
    if not is_found:
        _check_bucket(fs, path)
    return is_found


def _exists_at(fs: pafs.FileSystem, path: str) -> bool:
    return fs.get_file_info(path).type != pafs.FileType.NotFound


def _check_bucket(fs: pafs.FileSystem, path: str) -> None:
    """Raise DataError if the bucket does not exist. pyarrow reports only that a file in it is not found."""
    bucket = path.partition("/")[0]
    if isinstance(fs, pafs.S3FileSystem) and not _exists_at(fs, bucket):
        raise DataError(f"there is no bucket s3://{bucket}; create it, or correct its name or the endpoint")


def list_files(uri: str | os.PathLike[str], *, suffix: str = "", recursive: bool = False) -> list[str]:
    """Sorted URIs of the files in a folder, without strays (`is_stray`); none if there is no such folder."""
    fs, path = resolve(uri)
    if recursive and isinstance(fs, pafs.LocalFileSystem):
        found = _files_on_disk(path)
    else:
        found = [info.path for info in _below(fs, path, recursive=recursive) if info.is_file]
    names = [os.path.relpath(file, path) for file in sorted(file for file in found if file.endswith(suffix))]
    names = [name for name in names if not is_stray(name)]
    if "://" in os.fspath(uri):
        names = [name.replace("%", "%25").replace("?", "%3F") for name in names]
    return [join(uri, name) for name in names]


def _files_on_disk(folder: str) -> list[str]:
    """All files below a folder whose names are text. pyarrow would fail at other names, and follow circular links."""
    found, others = list[str](), list[str]()
    folders = [(folder, frozenset[tuple[int, int]]())] if os.path.isdir(folder) else []
    while folders:
        path, above = folders.pop()
        status = os.stat(path)
        if (this := (status.st_dev, status.st_ino)) in above:
            continue
        with os.scandir(path) as entries:
            for entry in entries:
                if not is_text(entry.name):
                    others.append(entry.path)
                    continue
                if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                    folders.append((entry.path, above | {this}))
                elif os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file():
                    found.append(entry.path)
    if others:
        _warn_of_names(folder, len(others), ascii(others[0]))
    return found


@lru_cache(1 << 10)  # once, though a folder may be listed several times
def _warn_of_names(folder: str, number: int, first: str) -> None:
    logger.warning(f"{number:,} names below {folder} are not UTF-8 and are left out, {first} for one; rename them")


def is_stray(path: str) -> bool:
    """Whether an operating system or a tool wrote this file for itself, such as a Mac's `._NAME`, trash or previews."""
    return _STRAY.search(path) is not None


def is_text(name: str) -> bool:
    """Whether a file name is UTF-8. Python represents other bytes as lone surrogates, which Arrow cannot store."""
    return name.isascii() or not re.search("[\ud800-\udfff]", name)


def modified_s(uri: str | os.PathLike[str], *, suffix: str = "") -> dict[str, float]:
    """Modification time of each file in a folder, by name, in seconds since 1970. Some file systems have none."""
    fs, path = resolve(uri)
    infos = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    files = [info for info in infos if info.is_file and info.path.endswith(suffix)]
    return {info.base_name: info.mtime_ns / 1e9 for info in files if info.mtime_ns is not None}


def size_and_time(uris: Sequence[str]) -> list[tuple[int | None, int | None]]:
    """Size in bytes and modification time in microseconds since 1970 of each file; None, None if it does not exist."""
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(_size_and_time, uris))


def _size_and_time(uri: str) -> tuple[int | None, int | None]:
    try:
        fs, path = resolve(uri)
        info = fs.get_file_info(path)
    except (OSError, DataError):
        return None, None
    return (info.size, None if info.mtime_ns is None else info.mtime_ns // 1000) if info.is_file else (None, None)


def written_us(uri: str) -> int:
    """Time at which a local file was last written or put in its place; 0 for another URI or a missing file.

    Copying with `cp -p` or moving sets an old time of writing, but not an old time of the inode's change.
    """
    path = local_path(uri)
    if "://" in path:
        return 0
    with suppress(OSError, ValueError):
        status = os.stat(path)
        return max(status.st_mtime_ns, status.st_ctime_ns) // 1000
    return 0


def modified_s_below(uri: str | os.PathLike[str]) -> dict[str, float]:
    """The latest modification time of the files below each subfolder, by its name, in seconds since 1970."""
    fs, path = resolve(uri)
    latest: dict[str, float] = {}
    for info in fs.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True)):
        name, is_below, _ = info.path.removeprefix(f"{path.rstrip('/')}/").partition("/")
        if is_below and info.is_file:
            latest[name] = max(latest.get(name, 0.0), (info.mtime_ns or 0) / 1e9)
    return latest


def is_empty(uri: str | os.PathLike[str]) -> bool:
    """Whether a folder does not exist, is empty, or has only locks, and unfinished files that a crash left.

    Raises:
        DataError: it is a file, or below one.
    """
    try:
        infos = _below(*resolve(uri))
    except NotADirectoryError as err:
        raise DataError(f"{os.fspath(uri)} is a file, or below one; give a folder") from err
    return all(info.base_name == LOCKS or (info.is_file and _UNFINISHED_FILE.search(info.path)) for info in infos)


def delete_unfinished(uri: str | os.PathLike[str], *, recursive: bool = False) -> None:
    """Delete unfinished files that a crash left in a folder. No other process may be writing there."""
    for file in list_files(uri, suffix=UNFINISHED, recursive=recursive):
        if _UNFINISHED_FILE.search(file):
            delete(file)


def _below(fs: pafs.FileSystem, path: str, *, recursive: bool = False) -> list[pafs.FileInfo]:
    infos = fs.get_file_info(pafs.FileSelector(path, recursive=recursive, allow_not_found=True))
    if not infos:
        _check_bucket(fs, path)
    return infos


def read_bytes(uri: str | os.PathLike[str]) -> bytes:
    fs, path = resolve(uri)
    try:
        with fs.open_input_file(path) as file:  # not a stream, which sends a request for each 256 kB
            return file.read()
    except FileNotFoundError as err:
        _check_bucket(fs, path)
        raise DataError(f"there is no file {os.fspath(uri)}") from err
    except OSError as err:
        if isinstance(fs, pafs.LocalFileSystem) and (os.path.isdir(path) or err.errno == errno.ENOTDIR):
            raise DataError(f"{os.fspath(uri)} is a folder, or below a file; give a file") from err
        raise


def read_text(uri: str | os.PathLike[str]) -> str:
    """The text of a file in any usual encoding: `ast_core.text_files.decode_text`."""
    return decode_text(read_bytes(uri), os.fspath(uri))


def read_json(uri: str | os.PathLike[str]) -> Any:
    try:
        return json.loads(read_text(uri))
    except ValueError as err:
        raise DataError(f"{os.fspath(uri)} is not valid JSON: {err}") from err


def write_file(uri: str | os.PathLike[str], write: Callable[[IO[bytes]], object]) -> None:
    """Write a file atomically: by a rename on disk, as one object on object storage.

    Closing a remote stream publishes it, even after an error. So the stream is opened only when all content is ready.
    """
    fs, path = resolve(uri)
    if not isinstance(fs, pafs.LocalFileSystem):
        whole = io.BytesIO()
        write(whole)
        with fs.open_output_stream(path) as file:
            file.write(whole.getbuffer())
        return
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as err:
        raise DataError(f"{os.fspath(uri)} cannot be written: {err.filename} is a file, not a folder") from err
    unfinished = f"{path}.{uuid.uuid4().hex}{UNFINISHED}"
    try:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # a power cut must not leave an empty file under the final name
        os.replace(unfinished, path)
    except IsADirectoryError as err:
        raise DataError(f"{os.fspath(uri)} is a folder; give a file") from err
    except OSError as err:
        if err.errno is not None and err.filename is None:  # the call that finds a full disk knows no name
            raise OSError(err.errno, os.strerror(err.errno), path) from err
        raise
    finally:
        Path(unfinished).unlink(missing_ok=True)


def write_bytes(uri: str | os.PathLike[str], data: bytes) -> None:
    write_file(uri, lambda file: file.write(data))


def write_json(uri: str | os.PathLike[str], value: Any) -> None:
    write_bytes(uri, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_checked_json(uri: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Write a JSON object with the SHA-256 of its own content."""
    write_json(uri, with_checksum(value))


def read_checked_json(
    uri: str | os.PathLike[str],
    *,
    remedy: str = "restore it",
    is_required: Callable[[dict[str, Any]], bool] = lambda _: False,
) -> dict[str, Any]:
    """Read a JSON object that `write_checked_json` wrote. The checksum is left out of the result.

    Earlier versions wrote no checksum. Such a file is accepted unless `is_required` returns true for its content.

    Raises:
        DataError: it is missing, not a JSON object, or does not match its checksum.
    """
    try:
        value = json.loads(read_text(uri))
    except ValueError as err:
        raise DataError(f"{os.fspath(uri)} is damaged, it is not valid JSON ({err}); {remedy}") from err
    return without_checksum(value, origin=uri, remedy=remedy, is_required=is_required)


def sha256(uri: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(read_bytes(uri)).hexdigest()


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Write an empty file and delete it, so that what storage refuses is known before hours of work depend on it."""
    probe = join(folder, "probe")
    write_bytes(probe, b"")
    delete(probe)


def is_local(uri: str | os.PathLike[str]) -> bool:
    return isinstance(resolve(uri)[0], pafs.LocalFileSystem)


def delete_if_empty(uri: str | os.PathLike[str]) -> None:
    """Remove a folder that contains no file at any depth."""
    if not list_files(uri, recursive=True):
        delete(uri)


def discard(uri: str | os.PathLike[str]) -> bool:
    """Remove a file that is no longer needed. False if it stays, because the bucket forbids deleting."""
    try:
        delete(uri)
    except OSError as err:
        if not re.search("during DeleteObjects? operation|deleting objects", str(err)):
            raise
        return False
    return True


def delete(uri: str | os.PathLike[str]) -> None:
    """Remove a file, or a folder with its content. Nothing happens if it does not exist."""
    fs, path = resolve(uri)
    kind = fs.get_file_info(path).type
    if kind == pafs.FileType.Directory:
        fs.delete_dir(path)
    elif kind == pafs.FileType.File:
        fs.delete_file(path)
