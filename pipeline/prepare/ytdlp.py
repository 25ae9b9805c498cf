"""One section of audio through yt-dlp's Python API, and what it means when that fails.

Runs in a process of its own (`pipeline.prepare.isolated`), which imports neither PyTorch nor Ray.
"""

import functools
import ipaddress
import math
import optparse
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import yt_dlp
from deno import find_deno_bin
from yt_dlp.extractor import gen_extractor_classes
from yt_dlp.networking.exceptions import HTTPError, RequestError, TransportError
from yt_dlp.postprocessor.ffmpeg import FFmpegPostProcessor
from yt_dlp.utils import ExtractorError, GeoRestrictedError, PostProcessingError, UnsupportedError, YoutubeDLError

from ast_core.errors import ConfigError, UserError
from ast_core.text_files import decode_text
from pipeline.prepare.clip import ClipError, Reason
from pipeline.prepare.isolated import LOCAL_ERRNOS
from pipeline.prepare.pacing import check_address

NOT_FOR_USERS = (
    "external_downloader",
    "ignoreerrors",
    "outtmpl",
    "paths",
    "postprocessors",
    "simulate",
    "skip_download",
)
"""Options of yt-dlp that say what is fetched and where it goes, or run programs: those are this project's to set."""

FFMPEG_LOG = "ffmpeg.log"

CONTAINERS = "matroska,mov,ogg,mp3,flac,wav,aac,aiff,caf,amr,ac3,avi,flv,asf,mpeg,mpegts,hls"
"""That FFmpeg may take what it gets for. It looks at the content: a DASH manifest or a list of files called audio/webm
would have it open what they name. `hls` is for sites that offer nothing else: FFmpeg asks for its type."""

WITHOUT_TIMESTAMPS = {"aac", "ac3", "aif", "aiff", "amr", "caf", "mp3", "wav"}
"""Containers in which a section cut out would begin at 0. NUT keeps the time of any codec; MP4 that of MP3, and where
the encoder's delay ends."""


@dataclass(frozen=True, kw_only=True)
class YtDlp:
    """How to ask the host. Travels to workers."""

    timeout_s: float = 30.0
    """Without a byte."""
    args: tuple[str, ...] = ()
    """yt-dlp's own command-line options: client, token provider, cookies, proxy, JavaScript runtime, …"""
    cookies: str | None = None
    """The text of the cookie file that `args` name: a worker writes into a copy of its own."""

    @classmethod
    def from_args(cls, args: list[str], *, timeout_s: float) -> "YtDlp":
        """Raises ConfigError for options that yt-dlp does not know, or that are not the user's to set."""
        options = options_of(tuple(args))
        for name in NOT_FOR_USERS:
            if name in options:
                raise ConfigError(f"--yt-dlp must not set {name}: what is fetched, and where it goes, is set already")
        if proxy := options.get("proxy"):
            check_address(proxy, "--yt-dlp's --proxy")
        try:
            file = options.get("cookiefile")
            cookies = decode_text(Path(file).read_bytes(), file) if file else None
        except (OSError, UserError) as err:
            raise ConfigError(f"cannot read the cookies that --yt-dlp names: {err}") from err
        return cls(timeout_s=timeout_s, args=tuple(args), cookies=cookies)


@functools.cache
def options_of(args: tuple[str, ...]) -> dict[str, Any]:
    """What a command line of yt-dlp sets, as its Python API takes it. Configuration files are not read."""
    try:
        given = yt_dlp.parse_options(list(args))
    except (optparse.OptParseError, SystemExit) as err:
        raise ConfigError(f"yt-dlp does not take {' '.join(args)!r}: {str(err).rpartition('error: ')[2]}") from err
    if given.urls:
        raise ConfigError(f"--yt-dlp takes options of yt-dlp, and {given.urls[0]!r} is none")
    usual = yt_dlp.parse_options([]).ydl_opts
    return {name: value for name, value in given.ydl_opts.items() if value != usual[name]}


def check_tools() -> None:
    """Raises UserError where a program is missing without which no clip could be fetched."""
    try:
        find_deno_bin()
        _ffmpeg()
    except (OSError, RuntimeError) as err:
        raise UserError(f"cannot fetch: {err}; install the project's requirements anew") from err


def fetch_with_ytdlp(
    url: str,
    begin_s: float,
    end_s: float | None,
    *,
    settings: YtDlp = YtDlp(),
    address: str | None = None,
    every_client: bool = False,
) -> bytes:
    """The audio of `url` between two times, in the host's codec and with its timestamps: nothing is encoded again.

    Args:
        address: a proxy's URL or a source IP address; None goes out as the machine does.
        every_client: ask as each of YouTube's clients that yt-dlp knows, where the usual ones were refused.

    Raises:
        ClipError: the first of REASONS that fits.
        UserError: this machine's fault (disk, programs), which no other clip would escape.
    """
    with tempfile.TemporaryDirectory(prefix="ast-fetch-") as folder:
        options = {"format": _format(url)} | _options(settings, folder, address, every_client=every_client)
        if begin_s > 0 or end_s is not None:
            section = yt_dlp.utils.download_range_func(None, [(begin_s, math.inf if end_s is None else end_s)])

            def with_timestamps(info: dict[str, Any], downloader: yt_dlp.YoutubeDL) -> Any:
                names = {offer.get("ext") for offer in info.get("formats") or [info]}
                if names <= WITHOUT_TIMESTAMPS:
                    container = "mp4" if names == {"mp3"} else "nut"
                    downloader.params["external_downloader_args"]["ffmpeg_o"] = ["-f", container]
                return section(info, downloader)

            options["download_ranges"] = with_timestamps
        audio, failure, log = _run(url, options, folder)
        other_way = next((way for said, way in OTHER_WAYS if said in log), None)
        if failure is not None and other_way is not None and STOPPED not in log:
            arguments = options["external_downloader_args"]
            options["external_downloader_args"] = arguments | {
                k: arguments.get(k, []) + v for k, v in other_way.items()
            }
            audio, failure, log = _run(url, options, folder)
        if failure is not None:
            raise failure_of(failure, log) from failure
        return audio


EMPTY, STOPPED = "nothing was encoded", "Error during demuxing: Input/output error"

OTHER_WAYS: tuple[tuple[str, dict[str, list[str]]], ...] = (
    (EMPTY, {"ffmpeg_o": ["-f", "nut"]}),  # WAV itself holds no times
    ("Could not write header", {"ffmpeg_o": ["-f", "nut"]}),
    ("Unable to choose an output format", {"ffmpeg_o": ["-f", "nut"]}),
)
"""What ffmpeg says, and how it can do it. It finds no section of a container without a start time, as WAV is; and where
a host calls a file what it is not, NUT holds any codec. Neither is the usual way, as they move others by a rounding."""


def _run(url: str, options: dict[str, Any], folder: str) -> tuple[bytes, Exception | None, str]:
    """What was fetched, the error, and what ffmpeg said."""
    # yt-dlp's API asks here, and only here, whether there is an ffmpeg.
    FFmpegPostProcessor._ffmpeg_location.set(_ffmpeg())
    os.environ["FFREPORT"] = f"file={folder}/{FFMPEG_LOG}:level=24"  # yt-dlp passes on ffmpeg's status alone
    try:
        with yt_dlp.YoutubeDL(options) as downloader:
            downloader.download([url])
    except (YoutubeDLError, OSError) as err:
        return b"", err, _said_by_ffmpeg(Path(folder, FFMPEG_LOG))
    log = _said_by_ffmpeg(Path(folder, FFMPEG_LOG))
    if EMPTY in log or STOPPED in log:  # and its status was 0
        return b"", YoutubeDLError(f"ffmpeg got no further: {log.strip().splitlines()[0]}"), log
    files = [path for path in Path(folder).iterdir() if path.stem == "audio"]
    if not files or files[0].stat().st_size == 0:
        return b"", YoutubeDLError("yt-dlp ended without an error and without a file"), log
    return files[0].read_bytes(), None, log


def _format(url: str) -> str:
    """What to choose of that which a host offers: a file by preference, which needs one request.

    At an address that yt-dlp knows no site for, a file alone: whoever answers there could name any other address in a
    playlist, one of this network's own too.
    """
    plain = "bestaudio[protocol~='^https?$']/best[protocol~='^https?$']"
    is_known = any(site.suitable(url) for site in gen_extractor_classes() if site.ie_key() != "Generic")
    return f"{plain}/bestaudio/best" if is_known else plain


def _said_by_ffmpeg(log: Path) -> str:
    """Its warnings and errors, without the command line above them: a URL may spell anything."""
    if not log.exists():
        return ""
    return log.read_text("utf-8", "replace").partition("Command line:\n")[2].partition("\n")[2]


def _options(settings: YtDlp, folder: str, address: str | None, *, every_client: bool) -> dict[str, Any]:
    given = dict(options_of(settings.args))
    # ffmpeg cuts the section and has no time-out of its own: microseconds without a byte.
    # With the original timestamps kept, the cut after decoding is exact; a copied stream starts somewhere near. Lists
    # count from the beginning of a recording, wherever its timestamps begin.
    ffmpeg_input = ["-rw_timeout", str(int(settings.timeout_s * 1e6)), "-copyts", "-start_at_zero"]
    ffmpeg_input += ["-format_whitelist", CONTAINERS]
    ffmpeg_input += ["-protocol_whitelist", "http,https,httpproxy,tcp,tls,crypto"]  # a playlist names no file of ours
    if settings.cookies is not None:
        given["cookiefile"] = f"{folder}/cookies.txt"
        Path(given["cookiefile"]).write_text(settings.cookies)
    if every_client:
        extractor_args = given.get("extractor_args", {})
        youtube = extractor_args.get("youtube", {}) | {"player_client": ["all"]}
        given["extractor_args"] = extractor_args | {"youtube": youtube}
    if address is not None and "://" in address:
        given["proxy"] = address
    elif address is not None:
        given["source_address"] = str(ipaddress.ip_address(address))
    if source := given.get("source_address"):
        _check_is_ours(source)
        ffmpeg_input += ["-local_addr", source]
    # YouTube's player needs a JavaScript runtime; in its wheel, maybe not on the PATH.
    usual = {"retries": 2, "js_runtimes": {"deno": {"path": find_deno_bin()}}}
    ours = {
        "paths": {"home": folder, "temp": folder},
        "outtmpl": "audio.%(ext)s",
        "noplaylist": True,
        "quiet": True,
        "no_warnings": True,
        "noprogress": True,
        "logger": _Silent(),
        "cachedir": False,
        "socket_timeout": settings.timeout_s,
        "external_downloader_args": {"ffmpeg_i": ffmpeg_input},
        "fixup": "never",
        "overwrites": True,
    }
    return usual | given | ours


def _check_is_ours(address: str) -> None:
    """Otherwise clip after clip would fail, as if by the network. Raises UserError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family) as tried:
            tried.bind((address, 0))
    except OSError as err:
        raise UserError(
            f"this machine has no address {address} ({err.strerror}); use `--addresses node`, or proxies"
        ) from err


REASONS: tuple[tuple[Reason, tuple[str, ...]], ...] = (
    (
        Reason.THROTTLED,
        ("rate-limited by youtube", "try again later", "not a bot", "captcha", "http error 429", "http error 402"),
    ),
    (
        Reason.SETUP,
        (
            "requested format is not available",
            "http error 403",
            "http error 407",
            "page needs to be reloaded",
            "playback on other websites has been disabled",  # to this client
            "unsupported url",  # a page where the media should be: a mirror at rest, or a network that wants a log-in
        ),
    ),
    (
        Reason.RESTRICTED,
        (
            "in your country",
            "confirm your age",
            "members-only",
            "this channel's members",
            "premium members",
            "requires payment",
            "http error 401",
            "http error 451",
        ),
    ),
    (
        Reason.UNAVAILABLE,
        (
            "private video",
            "video is private",
            "account associated with this video has been terminated",
            "has been removed",
            "no longer available",
            "video is not available",
            "recording is not available",
            "does not exist",
            "copyright",
            "drm protect",
            "video unavailable",
            "http error 404",
            "http error 410",
            "is not a valid url",
            "file:// urls are disabled",
            "cannot be partially downloaded",
        ),
    ),
    (Reason.TOO_LARGE, ("file too large", "ffmpeg exited with code -25")),  # SIGXFSZ
    (
        Reason.NETWORK,
        ("stream ends prematurely", "input/output error", "connection reset", "timed out", "http error 5"),
    ),
    (Reason.TRUNCATED, ("moov atom not found", "nothing was encoded")),  # the host's file is short, or knows no ranges
    (
        Reason.NOT_AUDIO,
        ("invalid data found when processing input", "format not on whitelist", "ffmpeg exited with code 183"),
    ),
)
"""Reasons in the order in which they are tried: the text of a rate limit itself begins with "Video unavailable"."""

LOCAL = ("no space left on device", "disk quota exceeded", "read-only file system", "ffmpeg is not installed",
         "ffmpeg could not be found", "no supported javascript runtime",
         *(f"ffmpeg exited with code {256 - number}" for number in LOCAL_ERRNOS))  # fmt: skip


def failure_of(err: Exception, ffmpeg_log: str = "") -> ClipError | UserError:
    """What a failed fetch means: the clip's own failure, or this machine's, which would be that of every clip."""
    message = re.sub(r"\x1b\[[0-9;]*m", "", str(err)).removeprefix("ERROR: ")
    causes = list(_causes(err))
    statuses = [f"http error {cause.status}" for cause in causes if isinstance(cause, HTTPError)]
    said = re.findall(r"(?:HTTP error|Server returned) (\d[\dX]{2})", ffmpeg_log)
    text = " ".join([message, *statuses, *(f"http error {code}" for code in said), ffmpeg_log])
    text = re.sub(r"https?://\S+|^\[[^]]+\] [^\s:]+: ", "", text).lower()  # an id or an address may spell anything
    if any(word in text for word in LOCAL) or any(map(_is_this_machines, causes)):
        return UserError(f"this machine cannot fetch: {message}")
    found = next((reason for reason, texts in REASONS if any(word in text for word in texts)), None)
    kinds = [reason for kind, reason in KINDS if any(isinstance(cause, kind) for cause in causes)]
    refusals = [cause for cause in causes if isinstance(cause, ExtractorError)]
    if found is None and not kinds and refusals:
        if not all(refusal.expected for refusal in refusals):
            kinds = [Reason.SETUP]  # the host's pages are no longer what yt-dlp knows
        elif not any(isinstance(cause, RequestError) for cause in causes):
            return ClipError(Reason.UNFORESEEN, message)  # the host's own words, which nobody has met yet
    order = [reason for reason, _ in REASONS]
    reason = min([*filter(None, [found]), *kinds], key=order.index, default=Reason.NETWORK)
    last = ffmpeg_log.strip().rpartition("\n")[2] if "ffmpeg exited" in message else ""
    return ClipError(reason, "; ".join(filter(None, [message, last])))


def _is_this_machines(cause: BaseException) -> bool:
    return isinstance(cause, PostProcessingError) or getattr(cause, "errno", None) in LOCAL_ERRNOS


KINDS: tuple[tuple[type[Exception], Reason], ...] = (
    (GeoRestrictedError, Reason.RESTRICTED),
    (UnsupportedError, Reason.SETUP),
    (TransportError, Reason.NETWORK),
)


def _causes(err: BaseException | None) -> Iterator[BaseException]:
    """An error of yt-dlp's and those behind it, which stand in several places."""
    waiting, seen = [err], set()
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            exc_info = getattr(one, "exc_info", None) or (None, None, None)
            waiting += [exc_info[1], getattr(one, "cause", None), one.__cause__, one.__context__]


@functools.cache
def _ffmpeg() -> str:
    """FFmpeg's program from its wheel: nothing needs to be installed on the machine."""
    return imageio_ffmpeg.get_ffmpeg_exe()


class _Silent:
    """yt-dlp's messages reach us as exceptions; a second copy on the terminal of 2 million clips helps nobody."""

    def debug(self, message: str) -> None: ...

    def warning(self, message: str) -> None: ...

    def error(self, message: str) -> None: ...
