"""What jobs of one cluster share and what they may not, on a real Ray."""

import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from typing import Any

import pyarrow as pa
import pytest
import ray
from ray.data import ActorPoolStrategy
from ray.exceptions import RayActorError

from ast_core.errors import DataError
from pipeline import storage
from pipeline.prepare.clip import Reason
from pipeline.prepare.pacing import Pace
from pipeline.prepare.plan import FetchAndPrepare, Stages
from pipeline.prepare.shared import NAMESPACE, PACER, cluster_turns, sole_writer
from pipeline.prepare.todo import write_todo
from tests import fakes

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


def test_an_output_elsewhere_is_held_against_the_jobs_of_the_cluster(local_ray: None):
    with sole_writer("s3://bucket/data"):
        with (
            pytest.raises(DataError, match="another job is preparing s3://bucket/data"),
            sole_writer("s3://bucket/data"),
        ):
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
            assert one.turn().address == "this network"
            assert other.turn().address is None
            other.report("this network", Reason.THROTTLED)
            assert list(one.at_rest()) == ["this network"]
            pacer = ray.get_actor(PACER, namespace=NAMESPACE)
            first_job.close()
            with pytest.raises(RayActorError):
                _ask_on(pacer)
            assert other.turn().address == "this network"
            assert other.turn().address is None
            assert other.at_rest() == {}


def test_a_job_after_another_begins_anew_and_a_node_may_have_an_address_of_its_own(local_ray: None):
    for own_addresses, home in (
        (False, "this network"),
        (True, ray.util.get_node_ip_address()),
        (False, "this network"),
    ):
        with cluster_turns(Pace(fetches_per_hour=60), own_addresses=own_addresses) as turns:
            assert turns.turn().address == home
            assert turns.turn().address is None


def _ask_on(pacer: Any) -> None:
    while True:
        ray.get(pacer.at_rest.remote())


class NotedFetch:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, rows: pa.Table) -> pa.Table:
        for clip_id in rows["clip_id"].to_pylist():
            (self._folder / clip_id).touch()
        return rows


class AtAGate:
    """Where prepared clips wait until the gate is open."""

    def __init__(self, gate: Path) -> None:
        self._gate = gate

    def __call__(self, rows: pa.Table) -> pa.Table:
        while not self._gate.exists():
            time.sleep(0.02)
        return rows.select(["clip_id"])


def test_no_more_than_a_chunk_of_each_download_worker_is_fetched_and_not_prepared(local_ray: None, tmp_path: Path):
    fetched, gate = tmp_path / "fetched", tmp_path / "open"
    fetched.mkdir()
    chunks = write_todo(str(tmp_path), fakes.clips(*({"clip_id": f"clip{i:02}", "media": "x"} for i in range(60))), 4)
    data = ray.data.from_items(list(chunks), override_num_blocks=len(chunks)).map_batches(
        FetchAndPrepare,
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=0.05,
        compute=ActorPoolStrategy(size=2, max_tasks_in_flight_per_actor=1),
        fn_constructor_args=(NotedFetch(fetched), Stages((AtAGate(gate),))),
    )
    prepared: list[str] = []
    job = Thread(target=lambda: prepared.extend(row["clip_id"] for row in data.iter_rows()))
    job.start()
    while len(list(fetched.iterdir())) < 2 * 4:
        time.sleep(0.02)
    time.sleep(1)
    assert len(list(fetched.iterdir())) == 2 * 4
    gate.touch()
    job.join()
    assert len(prepared) == len(set(prepared)) == 60
