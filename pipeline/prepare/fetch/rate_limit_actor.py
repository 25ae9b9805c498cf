"""The rate limiter of a cluster: one actor that all fetching jobs share."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from pipeline import ray_metrics
from pipeline.cluster import ASK_AGAIN_S, NAMESPACE, end, on_this_node
from pipeline.prepare.clip import Reason
from pipeline.prepare.fetch.rate_limiter import Fetching, Permit, RateLimit, RateLimiter

RATE_LIMITER = "rate_limiter"
ANSWER_S = 10.0
"""Time limit for the rate limiter's answer to a question about progress."""


@contextmanager
def cluster_permits(rate_limit: RateLimit, *, own_addresses: bool = False) -> Iterator["ClusterPermits"]:
    """Connect a job to the cluster's rate limiter. If no job has started it, this one starts it, and ends it."""
    try:
        ray.get_actor(RATE_LIMITER, namespace=NAMESPACE)
        is_ours = False
    except ValueError:
        is_ours = True
    limiter = _cluster_limiter()
    try:
        yield ClusterPermits(rate_limit, own_addresses, limiter)
    finally:
        if is_ours:
            end(limiter, RATE_LIMITER)


class ClusterPermits:
    """A worker's connection to the cluster's rate limiter. It can be pickled.

    The rate limiter ends with the job that started it, and its state is lost. The next call of another job starts a new
    one, which learns of throttling from the next fetch. So the mistakes of one job do not throttle the next job.
    """

    def __init__(self, rate_limit: RateLimit, own_addresses: bool, limiter: Any) -> None:
        self._rate_limit, self._own_addresses, self._limiter = rate_limit, own_addresses, limiter
        self._job = ray.get_runtime_context().get_job_id()

    def permit(self, host: str) -> Permit:
        egress_address = ray.util.get_node_ip_address() if self._own_addresses else "this network"
        permit: Permit = self._call(
            lambda limiter: ray.get(limiter.permit.remote(self._rate_limit, egress_address, host))
        )
        return permit

    def report(self, address: str, host: str, reason: Reason | None) -> None:
        ray_metrics.fetches().inc(1, {"outcome": str(reason) if reason else "fetched"})
        self._call(lambda limiter: ray.get(limiter.report.remote(self._rate_limit, address, host, reason, self._job)))

    def fetching(self) -> Fetching | None:
        """The state of the job's fetches since the rate limiter started; None if it does not answer."""
        try:
            fetching: Fetching = ray.get(self._limiter.fetching.remote(self._job), timeout=ANSWER_S)
        except RayActorError:
            self._limiter = _cluster_limiter()
            return None
        except RayError:
            return None
        return fetching

    def _call(self, ask: Callable[[Any], Any]) -> Any:
        while True:
            try:
                return ask(self._limiter)
            except RayActorError:
                time.sleep(ASK_AGAIN_S)
                self._limiter = _cluster_limiter()


def _cluster_limiter() -> Any:
    return ray.remote(RateLimiter).options(name=RATE_LIMITER, get_if_exists=True, **on_this_node()).remote()
