"""S3 as pyarrow reads and writes it, with retries for refused requests."""

import io
import time
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

S3_RETRIES = 10
"""Retries of one request. The wait doubles from 50 ms on, so a request fails after 26 s of refusals."""

SHORT_READ_BYTES = 4096
"""More than the length of any refusal of S3."""

S3_CONNECT_TIMEOUT_S = 10.0
S3_SILENCE_TIMEOUT_S = 30.0


class PatientS3(pafs.S3FileSystem):
    """An S3 file system that retries refused requests, also after pickling, and writes a small file by one request.

    pyarrow does not pickle the retry strategy of a file system. Its standard strategy fails for good after a hundred
    retries, because nothing refills its retry budget.
    """

    def __init__(self, **options: Any) -> None:
        ours = {
            "connect_timeout": S3_CONNECT_TIMEOUT_S,
            "request_timeout": S3_SILENCE_TIMEOUT_S,
            "allow_delayed_open": True,
        }
        super().__init__(**(options | ours), retry_strategy=pafs.AwsDefaultS3RetryStrategy(S3_RETRIES))

    def __reduce__(self) -> tuple[Any, ...]:
        _, (options,) = super().__reduce__()
        return _patient_s3, (options,)

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(_PatientReads(super().open_input_file(path)), mode="r")


class _PatientReads(io.RawIOBase):
    """A file whose short reads are retried too.

    pyarrow writes S3's answer to a buffer of the length of the read. A longer refusal overflows the buffer, which gives
    an error that pyarrow does not retry.
    """

    def __init__(self, file: pa.NativeFile) -> None:
        self._file, self._size, self._position = file, file.size(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._position)
        size = left if size < 0 else min(size, left)
        data = self._read(size)
        self._position += len(data)
        return data

    def _read(self, size: int) -> bytes:
        if size < SHORT_READ_BYTES:
            for retry in range(S3_RETRIES):
                try:
                    return self._file.read_at(size, self._position)
                except OSError:
                    time.sleep(0.025 * 2**retry)
        return self._file.read_at(size, self._position)

    def close(self) -> None:
        self._file.close()
        super().close()


def _patient_s3(options: dict[str, Any]) -> PatientS3:
    return PatientS3(**options)
