"""A file in object storage for FFmpeg, read by few requests of fitting size.

FFmpeg reads 32 KiB at a time. Each read would be a request, which takes tens of milliseconds whatever its size, and a
file of ten seconds has up to sixty of them. Reading far ahead is no better: ten seconds of a long recording are 160 KB
of Opus. So each request in a row is twice as large as the one before, up to what `expect` said. Beyond that they are
small again, and grow with the distance.
"""

import io
from typing import BinaryIO

SMALL_BYTES = 1 << 18
"""A file up to this size is read by one request, at the first read."""
JUMP_BYTES = 1 << 15
"""Bytes of the first read of a place: FFmpeg's buffer. It looks into a header or an index here and goes elsewhere."""
MOST_BYTES = 1 << 23
"""Bytes of the largest request."""


class RemoteFile(io.RawIOBase):
    """Reads `file`, which has `size` bytes; a read returns fewer bytes than asked for only at the end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size, self._position = file, size, 0
        self._begin, self._held = -1, b""
        self._head = b""
        """The beginning of the file, to which FFmpeg and the readers of headers come back."""
        self._expected_bytes = size
        self._row_begin, self._row_bytes = 0, JUMP_BYTES
        """Where reading at one stretch began, and the bytes of the last request."""

    def expect(self, share: float) -> None:
        """Say which share of the file will be read at one stretch."""
        self._expected_bytes = round(self._size * min(1.0, share))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if position < 0:
            raise ValueError(f"there is no place {position} in a file")
        self._position = position
        return position

    def read(self, size: int = -1) -> bytes:
        end = self._size if size < 0 else min(self._size, self._position + size)
        parts = []
        while self._position < end:
            if not (part := self._held_bytes(end)):
                self._fetch(end - self._position)
                part = self._held_bytes(end)
                if not part:
                    break  # the file has become shorter
            parts.append(part)
            self._position += len(part)
        return b"".join(parts)

    def _held_bytes(self, end: int) -> bytes:
        """What is held from the position on, at most up to `end`."""
        if self._position < len(self._head):
            return self._head[self._position : end]
        at = self._position - self._begin
        return self._held[at : end - self._begin] if 0 <= at < len(self._held) else b""

    def _fetch(self, wanted_bytes: int) -> None:
        if self._position != self._begin + len(self._held):
            self._row_begin, self._row_bytes = self._position, JUMP_BYTES
        else:
            rest_bytes = abs(self._row_begin + self._expected_bytes - self._position)
            self._row_bytes = max(JUMP_BYTES, min(2 * self._row_bytes, MOST_BYTES, rest_bytes))
        num_bytes = self._size if self._size <= SMALL_BYTES else max(self._row_bytes, wanted_bytes)
        self._file.seek(self._position)
        self._begin, self._held = self._position, self._file.read(num_bytes)
        if self._position == 0:
            self._head = self._held
