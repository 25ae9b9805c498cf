"""Classifies failed fetches by yt-dlp's errors and the hosts' messages: a fault of the clip, or of this machine."""

import re
import tempfile
from collections.abc import Iterator

from yt_dlp.networking.exceptions import HTTPError, RequestError, TransportError
from yt_dlp.utils import ExtractorError, GeoRestrictedError, PostProcessingError, UnsupportedError

from ast_core.errors import UserError
from pipeline.prepare.clip import ClipError, Reason
from pipeline.prepare.fetch.private_hosts import PrivateAddressError
from pipeline.prepare.sandbox import LOCAL_ERRNOS

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
            "unsupported url",  # a page in place of media: a mirror out of service, or a network that wants a log-in
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
    (Reason.NETWORK, ("input/output error", "connection reset", "timed out", "http error 5")),
)
"""Reasons, tried in this order, because the message of a rate limit itself begins with "Video unavailable"."""

LOCAL = ("no space left on device", "disk quota exceeded", "read-only file system", "no supported javascript runtime")


def failure_of(err: Exception) -> ClipError | UserError:
    """Return a ClipError for a fault of the clip, or a UserError for one of this machine, which affects every clip."""
    causes = list(_causes(err))
    if stopped := next((cause for cause in causes if isinstance(cause, ClipError | UserError)), None):
        return stopped
    if private := next((cause for cause in causes if isinstance(cause, PrivateAddressError)), None):
        return ClipError(Reason.PRIVATE_HOST, str(private))
    message = re.sub(r"\x1b\[[0-9;]*m", "", str(err)).removeprefix("ERROR: ")
    statuses = [f"http error {cause.status}" for cause in causes if isinstance(cause, HTTPError)]
    codes = re.findall(r"Server returned (\d[\dX]{2})", message)  # FFmpeg's words
    text = " ".join([message, *statuses, *(f"http error {code}" for code in codes)])
    text = re.sub(r"https?://\S+|^\[[^]]+\] [^\s:]+: ", "", text).lower()  # ids and addresses may contain any word
    if any(word in text for word in LOCAL) or any(map(_is_this_machines, causes)):
        return UserError(f"this machine cannot fetch: {message} (it works in {tempfile.gettempdir()})")
    found = next((reason for reason, texts in REASONS if any(word in text for word in texts)), None)
    kinds = [reason for kind, reason in KINDS if any(isinstance(cause, kind) for cause in causes)]
    refusals = [cause for cause in causes if isinstance(cause, ExtractorError)]
    if found is None and not kinds and refusals:
        if not all(refusal.expected for refusal in refusals):
            kinds = [Reason.SETUP]  # yt-dlp no longer understands the host's pages
        elif not any(isinstance(cause, RequestError) for cause in causes):
            return ClipError(Reason.UNFORESEEN, message)  # the host's message is unknown to us
    order = [reason for reason, _ in REASONS]
    reason = min([*filter(None, [found]), *kinds], key=order.index, default=Reason.NETWORK)
    return ClipError(reason, message)


def _is_this_machines(cause: BaseException) -> bool:
    return isinstance(cause, PostProcessingError) or getattr(cause, "errno", None) in LOCAL_ERRNOS


KINDS: tuple[tuple[type[Exception], Reason], ...] = (
    (GeoRestrictedError, Reason.RESTRICTED),
    (UnsupportedError, Reason.SETUP),
    (TransportError, Reason.NETWORK),
)


def _causes(err: BaseException | None) -> Iterator[BaseException]:
    """An error of yt-dlp and its causes, which are in several attributes."""
    waiting, seen = [err], set()
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            exc_info = getattr(one, "exc_info", None) or (None, None, None)
            waiting += [exc_info[1], getattr(one, "cause", None), one.__cause__, one.__context__]
            waiting += getattr(one, "unexpected_errors", [])
