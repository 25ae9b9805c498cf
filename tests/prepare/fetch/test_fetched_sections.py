"""Sections over HTTP equal those of the local file, or have a reason, for any host (CASES part 3, 1 and 5)."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.fetch_campaign import (
    DURATION_S,
    MISBEHAVIOURS,
    STALL_S,
    START_S,
    Case,
    cases,
    outcome,
    section_on_disk,
)
from pipeline.prepare.clip import ClipError, Reason
from pipeline.prepare.fetch import ytdlp
from pipeline.prepare.fetch.http_file import HttpFile
from pipeline.prepare.fetch.ytdlp import fetch_with_ytdlp
from pipeline.prepare.fetch.ytdlp_settings import YtDlp
from tests.bad_host import BadHost
from tests.prepare.containers import RATE_HZ, by_the_program, write_container

KINDS = ("webm", "m4a", "ogg", "flac", "wav", "w64", "au", "aiff", "caf", "mp3", "aac", "pcm.avi", "mov", "ts")
PATIENT = YtDlp(timeout_s=60.0, allow_private_hosts=True)
"""For hosts that answer: on a busy machine an answer may take longer than the campaign's timeout."""

BY_POSITION = ("wav", "rf64.wav", "w64", "au", "aiff", "caf", "pcm.avi", "mov", "mp3")
"""Containers in which time is derived from the position in the file."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("containers")
    for kind in {*KINDS, *BY_POSITION}:
        write_container(folder, kind)
    return folder


@pytest.fixture(scope="module")
def host(folder: Path) -> Iterator[BadHost]:
    with BadHost(folder, STALL_S) as elsewhere, BadHost(folder, STALL_S, elsewhere=f"{elsewhere.url}/good") as host:
        yield host


def fetched(host: BadHost, path: str) -> np.ndarray:
    return fetch_with_ytdlp(f"{host.url}/{path}", START_S, DURATION_S, settings=PATIENT)


def low(samples: np.ndarray) -> np.ndarray:
    """Frequencies below 6 kHz. Towards 8 kHz two resamplers differ."""
    spectrum = np.fft.rfft(samples)
    spectrum[round(len(spectrum) * 6 / 8) :] = 0
    return np.fft.irfft(spectrum, len(samples))


@pytest.mark.parametrize("kind", KINDS)
def test_a_section_equals_that_of_the_ffmpeg_program(host: BadHost, folder: Path, kind: str):
    section = fetched(host, f"good/sound.{kind}")
    whole = by_the_program(folder / f"sound.{kind}")
    # The clock of Opus in WebM begins 7 ms before its first sample, and counts whole milliseconds.
    lags = range(128) if kind == "webm" else (0,)
    there = [whole[round(START_S * RATE_HZ) + lag :][: len(section)] for lag in lags]
    assert len(section) == DURATION_S * RATE_HZ
    assert max(np.corrcoef(low(section), low(samples))[0, 1] for samples in there) > 0.99


@pytest.mark.parametrize("kind", BY_POSITION)
@pytest.mark.parametrize(
    "misbehaviour", ["chunked", "norange", "rst@2", "rstmid@2", "rst@3", "gzip", "wrongrange", "lyingrange"]
)
def test_case_part_3_1_positions_are_right_without_byte_ranges(
    host: BadHost, folder: Path, kind: str, misbehaviour: str
):
    expected = section_on_disk(folder / f"sound.{kind}")
    np.testing.assert_array_equal(fetched(host, f"{misbehaviour}/sound.{kind}"), expected)


def test_a_host_that_misbehaves_at_any_request_gives_no_wrong_sound(host: BadHost, folder: Path):
    expected = {kind: section_on_disk(folder / f"sound.{kind}") for kind in KINDS}
    chosen = random.Random(15).sample(list(cases(KINDS, (1, 2, 3, 4))), 40)
    said = {case.path: outcome(host, case, expected[case.kind]) for case in chosen}
    assert [f"{path}: {text}" for path, text in said.items() if text.startswith("WRONG")] == []
    assert sum(text == "right" for text in said.values()) > 20


@pytest.mark.parametrize("kind", ["wav", "webm", "m4a", "mp3", "ogg"])
def test_case_part_3_5_a_regular_end_at_40_percent_is_truncated(host: BadHost, kind: str):
    with pytest.raises(ClipError) as caught:
        fetched(host, f"chunked40/sound.{kind}")
    assert caught.value.reason is Reason.TRUNCATED


def test_case_part_3_5_an_encoded_file_is_not_too_large(host: BadHost, folder: Path):
    for encoding in ("gzip", "gzipchunked", "deflate", "br"):
        assert outcome(host, Case("wav", encoding, 0), section_on_disk(folder / "sound.wav"), PATIENT) == "right"
    for broken in ("gzipcut", "gziplie", "gziprange"):
        assert outcome(host, Case("wav", broken, 0), section_on_disk(folder / "sound.wav"), PATIENT) in (
            "right", "network", "truncated",
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["webm", "m4a", "wav"])
def test_a_section_needs_only_its_part_of_the_file(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    opened: list[HttpFile] = []

    class Counted(HttpFile):
        def close(self) -> None:
            opened.append(self)
            super().close()

    monkeypatch.setattr(ytdlp, "HttpFile", Counted)
    size = write_container(tmp_path, kind, duration_s=120.0).stat().st_size
    with BadHost(tmp_path) as host:
        fetch_with_ytdlp(f"{host.url}/good/sound.{kind}", 90.0, 4.0, settings=PATIENT)
    assert opened[0].num_received < 0.3 * size


def test_the_campaign_uses_every_misbehaviour_of_the_host():
    from tests.bad_host import STATUSES, _Handler

    assert [name for name in MISBEHAVIOURS if not (hasattr(_Handler, f"_{name}") or int(name) in STATUSES)] == []
