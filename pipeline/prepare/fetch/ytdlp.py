"""The samples of a section of a recording on the web. yt-dlp finds the media, and only the needed bytes are read.

It runs in a sandbox (`pipeline.prepare.sandbox`), which imports neither PyTorch nor Ray.
"""

import ipaddress
import os
import posixpath
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

import numpy as np
import yt_dlp
from deno import find_deno_bin
from yt_dlp.extractor import gen_extractor_classes
from yt_dlp.networking import Request, Response
from yt_dlp.utils import YoutubeDLError
from yt_dlp.utils.networking import HTTPHeaderDict, clean_proxies

from ast_core.errors import UserError
from ast_core.features import KALDI128, FeatureSettings
from pipeline.prepare.audio.decode import decode_section
from pipeline.prepare.clip import ClipError, Reason
from pipeline.prepare.fetch.failures import failure_of
from pipeline.prepare.fetch.http_file import HttpFile
from pipeline.prepare.fetch.private_hosts import Endpoint, check_name, endpoint_of, public_hosts_only
from pipeline.prepare.fetch.ytdlp_settings import MAX_FETCH_BYTES, YtDlp, options_of

IN_PIECES = {
    "m3u8": "m3u8_native",
    "m3u8_native": "m3u8_native",
    "http_dash_segments": "http_dash_segments",
    "http_dash_segments_generator": "http_dash_segments_generator",
}
"""Protocols of HLS and DASH (yt-dlp's names), each with the one by which yt-dlp joins the pieces without FFmpeg."""

USUAL = YtDlp()

MAX_BOXES, GLIMPSE_S = 1000, 0.2
"""Limits for detecting a cut file: top-level boxes of an MP4 file, and seconds to decode of any other."""


def fetch_with_ytdlp(
    url: str,
    start_s: float,
    duration_s: float | None,
    *,
    settings: YtDlp = USUAL,
    address: str | None = None,
    every_client: bool = False,
    features: FeatureSettings = KALDI128,
) -> np.ndarray:
    """float32 `[samples]`, mono: the section that `decode_section` reads from the recording at `url`.

    If the host serves byte ranges, only the bytes that the section needs are fetched. If a site offers a recording only
    in pieces (HLS, DASH), it is fetched whole, because a piece does not tell its position in the recording.

    Args:
        address: a proxy's URL or a source IP address; None uses the machine's own address.
        every_client: try all of YouTube's clients that yt-dlp knows, because the usual ones were refused.

    Raises:
        ClipError: the first matching entry of REASONS, or a fault of the recording.
        UserError: a fault of this machine (disk, programs), which would make every clip fail.
    """
    with tempfile.TemporaryDirectory(prefix="ast-fetch-", ignore_cleanup_errors=True) as folder:
        options = _options(settings, folder, address, every_client=every_client, max_bytes=MAX_FETCH_BYTES)
        try:
            with yt_dlp.YoutubeDL(options) as downloader, _only_allowed_hosts(settings, downloader):
                offer = _offer(downloader, url)
                if offer.get("protocol") in IN_PIECES:
                    joined = _joined(downloader, offer, folder)
                    return decode_section(f"file:{joined}", start_s, duration_s, features=features)
                return _read(offer, start_s, duration_s, features, partial(_open, downloader, offer, settings))
        except (YoutubeDLError, OSError) as err:
            raise failure_of(err) from err


@contextmanager
def open_url(url: str, *, settings: YtDlp, max_bytes: int) -> Iterator[BinaryIO | str]:
    """The recording at a URL, as `decode_section` takes it. A failure of the host is raised at the end of the block.

    Raises:
        ClipError, UserError: as `fetch_with_ytdlp`.
    """
    with tempfile.TemporaryDirectory(prefix="ast-fetch-", ignore_cleanup_errors=True) as folder:
        options = _options(settings, folder, None, every_client=False, max_bytes=max_bytes)
        try:
            with yt_dlp.YoutubeDL(options) as downloader, _only_allowed_hosts(settings, downloader):
                offer = _offer(downloader, url)
                if offer.get("protocol") in IN_PIECES:
                    yield f"file:{_joined(downloader, offer, folder)}"
                    return
                with _open(downloader, offer, settings, offer["url"], max_bytes) as file:
                    try:
                        yield cast(BinaryIO, file)
                    finally:  # the file seemed to end, and that may have raised anything
                        if file.failure is not None:
                            raise failure_of(file.failure)
        except (YoutubeDLError, OSError) as err:
            raise failure_of(err) from err


def _offer(downloader: yt_dlp.YoutubeDL, url: str) -> dict[str, Any]:
    """Where the media is, in yt-dlp's description.

    A URL for which yt-dlp knows no site is the media itself. A page or playlist there is not followed, because it could
    name any other address, also in this network.
    """
    if not _is_site(url):
        return {"url": url, "is_site": False}
    offer: dict[str, Any] = downloader.extract_info(url, download=False)
    if "url" not in offer:
        raise ClipError(Reason.SETUP, f"yt-dlp finds {offer.get('_type', 'several streams')} there, and no recording")
    if offer.get("is_live"):
        raise ClipError(Reason.SETUP, "the recording is still being made")
    if offer.get("protocol") not in ("http", "https", *IN_PIECES):
        problem = f"the site offers no file, only {offer.get('protocol')}, which is not read"
        raise ClipError(Reason.SETUP, f"{problem}; --yt-dlp may name another client")
    return offer


def _joined(downloader: yt_dlp.YoutubeDL, offer: dict[str, Any], folder: str) -> str:
    """Let yt-dlp fetch and join the pieces of a recording, and return the path.

    Raises:
        ClipError: too_large.
        YoutubeDLError: a piece cannot be fetched.
    """
    path = os.path.join(folder, "joined")
    downloader.dl(path, offer | {"protocol": IN_PIECES[offer["protocol"]]})
    return path


def _limit_size(status: dict[str, Any], max_bytes: int) -> None:
    """Progress hook that yt-dlp calls during a download."""
    if status.get("downloaded_bytes", 0) > max_bytes:
        raise ClipError(Reason.TOO_LARGE, f"more than {max_bytes >> 20} MiB in pieces")


def _is_site(url: str) -> bool:
    return any(site.suitable(url) for site in gen_extractor_classes() if site.ie_key() != "Generic")


def _open(
    downloader: yt_dlp.YoutubeDL, offer: dict[str, Any], settings: YtDlp, url: str, max_bytes: int = MAX_FETCH_BYTES
) -> HttpFile:
    def ask(headers: dict[str, str]) -> Response:
        headers = offer.get("http_headers", {}) | {"Accept-Encoding": "identity"} | headers
        if not settings.allow_private_hosts:
            check_name(url, settings.own_hosts)
        response: Response = downloader.urlopen(Request(url, headers=headers))
        if not settings.allow_private_hosts:
            check_name(response.url, settings.own_hosts)
        return response

    return HttpFile(
        ask,
        max_bytes=max_bytes,
        check_ranges=not offer.get("is_site", True),
        name=posixpath.basename(urlsplit(url).path),
    )


def _read(
    offer: dict[str, Any],
    start_s: float,
    duration_s: float | None,
    features: FeatureSettings,
    open_url: Callable[[str], HttpFile],
) -> np.ndarray:
    """Read the section. If the file could not be read completely, its failure takes precedence over FFmpeg's error."""
    opened: list[HttpFile] = []

    def open_part(url: str) -> BinaryIO:
        opened.append(open_url(url))
        return cast(BinaryIO, opened[-1])

    with ExitStack() as closing:
        error: Exception | None = None
        try:
            file = open_part(offer["url"])
            section = decode_section(file, start_s, duration_s, features=features)
        except Exception as err:  # a file that seems to end can make FFmpeg raise anything
            error = err
            if isinstance(err, ClipError) and err.reason is Reason.NOT_AUDIO and _is_cut(opened[0], start_s):
                error = ClipError(Reason.TRUNCATED, f"the file ends before that section ({err.message})")
        for part in opened:
            closing.callback(part.close)
    for failure in (*(part.failure for part in opened), error):
        if failure is not None:
            raise failure
    return section


def _is_cut(file: HttpFile, start_s: float) -> bool:
    """Whether the file is the beginning of a recording, rather than not a recording."""
    if _ends_within_a_box(file):
        return True
    file.seek(0)
    with suppress(ClipError):
        return start_s > 0 and len(decode_section(cast(BinaryIO, file), 0.0, GLIMPSE_S)) > 0
    return False


def _ends_within_a_box(file: HttpFile) -> bool:
    """Whether this is an MP4 file that is shorter than its boxes say."""
    size, position = file.seek(0, os.SEEK_END), 0
    for _ in range(MAX_BOXES):
        file.seek(position)
        box = file.read(16)
        if len(box) < 16 or (position == 0 and box[4:8] != b"ftyp"):
            return False
        length = int.from_bytes(box[:4])
        length = int.from_bytes(box[8:16]) if length == 1 else length
        position += max(8, length)
        if position >= size or length == 0:
            return position > size
    return False


@contextmanager
def _only_allowed_hosts(settings: YtDlp, downloader: yt_dlp.YoutubeDL) -> Iterator[None]:
    if settings.allow_private_hosts:
        yield
        return
    with public_hosts_only((*settings.own_hosts, *_proxies(downloader))):
        yield


def _proxies(downloader: yt_dlp.YoutubeDL) -> list[Endpoint]:
    """The proxies of the options or of the environment. Without a scheme they are HTTP, as for yt-dlp and curl."""
    proxies = dict(downloader.proxies)
    clean_proxies(proxies, HTTPHeaderDict())  # as yt-dlp does for each request
    return [endpoint_of(proxy) for proxy in map(proxies.get, ("http", "https", "all")) if proxy]


def _options(
    settings: YtDlp, folder: str, address: str | None, *, every_client: bool, max_bytes: int
) -> dict[str, Any]:
    given = dict(options_of(settings.args))
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
    usual = {
        # A single file is preferred, because it needs one request.
        "format": "bestaudio[protocol~='^https?$']/best[protocol~='^https?$']/bestaudio/best",
        "retries": 2,
        # YouTube's player needs a JavaScript runtime. It is in a wheel and may not be on the PATH.
        "js_runtimes": {"deno": {"path": find_deno_bin()}},
    }
    ours = {
        "paths": {"home": folder, "temp": folder},
        "noplaylist": True,
        "quiet": True,
        "no_warnings": True,
        "noprogress": True,
        "logger": _Silent(),
        "cachedir": False,
        "socket_timeout": settings.timeout_s,
        "external_downloader": "native",
        "skip_unavailable_fragments": False,
        "progress_hooks": [partial(_limit_size, max_bytes=max_bytes)],
    }
    return usual | given | ours


def _check_is_ours(address: str) -> None:
    """Raises UserError if this machine does not have the address. Otherwise every clip would seem to fail by
    network."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family) as tried:
            tried.bind((address, 0))
    except OSError as err:
        raise UserError(
            f"this machine has no address {address} ({err.strerror}); use `--addresses node`, or proxies"
        ) from err


class _Silent:
    """Discards yt-dlp's messages, because they also arrive as exceptions."""

    def debug(self, message: str) -> None: ...

    def warning(self, message: str) -> None: ...

    def error(self, message: str) -> None: ...
