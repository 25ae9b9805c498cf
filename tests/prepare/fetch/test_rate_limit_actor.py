"""The rate limiter that the jobs of a cluster share, on a real Ray."""

from contextlib import ExitStack, suppress

import ray

from pipeline.cluster import NAMESPACE
from pipeline.prepare.clip import Reason
from pipeline.prepare.fetch.rate_limit_actor import RATE_LIMITER, cluster_permits
from pipeline.prepare.fetch.rate_limiter import RateLimit

HOST = "host"


def test_jobs_of_a_cluster_share_a_rate_limiter_and_survive_its_end(local_ray: None):
    rate_limit = RateLimit(fetches_per_hour=60)
    with ExitStack() as first_job:
        one = first_job.enter_context(cluster_permits(rate_limit))
        with cluster_permits(rate_limit) as other:
            assert one.permit(HOST).address == "this network"
            assert other.permit(HOST).address is None
            other.report("this network", HOST, Reason.THROTTLED)
            fetching = one.fetching()
            assert fetching is not None
            assert (fetching.num_ended, list(fetching.cooling_down)) == (1, ["this network at host"])
            first_job.close()
            assert other.permit(HOST).address == "this network"
            assert other.permit(HOST).address is None
            assert other.fetching() == (0, {})
    # The rate limiter that the other job started ends at some time after nobody uses it.
    with suppress(ValueError):
        while True:
            ray.kill(ray.get_actor(RATE_LIMITER, namespace=NAMESPACE))


def test_a_later_job_starts_fresh_and_nodes_may_have_own_addresses(local_ray: None):
    for own_addresses, egress_address in (
        (False, "this network"),
        (True, ray.util.get_node_ip_address()),
        (False, "this network"),
    ):
        with cluster_permits(RateLimit(fetches_per_hour=60), own_addresses=own_addresses) as permits:
            assert permits.permit(HOST).address == egress_address
            assert permits.permit(HOST).address is None
