"""Limits of the service, and the rate at which an address may ask. Pure Python."""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

MAX_ADDRESSES = 10_000
"""Addresses whose rate is remembered. The one that asked least recently is forgotten first."""

BURST_S = 2.0
"""An address may make the requests of this time at once."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may take, and how many there may be."""

    max_bytes: int = 64 << 20
    """Size of a body."""
    max_recording_s: float = 600.0
    """Length of a recording."""
    upload_s: float = 30.0
    """Time in which a body must be complete."""
    timeout_s: float = 60.0
    """Time from a complete body to the answer."""
    max_concurrent: int = 64
    """Bodies that are tagged, or wait to be, at the same time."""
    max_uploads: int = 256
    """Bodies that are received at the same time. A slow client takes a place here, and none of `max_concurrent`."""
    max_uploads_of_address: int = 64
    """The same for one address, so that a single client cannot take all places."""
    per_second: float = 20.0
    """Requests of an address per second; 0 is no limit."""


class RateLimit:
    """A token bucket for each address.

    Args:
        at_once: requests that an address may make at once, if those of `BURST_S` are fewer.
    """

    def __init__(self, per_second: float, *, at_once: int = 1, clock_s: Callable[[], float] = time.monotonic) -> None:
        self.per_second, self._clock_s = per_second, clock_s
        self._burst = max(at_once, per_second * BURST_S)
        self._tokens: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, and when they were counted

    def wait_s(self, address: str) -> float:
        """0 if a request of this address is allowed now, and counts it; else the seconds until one is."""
        if not self.per_second:
            return 0.0
        now_s = self._clock_s()
        tokens, counted_s = self._tokens.pop(address, (self._burst, now_s))
        tokens = min(self._burst, tokens + (now_s - counted_s) * self.per_second)
        is_allowed = tokens >= 1
        self._tokens[address] = (tokens - is_allowed, now_s)
        if len(self._tokens) > MAX_ADDRESSES:
            self._tokens.popitem(last=False)
        return 0.0 if is_allowed else (1 - tokens) / self.per_second
