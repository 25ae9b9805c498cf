"""An S3 server on loopback in a separate process: `tests.s3_server`, which can refuse requests or close connections.

Ray's workers use it too, through the usual environment variables.
"""

import json
import socket
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CONTROL = "/-/busy"


@dataclass(frozen=True)
class S3Server:
    endpoint: str
    bucket: str = "bucket"

    @property
    def env(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.endpoint,
        }

    def uri(self, *parts: str) -> str:
        return "/".join([f"s3://{self.bucket}", *parts])

    @contextmanager
    def busy(self, *, share: float = 0.0, following: int = 0) -> Iterator[dict[str, int]]:
        """Refuse `share` of the requests and all of the `following` ones. The counts are known when the block ends."""
        counts: dict[str, int] = {}
        self._control(share=share, following=following)
        try:
            yield counts
        finally:
            counts |= self._control()

    @contextmanager
    def without_deleting(self) -> Iterator[None]:
        """Refuse deleting, as for a key without s3:DeleteObject."""
        self._control(forbids_deleting=1)
        try:
            yield
        finally:
            self._control()

    @contextmanager
    def without_conditions(self, conditions: Literal["refused", "ignored"]) -> Iterator[None]:
        """Do not heed If-Match and If-None-Match, as stores do that have no conditional writes."""
        self._control(conditions=conditions)
        try:
            yield
        finally:
            self._control()

    @contextmanager
    def away_from(self, request: str) -> Iterator[dict[str, int]]:
        """The server answers no request from the first match on. The counts are known when the block ends.

        Args:
            request: a regular expression for method and path, such as `PUT .*/dataset.json`.
        """
        counts: dict[str, int] = {}
        self._control(away_from=request)
        try:
            yield counts
        finally:
            counts |= self._control()

    def _control(self, **settings: float | str) -> dict[str, int]:
        query = urllib.parse.urlencode(settings)
        with urllib.request.urlopen(f"{self.endpoint}{CONTROL}?{query}", timeout=60) as answer:
            return json.load(answer)


@contextmanager
def serve(*elsewhere: socket.socket) -> Iterator[S3Server]:
    """Serve on loopback, and on the listening sockets `elsewhere`, which may be on other networks."""
    root, sockets = str(Path(__file__).parents[1]), [each.fileno() for each in elsewhere]
    with subprocess.Popen(
        [sys.executable, "-m", "tests.s3_server", *map(str, sockets)],
        cwd=root,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=sockets,
    ) as process:
        try:
            server = S3Server(f"http://127.0.0.1:{int(process.stdout.readline())}")
            make_bucket = urllib.request.Request(f"{server.endpoint}/{server.bucket}", method="PUT")
            urllib.request.urlopen(make_bucket, timeout=60).close()
            yield server
        finally:
            process.terminate()
