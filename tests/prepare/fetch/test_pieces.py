"""Recordings that a site offers only in pieces, as HLS or DASH: the section equals that of the file."""

import subprocess
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import yt_dlp
from yt_dlp.extractor.common import InfoExtractor

from jobs.demo.media_server import serving
from pipeline.prepare.audio.decode import decode_section
from pipeline.prepare.clip import ClipError, Reason
from pipeline.prepare.fetch import ytdlp
from pipeline.prepare.fetch.ytdlp import fetch_with_ytdlp, open_url
from pipeline.prepare.fetch.ytdlp_settings import YtDlp
from tests import fakes

START_S, DURATION_S = 5.0, 3.0
SETTINGS = YtDlp(timeout_s=20.0, allow_private_hosts=True)
WAYS = {
    "ts": ("hls", ["-f", "hls", "-hls_time", "2", "-hls_playlist_type", "vod"], "m3u8"),
    "fmp4": ("hls", ["-f", "hls", "-hls_time", "2", "-hls_playlist_type", "vod", "-hls_segment_type", "fmp4"], "m3u8"),
    "dash": ("dash", ["-f", "dash", "-seg_duration", "2"], "mpd"),
}


class PiecesIE(InfoExtractor):
    """A site for yt-dlp, whose page leads to a list of pieces."""

    _VALID_URL = r"http://127\.0\.0\.1:\d+/watch/(?P<id>\w+)"

    def _real_extract(self, url: str) -> dict[str, Any]:
        name = self._match_id(url)
        kind = WAYS[name]
        base = url.partition("/watch/")[0]
        if kind[0] == "hls":
            formats = self._extract_m3u8_formats(f"{base}/list-{name}.m3u8", name, ext="m4a")
        else:
            formats = self._extract_mpd_formats(f"{base}/list-{name}.mpd", name)
        return {"id": name, "title": name, "formats": formats}


class KnowsTheSite(yt_dlp.YoutubeDL):
    def add_default_info_extractors(self) -> None:
        self.add_info_extractor(PiecesIE())
        super().add_default_info_extractors()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pieces")
    sound = fakes.write_media(folder / "sound.wav", fakes.noise(12.0))
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    subprocess.run([ffmpeg, "-v", "error", "-i", sound, "-c:a", "aac", folder / "sound.m4a"], check=True)
    for name, (_, options, ending) in WAYS.items():
        to = [*options, folder / f"list-{name}.{ending}"]
        if name == "fmp4":
            to = [*options, "-hls_fmp4_init_filename", "init-fmp4.mp4", folder / f"list-{name}.{ending}"]
        subprocess.run([ffmpeg, "-v", "error", "-i", folder / "sound.m4a", "-c", "copy", *to], check=True, cwd=folder)
    return folder


@pytest.fixture
def site(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(yt_dlp, "YoutubeDL", KnowsTheSite)
    monkeypatch.setattr(ytdlp, "gen_extractor_classes", lambda: [PiecesIE])
    with serving(partial(SimpleHTTPRequestHandler, directory=str(folder))) as url:
        yield url


@pytest.mark.parametrize("name", WAYS)
def test_a_section_of_a_recording_in_pieces_equals_that_of_the_file(site: str, folder: Path, name: str):
    section = fetch_with_ytdlp(f"{site}/watch/{name}", START_S, DURATION_S, settings=SETTINGS)
    expected = decode_section(str(folder / "sound.m4a"), START_S, DURATION_S)
    assert len(section) == len(expected)
    # MPEG-TS counts time in 1/90,000 s and cannot store AAC's priming, so a shift of one AAC frame is allowed.
    lags = range(-1100, 1101) if name != "dash" else range(-64, 65)
    inner = slice(2000, -2000)
    found = max(np.corrcoef(np.roll(section, lag)[inner], expected[inner])[0, 1] for lag in lags)
    assert found > 0.99


def test_the_size_of_pieces_is_limited(site: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ytdlp, "MAX_FETCH_BYTES", 1000)
    with pytest.raises(ClipError) as raised:
        fetch_with_ytdlp(f"{site}/watch/ts", START_S, DURATION_S, settings=SETTINGS)
    assert raised.value.reason is Reason.TOO_LARGE


def test_the_size_of_a_whole_recording_in_pieces_has_its_own_limit(site: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ytdlp, "MAX_FETCH_BYTES", 1000)
    with open_url(f"{site}/watch/ts", settings=SETTINGS, max_bytes=1 << 20) as joined:
        assert len(decode_section(joined, 0.0, None)) > 11 * 16_000
    with pytest.raises(ClipError) as raised, open_url(f"{site}/watch/ts", settings=SETTINGS, max_bytes=1000):
        pass
    assert raised.value.reason is Reason.TOO_LARGE


def test_a_missing_piece_has_a_reason(site: str, folder: Path):
    (folder / "list-gone.m3u8").write_text((folder / "list-ts.m3u8").read_text().replace("list-ts1.ts", "gone.ts"))
    WAYS["gone"] = ("hls", [], "m3u8")
    try:
        with pytest.raises(ClipError) as raised:
            fetch_with_ytdlp(f"{site}/watch/gone", START_S, DURATION_S, settings=SETTINGS)
    finally:
        del WAYS["gone"]
    assert raised.value.reason in {Reason.UNAVAILABLE, Reason.NETWORK, Reason.SETUP}
