"""Reads lists by name, path or URL. A list from the web is copied to the user's cache.

At each use the server is asked whether the list has changed (ETag, Last-Modified). If it does not answer, the copy is
used and the user gets a line about it. If the SHA-256 of an official list is known, only the hash is checked.
"""

import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from pathlib import Path
from posixpath import basename

from ast_core.errors import DataError, one_line
from ast_core.text_files import decode_text
from pipeline import storage
from pipeline.prepare.sources.checks import WEB

OFFICIAL_LISTS = {
    name: f"https://storage.googleapis.com/us_audioset/youtube_corpus/v1/csv/{name}_segments.csv"
    for name in ("balanced_train", "unbalanced_train", "eval")
}
SHA256 = {
    OFFICIAL_LISTS["balanced_train"]: "3b83e5ff9ed72cfda37d4e36ce08250e107c1ea70f109f6ab6668ac200db5e94",
    OFFICIAL_LISTS["eval"]: "f7055f53935f70e74e39494a5c8c4c78f1700fce275028bd36e31186f33d45db",
}
"""Hashes of lists that never change. For unbalanced_train (100 MB) the hash is unknown, so the server is asked."""

MAX_LIST_BYTES = 1 << 30
"""Ten times the longest official list."""

TIMEOUT_S = 60.0
"""Longest wait for a server without an answer."""

DEADLINE_S = 1800.0
"""Longest time for a whole list."""


def read_list(uri: str, notes: list[str]) -> str:
    """Return the text of a list. Lines for the user are added to `notes`.

    Raises:
        DataError: the list cannot be read or fetched, or is not a text.
    """
    return read_text(fetched(uri, notes), uri)


def read_text(copy: str, uri: str) -> str:
    """Return the text of a list from the file `copy`. Messages name it `uri`."""
    try:
        return decode_text(storage.read_bytes(copy), uri)
    except (OSError, ValueError) as err:
        raise DataError(f"cannot read {uri}: {one_line(err)}") from err


def fetched(uri: str, notes: list[str]) -> str:
    """Return `uri`, or the path of the copy if it is a URL or the name of an official list.

    Raises:
        DataError: the list cannot be fetched and there is no copy, or its hash is not that of the official list.
    """
    url = OFFICIAL_LISTS.get(uri, uri)
    if not WEB.match(url):
        return uri
    copy, sha256 = _copy_of(url), SHA256.get(url)
    if sha256 and copy.exists() and _sha256(copy.read_bytes()) == sha256:
        return str(copy)
    try:
        data, validators = _ask(url, _conditional_headers(copy) if not sha256 else {})
    except (OSError, ValueError, http.client.HTTPException) as err:
        if copy.exists() and not sha256:
            when = time.strftime("%Y-%m-%d", time.gmtime(copy.stat().st_mtime))
            notes.append(f"{url} cannot be checked for changes ({one_line(err)}); its copy of {when} is used: {copy}")
            return str(copy)
        raise DataError(f"cannot fetch {url} ({one_line(err)}); download it by hand and give its path") from err
    if data is not None:
        if sha256 and _sha256(data) != sha256:
            raise DataError(
                f"{url} is not the official list: its SHA-256 is {_sha256(data)}, not {sha256}; "
                "download it in another way, and give its path"
            )
        if copy.exists() and data != copy.read_bytes():
            notes.append(f"{url} has changed since it was fetched; the new one is used")
        try:
            storage.write_bytes(copy, data)
            storage.write_json(_validators_file(copy), {"url": url, "sha256": _sha256(data), **validators})
        except (OSError, DataError) as err:
            raise DataError(
                f"cannot keep {url} in {copy.parent} ({one_line(err)}); set XDG_CACHE_HOME to another folder"
            ) from err
    return str(copy)


def cached(name: str) -> str | None:
    """Path of the copy of an official list, without using the network; None if there is none."""
    url = OFFICIAL_LISTS[name]
    copy, sha256 = _copy_of(url), SHA256.get(url)
    is_whole = copy.exists() and (sha256 is None or _sha256(copy.read_bytes()) == sha256)
    return str(copy) if is_whole else None


def _copy_of(url: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ast-ray"
    safe_basename = re.sub(r"[^A-Za-z0-9_.-]", "_", basename(re.split("[?#]", url)[0]))[-100:]
    return cache / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{safe_basename}"


def _validators_file(copy: Path) -> Path:
    return copy.with_name(f"{copy.name}.json")


def _conditional_headers(copy: Path) -> dict[str, str]:
    """Headers that request the list only if it has changed since it was copied."""
    try:
        validators = json.loads(_validators_file(copy).read_bytes())
        if _sha256(copy.read_bytes()) != validators["sha256"]:
            return {}
        pairs = (("If-None-Match", validators.get("etag")), ("If-Modified-Since", validators.get("last_modified")))
        return {name: value for name, value in pairs if isinstance(value, str)}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _ask(url: str, headers: dict[str, str]) -> tuple[bytes | None, dict[str, str | None]]:
    """Request the list. Returns its content (None if unchanged) and the headers for the next check."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S) as response:
            data = _read(response)
            validators = {"etag": response.headers["ETag"], "last_modified": response.headers["Last-Modified"]}
    except urllib.error.HTTPError as err:
        with err:
            if err.code == http.HTTPStatus.NOT_MODIFIED and headers:
                return None, {}
            raise
    # A log-in page must not be taken for the list.
    if data.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"", b"<") or "html" in (response.headers["Content-Type"] or ""):
        raise ValueError("the answer is a web page or empty")
    return data, validators


def _read(response: http.client.HTTPResponse) -> bytes:
    data, ends = bytearray(), time.monotonic() + DEADLINE_S
    while piece := response.read1(1 << 20):
        data += piece
        if len(data) > MAX_LIST_BYTES:
            raise ValueError(f"it is longer than {MAX_LIST_BYTES >> 20} MB, which no list is")
        if time.monotonic() > ends:
            raise TimeoutError(f"not complete after {DEADLINE_S:g} s")
    if response.length:  # read1 does not report an answer that was cut off
        raise http.client.IncompleteRead(b"", response.length)
    return bytes(data)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
