"""A recording at a URL, read like a local file: each byte is the host's own, at its place, or there is a failure.

FFmpeg's HTTP client goes on after a broken or a wrong answer, and a demuxer that tells time by the position in the file
(WAV, MP3, …) then hands on other sound. So every answer is checked here. Where a host proves that it serves byte ranges
only what is asked for is fetched; from any other the file is fetched from its beginning on, as far as it is needed.
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
"""Broken answers of one fetch that are asked for again at once. After one more the attempt has failed."""

SKIP_BYTES = 1 << 16
"""So far ahead it is quicker to read on than to ask again."""

BLOCK_BYTES = 1 << 16

CHECKED_BYTES = 256
"""Length of the pieces of a file that are asked for twice, to see whether they agree."""

HEAD_BYTES, MAX_HEAD_BYTES = 1 << 15, 1 << 19
"""Received at once from the beginning of the file, and kept of it in memory: FFmpeg returns there."""

OWN_CLOCK = (b"\x1aE\xdf\xa3",)
"""Beginning of files whose parts hold their own time (Matroska): wrong bytes of a host are no wrong sound there. In Ogg
they may be: the campaign found a section from a host that sent the beginning in the place of a range."""

PAGE, PLAYLIST = b"<", b"#EXTM3U"
"""Beginnings of what is no recording."""

MEDIA_TYPES = ("audio/", "video/")
"""What the host calls by one of these types, FFmpeg judges by its content."""

PROOF_OFFSET = 16

OK, PARTIAL_CONTENT, RANGE_NOT_SATISFIABLE = 200, 206, 416

T = TypeVar("T")

Ask = Callable[[dict[str, str]], Response]
"""A GET of the file with these headers. It raises yt-dlp's RequestError, of which HTTPError is one."""


@dataclass
class _Body:
    """What is being received: bytes from `position` to `end` of the file; None: as many as come."""

    response: Response
    position: int
    end: int | None
    waiting: bytes = b""
    """Bytes that were received before they were needed."""

    def read(self, num_bytes: int) -> bytes:
        """At least one byte; none when the body is complete.

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
    """The file that `ask` gets, read-only and seekable, whatever the host can do.

    Args:
        ask: see `Ask`.
        max_bytes: to receive in all.
        check_ranges: ask for a little more than is needed, to see whether ranges hold the bytes that they claim.

    Where it cannot go on, the file seems to end, as FFmpeg takes an error for that in any case. Then `failure` is not
    None, and what was read is no whole: a RequestError or OSError of the network; a ClipError `too_large`, or `setup`
    for a page in the place of media; a UserError for a disk that is full.
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
        """The file from its beginning on, where the host serves no ranges."""
        self._num_spooled, self._is_complete, self._are_ranges_proven = 0, False, False
        self._guarded(self._open)

    # What FFmpeg calls

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
            return -errno.EINVAL  # as FFmpeg has it; an exception would be printed
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

    # Answers, and what is made of them

    def _guarded(self, work: Callable[[], T]) -> T | None:
        """The result of `work`, which is begun again after a fault; None when there is a failure."""
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
            self._drop_body()  # a host may send less than all that was asked for, and says so
        return data

    def _find_size(self) -> int:
        if self._size is None:
            self._fill(self._max_bytes + 1)
        assert self._size is not None
        return self._size

    # From a host with ranges

    def _find(self, begin: int) -> None:
        """Have a body that stands at `begin`, or go over to the whole file."""
        if self._body is not None and self._body.position <= begin <= self._body.position + SKIP_BYTES:
            while self._body.position < begin and self._take(min(BLOCK_BYTES, begin - self._body.position)):
                pass
            if self._body.position == begin:
                return
        self._drop_body()
        is_checked = self._check_ranges and not self._head.startswith(OWN_CLOCK)
        if is_checked and not self._are_ranges_proven:
            known = self._head[PROOF_OFFSET : PROOF_OFFSET + CHECKED_BYTES]
            self._are_ranges_proven = self._piece(PROOF_OFFSET, len(known)) == known
        again = self._piece(begin - PROOF_OFFSET, PROOF_OFFSET + CHECKED_BYTES) if is_checked else b""
        response = self._ask_range(f"bytes={begin}-")
        if response is not None and (span := _span(response)) is not None:
            is_right = span.first == begin and span.size == self._size
            if is_right and (self._are_ranges_proven or not is_checked):
                self._body = _Body(response, begin, span.end)
                if not is_checked or self._look_ahead(CHECKED_BYTES) == again[PROOF_OFFSET:]:
                    return
                self._drop_body()
        self._read_whole(response)

    def _piece(self, begin: int, num_bytes: int) -> bytes:
        """That piece of the file, by a request of its own; nothing where the answer is not what was asked for."""
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
        """None where the host cannot satisfy a range."""
        try:
            return self._ask({"Range": text})
        except HTTPError as err:
            if err.status == RANGE_NOT_SATISFIABLE:
                return None
            raise

    # From a host without

    def _read_whole(self, response: Response | None) -> None:
        """Receive the file from its beginning from now on, by this answer if it is one to that."""
        if response is not None and response.status != OK:
            response.close()
            response = None
        self._spool = tempfile.TemporaryFile()  # noqa: SIM115  close() closes it
        self._num_spooled = self._spool.write(self._head)
        self._body = self._whole(response)

    def _whole(self, response: Response | None = None) -> _Body:
        """The file from its beginning, which is as it was before, and from where the last answer broke."""
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
        """Have so many bytes of the file in the spool, or all that there are."""
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

    # The body that is being received

    def _take(self, num_bytes: int) -> bytes:
        assert self._body is not None
        data = self._body.read(num_bytes)
        self.num_received += len(data)
        if self.num_received > self._max_bytes:
            raise ClipError(Reason.TOO_LARGE, f"more than {self._max_bytes >> 20} MiB to fetch")
        return data

    def _take_exactly(self, num_bytes: int) -> bytes:
        """So many bytes, or all of the body."""
        parts = []
        while num_bytes and (data := self._take(num_bytes)):
            parts.append(data)
            num_bytes -= len(data)
        return b"".join(parts)

    def _look_ahead(self, num_bytes: int) -> bytes:
        """The next bytes of the body, which stay the next."""
        assert self._body is not None
        begin = self._body.position
        data = self._take_exactly(num_bytes)
        self._body.position, self._body.waiting = begin, data
        return data

    def _drop_body(self) -> None:
        if self._body is not None:
            with suppress(Exception):  # of a connection that is broken already
                self._body.response.close()
            self._body = None


def _is_timeout(err: BaseException) -> bool:
    """Waiting as long once more at once would take the attempt's time away."""
    return "timed out" in str(err)


class _Span(NamedTuple):
    first: int
    end: int
    size: int
    """The size of the whole file."""


def _span(response: Response) -> _Span | None:
    """Which bytes of the file an answer says that it holds; None if it does not say so, or contradicts itself."""
    match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", response.headers.get("Content-Range", "").strip())
    if response.status != PARTIAL_CONTENT or match is None or _is_encoded(response):
        return None
    first, last, size = map(int, match.groups())
    length = _length(response)
    if not first <= last < size or length not in (None, last + 1 - first):
        return None
    return _Span(first, last + 1, size)


def _length(response: Response) -> int | None:
    """Bytes of the body by its head; None if it does not say, or speaks of the bytes before they are decoded."""
    text = response.headers.get("Content-Length", "").strip()
    is_chunked = "chunked" in response.headers.get("Transfer-Encoding", "").lower()
    return int(text) if re.fullmatch(r"\d{1,18}", text) and not is_chunked and not _is_encoded(response) else None


def _is_encoded(response: Response) -> bool:
    return response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity")
