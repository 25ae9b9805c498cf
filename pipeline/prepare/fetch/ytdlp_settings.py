"""Settings of yt-dlp, and which of its options a user may set.

yt-dlp takes 0.2 s to import, so it is imported only if there is something to parse. A preparation of files needs none
of it, in any of its processes.
"""

import functools
import optparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ast_core.errors import ConfigError, UserError
from ast_core.text_files import decode_text
from pipeline.prepare.fetch.private_hosts import Endpoint
from pipeline.prepare.fetch.rate_limiter import check_address

MAX_FETCH_BYTES = 256 << 20
"""Enough for a section of audio, and for a whole recording of three hours in a good codec."""

USERS_OPTIONS = {
    "client_certificate",
    "client_certificate_key",
    "client_certificate_password",
    "cookiefile",
    "extractor_args",
    "extractor_retries",
    "format",
    "format_sort",
    "geo_bypass",
    "geo_verification_proxy",
    "headers",
    "impersonate",
    "js_runtimes",
    "legacy_server_connect",
    "no_check_certificate",
    "password",
    "proxy",
    "referer",
    "retries",
    "sleep_interval_requests",
    "source_address",
    "twofactor",
    "user_agent",
    "username",
    "videopassword",
}
"""yt-dlp's options (names of its parser) that define how a host is asked and by whom. All other options are refused,
because they define what is fetched or where it goes, read or write files, or run programs."""


@dataclass(frozen=True, kw_only=True)
class YtDlp:
    """Settings of yt-dlp that are sent to the workers."""

    timeout_s: float = 30.0
    """Longest time without a byte."""
    args: tuple[str, ...] = ()
    """yt-dlp's own command-line options: client, token provider, cookies, proxy, JavaScript runtime, …"""
    cookies: str | None = None
    """Content of the cookie file that `args` name. Each worker writes it to its own copy."""
    allow_private_hosts: bool = False
    """Whether a URL may lead to a private address."""
    own_hosts: tuple[Endpoint, ...] = ()
    """Hosts named by the user and not by a list. Their addresses may be private."""

    @classmethod
    def from_args(cls, args: list[str], *, timeout_s: float, **settings: Any) -> "YtDlp":
        """Raises ConfigError as `options_of` does, and for an unusable proxy or cookie file."""
        options = options_of(tuple(args)) if args else {}
        if proxy := options.get("proxy"):
            check_address(proxy, "--yt-dlp's --proxy")
        try:
            file = options.get("cookiefile")
            cookies = decode_text(Path(file).read_bytes(), file) if file else None
        except (OSError, UserError) as err:
            raise ConfigError(f"cannot read the cookies that --yt-dlp names: {err}") from err
        return cls(timeout_s=timeout_s, args=tuple(args), cookies=cookies, **settings)


@functools.cache
def options_of(args: tuple[str, ...]) -> dict[str, Any]:
    """Parse a yt-dlp command line into options of its Python API. Configuration files are ignored.

    Raises:
        ConfigError: an option is unknown to yt-dlp, or is not in USERS_OPTIONS.
    """
    import yt_dlp

    try:
        given = yt_dlp.parse_options(list(args))
    except (optparse.OptParseError, SystemExit, EOFError) as err:
        raise ConfigError(f"yt-dlp does not take {' '.join(args)!r}: {str(err).rpartition('error: ')[2]}") from err
    usual = yt_dlp.parse_options([])
    for name in _set_by(given) - USERS_OPTIONS:
        groups = [given.parser, *given.parser.option_groups]
        options = (str(option) for group in groups for option in group.option_list if option.dest == name)
        raise ConfigError(
            f"--yt-dlp must not set {min(options, key=len, default=name)}: it takes options that say how a host is "
            "asked (clients, tokens, cookies, log-in, proxies, headers, certificates, formats); all else is set already"
        )
    if given.urls:
        raise ConfigError(f"--yt-dlp takes options of yt-dlp, and {given.urls[0]!r} is none")
    return {name: value for name, value in given.ydl_opts.items() if value != usual.ydl_opts[name]}


def _set_by(given: Any) -> set[str]:
    """Options that differ from their defaults (names of yt-dlp's parser)."""
    import yt_dlp

    usual = vars(yt_dlp.parse_options([]).options)
    return {name for name, value in vars(given.options).items() if value != usual.get(name)}


def check_tools() -> None:
    """Raises UserError if a program is missing that every fetch needs."""
    from deno import find_deno_bin

    try:
        find_deno_bin()
    except (OSError, RuntimeError) as err:
        raise UserError(f"cannot fetch: {err}; install the project's requirements again") from err
