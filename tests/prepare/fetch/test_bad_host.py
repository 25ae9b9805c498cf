"""Faults of a host, with the real yt-dlp and FFmpeg: each ends with its reason in bounded time."""

import io
import tempfile
import time
import wave
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from jobs.prepare_audioset import main
from pipeline.prepare.audio.decode import Decode
from pipeline.prepare.audio.features import clip_fbank
from pipeline.prepare.clip import Reason, in_progress
from pipeline.prepare.fetch import download as download_module
from pipeline.prepare.fetch.download import ATTEMPTS, BACK_OFF_S, Download, FetchSettings
from pipeline.prepare.fetch.rate_limiter import RateLimit
from pipeline.prepare.fetch.ytdlp_settings import YtDlp
from tests import fakes
from tests.bad_host import BadHost
from tests.fakes import Permits

TIMEOUT_S, DEADLINE_S = 20.0, 60.0
"""Longer than an answer or a whole fetch takes on a busy machine."""
STALL_TIMEOUT_S = 2.0
"""Timeout for hosts that stall."""
LOCAL = YtDlp(timeout_s=TIMEOUT_S, allow_private_hosts=True)
LONG_S = 3 * 3600


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    fakes.write_media(folder / "sound.webm", fakes.noise(30))
    fakes.write_media(folder / "other.m4a", fakes.noise(30))
    write_long(folder / "long.wav")
    write_bomb(folder / "bomb.flac")
    return folder


def write_long(path: Path) -> None:
    """Three hours with sound only in the last half minute; the rest is a hole in the file."""
    sound = (128 + 100 * fakes.noise(30, rate_hz=8000)).astype(np.uint8)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 1, 8000, LONG_S * 8000, "NONE", ""))
        file.writeframes(sound.tobytes())
    with path.open("r+b") as raw:
        raw.truncate(44)
        raw.seek(4)
        raw.write((36 + LONG_S * 8000).to_bytes(4, "little"))
        raw.seek(40)
        raw.write((LONG_S * 8000).to_bytes(4, "little"))
        raw.seek(44 + (LONG_S - 30) * 8000)
        raw.write(sound.tobytes())


def write_bomb(path: Path, duration_s: int = 3600) -> None:
    """An hour of silence in a few hundred kilobytes."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("flac", rate=8000, layout="mono")
        for _ in range(duration_s // 60):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 60 * 8000), np.int16), format="s16", layout="mono")
            frame.rate = 8000
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def host(media: Path) -> Iterator[BadHost]:
    with BadHost(media) as elsewhere, BadHost(media, elsewhere=f"{elsewhere.url}/good") as host:
        yield host


@pytest.fixture(scope="module")
def download() -> Iterator[Download]:
    stage = Download(settings(), Permits(RateLimit(cool_down_s=0.2)))
    yield stage
    stage.stop()


def settings(**more: Any) -> FetchSettings:
    return FetchSettings(**{"ytdlp": LOCAL, "deadline_s": DEADLINE_S, "back_off_s": 0.05} | more)


def prepare(download: Download, url: str, start_s: float = 20.0) -> dict[str, Any]:
    """Fetch and decode one clip of five seconds, and return its row."""
    times = {"media_start_s": start_s, "start_s": start_s, "end_s": start_s + 5}
    rows = in_progress(fakes.clips({"clip_id": "a", "media": url} | times))
    return Decode()(download(rows)).to_pylist()[0]


@pytest.fixture(scope="module")
def undisturbed(host: BadHost, download: Download) -> dict[str, np.ndarray]:
    return {name: np.array(prepare(download, f"{host.url}/good/{name}")["waveform"]) for name in ("sound", "other")}


@pytest.mark.parametrize("name", ["sound", "other"])
@pytest.mark.parametrize("behaviour", ["flaky", "reset", "throttled", "wrongtype", "redirect"])
def test_a_transient_fault_does_not_change_the_sound(
    host: BadHost, download: Download, undisturbed: dict[str, np.ndarray], behaviour: str, name: str
):
    row = prepare(download, f"{host.url}/{behaviour}/{name}")
    assert (row["reason"], host.of(behaviour) != []) == (None, True)
    np.testing.assert_array_equal(row["waveform"], undisturbed[name])


@pytest.mark.parametrize(
    ("path", "reason", "attempts"),
    [
        ("404/sound", Reason.UNAVAILABLE, 1),
        ("410/sound", Reason.UNAVAILABLE, 1),
        ("401/sound", Reason.RESTRICTED, 1),
        ("451/sound", Reason.RESTRICTED, 1),
        ("403/sound", Reason.SETUP, 2),
        ("402/sound", Reason.THROTTLED, 3),
        ("429/sound", Reason.THROTTLED, 3),
        ("503/sound", Reason.NETWORK, 3),
        ("cut/sound", Reason.NETWORK, 3),
        ("cut/other", Reason.NETWORK, 3),
        ("short/sound", Reason.TRUNCATED, 2),
        ("short/other", Reason.TRUNCATED, 2),  # the index at its end is missing
        ("chunked40/sound", Reason.TRUNCATED, 2),
        ("stall/other", Reason.NETWORK, 3),
        ("html/sound", Reason.SETUP, 2),
        ("empty/sound", Reason.NOT_AUDIO, 2),
        ("loop/sound", Reason.NETWORK, 3),
        ("tofile/sound", Reason.NETWORK, 3),
        ("playlist/sound", Reason.SETUP, 2),  # from an unknown host only files are accepted
        ("longpage/sound", Reason.SETUP, 2),
        ("good/bomb", Reason.SILENT, 1),
    ],
)
def test_each_fault_has_its_reason_and_number_of_attempts(
    host: BadHost, download: Download, path: str, reason: Reason, attempts: int
):
    if path.startswith("stall/"):
        download = Download(
            settings(ytdlp=replace(LOCAL, timeout_s=STALL_TIMEOUT_S)), Permits(RateLimit(cool_down_s=0.2))
        )
    row = prepare(download, f"{host.url}/{path}")
    assert (row["reason"], row["attempts"]) == (reason, attempts)
    assert row["message"]


def test_a_playlist_cannot_lead_to_another_file_or_host(host: BadHost, download: Download, media: Path):
    with BadHost(media) as secret:
        host.elsewhere, elsewhere = f"{secret.url}/good", host.elsewhere
        try:
            prepare(download, f"{host.url}/playlist/sound")
        finally:
            host.elsewhere = elsewhere
        assert secret.requests == []


def test_a_section_late_in_a_long_recording_costs_no_more_than_another(host: BadHost, download: Download):
    row = prepare(download, f"{host.url}/good/long", start_s=LONG_S - 20)
    assert (row["reason"], len(row["waveform"])) == (None, 80_000)
    sent = sum(int(r.range.split("-")[0].removeprefix("bytes=")) > 44 for r in host.of("good") if r.range)
    assert sent >= 1  # by ranges, not from the beginning


def test_an_endless_fetch_is_ended_with_all_its_programs(
    host: BadHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fetch = Download(settings(deadline_s=4.0), Permits(RateLimit(cool_down_s=0.2)))
    row = prepare(fetch, f"{host.url}/endless/sound", start_s=100.0)
    assert row["reason"] in (Reason.TIMEOUT, Reason.TOO_LARGE, Reason.TRUNCATED, Reason.NETWORK)
    fetch.stop()
    assert list(tmp_path.iterdir()) == []  # no temporary files are left
    programs = [p for p in psutil.Process().children(recursive=True) if "ffmpeg" in p.as_dict(["name"])["name"]]
    assert psutil.wait_procs(programs, timeout=DEADLINE_S)[1] == []


def test_an_endless_page_does_not_use_up_memory(host: BadHost, monkeypatch: pytest.MonkeyPatch):
    """yt-dlp reads such a page of a site that it knows."""
    monkeypatch.setattr(download_module, "MEMORY_BYTES", 300 << 20)
    fetch = Download(settings(deadline_s=60.0), Permits(RateLimit(cool_down_s=0.2)))  # the memory limit comes first
    monkeypatch.setattr(fetch._fetch, "function", "tests.prepare.work:fetch_as_of_a_known_site")
    row = prepare(fetch, f"{host.url}/longpage/sound")
    fetch.stop()
    assert (row["reason"], row["attempts"]) == (Reason.TOO_LARGE, 1)


def test_after_the_cool_down_a_throttled_clip_is_fetched_in_the_same_run(media: Path):
    with BadHost(media, throttled=2) as host:
        row = prepare(Download(settings(), Permits(RateLimit(cool_down_s=0.5))), f"{host.url}/throttled/sound")
        assert row["reason"] is None
        at_s = [request.at_s for request in host.of("throttled")]
        assert at_s[1] - at_s[0] >= 0.5
        assert at_s[2] - at_s[1] >= 1.0  # twice as long


def test_addresses_share_the_fetches_and_send_every_request(media: Path):
    addresses = ("127.0.0.2", "127.0.0.3")
    with BadHost(media) as host:
        rate_limit = RateLimit(addresses=addresses, fetches_per_hour=3600 * 2)
        fetch = Download(
            settings(rate_limit=rate_limit),
            Permits(RateLimit(addresses=addresses, fetches_per_hour=3600 * 2, cool_down_s=0.2)),
        )
        for _ in range(4):
            assert prepare(fetch, f"{host.url}/good/sound")["reason"] is None
        assert {request.client for request in host.requests} == set(addresses)
        of_sections = {request.client for request in host.requests if request.range and request.range != "bytes=0-"}
        assert of_sections == set(addresses)


def test_cookies_reach_the_host_and_their_file_stays_unchanged(media: Path, tmp_path: Path):
    cookies = tmp_path / "cookies.txt"
    with BadHost(media) as host:
        line = "127.0.0.1\tFALSE\t/\tFALSE\t0\tkey\tvalue\n"
        cookies.write_text(f"# Netscape HTTP Cookie File\n{line}")
        before = cookies.read_bytes()
        ytdlp = YtDlp.from_args(["--cookies", str(cookies)], timeout_s=TIMEOUT_S, allow_private_hosts=True)
        assert (
            prepare(Download(settings(ytdlp=ytdlp), Permits(RateLimit(cool_down_s=0.2))), f"{host.url}/good/sound")[
                "reason"
            ]
            is None
        )
        assert {"key=value"} <= {request.cookie for request in host.requests}
    assert cookies.read_bytes() == before


def test_the_bomb_is_small_but_its_content_is_not(media: Path):
    assert (media / "bomb.flac").stat().st_size < 1 << 20
    with av.open(io.BytesIO((media / "bomb.flac").read_bytes())) as container:
        assert container.duration is not None
        assert container.duration / av.time_base == 3600


# The whole job

JOB_DEADLINE_S, REST_S = 10.0, 0.2

ON_BAD_DAYS = {
    "endless/sound": {Reason.TIMEOUT, Reason.TOO_LARGE, Reason.TRUNCATED, Reason.NETWORK},
    "404/sound": {Reason.UNAVAILABLE},
    "403/sound": {Reason.SETUP},
    "429/sound": {Reason.THROTTLED},
    "cut/sound": {Reason.NETWORK},
    "html/sound": {Reason.SETUP},
    "empty/sound": {Reason.NOT_AUDIO},
    "good/bomb": {Reason.SILENT},
    "loop/sound": {Reason.NETWORK},
    "short/other": {Reason.TRUNCATED},
    "good/bomb whole": {Reason.TOO_LONG},
    "good/long whole": {Reason.TOO_LONG},
    "stall/other": {Reason.NETWORK, Reason.TIMEOUT},  # whichever of two limits comes first
}
"""Clips that cannot be fetched, and their allowed reasons. Slow ones are in different chunks."""

SOUND_ALL_THE_SAME = ("good/sound", "flaky/sound", "throttled/sound", "redirect/sound")


def longest_s(reasons: set[Reason]) -> float:
    attempts = max(ATTEMPTS.get(reason, 1) for reason in reasons)
    return attempts * JOB_DEADLINE_S + sum(max(BACK_OFF_S, REST_S) * 4**i for i in range(attempts - 1))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_with_all_faults_ends_in_time_with_a_result_for_each_clip(
    local_ray: None, host: BadHost, undisturbed: dict[str, np.ndarray], tmp_path: Path
):
    times = {"endless/sound": "100,105", "good/long": f"{LONG_S - 20},{LONG_S - 15}"}
    healing = (*SOUND_ALL_THE_SAME, "wrongtype/sound", "good/long")
    lines = ["clip_id,url,start_s,end_s,labels"]
    for name in (*ON_BAD_DAYS, *healing):
        path, _, whole = name.partition(" ")
        lines.append(f"{name},{host.url}/{path},{',' if whole else times.get(path, '20,25')},sound")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    argv = ["--manifest", str(tmp_path / "list.csv"), "--output", str(tmp_path / "data")]
    argv.append("--allow-private-hosts")
    limits = {"--timeout-s": STALL_TIMEOUT_S, "--deadline-s": JOB_DEADLINE_S, "--rest-s": REST_S}
    began_s = time.monotonic()
    assert main([*argv, *(f"{word}" for option in limits.items() for word in option)]) == 0
    # Upper bound: one worker makes all attempts, and each takes its full time.
    assert time.monotonic() - began_s < sum(map(longest_s, [*ON_BAD_DAYS.values(), *[{Reason.TIMEOUT}] * len(healing)]))

    failures = pq.read_table(tmp_path / "data" / "train" / "failures.parquet").to_pylist()
    assert sorted(row["clip_id"] for row in failures) == sorted(ON_BAD_DAYS)
    for row in failures:
        assert row["reason"] in ON_BAD_DAYS[row["clip_id"]], row
        assert 0 <= row["attempts"] - ATTEMPTS.get(row["reason"], 1) <= 1, row  # a busy machine may lose one
        assert row["message"]
    prepared = fakes.shard_rows(tmp_path / "data")
    assert set(prepared) == set(healing)
    assert len({prepared[name]["fbank_hash"] for name in SOUND_ALL_THE_SAME}) == 1
    expected = clip_fbank(undisturbed["sound"])  # other threads, so not equal to the byte
    np.testing.assert_allclose(np.array(prepared["good/sound"]["fbank"]), expected, atol=0.05)
