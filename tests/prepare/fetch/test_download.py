"""Sections fetched with the real yt-dlp from a real HTTP server on loopback."""

import errno
import io
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from yt_dlp.networking import Response
from yt_dlp.networking.exceptions import HTTPError, TransportError
from yt_dlp.utils import DownloadError, ExtractorError, GeoRestrictedError, PostProcessingError

from ast_core.errors import ConfigError, UserError
from jobs.demo.media_server import serve
from pipeline.prepare.audio.decode import decode_section
from pipeline.prepare.clip import ClipError, Reason, each_clip, in_progress
from pipeline.prepare.fetch.download import Download, FetchSettings
from pipeline.prepare.fetch.rate_limiter import RateLimit
from pipeline.prepare.fetch.ytdlp import failure_of, fetch_with_ytdlp
from pipeline.prepare.fetch.ytdlp_settings import YtDlp
from tests import fakes
from tests.fakes import Permits
from tests.prepare.audio.test_decode import lag_samples

LOCAL = YtDlp(allow_private_hosts=True)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("media")
    for suffix in ("webm", "m4a", "ogg", "flac", "wav", "mp3"):
        fakes.write_media(folder / f"sound-{suffix}.{suffix}", fakes.noise(35))
    with serve(folder) as base_url:
        yield folder, base_url


@pytest.mark.parametrize("suffix", ["webm", "m4a", "ogg", "flac", "wav", "mp3"])
@pytest.mark.parametrize("start_s", [0.0, 7.137, 24.9])
def test_a_fetched_section_equals_that_of_the_local_file(host: tuple[Path, str], suffix: str, start_s: float):
    folder, base_url = host
    url = f"{base_url}/sound-{suffix}"
    section = fetch_with_ytdlp(url, start_s, 5.0, settings=LOCAL)
    assert len(section) == 5 * 16_000
    file = str(folder / f"sound-{suffix}.{suffix}")
    np.testing.assert_array_equal(section, decode_section(file, start_s, 5.0))
    padded = np.concatenate([np.zeros(3000, np.float32), decode_section(file, 0.0, None)])  # for lags before time 0
    assert lag_samples(section, padded, start_s + 3000 / 16_000) == 0


def test_a_missing_recording_keeps_its_row_and_reason(host: tuple[Path, str]):
    _, base_url = host
    rows = fakes.clips(
        {"clip_id": "a", "media": f"{base_url}/sound-ogg", "media_start_s": 3.0, "end_s": 5.0},
        {"clip_id": "b", "media": f"{base_url}/nothing", "media_start_s": 3.0, "end_s": 5.0},
        {"clip_id": "c", "media": "/a/file.wav"},
    )
    out = Download(FetchSettings(ytdlp=LOCAL), Permits(RateLimit()))(in_progress(rows))
    assert out["reason"].to_pylist() == [None, "unavailable", None]
    assert [samples is not None for samples in out["samples"].to_pylist()] == [True, False, False]
    assert "404" in out["message"][1].as_py()


def test_a_host_that_does_not_answer_is_a_network_fault_and_tried_again():
    with pytest.raises(ClipError) as caught:
        fetch_with_ytdlp("http://127.0.0.1:9/x.webm", 0.0, 5.0, settings=replace(LOCAL, timeout_s=2))
    assert caught.value.reason is Reason.NETWORK
    assert caught.value.reason.retry


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("Video unavailable. This content isn't available, try again later.", Reason.THROTTLED),
        ("The current session has been rate-limited by YouTube for up to an hour", Reason.THROTTLED),
        ("Sign in to confirm you're not a bot", Reason.THROTTLED),
        ("Sign in to confirm your age", Reason.RESTRICTED),
        ("The uploader has not made this video available in your country", Reason.RESTRICTED),
        ("Video unavailable", Reason.UNAVAILABLE),
        ("Private video. Sign in if you've been granted access to this video", Reason.UNAVAILABLE),
        ("Video unavailable. This video is private", Reason.UNAVAILABLE),
        ("This video is not available", Reason.UNAVAILABLE),
        ("This video is no longer available because the uploader has closed their account", Reason.UNAVAILABLE),
        ("This video is no longer available due to a copyright claim by X", Reason.UNAVAILABLE),
        ("[youtube] abcdefghijk: This video is DRM protected", Reason.UNAVAILABLE),
        ("This video is only available to Music Premium members", Reason.RESTRICTED),
        ("This video requires payment to watch", Reason.RESTRICTED),
        ("Video unavailable. Playback on other websites has been disabled by the video owner", Reason.SETUP),
        # An id and an address may contain any word.
        ("[youtube] aDRMprotect: Unable to download webpage: timed out", Reason.NETWORK),
        ("Unable to download https://host/not-a-bot/captcha: timed out", Reason.NETWORK),
        ("Requested format is not available", Reason.SETUP),
    ],
)
def test_messages_of_hosts_are_classified_in_order(message: str, reason: Reason):
    assert failure_of(DownloadError(message)).reason is reason


@pytest.mark.parametrize(
    "err",
    [
        DownloadError("unable to write data: [Errno 28] No space left on device"),
        DownloadError("x", exc_info=(OSError, OSError(errno.ENOSPC, "full"), None)),
        DownloadError("x", exc_info=(None, PostProcessingError("x"), None)),
    ],
)
def test_a_fault_of_this_machine_ends_the_job_not_only_the_clip(err: DownloadError):
    failure = failure_of(err)
    assert isinstance(failure, UserError)
    with pytest.raises(UserError, match="this machine cannot fetch"):
        each_clip(in_progress(fakes.clips({"clip_id": "a", "media": "x"})), "download", lambda row: throw(failure))


def throw(err: Exception) -> None:
    raise err


def test_error_types_decide_where_messages_do_not():
    response = Response(io.BytesIO(b""), "http://x", {}, status=429, reason="Zu viele")
    wrapped = DownloadError(
        "no luck", exc_info=(ExtractorError, ExtractorError("no luck", cause=HTTPError(response)), None)
    )
    assert failure_of(wrapped).reason is Reason.THROTTLED
    assert failure_of(DownloadError("x", exc_info=(None, GeoRestrictedError("x"), None))).reason is Reason.RESTRICTED
    assert failure_of(DownloadError("x", exc_info=(None, TransportError("x"), None))).reason is Reason.NETWORK
    changed = ExtractorError("Unable to extract player response", expected=False)
    assert failure_of(DownloadError("x", exc_info=(None, changed, None))).reason is Reason.SETUP
    said = ExtractorError("This video plays on Tuesdays", expected=True)
    assert failure_of(DownloadError("x", exc_info=(None, said, None))).reason is Reason.UNFORESEEN


def test_a_fetch_whose_process_is_killed_is_repeated_once(tmp_path: Path):
    fakes.write_media(tmp_path / "sound.ogg", fakes.noise(8))
    download = Download(FetchSettings(ytdlp=LOCAL), Permits(RateLimit()))
    killed: list[int] = []

    class Killing(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            if not killed:
                killed.append(download._fetch._child.pid)
                os.kill(killed[0], signal.SIGKILL)
            super().do_GET()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Killing, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_port}/sound.ogg"
        rows = download(in_progress(fakes.clips({"clip_id": "a", "media": url, "end_s": 5.0})))
        server.shutdown()
    assert killed
    assert rows["reason"].to_pylist() == [None]
    assert len(rows["samples"][0].as_py()) == 5 * 16_000 * 4


@pytest.mark.parametrize(("host", "attempts"), [("mirror.example:8000", 1), ("other.example", 2)])
def test_only_a_refusal_of_the_users_own_host_is_not_repeated(host: str, attempts: int):
    rate_limit = RateLimit(own_hosts=frozenset(["mirror.example:8000"]))
    download = Download(FetchSettings(rate_limit=rate_limit), Permits(rate_limit))
    download._fetch = Mock(side_effect=ClipError(Reason.SETUP, "HTTP Error 403: Forbidden"))
    row = {"clip_id": "a", "media": f"http://{host}/a.webm", "end_s": 5.0}
    assert download(in_progress(fakes.clips(row)))["attempts"].to_pylist() == [attempts]


def test_a_node_that_cannot_fetch_ends_the_job(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("deno.find_deno_bin", Mock(side_effect=FileNotFoundError("no deno")))
    with pytest.raises(UserError, match="cannot fetch: no deno"):
        Download(FetchSettings(), Permits(RateLimit()))(
            in_progress(fakes.clips({"clip_id": "a", "media": "http://127.0.0.1:9/x"}))
        )


def test_a_source_address_of_another_machine_ends_the_job():
    with pytest.raises(UserError, match=r"no address 192\.0\.2\.7 .*--addresses node"):
        fetch_with_ytdlp("http://127.0.0.1:9/x.webm", 0.0, 5.0, address="192.0.2.7")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--no-such-option"], "no such option"),
        (["--exec", "touch x"], "must not set --exec: "),
        (["-o", "elsewhere"], "must not set -o/--output: "),
        # C11 of the review
        (["--netrc-cmd", "touch x"], "must not set --netrc-cmd: "),
        (["--ffmpeg-location", "x"], "must not set --ffmpeg-location: "),
        (["--plugin-dirs", "x"], "must not set --plugin-dirs: "),
        (["--download-archive", "x"], "must not set --download-archive: "),
        (["--print-to-file", "id", "x"], "must not set --print-to-file: "),
        (["--write-info-json"], "must not set --write-info-json: "),
        (["--enable-file-urls"], "must not set --enable-file-urls: "),
        (["--load-info-json", "x"], "must not set --load-info-json: "),
        (["--cookies-from-browser", "firefox"], "must not set --cookies-from-browser: "),
        (["--config-locations", "list.txt"], "must not set --config-locations"),
        (["--alias", "x", "--exec y", "--x"], "must not set "),
        (["http://127.0.0.1/x"], "is none"),
        (["--cookies", "nowhere.txt"], "cannot read the cookies"),
        (["--proxy", "socks5://127.0.0.1:1080"], "--proxy socks5://127.0.0.1:1080: .* http:// proxies"),
    ],
)
def test_options_of_yt_dlp_are_checked_before_any_work(
    args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text("--proxy http://127.0.0.1:1")
    with pytest.raises(ConfigError, match=message):
        YtDlp.from_args(args, timeout_s=1)


@pytest.mark.parametrize(
    "args",
    [
        ["--extractor-args", "youtube:player_client=tv", "--js-runtimes", "node", "--retries", "3"],
        ["--user-agent", "x", "--referer", "http://y", "--add-headers", "A:b", "-4", "--xff", "never"],
        ["-u", "me", "-p", "secret", "--video-password", "x", "--no-check-certificates"],
        ["-f", "ba", "-S", "abr", "--sleep-requests", "1", "--client-certificate", "x"],
    ],
)
def test_options_on_how_a_host_is_asked_are_accepted(args: list[str]):
    assert YtDlp.from_args(args, timeout_s=1).args == tuple(args)
