"""A media host on loopback that serves the recordings of a folder with byte ranges, as real media hosts do.

`/VIDEO_ID` finds VIDEO_ID.webm, VIDEO_ID.m4a or VIDEO_ID.ogg; the full file name works too.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

CONTENT_TYPES = {
    ".webm": "audio/webm",
    ".m4a": "audio/mp4",
    ".ogg": "audio/ogg",
    ".flac": "audio/flac",
    ".wav": "audio/wav",
    ".mp3": "audio/mpeg",
}

_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[a-z0-9]+)?")
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_BLOCK_BYTES = 1 << 16


class FolderHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path
    content_type: str | None = None
    """Overrides the content type of the file's suffix."""

    def handle(self) -> None:
        with suppress(ConnectionError):  # FFmpeg closes the connection when it has read enough
            super().handle()

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing, so that the demo's own lines are easy to read."""

    def answer(self, *, with_body: bool) -> None:
        path = find_media(self.folder, unquote(urlsplit(self.path).path).removeprefix("/"))
        if path is None:
            self.send_head(HTTPStatus.NOT_FOUND, {"Content-Length": "0"})
            return
        size = path.stat().st_size
        asked = self.headers.get("Range")
        span = parse_range(asked, size) if asked else None
        if span is not None and not span:
            self.send_head(
                HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, {"Content-Range": f"bytes */{size}", "Content-Length": "0"}
            )
            return
        headers = {"Content-Type": self.content_type or CONTENT_TYPES[path.suffix], "Accept-Ranges": "bytes"}
        if span is not None:
            headers["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{size}"
        wanted = range(size) if span is None else span
        headers["Content-Length"] = str(len(wanted))
        self.send_head(HTTPStatus.OK if span is None else HTTPStatus.PARTIAL_CONTENT, headers)
        if with_body:
            with path.open("rb") as file:
                self._send_bytes(file, wanted)

    def send_head(self, status: HTTPStatus, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send_bytes(self, file: BinaryIO, wanted: range) -> None:
        file.seek(wanted.start)
        left = len(wanted)
        while left and (block := file.read(min(left, _BLOCK_BYTES))):
            self.wfile.write(block)
            left -= len(block)


def find_media(folder: Path, name: str) -> Path | None:
    """The file called `name`, with or without its extension, directly in `folder`."""
    if not _NAME.fullmatch(name):  # no slash and no leading dot: nothing outside the folder can be named
        return None
    for candidate in (name, *(name + suffix for suffix in CONTENT_TYPES)):
        path = folder / candidate
        if path.suffix in CONTENT_TYPES and path.is_file():
            return path
    return None


def parse_range(header: str, size: int) -> range | None:
    """The bytes that a Range header requests: empty if they are outside the file, None if the header is ignored."""
    match = _RANGE.fullmatch(header.strip())
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:  # the last N bytes
        return range(max(0, size - int(last)), size)
    if last and int(last) < int(first):
        return None
    return range(int(first), min(int(last) + 1, size) if last else size)


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve `folder` on a free port of 127.0.0.1 until the block ends. Yields the base URL without a final slash."""
    with serving(type("Handler", (FolderHandler,), {"folder": folder})) as url:
        yield url


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve with any handler class on a free port of 127.0.0.1 until the block ends. Yields the base URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
