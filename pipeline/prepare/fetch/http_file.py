"""A recording at a URL as a file object: each byte is the one that the host has at that position, or reading fails.

FFmpeg's HTTP client continues after a broken or wrong answer, and a demuxer that derives time from the position in the
file (WAV, MP3, …) then returns wrong sound. So every answer is checked here. If a host proves that it serves byte
ranges, only the needed bytes are fetched. From any other host the file is fetched from its beginning, as far as needed.
"""

import errno
import io
import re
import tempfile
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import IO, NamedTuple, TypeVar

from yt_dlp.networking import Response
from yt_dlp.networking.exceptions import HTTPError, RequestError, TransportError

from ast_core.errors import UserError
from pipeline.prepare.clip import ClipError, Reason
from pipeline.prepare.sandbox import LOCAL_ERRNOS

MAX_FAULTS = 2
"""Broken answers per fetch after which the request is repeated at once. After one more the attempt fails."""

SKIP_BYTES = 1 << 16
"""Up to this distance, reading on is faster than a new request."""

BLOCK_BYTES = 1 << 16

CHECKED_BYTES = 256
"""Length of the parts of a file that are requested twice, to check that they are equal."""

HEAD_BYTES, MAX_HEAD_BYTES = 1 << 15, 1 << 19
"""Bytes received at once from the beginning of the file, and bytes of it that stay in memory, because FFmpeg returns
there."""

PAGE, PLAYLIST = b"<", b"#EXTM3U"
"""Beginnings of answers that are not recordings."""

MEDIA_TYPES = ("audio/", "video/")
"""Content types of media. FFmpeg judges such an answer by its content."""

PROOF_OFFSET = 16

OK, PARTIAL_CONTENT, RANGE_NOT_SATISFIABLE = 200, 206, 416

T = TypeVar("T")

Ask = Callable[[dict[str, str]], Response]
"""Sends a GET request for the file with these headers. It raises yt-dlp's RequestError, of which HTTPError is one."""


@dataclass
class _Body:
    """An answer in progress: the bytes from `position` to `end` of the file; None: up to the end of the answer."""

    response: Response
    position: int
    end: int | None
    waiting: bytes = b""
    """Bytes that were received before they were needed."""

    def read(self, num_bytes: int) -> bytes:
        """Return at least one byte, or none if the body is complete.

        Raises:
            RequestError: the connection broke, or was closed before the end.
        """
        if self.waiting:
            data, self.waiting = self.waiting[:num_bytes], self.waiting[num_bytes:]
            self.position += len(data)
            return data
        if self.end is not None:
            num_bytes = min(num_bytes, self.end - self.position)
        data = self.response.read(num_bytes) if num_bytes else b""
        if not data and self.end is not None and self.position < self.end:
            raise TransportError(f"the stream ends prematurely, {self.end - self.position:,} bytes before its end")
        self.position += len(data)
        return data


class HttpFile(io.RawIOBase):
    """Read-only, seekable file object for the file that `ask` requests, with or without byte ranges.

    Args:
        ask: see `Ask`.
        max_bytes: limit of the bytes to receive in total.
        check_ranges: request a little more than needed, to check that ranges contain the bytes that they claim.

    After a failure the file seems to end, because FFmpeg treats an error in the same way. Then `failure` is not None,
    and what was read is incomplete. It is a RequestError or OSError of the network, a ClipError (`too_large`, or
    `setup` for a page in place of media), or a UserError for a full disk.
    """

    def __init__(
        self,
        ask: Ask,
        *,
        max_bytes: int,
        check_ranges: bool = True,
        name: str = "",
    ) -> None:
        self._ask, self._max_bytes, self.name = ask, max_bytes, name
        self._check_ranges = check_ranges
        self.failure: Exception | None = None
        self.num_received = 0
        self._position = 0
        self._size: int | None = None
        self._num_faults = 0
        self._head, self._content_type = b"", ""
        self._body: _Body | None = None
        self._spool: IO[bytes] | None = None
        """The file from its beginning, if the host serves no byte ranges."""
        self._num_spooled, self._is_complete, self._are_ranges_proven = 0, False, False
        self._guarded(self._open)

    # Methods that FFmpeg calls

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position}.get(whence)
        if base is None:
            base = self._guarded(self._find_size) or 0
        if base + offset < 0:
            return -errno.EINVAL  # FFmpeg's convention; an exception would be printed
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        size = BLOCK_BYTES if size is None or size < 0 else size
        data = self._guarded(lambda: self._read(size)) or b""
        self._position += len(data)
        return data

    def close(self) -> None:
        self._drop_body()
        if self._spool is not None:
            self._spool.close()
        super().close()

    # Answers and how they are used

    def _guarded(self, work: Callable[[], T]) -> T | None:
        """Return the result of `work`, which is repeated after a fault; None if it failed."""
        while self.failure is None:
            try:
                return work()
            except (RequestError, OSError) as err:
                self._drop_body()
                if getattr(err, "errno", None) in LOCAL_ERRNOS:
                    self.failure = UserError(f"this machine cannot fetch: {err}, in {tempfile.gettempdir()}")
                self._num_faults += 1
                is_refused = isinstance(err, HTTPError) and err.status < 500
                if is_refused or _is_timeout(err) or self._num_faults > MAX_FAULTS:
                    self.failure = self.failure or err
            except Exception as err:
                self.failure = err
        return None

    def _open(self) -> None:
        if self._spool is None:
            response = self._ask_range("bytes=0-")
            if response is not None and (span := _span(response)) is not None and span.first == 0:
                self._size, self._body = span.size, _Body(response, 0, span.end)
                self._content_type = response.headers.get("Content-Type", "")
                self._head = self._take_exactly(HEAD_BYTES)
            else:
                self._read_whole(response)
        if self._spool is not None:
            self._fill(HEAD_BYTES)
            self._head = self._spooled(0, HEAD_BYTES)
        beginning = self._head.removeprefix(b"\xef\xbb\xbf").lstrip()
        for kind, text in (("page", PAGE), ("playlist", PLAYLIST)):
            if beginning.startswith(text) and not self._content_type.startswith(MEDIA_TYPES):
                raise ClipError(Reason.SETUP, f"the host sent a {kind} where the media should be")

    def _read(self, num_bytes: int) -> bytes:
        begin = self._position
        if begin < len(self._head):
            return self._head[begin : begin + num_bytes]
        if self._spool is None:
            assert self._size is not None
            if begin >= self._size:
                return b""
            self._find(begin)
        if self._spool is not None:
            self._fill(begin + num_bytes)
            return self._spooled(begin, num_bytes)
        data = self._take(num_bytes)
        if begin == len(self._head) < MAX_HEAD_BYTES:
            self._head += data
        assert self._body is not None
        if self._body.position == self._body.end:
            self._drop_body()  # a host may send less than requested, and say so
        return data

    def _find_size(self) -> int:
        if self._size is None:
            self._fill(self._max_bytes + 1)
        assert self._size is not None
        return self._size

    # Hosts with byte ranges

    def _find(self, begin: int) -> None:
        """Start a body at `begin`, or switch to fetching the whole file."""
        if self._body is not None and self._body.position <= begin <= self._body.position + SKIP_BYTES:
            while self._body.position < begin and self._take(min(BLOCK_BYTES, begin - self._body.position)):
                pass
            if self._body.position == begin:
                return
        self._drop_body()
        if self._check_ranges and not self._are_ranges_proven:
            known = self._head[PROOF_OFFSET : PROOF_OFFSET + CHECKED_BYTES]
            self._are_ranges_proven = self._piece(PROOF_OFFSET, len(known)) == known
        again = self._piece(begin - PROOF_OFFSET, PROOF_OFFSET + CHECKED_BYTES) if self._check_ranges else b""
        response = self._ask_range(f"bytes={begin}-")
        if response is not None and (span := _span(response)) is not None:
            is_right = span.first == begin and span.size == self._size
            if is_right and (self._are_ranges_proven or not self._check_ranges):
                self._body = _Body(response, begin, span.end)
                if not self._check_ranges or self._look_ahead(CHECKED_BYTES) == again[PROOF_OFFSET:]:
                    return
                self._drop_body()
        self._read_whole(response)

    def _piece(self, begin: int, num_bytes: int) -> bytes:
        """Request a part of the file separately; empty if the answer is not what was requested."""
        assert self._size is not None
        end = min(begin + num_bytes, self._size)
        response = self._ask_range(f"bytes={begin}-{end - 1}")
        if response is None:
            return b""
        with closing(response):
            if _span(response) != _Span(begin, end, self._size):
                return b""
            self._body = _Body(response, begin, end)
            piece = self._take_exactly(end - begin)
        self._body = None
        return piece

    def _ask_range(self, text: str) -> Response | None:
        """Request a range; None if the host cannot satisfy it."""
        try:
            return self._ask({"Range": text})
        except HTTPError as err:
            if err.status == RANGE_NOT_SATISFIABLE:
                return None
            raise

    # Hosts without byte ranges

    def _read_whole(self, response: Response | None) -> None:
        """Fetch the file from its beginning from now on. `response` is used if it answers such a request."""
        if response is not None and response.status != OK:
            response.close()
            response = None
        self._spool = tempfile.TemporaryFile()  # noqa: SIM115  close() closes it
        self._num_spooled = self._spool.write(self._head)
        self._body = self._whole(response)

    def _whole(self, response: Response | None = None) -> _Body:
        """Request the whole file, check that it is unchanged, and skip what was received before the last fault."""
        response = response or self._ask({})
        if response.status != OK:
            raise TransportError(f"status {response.status} for a request of the whole file")
        length = _length(response)
        if self._size is not None and length is not None and length != self._size:
            raise TransportError(f"a file of {self._size:,} bytes, and then of {length:,}")
        self._size = self._size if length is None else length
        self._content_type = response.headers.get("Content-Type", "")
        self._body = body = _Body(response, 0, length)
        while body.position < self._num_spooled:
            begin = body.position
            data = self._take(min(BLOCK_BYTES, self._num_spooled - begin))
            if not data or data != self._spooled(begin, len(data)):
                raise TransportError("the host sent two files at one address")
        return body

    def _fill(self, num_bytes: int) -> None:
        """Receive the file up to `num_bytes`, or up to its end."""
        assert self._spool is not None
        while not self._is_complete and self._num_spooled < num_bytes:
            self._body = self._body or self._whole()
            data = self._take(BLOCK_BYTES)
            self._spool.seek(self._num_spooled)
            self._spool.write(data)
            self._spool.flush()
            self._num_spooled += len(data)
            if not data:
                self._drop_body()
                if self._size not in (None, self._num_spooled):
                    raise TransportError(f"a file of {self._size:,} bytes, and then of {self._num_spooled:,}")
                self._size, self._is_complete = self._num_spooled, True

    def _spooled(self, begin: int, num_bytes: int) -> bytes:
        assert self._spool is not None
        self._spool.seek(begin)
        return self._spool.read(max(0, min(num_bytes, self._num_spooled - begin)))

    # The body in progress

    def _take(self, num_bytes: int) -> bytes:
        assert self._body is not None
        data = self._body.read(num_bytes)
        self.num_received += len(data)
        if self.num_received > self._max_bytes:
            raise ClipError(Reason.TOO_LARGE, f"more than {self._max_bytes >> 20} MiB to fetch")
        return data

    def _take_exactly(self, num_bytes: int) -> bytes:
        """Return `num_bytes` bytes, or all that are left in the body."""
        parts = []
        while num_bytes and (data := self._take(num_bytes)):
            parts.append(data)
            num_bytes -= len(data)
        return b"".join(parts)

    def _look_ahead(self, num_bytes: int) -> bytes:
        """Return the next bytes of the body without consuming them."""
        assert self._body is not None
        begin = self._body.position
        data = self._take_exactly(num_bytes)
        self._body.position, self._body.waiting = begin, data
        return data

    def _drop_body(self) -> None:
        if self._body is not None:
            with suppress(Exception):  # the connection may be broken already
                self._body.response.close()
            self._body = None


def _is_timeout(err: BaseException) -> bool:
    """Whether an error is a timeout. It is not repeated at once, because that could use up the attempt's time."""
    return "timed out" in str(err)


class _Span(NamedTuple):
    first: int
    end: int
    size: int
    """The size of the whole file."""


def _span(response: Response) -> _Span | None:
    """The range of the file that an answer claims to contain; None if it claims none or contradicts itself."""
    match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", response.headers.get("Content-Range", "").strip())
    if response.status != PARTIAL_CONTENT or match is None or _is_encoded(response):
        return None
    first, last, size = map(int, match.groups())
    length = _length(response)
    if not first <= last < size or length not in (None, last + 1 - first):
        return None
    return _Span(first, last + 1, size)


def _length(response: Response) -> int | None:
    """Length of the body according to its header; None if unknown or if it is the length before decoding."""
    text = response.headers.get("Content-Length", "").strip()
    is_chunked = "chunked" in response.headers.get("Transfer-Encoding", "").lower()
    return int(text) if re.fullmatch(r"\d{1,18}", text) and not is_chunked and not _is_encoded(response) else None


def _is_encoded(response: Response) -> bool:
    return response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity")
