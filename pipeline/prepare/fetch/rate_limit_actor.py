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
from pipeline.prepare.fetch.pacing import Fetching, Pace, Pacer, Turn

PACER = "pacer"
ANSWER_S = 10.0
"""Time limit for the rate limiter's answer to a question about progress."""


@contextmanager
def cluster_turns(pace: Pace, *, own_addresses: bool = False) -> Iterator["ClusterTurns"]:
    """Connect a job to the cluster's rate limiter. If no job has started it, this one starts it, and ends it."""
    try:
        ray.get_actor(PACER, namespace=NAMESPACE)
        is_ours = False
    except ValueError:
        is_ours = True
    pacer = _cluster_pacer()
    try:
        yield ClusterTurns(pace, own_addresses, pacer)
    finally:
        if is_ours:
            end(pacer, PACER)


class ClusterTurns:
    """A worker's connection to the cluster's rate limiter. It can be pickled.

    The rate limiter ends with the job that started it, and its state is lost. The next call of another job starts a new
    one, which learns of throttling from the next fetch. So the mistakes of one job do not throttle the next job.
    """

    def __init__(self, pace: Pace, own_addresses: bool, pacer: Any) -> None:
        self._pace, self._own_addresses, self._pacer = pace, own_addresses, pacer
        self._job = ray.get_runtime_context().get_job_id()

    def turn(self, host: str) -> Turn:
        home = ray.util.get_node_ip_address() if self._own_addresses else "this network"
        turn: Turn = self._call(lambda pacer: ray.get(pacer.turn.remote(self._pace, home, host)))
        return turn

    def report(self, address: str, host: str, reason: Reason | None) -> None:
        ray_metrics.fetches().inc(1, {"outcome": str(reason) if reason else "fetched"})
        self._call(lambda pacer: ray.get(pacer.report.remote(self._pace, address, host, reason, self._job)))

    def fetching(self) -> Fetching | None:
        """The state of the job's fetches since the rate limiter started; None if it does not answer."""
        try:
            fetching: Fetching = ray.get(self._pacer.fetching.remote(self._job), timeout=ANSWER_S)
        except RayActorError:
            self._pacer = _cluster_pacer()
            return None
        except RayError:
            return None
        return fetching

    def _call(self, ask: Callable[[Any], Any]) -> Any:
        while True:
            try:
                return ask(self._pacer)
            except RayActorError:
                time.sleep(ASK_AGAIN_S)
                self._pacer = _cluster_pacer()


def _cluster_pacer() -> Any:
    return ray.remote(Pacer).options(name=PACER, get_if_exists=True, **on_this_node()).remote()
