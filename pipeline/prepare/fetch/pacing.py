"""When a fetch may begin, and from which address: one `Pacer` for all workers of all jobs.

A host counts the requests of an address, whichever worker sends them. So every fetch asks for a turn, and tells how it
ended. An address that is throttled rests, longer each time in a row; after the rest one fetch alone tries it. No Ray
here: `shared.py` makes an actor of it.
"""

import ipaddress
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ast_core.errors import ConfigError
from pipeline.prepare.clip import Reason

LONGEST_WAIT_S = 30.0
"""A worker asks again at least this often, so that it hears of changes."""

PROBE_S = 900.0
"""A probe that has not been heard of for so long is taken for lost, with the worker that made it."""

REFUSALS, OF_THE_LAST = 16, 20
"""So many fetches of the last so many that failed as `setup` (403, no format, another client wanted) rest an address as
throttling does: going on would burn through the list."""

INCONCLUSIVE = {Reason.NETWORK, Reason.TIMEOUT, Reason.SETUP, Reason.CRASHED, Reason.UNFORESEEN}
"""Endings that do not show that a host serves an address again."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    fetches_per_hour: float = math.inf
    """From one address."""
    addresses: tuple[str, ...] = ()
    """Proxies (`http://…`) or source IP addresses; none: each worker goes out by the address that it calls home."""
    rest_s: float = 3600.0
    """The first rest; each in a row is twice as long as the one before, up to 8 times this."""

    def __post_init__(self) -> None:
        if not self.fetches_per_hour > 0:
            raise ConfigError(f"--fetches-per-hour is {self.fetches_per_hour:g}; use more than 0")
        if not 0 < self.rest_s < math.inf:
            raise ConfigError(f"--rest-s is {self.rest_s:g}; use more than 0")

    def seconds_for(self, num_fetches: int) -> float:
        """How long so many fetches take at the least, with one address where none is named."""
        return num_fetches * 3600 / self.fetches_per_hour / max(1, len(self.addresses))


def check_address(address: str, option: str = "--addresses") -> None:
    """Raises ConfigError unless it is the URL of an HTTP proxy, or an IP address."""
    scheme, is_url, host = address.partition("://")
    if is_url:
        if scheme != "http" or not host:  # it goes out without any other, by the machine's own address
            raise ConfigError(f"{option} {address}: fetches go through http:// proxies alone")
        return
    try:
        ipaddress.ip_address(address)
    except ValueError:
        raise ConfigError(f"{option} {address} is neither a proxy's http:// URL nor an IP address") from None


class Turn(NamedTuple):
    address: str | None
    """None: not yet."""
    wait_s: float
    """Ask again after so long; 0 with an address."""


class Fetching(NamedTuple):
    """Of a job, for its progress."""

    num_ended: int
    """Fetches, well or not."""
    at_rest: dict[str, tuple[str, float]]
    """Of each address that rests, named with the host: why, and seconds left."""


@dataclass
class _Address:
    next_s: float = 0.0
    rests_until_s: float = 0.0
    rests_in_a_row: int = 0
    probe_until_s: float = 0.0
    """While it is not proven again: when another probe may begin."""
    refused: deque[bool] = field(default_factory=lambda: deque(maxlen=OF_THE_LAST))
    why: str = ""


class Pacer:
    """Its callers may keep different paces, each by what it brings: an address is free again for all of them when the
    last one's interval is over. What an address is to one host, it is not to another."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._addresses: dict[tuple[str, str], _Address] = {}
        """By name and host."""
        self._num_ended: Counter[str] = Counter()
        """Fetches by job."""

    def turn(self, pace: Pace, home: str, host: str) -> Turn:
        """By which address to fetch from `host` now, or how long to wait. `home`: the worker's own address."""
        now_s = self._clock()
        names: Sequence[str] = pace.addresses or [home]
        name, address = min(
            ((name, self._addresses.setdefault((name, host), _Address())) for name in names),
            key=lambda item: _free_s(item[1]),
        )
        if (wait_s := _free_s(address) - now_s) > 0:
            return Turn(None, min(wait_s, LONGEST_WAIT_S))
        address.next_s = now_s + 3600 / pace.fetches_per_hour
        if address.rests_in_a_row:
            address.probe_until_s = now_s + PROBE_S
        return Turn(name, 0.0)

    def report(self, pace: Pace, name: str, host: str, reason: Reason | None, job: str = "") -> None:
        """How a job's fetch from a host by an address ended: the clip's failure, or None."""
        self._num_ended[job] += 1
        address, now_s = self._addresses.setdefault((name, host), _Address()), self._clock()
        if now_s < address.rests_until_s:
            return  # begun before the rest
        address.refused.append(reason is Reason.SETUP)
        if reason is Reason.THROTTLED or sum(address.refused) >= REFUSALS:
            address.why = str(reason)
            address.rests_until_s = now_s + pace.rest_s * 2 ** min(address.rests_in_a_row, 3)
            address.rests_in_a_row += 1
            address.probe_until_s = 0.0
            address.refused.clear()
        elif reason in INCONCLUSIVE:
            address.probe_until_s = 0.0
        else:
            address.rests_in_a_row, address.probe_until_s = 0, 0.0

    def fetching(self, job: str = "") -> Fetching:
        now_s = self._clock()
        at_rest = {
            f"{name} at {host}": (address.why, address.rests_until_s - now_s)
            for (name, host), address in self._addresses.items()
            if address.rests_until_s > now_s
        }
        return Fetching(self._num_ended[job], at_rest)


def _free_s(address: _Address) -> float:
    return max(address.next_s, address.rests_until_s, address.probe_until_s)
