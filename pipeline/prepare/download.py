"""Audio sections from YouTube, or from any URL that yt-dlp can take, through yt-dlp's Python API."""

import functools
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import pyarrow as pa
import yt_dlp
from deno import find_deno_bin
from yt_dlp.postprocessor.ffmpeg import FFmpegPostProcessor

from pipeline.prepare.clip import ClipError, Reason, each_clip

MARGIN_S = 1.0
"""Fetched beyond the section on each side: cutting a stream without decoding it is only roughly exact."""

REASONS: tuple[tuple[Reason, tuple[str, ...]], ...] = (
    (
        Reason.THROTTLED,
        ("rate-limited by youtube", "try again later", "not a bot", "captcha", "http error 429", "http error 402"),
    ),
    (
        Reason.SETUP,
        (
            "javascript runtime",
            "requested format is not available",
            "http error 403",
            "ffmpeg is not installed",
            "page needs to be reloaded",
        ),
    ),
    (Reason.RESTRICTED, ("in your country", "confirm your age", "members-only", "this channel's members")),
    (
        Reason.UNAVAILABLE,
        (
            "private video",
            "account associated with this video has been terminated",
            "has been removed",
            "drm",
            "video unavailable",
            "http error 404",
            "http error 410",
            "unsupported url",
            "is not a valid url",
        ),
    ),
    (Reason.NOT_AUDIO, ("ffmpeg exited with code 183",)),  # AVERROR_INVALIDDATA: nothing there that it can read
)
"""Reasons in the order in which they are tried: the text of a rate limit itself begins with "Video unavailable"."""

Fetch = Callable[..., bytes]
"""`(url, begin_s, end_s, *, timeout_s) -> bytes` of a media file with the timestamps of the whole; raises ClipError."""


def reason_of(message: str) -> Reason:
    """The first reason of which a text occurs; a fault that nothing explains is the network's, and is tried again."""
    lower = message.lower()
    return next((reason for reason, texts in REASONS if any(text in lower for text in texts)), Reason.NETWORK)


def fetch_with_ytdlp(url: str, begin_s: float, end_s: float | None, *, timeout_s: float) -> bytes:
    """The audio of `url` between two times, in the host's codec and with its timestamps: nothing is encoded again."""
    # yt-dlp's API asks here, and only here, whether there is an ffmpeg.
    FFmpegPostProcessor._ffmpeg_location.set(_ffmpeg())
    with tempfile.TemporaryDirectory(prefix="ast-fetch-") as folder:
        options: dict[str, Any] = {
            "format": "bestaudio/best",
            "paths": {"home": folder, "temp": folder},
            "outtmpl": "audio.%(ext)s",
            "noplaylist": True,
            "quiet": True,
            "no_warnings": True,
            "noprogress": True,
            "logger": _Silent(),
            "cachedir": False,
            "retries": 2,
            "socket_timeout": timeout_s,
            "js_runtimes": {"deno": {"path": find_deno_bin()}},  # YouTube's player; in its wheel, maybe not on the PATH
            # ffmpeg cuts the section and has no time-out of its own: microseconds without a byte.
            # With the original timestamps kept, the cut after decoding is exact; a copied stream starts somewhere near.
            "external_downloader_args": {"ffmpeg_i": ["-rw_timeout", str(int(timeout_s * 1e6)), "-copyts"]},
        }
        if begin_s > 0 or end_s is not None:
            section = (begin_s, end_s if end_s is not None else float("inf"))
            options["download_ranges"] = yt_dlp.utils.download_range_func(None, [section])
        try:
            with yt_dlp.YoutubeDL(options) as downloader:
                downloader.download([url])
        except yt_dlp.utils.YoutubeDLError as err:
            message = re.sub(r"\x1b\[[0-9;]*m", "", str(err)).removeprefix("ERROR: ")
            raise ClipError(reason_of(message), message) from err
        files = [path for path in Path(folder).iterdir() if path.stem == "audio"]
        if not files or files[0].stat().st_size == 0:
            raise ClipError(Reason.NETWORK, "yt-dlp ended without an error and without a file")
        return files[0].read_bytes()


@dataclass(frozen=True)
class Download:
    """Rows whose `media` is a URL in; the same rows with `audio` (bytes, null where the media is a file) out."""

    timeout_s: float
    fetch: Fetch = fetch_with_ytdlp

    def __call__(self, rows: pa.Table) -> pa.Table:
        rows, audio = each_clip(rows, "download", self._one)
        return rows.append_column("audio", pa.array(audio, pa.binary()))

    def _one(self, row: dict[str, Any]) -> bytes | None:
        if not is_url(row["media"]):
            return None
        begin_s = max(0.0, row["media_start_s"] - MARGIN_S)
        end_s = None if row["end_s"] is None else row["media_start_s"] + (row["end_s"] - row["start_s"]) + MARGIN_S
        return self.fetch(row["media"], begin_s, end_s, timeout_s=self.timeout_s)


def is_url(media: str) -> bool:
    return media.startswith(("http://", "https://"))


@functools.cache
def _ffmpeg() -> str:
    """FFmpeg's program from its wheel: nothing needs to be installed on the machine."""
    return imageio_ffmpeg.get_ffmpeg_exe()


class _Silent:
    """yt-dlp's messages reach us as exceptions; a second copy on the terminal of 2 million clips helps nobody."""

    def debug(self, message: str) -> None: ...

    def warning(self, message: str) -> None: ...

    def error(self, message: str) -> None: ...
