"""A rate limiter that decides when a fetch may begin, and from which address. It serves all workers of all jobs.

A host counts the requests of an address, no matter which worker sends them. So every fetch asks for a permit and
reports how it ended. A throttled address cools down, each time longer than before; after the cool-down a single fetch
probes it. This module does not use Ray; `rate_limit_actor.py` runs it as an actor.
"""

import ipaddress
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from ast_core.errors import ConfigError
from pipeline.prepare.clip import Reason
from pipeline.text_table import duration

YOUTUBE_PER_HOUR = 300.0
"""The usual rate limit of one address, for recordings of YouTube. It is YouTube's limit for clients without an account,
according to yt-dlp's maintainers."""

LONGEST_WAIT_S = 30.0
"""A worker asks again at least this often, so that it notices changes."""

PROBE_S = 900.0
"""Time after which a probe without a report counts as lost, together with the worker that made it."""

REFUSALS, OF_THE_LAST = 16, 20
"""If 16 of the last 20 fetches failed with `setup` (403, no format, another client required), the address is treated as
throttled. Otherwise the whole list would fail."""

INCONCLUSIVE = {Reason.NETWORK, Reason.TIMEOUT, Reason.SETUP, Reason.CRASHED, Reason.UNFORESEEN}
"""Results that do not show that a host serves an address again."""


@dataclass(frozen=True, kw_only=True)
class RateLimit:
    fetches_per_hour: float = math.inf
    """Limit per address."""
    addresses: tuple[str, ...] = ()
    """Proxies (`http://…`) or source IP addresses. If empty, fetches come from the machines' own addresses. All nodes
    count as one address then, unless each has its own (`PrepareSettings.own_addresses`)."""
    cool_down_s: float = 3600.0
    """Duration of the first cool-down. Each further one in a row is twice as long, up to 8 times this."""
    own_hosts: frozenset[str] = frozenset()
    """Hosts that the user named, as `locate.host_of` gives them. There `setup` concerns the file and not the client: a
    bucket that may not be listed answers 403 if a file is missing."""

    def __post_init__(self) -> None:
        if not self.fetches_per_hour > 0:
            raise ConfigError(f"--fetches-per-hour is {self.fetches_per_hour:g}; use more than 0")
        if not 0 < self.cool_down_s < math.inf:
            raise ConfigError(f"--rest-s is {self.cool_down_s:g}; use more than 0")

    def seconds_for(self, num_fetches: int) -> float:
        """Shortest time that `num_fetches` take; for one address if none is named."""
        return num_fetches * 3600 / self.fetches_per_hour / max(1, len(self.addresses))


def check_address(address: str, option: str = "--addresses") -> None:
    """Raises ConfigError unless `address` is the URL of an HTTP proxy or an IP address."""
    scheme, is_url, host = address.partition("://")
    if is_url:
        if scheme != "http" or not host:  # yt-dlp would ignore any other proxy and use the machine's own address
            raise ConfigError(f"{option} {address}: fetches go only through http:// proxies")
        return
    try:
        ipaddress.ip_address(address)
    except ValueError:
        raise ConfigError(f"{option} {address} is neither a proxy's http:// URL nor an IP address") from None


class Permit(NamedTuple):
    address: str | None
    """None: no fetch is permitted yet."""
    wait_s: float
    """Time after which to ask again; 0 with an address."""


class Fetching(NamedTuple):
    """The state of a job's fetches, for its progress."""

    num_ended: int
    """Number of fetches that ended, successful or not."""
    cooling_down: dict[str, tuple[str, float]]
    """Reason and remaining seconds for each address in its cool-down, named together with the host."""

    def cooling_in_words(self) -> str:
        """A part of a line of progress; empty if no address is in its cool-down."""
        cooling = [f"{name} ({why}, {duration(left_s)} more)" for name, (why, left_s) in self.cooling_down.items()]
        return f"cooling down: {', '.join(cooling)}" if cooling else ""


@dataclass
class _Address:
    next_s: float = 0.0
    cool_down_until_s: float = 0.0
    cool_downs_in_a_row: int = 0
    probe_until_s: float = 0.0
    """While a throttled address is not proven to work again: when the next probe may begin."""
    refused: deque[bool] = field(default_factory=lambda: deque(maxlen=OF_THE_LAST))
    why: str = ""


class RateLimiter:
    """Gives permits for all jobs of a cluster. Each call brings its own rate limit.

    An address is free when the interval of its last permit is over. It has a separate state for each host.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._addresses: dict[tuple[str, str], _Address] = {}
        """State by address and host."""
        self._num_ended: Counter[str] = Counter()
        """Number of fetches by job."""

    def permit(self, rate_limit: RateLimit, egress_address: str, host: str) -> Permit:
        """The address from which to fetch from `host` now, or how long to wait.

        `egress_address` is the address of the worker itself.
        """
        now_s = self._clock()
        names: Sequence[str] = rate_limit.addresses or [egress_address]
        name, address = min(
            ((name, self._addresses.setdefault((name, host), _Address())) for name in names),
            key=lambda item: _free_s(item[1]),
        )
        if (wait_s := _free_s(address) - now_s) > 0:
            return Permit(None, min(wait_s, LONGEST_WAIT_S))
        address.next_s = now_s + 3600 / rate_limit.fetches_per_hour
        if address.cool_downs_in_a_row:
            address.probe_until_s = now_s + PROBE_S
        return Permit(name, 0.0)

    def report(self, rate_limit: RateLimit, name: str, host: str, reason: Reason | None, job: str = "") -> None:
        """Record how a job's fetch from `host` by an address ended: with the clip's failure, or None."""
        self._num_ended[job] += 1
        address, now_s = self._addresses.setdefault((name, host), _Address()), self._clock()
        if now_s < address.cool_down_until_s:
            return  # the fetch began before the cool-down
        address.refused.append(reason is Reason.SETUP and host not in rate_limit.own_hosts)
        if reason is Reason.THROTTLED or sum(address.refused) >= REFUSALS:
            address.why = str(reason)
            address.cool_down_until_s = now_s + rate_limit.cool_down_s * 2 ** min(address.cool_downs_in_a_row, 3)
            address.cool_downs_in_a_row += 1
            address.probe_until_s = 0.0
            address.refused.clear()
        elif reason in INCONCLUSIVE:
            address.probe_until_s = 0.0
        else:
            address.cool_downs_in_a_row, address.probe_until_s = 0, 0.0

    def fetching(self, job: str = "") -> Fetching:
        now_s = self._clock()
        cooling_down = {
            f"{name} at {host}": (address.why, address.cool_down_until_s - now_s)
            for (name, host), address in self._addresses.items()
            if address.cool_down_until_s > now_s
        }
        return Fetching(self._num_ended[job], cooling_down)


class Permits(Protocol):
    """A job's view of the `RateLimiter`, in this process or in an actor."""

    def permit(self, host: str) -> Permit: ...

    def report(self, address: str, host: str, reason: Reason | None) -> None: ...

    def fetching(self) -> Fetching | None: ...


def wait_for_permit(permits: Permits, host: str, sleep: Callable[[float], None] = time.sleep) -> str:
    """Wait until a fetch from `host` is permitted, and return from which address."""
    while True:
        address, wait_s = permits.permit(host)
        if address is not None:
            return address
        sleep(wait_s)


class LocalPermits:
    """A job's view of a `RateLimiter` in this process."""

    def __init__(self, rate_limit: RateLimit) -> None:
        self._rate_limit, self._limiter = rate_limit, RateLimiter()
        self._lock = threading.Lock()

    def permit(self, host: str) -> Permit:
        with self._lock:
            return self._limiter.permit(self._rate_limit, "this network", host)

    def report(self, address: str, host: str, reason: Reason | None) -> None:
        with self._lock:
            self._limiter.report(self._rate_limit, address, host, reason)

    def fetching(self) -> Fetching:
        with self._lock:
            return self._limiter.fetching()


def _free_s(address: _Address) -> float:
    return max(address.next_s, address.cool_down_until_s, address.probe_until_s)
