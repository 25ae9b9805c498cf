"""What jobs of one cluster share and what they may not, on a real Ray."""

import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import ray

from ast_core.errors import DataError
from pipeline import storage
from pipeline.cluster import NAMESPACE
from pipeline.prepare.clip import Reason
from pipeline.prepare.pacing import Pace
from pipeline.prepare.shared import PACER, cluster_turns, sole_writer

HOST = "host"
HOLD = (
    "import sys; from pipeline import storage\nwith storage.lock(sys.argv[1]) as ours: print(ours, flush=True); input()"
)


def test_an_output_on_disk_is_held_against_any_other_process_until_its_job_ends_or_dies(tmp_path: Path):
    argv = [sys.executable, "-c", HOLD, str(tmp_path / "data")]
    for ending in (subprocess.Popen.kill, lambda holder: holder.communicate("\n")):
        with subprocess.Popen(argv, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "True\n"
            with storage.lock(tmp_path / "data") as is_ours:
                assert not is_ours
            with pytest.raises(DataError, match="another job is preparing"), sole_writer(str(tmp_path / "data")):
                pass
            ending(holder)
            holder.wait()
        with storage.lock(tmp_path / "data") as is_ours:
            assert is_ours
    assert not list((tmp_path / "data").iterdir())


def test_an_output_that_is_a_file_is_refused(tmp_path: Path):
    (tmp_path / "data").write_text("")
    with (
        pytest.raises(DataError, match="data is a file or below one; give a"),
        sole_writer(str(tmp_path / "data")),
    ):
        pass


def test_an_output_elsewhere_is_held_against_the_jobs_of_the_cluster(local_ray: None):
    with sole_writer("s3://bucket/data"):
        for spelling in ("s3://bucket/data", "s3://bucket/data/", "s3://bucket/data?region=eu-west-1"):
            with pytest.raises(DataError, match="another job is preparing s3://bucket/data"), sole_writer(spelling):
                pass
        with sole_writer("s3://bucket/other"):
            pass
    with sole_writer("s3://bucket/data"):
        pass


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
