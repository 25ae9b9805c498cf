"""A media host on its bad days: the first part of a path says what happens, `/429/sound` or `/stall/sound`.

with BadHost(folder) as host: ... f"{host.url}/404/sound.webm" ... host.requests
"""

import shutil
import socket
import struct
import time
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from types import TracebackType

from jobs.demo.media_server import FolderHandler, find_media, serving

TRUNCATED = 0.3
"""Share of a file that arrives where it is cut short."""

BLOCK = b"\x1a\x45\xdf\xa3" + b"\0" * 8188
PAGE = b"<p>Sign in</p>" * 100_000
STATUSES = {
    401: "Unauthorized",
    402: "Payment Required",
    403: "Forbidden",
    404: "Not Found",
    410: "Gone",
    429: "Too Many Requests",
    451: "Unavailable For Legal Reasons",
    503: "Service Unavailable",
}


@dataclass(frozen=True)
class Request:
    at_s: float
    path: str
    range: str | None
    client: str
    cookie: str | None


@dataclass
class BadHost(AbstractContextManager["BadHost"]):
    folder: Path
    stall_s: float = 60.0
    throttled: int = 1
    """Requests to `/throttled/…` that get a 429 before the good one."""
    elsewhere: str = ""
    """Base URL that `/redirect/…` and `/playlist/…` lead to."""
    requests: list[Request] = field(default_factory=list)
    url: str = ""

    def __enter__(self) -> "BadHost":
        self._seen: Counter[str] = Counter()
        self._lock = Lock()
        self._server = serving(type("Handler", (_Handler,), {"folder": self.folder, "host": self}))
        self.url = self._server.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, at: TracebackType | None) -> None:
        self._server.__exit__(kind, err, at)

    def seen(self, request: Request) -> int:
        """How often that path had been asked for before."""
        with self._lock:
            self.requests.append(request)
            self._seen[request.path] += 1
            return self._seen[request.path] - 1

    def of(self, behaviour: str) -> list[Request]:
        return [request for request in self.requests if request.path.startswith(f"/{behaviour}/")]


class _Handler(FolderHandler):
    host: BadHost

    def answer(self, *, with_body: bool) -> None:
        behaviour, _, name = self.path.removeprefix("/").partition("/")
        request = Request(
            time.monotonic(), self.path, self.headers["Range"], self.client_address[0], self.headers["Cookie"]
        )
        before = self.host.seen(request)
        self.path = f"/{name}"
        if behaviour.isdecimal():
            self._status(int(behaviour))
        elif behaviour == "throttled" and before < self.host.throttled:
            self._status(429)
        elif behaviour == "flaky" and before < 1:
            self._status(503)
        elif behaviour == "reset" and before < 1:
            self._drop()
        elif special := getattr(self, f"_{behaviour}", None):
            special(name, with_body)
        else:
            super().answer(with_body=with_body)

    def _drop(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.close(self.connection.detach())  # at once: the handler's files would keep the socket open

    def _status(self, status: int) -> None:
        body = STATUSES[status].encode()
        self.send_response(status, STATUSES[status])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _head(self, num_bytes: int | None, content_type: str = "audio/webm") -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        if num_bytes is None:
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(num_bytes))
        self.end_headers()

    def _media(self, name: str) -> bytes:
        path = find_media(self.folder, name)
        assert path is not None
        return path.read_bytes()

    def _stall(self, name: str, with_body: bool) -> None:
        media = self._media(name)
        self._head(len(media))
        if with_body:
            self.wfile.write(media[: int(TRUNCATED * len(media))])
            self.wfile.flush()
            time.sleep(self.host.stall_s)
        self.close_connection = True

    def _cut(self, name: str, with_body: bool) -> None:
        """The connection ends before the bytes that were announced have come."""
        media = self._media(name)
        self._head(len(media))
        if with_body:
            self.wfile.write(media[: int(TRUNCATED * len(media))])
        self.close_connection = True

    def _short(self, name: str, with_body: bool) -> None:
        """A file that was cut where it lies, served as whole."""
        media = self._media(name)
        media = media[: int(TRUNCATED * len(media))]
        self._head(len(media))
        if with_body:
            self.wfile.write(media)

    def _html(self, name: str, with_body: bool) -> None:
        body = b"<!DOCTYPE html><html><head><title>Sign in</title></head><body>Sign in</body></html>"
        self._head(len(body), "text/html")
        if with_body:
            self.wfile.write(body)

    def _wrongtype(self, name: str, with_body: bool) -> None:
        self.content_type = "application/octet-stream"
        super().answer(with_body=with_body)

    def _empty(self, name: str, with_body: bool) -> None:
        self._head(0)

    def _endless(self, name: str, with_body: bool) -> None:
        """A recording that goes on for ever: its beginning, and then bytes that are none of its."""
        self._head(None)
        if with_body:
            self.wfile.write(self._media(name))
            while True:
                self.wfile.write(BLOCK)

    def _longpage(self, name: str, with_body: bool) -> None:
        """A page that goes on for ever, which yt-dlp reads to its end."""
        self._head(None, "text/html")
        if with_body:
            while True:
                self.wfile.write(PAGE)

    def _redirect(self, name: str, with_body: bool) -> None:
        self._to(f"{self.host.elsewhere}/{name}")

    def _loop(self, name: str, with_body: bool) -> None:
        self._to(f"/loop/{name}")

    def _tofile(self, name: str, with_body: bool) -> None:
        self._to("file:///etc/passwd")

    def _to(self, location: str) -> None:
        self.send_response(302)
        self.send_header("Location", location)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _playlist(self, name: str, with_body: bool) -> None:
        """A playlist where a recording should be: of a local file, and of another host."""
        secret = shutil.which("true")
        body = (
            f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile://{secret}\n"
            f"#EXTINF:10,\n{self.host.elsewhere}/playlist-went-there.ts\n#EXT-X-ENDLIST\n"
        ).encode()
        self._head(len(body), "application/vnd.apple.mpegurl")
        if with_body:
            self.wfile.write(body)
