"""S3 as pyarrow reads and writes it, with retries for refused requests; and writing on condition, for locks."""

import io
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
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


class S3Error(OSError):
    """S3, or the way to it, refuses a request of `ConditionalS3`. `pipeline.os_errors` explains it.

    Args:
        code: S3's code in capitals, as pyarrow writes it: `ACCESS_DENIED`.
    """

    def __init__(self, path: str, operation: str, code: str, status: int | None, text: str) -> None:
        self.bucket, _, self.key = path.partition("/")
        self.operation, self.code, self.status, self.text = operation, code, status, text
        super().__init__(f"S3 answers {operation} of s3://{path} with {code} ({text})")


class UnconditionalError(Exception):
    """The store does not write on condition."""


class ConditionalS3:
    """Objects that are written only if they do not exist, or only in the place of a known version.

    pyarrow cannot ask for this, so the client is botocore (decision 44). It connects as the file system `fs` does: with
    its endpoint, its region, and its keys, or those that AWS's libraries find.

    Args:
        attempts: how often a request is tried; between the attempts the time doubles.
        timeout_s: seconds without an answer after which an attempt fails.

    Raises (all methods):
        S3Error: the request fails.
        UnconditionalError: the store says that it does not write on condition.
    """

    def __init__(self, fs: pafs.S3FileSystem, *, attempts: int, timeout_s: float = S3_CONNECT_TIMEOUT_S) -> None:
        from botocore import UNSIGNED  # it takes half a second to import, which only a job that locks S3 pays
        from botocore.config import Config
        from botocore.session import Session

        _, (given,) = fs.__reduce__()
        endpoint = given["endpoint_override"]
        if endpoint and "://" not in endpoint:
            endpoint = f"{given['scheme']}://{endpoint}"
        session = Session()
        region = given["region"] or os.environ.get("AWS_REGION") or session.get_config_variable("region")
        keys = {
            "aws_access_key_id": given["access_key"] or None,
            "aws_secret_access_key": given["secret_key"] or None,
            "aws_session_token": given["session_token"] or None,
        }
        is_path = bool(endpoint) and not given["force_virtual_addressing"]
        config = Config(
            connect_timeout=timeout_s,
            read_timeout=timeout_s,
            retries={"total_max_attempts": attempts, "mode": "standard"},
            s3={"addressing_style": "path" if is_path else "auto"},
            # Other stores than AWS's do not know the newer checksums.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            **({"signature_version": UNSIGNED} if given["anonymous"] else {}),
        )
        with _errors_of("", "Connect"):
            self._client = session.create_client(
                "s3",
                region_name=region or "us-east-1",
                endpoint_url=endpoint or None,
                verify=given["tls_ca_file_path"] or None,
                config=config,
                **(keys if keys["aws_access_key_id"] else {}),
            )

    def create(self, path: str, data: bytes) -> str | None:
        """Write the object `BUCKET/KEY` if there is none. Returns its ETag; None if there is one."""
        return self._put(path, data, IfNoneMatch="*")

    def replace(self, path: str, data: bytes, etag: str) -> str | None:
        """Write in the place of the version `etag`. Returns the new ETag; None if it is not there any more."""
        return self._put(path, data, IfMatch=etag)

    def _put(self, path: str, data: bytes, **condition: str) -> str | None:
        answer = self._ask("PutObject", path, Body=data, ContentType="application/json", **condition)
        return None if answer is None else str(answer["ETag"])

    def read(self, path: str) -> tuple[bytes, str] | None:
        """The object's content and ETag; None if there is none."""
        answer = self._ask("GetObject", path)
        if answer is None:
            return None
        with _errors_of(path, "GetObject"):
            return answer["Body"].read(), str(answer["ETag"])

    def delete(self, path: str, etag: str) -> None:
        """Delete the object if it is the version `etag`. A store that does not know this condition deletes any."""
        self._ask("DeleteObject", path, IfMatch=etag)

    def _ask(self, operation: str, path: str, **arguments: Any) -> dict[str, Any] | None:
        """S3's answer; None if a condition is not met, or if there is no such object."""
        bucket, _, key = path.partition("/")
        method = {"PutObject": "put_object", "GetObject": "get_object", "DeleteObject": "delete_object"}[operation]
        try:
            with _errors_of(path, operation):
                answer: dict[str, Any] = getattr(self._client, method)(Bucket=bucket, Key=key, **arguments)
                return answer
        except S3Error as err:
            if err.status == 501:
                raise UnconditionalError(err.text) from err
            # 409: another conditional request was just being carried out.
            if err.status in (409, 412) or err.code == "NO_SUCH_KEY":
                return None
            raise


@contextmanager
def _errors_of(path: str, operation: str) -> Iterator[None]:
    """Raise botocore's errors as S3Error."""
    from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError, NoCredentialsError

    try:
        yield
    except ClientError as err:
        answer = err.response
        code = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", str(answer.get("Error", {}).get("Code", "UNKNOWN"))).upper()
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        raise S3Error(path, operation, code, status, str(answer.get("Error", {}).get("Message", ""))) from err
    except (ConnectionError, HTTPClientError) as err:
        raise S3Error(path, operation, "NETWORK_CONNECTION", None, str(err)) from err
    except NoCredentialsError as err:
        raise S3Error(path, operation, "NO_CREDENTIALS", None, str(err)) from err
    except BotoCoreError as err:
        code = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(err).__name__).upper()
        raise S3Error(path, operation, code, None, str(err)) from err
