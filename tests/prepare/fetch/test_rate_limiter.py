"""When and from which address a fetch may begin, with a clock that the test sets."""

import math
from itertools import pairwise

import pytest

from ast_core.errors import ConfigError
from pipeline.prepare.clip import Reason
from pipeline.prepare.fetch.rate_limiter import (
    LONGEST_WAIT_S,
    OF_THE_LAST,
    PROBE_S,
    REFUSALS,
    RateLimit,
    RateLimiter,
    check_address,
)
from tests.fakes import Permits

HOST = "host"


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def fetches_within(
    permits: Permits, clock: Clock, duration_s: float, egress_addresses: list[str]
) -> list[tuple[float, str]]:
    """Simulate workers that ask for permission, fetch and wait. Returns time in seconds and address of each fetch."""
    begun, asks_s = [], dict.fromkeys(range(len(egress_addresses)), clock.now_s)
    end_s = clock.now_s + duration_s
    while min(asks_s.values()) < end_s:
        worker = min(asks_s, key=lambda w: asks_s[w])
        clock.now_s = asks_s[worker]
        address, wait_s = permits.permit(HOST, egress_addresses[worker])
        if address is not None:
            begun.append((clock.now_s, address))
            permits.report(address, HOST, None)
        asks_s[worker] = clock.now_s + max(wait_s, 0.5)
    return begun


def test_an_address_is_limited_for_any_number_of_workers(clock: Clock):
    for num_workers in (1, 2, 16):
        permits = Permits(RateLimit(fetches_per_hour=300), RateLimiter(clock))
        begun = fetches_within(permits, clock, 3600, ["here"] * num_workers)
        assert 290 <= len(begun) <= 301
        gaps = [after - before for (before, _), (after, _) in pairwise(begun)]
        assert min(gaps) >= 12 - 1e-6


def test_two_addresses_allow_twice_as_many_fetches(clock: Clock):
    named = Permits(RateLimit(fetches_per_hour=300, addresses=("http://a:1", "http://b:1")), RateLimiter(clock))
    begun = fetches_within(named, clock, 3600, ["here"] * 8)
    assert 580 <= len(begun) <= 602
    assert 290 <= sum(address == "http://a:1" for _, address in begun) <= 301
    own = Permits(RateLimit(fetches_per_hour=300), RateLimiter(clock))
    assert 580 <= len(fetches_within(own, clock, 3600, ["node 1", "node 2"] * 2)) <= 602


def test_two_jobs_share_the_interval_and_cool_down_of_an_address(clock: Clock):
    limiter = RateLimiter(clock)
    slow, quick = (Permits(RateLimit(fetches_per_hour=n, cool_down_s=100), limiter) for n in (300, 600))
    begun = []
    end_s = clock.now_s + 3600
    while clock.now_s < end_s:
        for job in (slow, quick):
            if job.permit(HOST).address is not None:
                begun.append((job, clock.now_s))
                job.report("here", HOST, None)
        clock.now_s += 0.5
    assert 300 <= len(begun) <= 601  # not 900
    for (job, before_s), (_, after_s) in pairwise(begun):
        assert after_s - before_s >= 3600 / job.rate_limit.fetches_per_hour - 1e-6
    quick.report("here", HOST, Reason.THROTTLED)
    assert limiter.fetching().cooling_down == {"here at host": ("throttled", 100.0)}
    clock.now_s += 99
    assert slow.permit(HOST).address is None


def test_a_cool_down_applies_to_one_host_only(clock: Clock):
    permits = Permits(RateLimit(fetches_per_hour=60), RateLimiter(clock))
    assert permits.permit("one").address == "here"
    permits.report("here", "one", Reason.THROTTLED)
    assert permits.permit("one").address is None
    assert permits.permit("other").address == "here"
    assert list(permits.limiter.fetching().cooling_down) == ["here at one"]


def test_without_a_rate_limit_no_worker_waits(clock: Clock):
    permits = Permits(RateLimit(), RateLimiter(clock))
    assert [permits.permit(HOST).wait_s for _ in range(100)] == [0.0] * 100


def test_after_the_cool_down_a_single_fetch_probes_the_address(clock: Clock):
    permits = Permits(RateLimit(cool_down_s=600, addresses=("a", "b")), RateLimiter(clock))
    assert {permits.permit(HOST).address for _ in range(2)} <= {"a", "b"}
    permits.report("a", HOST, Reason.THROTTLED)
    assert {permits.permit(HOST).address for _ in range(10)} == {"b"}
    assert permits.limiter.fetching().cooling_down == {"a at host": ("throttled", 600.0)}
    permits.report("b", HOST, Reason.THROTTLED)
    assert permits.permit(HOST) == (None, LONGEST_WAIT_S)

    clock.now_s += 600
    assert {permits.permit(HOST).address, permits.permit(HOST).address} == {"a", "b"}
    assert permits.permit(HOST).address is None  # each has its probe
    permits.report("a", HOST, None)
    assert {permits.permit(HOST).address for _ in range(10)} == {"a"}
    permits.report("b", HOST, Reason.THROTTLED)
    assert permits.limiter.fetching().cooling_down == {"b at host": ("throttled", 1200.0)}  # twice as long as before


def test_cool_downs_in_a_row_grow_eightfold_until_a_fetch_succeeds(clock: Clock):
    permits = Permits(RateLimit(cool_down_s=100), RateLimiter(clock))
    cool_downs = []
    for _ in range(6):
        address = permits.permit(HOST).address
        assert address == "here"
        permits.report(address, HOST, Reason.THROTTLED)
        cool_downs.append(permits.limiter.fetching().cooling_down["here at host"][1])
        clock.now_s += cool_downs[-1]
    assert cool_downs == [100, 200, 400, 800, 800, 800]
    permits.permit(HOST)
    permits.report("here", HOST, Reason.UNAVAILABLE)  # the host answered, but the video is missing
    permits.permit(HOST)
    permits.report("here", HOST, Reason.THROTTLED)
    assert permits.limiter.fetching().cooling_down["here at host"][1] == 100


def test_a_fetch_begun_before_the_cool_down_does_not_change_it(clock: Clock):
    permits = Permits(RateLimit(cool_down_s=100), RateLimiter(clock))
    for _ in range(3):
        permits.permit(HOST)
    permits.report("here", HOST, Reason.THROTTLED)
    clock.now_s += 1
    permits.report("here", HOST, Reason.THROTTLED)
    permits.report("here", HOST, None)
    assert permits.limiter.fetching().cooling_down == {"here at host": ("throttled", 99.0)}


def test_an_inconclusive_probe_is_followed_by_another(clock: Clock):
    permits = Permits(RateLimit(cool_down_s=100), RateLimiter(clock))
    permits.permit(HOST)
    permits.report("here", HOST, Reason.THROTTLED)
    clock.now_s += 100
    permits.permit(HOST)
    permits.report("here", HOST, Reason.NETWORK)
    assert permits.permit(HOST).address == "here"
    assert permits.permit(HOST).address is None  # still one probe at a time
    clock.now_s += PROBE_S  # its worker died
    assert permits.permit(HOST).address == "here"


@pytest.mark.parametrize("address", ["socks5://host:1080", "https://host:443", "http://", "host.example"])
def test_an_unusable_address_is_refused(address: str):
    check_address("http://host:3128")
    check_address("2001:db8::1")
    with pytest.raises(ConfigError, match="--addresses"):
        check_address(address)


def test_an_address_with_mostly_setup_failures_cools_down(clock: Clock):
    permits = Permits(RateLimit(cool_down_s=100), RateLimiter(clock))
    endings = [None] * (OF_THE_LAST - REFUSALS) + [Reason.SETUP] * REFUSALS
    for ending in endings[:-1]:
        permits.permit(HOST)
        permits.report("here", HOST, ending)
    assert not permits.limiter.fetching().cooling_down
    permits.report("here", HOST, endings[-1])
    assert permits.limiter.fetching().cooling_down == {"here at host": ("setup", 100.0)}


def test_a_refusal_of_the_users_own_host_concerns_only_its_file(clock: Clock):
    permits = Permits(RateLimit(own_hosts=frozenset([HOST])), RateLimiter(clock))
    for host in (HOST, "other"):
        for _ in range(OF_THE_LAST):
            permits.report("here", host, Reason.SETUP)
    assert list(permits.fetching().cooling_down) == ["here at other"]
    permits.report("here", HOST, Reason.THROTTLED)
    assert "here at host" in permits.fetching().cooling_down


def test_the_duration_of_a_list_is_estimated():
    assert RateLimit(fetches_per_hour=300).seconds_for(2_084_320) / 86_400 == pytest.approx(289.5, abs=0.1)
    assert RateLimit(fetches_per_hour=300, addresses=("a", "b")).seconds_for(600) == 3600
    assert RateLimit().seconds_for(10**6) == 0


@pytest.mark.parametrize("wrong", [{"fetches_per_hour": 0}, {"fetches_per_hour": math.nan}, {"cool_down_s": -1}])
def test_an_impossible_rate_limit_is_refused(wrong: dict[str, float]):
    with pytest.raises(ConfigError, match="use more than 0"):
        RateLimit(**wrong)
