"""Which errors of the machine and of storage a user can act on, and the line that says how.

An OSError is one of these when the system or S3 *refused* what was asked: no room, no right, no answer. A name that
does not exist is none of them: where a user gives it, the code that reads it says so; anywhere else the program is
wrong, and its traceback is wanted.
"""

import errno
import os
import re
import shutil
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow.fs as pafs

from ast_core.errors import UserError
from pipeline import storage

REFUSALS = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room in the quota",
    errno.EROFS: "it is mounted read-only: give another folder",
    errno.EACCES: "give the rights to it",
    errno.EPERM: "give the rights to it",
    errno.EIO: "the disk fails",
    errno.ESTALE: "the file server has changed it",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files",
    errno.ENOMEM: "give the machine more memory",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "links lead round in a circle",
}
"""Errors of the system by their remedies."""

NETWORK = (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)

NEARLY_FULL = 0.02
"""Share of a disk that may be free again after an unfinished file was deleted."""

PERMISSIONS = {"HeadObject": "GetObject", "ListObjectsV2": "ListBucket", "HeadBucket": "ListBucket"}
"""The permission that an operation of S3 wants, where it is not called as the operation."""

_S3 = re.compile(
    r"key '(?P<key>[^']*)' in bucket '(?P<bucket>[^']*)'.*?AWS Error (?P<code>[A-Z_]+)"
    r"(?: \(HTTP status (?P<status>\d+)\))? during (?P<operation>\w+) operation: (?P<said>.*)",
    re.DOTALL,
)
_S3_BUCKET = re.compile(
    r"bucket '(?P<bucket>[^']*)'.*?AWS Error (?P<code>[A-Z_]+)(?: \(HTTP status (?P<status>\d+)\))? during "
    r"(?P<operation>\w+) operation: (?P<said>.*)",
    re.DOTALL,
)
_DENIED = {
    "REQUEST_TIME_TOO_SKEWED": "this machine's clock is wrong, and S3 refuses what it signs: set the clock",
    "REQUEST_EXPIRED": "this machine's clock is wrong, and S3 refuses what it signs: set the clock",
    "INVALID_ACCESS_KEY_ID": "S3 does not know this access key: see AWS_ACCESS_KEY_ID, or the profile",
    "SIGNATURE_DOES_NOT_MATCH": "the secret does not fit the access key: see AWS_SECRET_ACCESS_KEY, or the profile",
    "NO_SUCH_BUCKET": "there is no such bucket: create it, or see its name and AWS_ENDPOINT_URL",
    "INVALID_BUCKET_NAME": "no bucket may have such a name",
}


def explain(error: BaseException | None, place: str | None = None) -> str | None:
    """One line for an error that a user can act on: the thing and the remedy; None for any other.

    Args:
        place: the path or URI at work, for errors that do not name theirs.
    """
    if not isinstance(error, OSError):
        return None
    if match := _S3.search(str(error)) or _S3_BUCKET.search(str(error)):
        return _of_s3(match)
    if error.errno in REFUSALS:
        where = error.filename or error.filename2 or place
        said = errno_text(error)
        return f"{said}{f': {_text(where)}' if where else ''}; {REFUSALS[error.errno]}, and run the same command again"
    if isinstance(error, (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)) or "google::cloud" in str(
        error
    ):
        said = " ".join(str(error).split()[:60]) or type(error).__name__
        return f"{said}{f' ({place})' if place else ''}; see the network, and run the same command again"
    return None


@contextmanager
def in_spite_of_errors(is_whole: str) -> Iterator[None]:
    """Raise an error that a user can act on as a line that begins with what is whole all the same."""
    try:
        yield
    except OSError as err:
        line = explain(err)
        if line is None:
            raise
        raise UserError(f"{is_whole}: {line}") from err


def nearly_full(*folders: str) -> str | None:
    """The first of these folders on this machine whose disk is full, for errors that do not say which one is."""
    for folder in folders:
        if os.path.isdir(folder):
            disk = shutil.disk_usage(folder)
            if disk.free <= NEARLY_FULL * disk.total:
                return folder
    return None


def errno_text(error: OSError) -> str:
    """`No space left on device`, for a subclass as for pyarrow's longer sentences."""
    assert error.errno is not None
    return os.strerror(error.errno)


def _text(path: object) -> str:
    return path.decode(errors="replace") if isinstance(path, bytes) else str(path)


def _of_s3(match: re.Match[str]) -> str:
    key = match.groupdict().get("key") or ""
    uri, code, said = f"s3://{match['bucket']}/{key}".rstrip("/"), match["code"], " ".join(match["said"].split())[:200]
    if "No response body" in said and match["status"] != "503":  # that of a HEAD, which has none
        code, said = _why(match["bucket"], code, said)
    if code in _DENIED:
        return f"{uri}: {_DENIED[code]}"
    if code == "ACCESS_DENIED" or match["status"] == "403":
        permission = PERMISSIONS.get(match["operation"], match["operation"])
        return f"{uri}: S3 denies {match['operation']} ({said}); give this key s3:{permission} there"
    if code == "NETWORK_CONNECTION":
        return (
            f"{uri}: S3 does not answer ({said.split('; Details')[0]}); see the network and AWS_ENDPOINT_URL, and run "
            "the same command again"
        )
    if (
        code in ("SLOW_DOWN", "SERVICE_UNAVAILABLE", "INTERNAL_FAILURE", "THROTTLING")
        or (match["status"] or "") >= "500"
    ):
        return (
            f"{uri}: S3 has refused this for half a minute ({code.lower()}: {said}); run the same command again later, "
            "or with fewer workers"
        )
    return f"{uri}: S3 answers {match['operation']} with {code.lower()} ({said})"


def _why(bucket: str, code: str, said: str) -> tuple[str, str]:
    """S3's reason, from a question whose answer has a body."""
    fs = storage.opened_bucket(bucket)
    if fs is None:
        return code, said
    try:
        fs.get_file_info(pafs.FileSelector(bucket))
    except OSError as err:
        if found := _S3.search(str(err)) or _S3_BUCKET.search(str(err)):
            return found["code"], " ".join(found["said"].split())[:200]
    return code, said
