"""Errors of the machine and of storage that a user can act on, and the line that says how.

These are the OSErrors by which the system or S3 refuses a request: no space, no permission, no answer. A missing file
is not one of them. If a user named the file, the code that reads it reports that; otherwise it is a bug in this
program, and its traceback is needed.
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
from pipeline.s3 import S3Error

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
"""System errors that a user can act on, with the remedy."""

NETWORK = (ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)

S3_IS_BUSY = {"SLOW_DOWN", "SERVICE_UNAVAILABLE", "INTERNAL_FAILURE", "THROTTLING"}

NEARLY_FULL = 0.02
"""Share of a disk that may be free again after an unfinished file was deleted."""

PERMISSIONS = {"HeadObject": "GetObject", "ListObjectsV2": "ListBucket", "HeadBucket": "ListBucket"}
"""The permission that an S3 operation needs, if its name differs from the operation's."""

_S3 = re.compile(
    r"key '(?P<key>[^']*)' in bucket '(?P<bucket>[^']*)'.*?AWS Error (?P<code>[A-Z_]+)"
    r"(?: \(HTTP status (?P<status>\d+)\))? during (?P<operation>\w+) operation: (?P<text>.*)",
    re.DOTALL,
)
_S3_BUCKET = re.compile(
    r"bucket '(?P<bucket>[^']*)'.*?AWS Error (?P<code>[A-Z_]+)(?: \(HTTP status (?P<status>\d+)\))? during "
    r"(?P<operation>\w+) operation: (?P<text>.*)",
    re.DOTALL,
)
_DENIED = {
    "REQUEST_TIME_TOO_SKEWED": "this machine's clock is wrong, and S3 refuses what it signs: set the clock",
    "REQUEST_EXPIRED": "this machine's clock is wrong, and S3 refuses what it signs: set the clock",
    "INVALID_ACCESS_KEY_ID": "S3 does not know this access key: see AWS_ACCESS_KEY_ID, or the profile",
    "SIGNATURE_DOES_NOT_MATCH": "the secret does not fit the access key: see AWS_SECRET_ACCESS_KEY, or the profile",
    "NO_SUCH_BUCKET": "there is no such bucket: create it, or see its name and AWS_ENDPOINT_URL",
    "INVALID_BUCKET_NAME": "no bucket may have such a name",
    "NO_CREDENTIALS": "there are no keys for S3: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile",
}


def explain(error: BaseException | None, place: str | None = None) -> str | None:
    """One line with the error and the remedy if a user can act on the error; None otherwise.

    Args:
        place: The path or URI in use, for errors that do not name one.
    """
    if not isinstance(error, OSError):
        return None
    if isinstance(error, S3Error):
        status = "" if error.status is None else str(error.status)
        return _explain_s3(error.bucket, error.key, error.code, status, error.operation, error.text)
    if match := _S3.search(str(error)) or _S3_BUCKET.search(str(error)):
        key, status = match.groupdict().get("key") or "", match["status"] or ""
        return _explain_s3(match["bucket"], key, match["code"], status, match["operation"], match["text"])
    if error.errno in REFUSALS:
        where = error.filename or error.filename2 or place
        text = errno_text(error)
        path = f": {_path_text(where)}" if where else ""
        return f"{text}{path}; {REFUSALS[error.errno]}, and run the same command again"
    if isinstance(error, NETWORK) or "google::cloud" in str(error):
        text = " ".join(str(error).split()[:60]) or type(error).__name__
        return f"{text}{f' ({place})' if place else ''}; see the network, and run the same command again"
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
    """The system's text of an error, for example `No space left on device`. pyarrow's own texts are longer."""
    assert error.errno is not None
    return os.strerror(error.errno)


def _path_text(path: object) -> str:
    return path.decode(errors="replace") if isinstance(path, bytes) else str(path)


def _explain_s3(bucket: str, key: str, code: str, status: str, operation: str, text: str) -> str:
    uri, text = f"s3://{bucket}/{key}".rstrip("/"), " ".join(text.split())[:200]
    if "No response body" in text and status != "503":  # the answer to a HEAD request has no body
        code, text = _reason_from_s3(bucket, code, text)
    if code in _DENIED:
        return f"{uri}: {_DENIED[code]}"
    if code == "ACCESS_DENIED" or status == "403":
        permission = PERMISSIONS.get(operation, operation)
        return f"{uri}: S3 denies {operation} ({text}); give this key s3:{permission} there"
    if code == "NETWORK_CONNECTION":
        return (
            f"{uri}: S3 does not answer ({text.split('; Details')[0]}); see the network and AWS_ENDPOINT_URL, and run "
            "the same command again"
        )
    if code in S3_IS_BUSY or status >= "500":
        return (
            f"{uri}: S3 has refused this for half a minute ({code.lower()}: {text}); run the same command again later, "
            "or with fewer workers"
        )
    return f"{uri}: S3 answers {operation} with {code.lower()} ({text})"


def _reason_from_s3(bucket: str, code: str, text: str) -> tuple[str, str]:
    """S3's reason for a refusal, from a second request whose answer has a body."""
    fs = storage.opened_bucket(bucket)
    if fs is None:
        return code, text
    try:
        fs.get_file_info(pafs.FileSelector(bucket))
    except OSError as err:
        if found := _S3.search(str(err)) or _S3_BUCKET.search(str(err)):
            return found["code"], " ".join(found["text"].split())[:200]
    return code, text
