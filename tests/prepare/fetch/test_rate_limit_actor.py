"""What jobs of one cluster share and what they may not, on a real Ray."""

from contextlib import ExitStack, suppress

import ray

from pipeline.cluster import NAMESPACE
from pipeline.prepare.clip import Reason
from pipeline.prepare.fetch.rate_limit_actor import RATE_LIMITER, cluster_permits
from pipeline.prepare.fetch.rate_limiter import RateLimit

HOST = "host"


def test_jobs_of_a_cluster_share_their_pacer_and_outlive_it(local_ray: None):
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
    # What the other made anew ends when nobody asks it any more, sooner or later.
    with suppress(ValueError):
        while True:
            ray.kill(ray.get_actor(RATE_LIMITER, namespace=NAMESPACE))


def test_a_job_after_another_begins_anew_and_a_node_may_have_an_address_of_its_own(local_ray: None):
    for own_addresses, egress_address in (
        (False, "this network"),
        (True, ray.util.get_node_ip_address()),
        (False, "this network"),
    ):
        with cluster_permits(RateLimit(fetches_per_hour=60), own_addresses=own_addresses) as permits:
            assert permits.permit(HOST).address == egress_address
            assert permits.permit(HOST).address is None
