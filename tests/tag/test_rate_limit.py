"""Recordings at URLs are fetched at the pace of the rate limiter, which hears how each fetch ended."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pytest

from ast_core.features import KALDI128
from jobs.demo.media_server import FolderHandler, serving
from jobs.tag import _rate_limit
from pipeline.prepare.clip import Reason
from pipeline.prepare.fetch.rate_limiter import LocalPermits, Permit, RateLimit
from pipeline.prepare.stream import Source
from pipeline.tag.pieces import Readers
from pipeline.tag.progress import LocalTally, Progress
from pipeline.tag.windows import WindowSettings
from tests import fakes

SETTINGS = WindowSettings.of(KALDI128, 100, None, None)


class Recorded:
    """Permits that are given at the second question, and what was asked and requested, in this order."""

    def __init__(self) -> None:
        self.log: list[Any] = []

    def permit(self, host: str) -> Permit:
        self.log.append(("permit", host))
        return Permit(None, 0.01) if self.log.count(("permit", host)) % 2 else Permit("address", 0.0)

    def report(self, address: str, host: str, reason: Reason | None) -> None:
        self.log.append(("report", host, reason))

    def fetching(self) -> None:
        return None


@pytest.fixture
def host(tmp_path: Path) -> Iterator[tuple[str, list[Any]]]:
    """A server with a recording, and the log of its requests."""
    fakes.write_media(tmp_path / "a.wav", fakes.noise(3.0))
    log: list[Any] = []

    class Handler(FolderHandler):
        folder = tmp_path

        def answer(self, *, with_body: bool) -> None:
            log.append(("request", self.path))
            super().answer(with_body=with_body)

    with serving(Handler) as url:
        yield url, log


def test_a_fetch_waits_for_its_permit_and_its_end_is_reported(host: tuple[str, list[Any]], tmp_path: Path):
    url, requests = host
    permits = Recorded()
    requests_and_permits = permits.log = requests
    name = urlsplit(url).netloc
    own = ((urlsplit(url).hostname or "", urlsplit(url).port or 0),)
    sources = [
        Source(f"{url}/a.wav", own_hosts=own),
        Source(str(tmp_path / "a.wav")),
        Source(f"{url}/b.wav", own_hosts=own),
    ]
    readers = Readers(permits)
    pieces = list(readers.pieces([0, 1, 2], sources, SETTINGS))
    readers.stop()
    assert [piece.recording for piece in pieces if piece.windows] == [0, 1]
    (failed,) = [piece for piece in pieces if piece.lost]
    found = list(dict.fromkeys(requests_and_permits))  # how often FFmpeg's reader asks does not matter
    assert found == [
        ("permit", name),
        ("request", "/a.wav"),
        ("report", name, None),
        ("request", "/b.wav"),
        ("report", name, failed.lost[0].reason),
    ]
    assert requests_and_permits[:3] == [("permit", name), ("permit", name), ("request", "/a.wav")]
    assert requests_and_permits.count(("permit", name)) == 4


def test_the_usual_rate_is_that_of_the_preparation():
    assert _rate_limit(None, pa.chunked_array([["/a.wav", "s3://b/c.wav"]])) is None
    assert _rate_limit(None, pa.chunked_array([["https://example.org/a.wav"]])) == RateLimit()
    of_youtube = pa.chunked_array([["https://www.youtube.com/watch?v=abcdefghijk"]])
    assert _rate_limit(None, of_youtube) == RateLimit(fetches_per_hour=300)
    assert _rate_limit(60.0, of_youtube) == RateLimit(fetches_per_hour=60)


def test_progress_names_a_host_that_throttles():
    permits, said = LocalPermits(RateLimit()), list[str]()
    address, _ = permits.permit("example.org")
    assert address is not None
    permits.report(address, "example.org", Reason.THROTTLED)
    assert permits.permit("example.org").address is None
    Progress(1, said.append, LocalTally().total, permits)._show(1.0)
    assert "cooling down: this network at example.org (throttled, " in said[0]
