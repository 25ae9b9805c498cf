"""What jobs of one cluster share and what they may not, on a real Ray."""

from contextlib import ExitStack, suppress

import ray

from pipeline.cluster import NAMESPACE
from pipeline.prepare.clip import Reason
from pipeline.prepare.fetch.pacing import Pace
from pipeline.prepare.fetch.rate_limit_actor import PACER, cluster_turns

HOST = "host"


def test_jobs_of_a_cluster_share_their_pacer_and_outlive_it(local_ray: None):
    pace = Pace(fetches_per_hour=60)
    with ExitStack() as first_job:
        one = first_job.enter_context(cluster_turns(pace))
        with cluster_turns(pace) as other:
            assert one.turn(HOST).address == "this network"
            assert other.turn(HOST).address is None
            other.report("this network", HOST, Reason.THROTTLED)
            fetching = one.fetching()
            assert fetching is not None
            assert (fetching.num_ended, list(fetching.at_rest)) == (1, ["this network at host"])
            first_job.close()
            assert other.turn(HOST).address == "this network"
            assert other.turn(HOST).address is None
            assert other.fetching() == (0, {})
    # What the other made anew ends when nobody asks it any more, sooner or later.
    with suppress(ValueError):
        while True:
            ray.kill(ray.get_actor(PACER, namespace=NAMESPACE))


def test_a_job_after_another_begins_anew_and_a_node_may_have_an_address_of_its_own(local_ray: None):
    for own_addresses, home in (
        (False, "this network"),
        (True, ray.util.get_node_ip_address()),
        (False, "this network"),
    ):
        with cluster_turns(Pace(fetches_per_hour=60), own_addresses=own_addresses) as turns:
            assert turns.turn(HOST).address == home
            assert turns.turn(HOST).address is None
