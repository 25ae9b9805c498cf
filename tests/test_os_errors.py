"""Errors of storage and of the machine are one line with the object and the remedy."""

import errno
import os
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import storage
from pipeline.os_errors import explain, nearly_full
from pipeline.s3 import ConditionalS3

URI = "s3://bucket/data/x"


class Refusing(BaseHTTPRequestHandler):
    """An S3 server that refuses all requests, or only deletions, with `said`. Answers to HEAD have no body."""

    protocol_version = "HTTP/1.1"
    said = SimpleNamespace(code="AccessDenied", status=403)

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = f"<Error><Code>{self.said.code}</Code><Message>because</Message></Error>".encode()
        self.send_response(self.said.status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = answer

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("pipeline.s3.S3_RETRIES", 1)  # 26 s otherwise
    yield Refusing.said
    server.shutdown()
    server.server_close()


ASK = {
    "HEAD": lambda: storage.exists(URI),
    "GET": lambda: storage.list_files("s3://bucket/data"),
    "PUT": lambda: storage.write_bytes(URI, b"x"),
    "PUT on condition": lambda: ConditionalS3(storage.resolve(URI)[0], attempts=1).create("bucket/data/x", b"x"),
}


@pytest.mark.parametrize("method", list(ASK))
@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("AccessDenied", 403, r"S3 denies \w+ \(.*\); give this key s3:(GetObject|ListBucket|PutObject) there"),
        ("RequestTimeTooSkewed", 403, "this machine's clock is wrong, and S3 refuses what it signs: set the clock"),
        ("InvalidAccessKeyId", 403, "S3 does not know this access key: see AWS_ACCESS_KEY_ID"),
        ("SignatureDoesNotMatch", 403, "the secret does not fit the access key: see AWS_SECRET_ACCESS_KEY"),
        ("SlowDown", 503, r"S3 has refused this for half a minute \(.*\); run the same command again later"),
    ],
)
def test_part_3_4_refusals_of_s3_name_the_object_and_the_remedy(
    refusing: SimpleNamespace, method: str, code: str, status: int, said: str
):
    refusing.code, refusing.status = code, status
    with pytest.raises(OSError, match=r"AWS Error|S3 answers") as caught:
        ASK[method]()
    line = explain(caught.value)
    assert line is not None
    assert re.match(rf"s3://bucket/data(/x)?: {said}", line), line


@pytest.mark.parametrize("method", ["PUT", "PUT on condition"])
def test_part_3_4_s3_that_does_not_answer(method: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setattr("pipeline.s3.S3_RETRIES", 1)
    with pytest.raises(OSError, match=r"AWS Error|S3 answers") as caught:
        ASK[method]()
    assert re.match(
        f"{URI}: S3 does not answer .*; see the network and AWS_ENDPOINT_URL, and run", explain(caught.value)
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_named_with_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The failing call knows no path: the unfinished file is opened on a device that is always full."""
    whole = tmp_path / "index.parquet"
    whole.write_bytes(b"whole")
    monkeypatch.setattr("builtins.open", lambda *_: os.fdopen(os.open("/dev/full", os.O_WRONLY), "wb"))
    with pytest.raises(OSError, match="No space") as caught:
        storage.write_bytes(whole, b"x" * 100_000)
    monkeypatch.undo()
    assert explain(caught.value) == f"No space left on device: {whole}; make room there, and run the same command again"
    assert whole.read_bytes() == b"whole"


def test_of_two_folders_the_one_on_a_full_disk_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    free_bytes = {str(tmp_path / "run"): 500, str(tmp_path / "temporary"): 10}
    for folder in free_bytes:
        os.mkdir(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=1000, free=free_bytes[folder]))
    assert nearly_full("s3://bucket/run", *free_bytes) == str(tmp_path / "temporary")
    assert nearly_full(str(tmp_path / "run")) is None


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError(errno.ENOENT, "No such file", "/nowhere/typo.json"), OSError("odd"), OSError(errno.EBADF, "x")],
)
def test_case_c18_a_programming_error_keeps_its_traceback(error: OSError):
    assert explain(error) is None


def test_a_path_below_a_file_is_a_data_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(storage.DataError, match="file is a file, not a folder"):
        storage.write_bytes(tmp_path / "file" / "x", b"")
    with pytest.raises(storage.DataError, match="is a folder, or below a file; give a file"):
        storage.read_bytes(tmp_path)
