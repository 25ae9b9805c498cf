"""A media host that misbehaves: the first part of a path says how, for example `/429/sound` or `/stall/sound`.

with BadHost(folder) as host: ... f"{host.url}/404/sound.webm" ... host.requests

`/stall@3/sound` misbehaves only at the third request for that path, and answers the others correctly.
"""

import gzip
import shutil
import socket
import struct
import time
import zlib
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from types import TracebackType

import brotli

from jobs.demo.media_server import FolderHandler, find_media, parse_range, serving

TRUNCATED = 0.3
"""Share of a truncated file that arrives."""

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
    416: "Range Not Satisfiable",
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
    """Number of requests to `/throttled/…` that get a 429 before the correct answer."""
    elsewhere: str = ""
    """Base URL to which `/redirect/…` and `/playlist/…` lead."""
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
        """How often that path was requested before."""
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
        behaviour, _, turn = behaviour.partition("@")
        if turn and before + 1 != int(turn):
            behaviour = "good"
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
        elif find_media(self.folder, name) is None and (self.folder / Path(name).name).is_file():
            media, span = self._asked(name)  # a misbehaviour that the demo's server does not have
            self._part(media[span.start : span.stop], span.start, len(media))
        else:
            super().answer(with_body=with_body)

    def _drop(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.close(self.connection.detach())  # at once, since the handler's files keep the socket open

    # Wrong answers to range requests

    def _asked(self, name: str) -> tuple[bytes, range]:
        """The file, and the range of bytes that was requested."""
        media = self._media(name)
        span = parse_range(self.headers["Range"] or "", len(media))
        return media, span or range(len(media))

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for header, value in {"Content-Type": "application/octet-stream", **headers}.items():
            self.send_header(header.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.close_connection = True
        self.end_headers()
        self.wfile.write(body)

    def _part(self, body: bytes, first: int, size: int, **headers: str) -> None:
        """Answer with a range; if the whole file was requested, as a whole file."""
        length = {"Content_Length": str(len(body))}
        if self.headers["Range"] is None:
            headers.pop("Content_Range", None)
            self._send(200, body, **(length | headers))
            return
        span = {"Content_Range": f"bytes {first}-{first + len(body) - 1}/{size}"}
        self._send(206, body, **(length | span | headers))

    def _reset_connection(self) -> None:
        """Reset the connection, so that sent data that has not arrived is lost too."""
        self._drop()
        raise ConnectionResetError  # which ends `handle`

    def _rst(self, name: str, with_body: bool) -> None:
        """The connection is reset before the answer."""
        self._reset_connection()

    def _rstmid(self, name: str, with_body: bool) -> None:
        """The connection is reset after a third of the answer."""
        media, span = self._asked(name)
        body = media[span.start : span.stop]
        self._part(body[: len(body) // 3], span.start, len(media), Content_Length=str(len(body)))
        self._reset_connection()

    def _norange(self, name: str, with_body: bool) -> None:
        media = self._media(name)
        self._send(200, media, Content_Length=str(len(media)))

    def _nolength(self, name: str, with_body: bool) -> None:
        self._send(200, self._media(name))

    def _chunks(self, data: bytes) -> bytes:
        pieces = [data[i : i + 50_000] for i in range(0, len(data), 50_000)]
        return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"

    def _chunked(self, name: str, with_body: bool) -> None:
        self._send(200, self._chunks(self._media(name)), Transfer_Encoding="chunked")

    def _chunked40(self, name: str, with_body: bool) -> None:
        """40 % of the file, with a correct end of the chunks."""
        media = self._media(name)
        self._send(200, self._chunks(media[: len(media) * 2 // 5]), Transfer_Encoding="chunked")

    def _brokenchunks(self, name: str, with_body: bool) -> None:
        chunks = self._chunks(self._media(name))
        self._send(200, chunks[: len(chunks) * 2 // 5], Transfer_Encoding="chunked")

    def _gzip(self, name: str, with_body: bool) -> None:
        body = gzip.compress(self._media(name), 1)
        self._send(200, body, Content_Encoding="gzip", Content_Length=str(len(body)))

    def _gzipchunked(self, name: str, with_body: bool) -> None:
        body = self._chunks(gzip.compress(self._media(name), 1))
        self._send(200, body, Content_Encoding="gzip", Transfer_Encoding="chunked")

    def _gzipcut(self, name: str, with_body: bool) -> None:
        body = gzip.compress(self._media(name), 1)
        self._send(200, body[: len(body) // 2], Content_Encoding="gzip", Content_Length=str(len(body) // 2))

    def _deflate(self, name: str, with_body: bool) -> None:
        body = zlib.compress(self._media(name), 1)
        self._send(200, body, Content_Encoding="deflate", Content_Length=str(len(body)))

    def _br(self, name: str, with_body: bool) -> None:
        body = brotli.compress(self._media(name), quality=0)
        self._send(200, body, Content_Encoding="br", Content_Length=str(len(body)))

    def _gziprange(self, name: str, with_body: bool) -> None:
        """A range of the encoded file, as in the HTTP standard."""
        body = gzip.compress(self._media(name), 1)
        span = parse_range(self.headers["Range"] or "", len(body)) or range(len(body))
        self._part(body[span.start : span.stop], span.start, len(body), Content_Encoding="gzip")

    def _gziplie(self, name: str, with_body: bool) -> None:
        media = self._media(name)
        self._send(200, media, Content_Encoding="gzip", Content_Length=str(len(media)))

    def _longlength(self, name: str, with_body: bool) -> None:
        media, span = self._asked(name)
        body = media[span.start : span.stop]
        self._part(body, span.start, len(media), Content_Length=str(len(body) + 1000))
        self.close_connection = True

    def _shortlength(self, name: str, with_body: bool) -> None:
        media = self._media(name)
        body = media[: len(media) * 3 // 5]
        self._send(200, body, Content_Length=str(len(body)))

    def _early(self, name: str, with_body: bool) -> None:
        """Half of the announced range, with the length of the sent half."""
        media, span = self._asked(name)
        body = media[span.start : span.stop]
        header = f"bytes {span.start}-{span.stop - 1}/{len(media)}"
        self._part(body[: len(body) // 2], span.start, len(media), Content_Range=header)

    def _capped(self, name: str, with_body: bool) -> None:
        """At most 100 KB at a time, correctly announced."""
        media, span = self._asked(name)
        self._part(media[span.start : span.stop][:100_000], span.start, len(media))

    def _wrongrange(self, name: str, with_body: bool) -> None:
        """Another range than the requested one, correctly announced."""
        media, span = self._asked(name)
        first = (span.start + 5000) % len(media) if self.headers["Range"] else 0
        self._part(media[first:], first, len(media))

    def _lyingrange(self, name: str, with_body: bool) -> None:
        """Another range, unless it begins at 0, announced as the requested one."""
        media, span = self._asked(name)
        moved = media[40_000:] + media[:40_000] if span.start else media
        self._part(moved[span.start : span.stop], span.start, len(media))

    def _fromstart(self, name: str, with_body: bool) -> None:
        """The beginning of the file, announced as the requested range."""
        media, span = self._asked(name)
        self._part(media[: len(span)], span.start, len(media))

    def _wrongheader(self, name: str, with_body: bool) -> None:
        media, span = self._asked(name)
        body = media[span.start : span.stop]
        first = max(0, span.start - 1000)
        header = f"bytes {first}-{first + len(body) - 1}/{len(media)}"
        self._part(body, span.start, len(media), Content_Range=header)

    def _wrongtotal(self, name: str, with_body: bool) -> None:
        media, span = self._asked(name)
        self._part(media[span.start : span.stop], span.start, len(media) + 10_000)

    def _norangeheader(self, name: str, with_body: bool) -> None:
        media, span = self._asked(name)
        body = media[span.start : span.stop]
        self._send(206, body, Content_Length=str(len(body)))

    def _otherfile(self, name: str, with_body: bool) -> None:
        """A file of the same length with other bytes."""
        media, span = self._asked(name)
        other = bytes(reversed(media))
        self._part(other[span.start : span.stop], span.start, len(media))

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
        path = find_media(self.folder, name) or self.folder / Path(name).name
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
        """The connection ends before all announced bytes are sent."""
        media = self._media(name)
        self._head(len(media))
        if with_body:
            self.wfile.write(media[: int(TRUNCATED * len(media))])
        self.close_connection = True

    def _short(self, name: str, with_body: bool) -> None:
        """A truncated file, served as a whole one."""
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
        """A recording that never ends: its beginning, and then other bytes."""
        self._head(None)
        if with_body:
            self.wfile.write(self._media(name))
            while True:
                self.wfile.write(BLOCK)

    def _longpage(self, name: str, with_body: bool) -> None:
        """A page that never ends, which yt-dlp tries to read completely."""
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
        """A playlist instead of a recording. It names a local file and another host."""
        secret = shutil.which("true")
        body = (
            f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile://{secret}\n"
            f"#EXTINF:10,\n{self.host.elsewhere}/playlist-went-there.ts\n#EXT-X-ENDLIST\n"
        ).encode()
        self._head(len(body), "application/vnd.apple.mpegurl")
        if with_body:
            self.wfile.write(body)
