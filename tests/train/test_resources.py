"""The CPUs and the GPU of a worker on clusters of several machines."""

import os
from collections.abc import Sequence
from typing import Any

import pytest
import ray

from ast_core.errors import ConfigError
from pipeline.train.resources import Node, known_nodes, worker_resources, workers_line
from pipeline.train.settings import IN_PROCESS


def resources(nodes: Sequence[Node], num_workers: int | tuple[int, int], **options: Any) -> tuple[bool, int, list[str]]:
    numbers = (num_workers, num_workers) if isinstance(num_workers, int) else num_workers
    usual: dict[str, Any] = {"device": "auto", "cpus_per_worker": None, "async_validation": False, "is_local": False}
    return worker_resources(num_workers=numbers, nodes=nodes, **usual | options)


def cpus(*of_nodes: int) -> list[Node]:
    return [{"CPU": number} for number in of_nodes]


@pytest.mark.parametrize(
    ("nodes", "num_workers", "expected"),
    [
        ([16, 16, 16], 1, 16),
        ([8, 8], 3, 4),
        ([16, 16, 16], 8, 5),
        ([0, 30, 2], 4, 7),
        ([4], 2, 2),
        ([16, 16], (1, 100), 1),  # as many as there is room for
    ],
)
def test_all_workers_fit_on_single_machines_of_a_cluster(
    nodes: list[int], num_workers: int | tuple[int, int], expected: int
):
    assert resources(cpus(*nodes), num_workers) == (False, expected, [])


def test_a_worker_with_a_gpu_takes_cpus_of_the_machine_of_its_gpu():
    nodes = [{"CPU": 64}, {"CPU": 4, "GPU": 2}]
    assert resources(nodes, 2) == (True, 2, [])
    assert resources([*nodes, {"CPU": 32, "GPU": 4}], 6) == (True, 2, [])
    assert resources([{"CPU": 2, "GPU": 1}], 1, is_local=True) == (True, 2, [])
    assert resources([{"CPU": 2, "GPU": 1}] * 2, (1, 4)) == (True, 2, [])
    use_gpu, number, [line] = resources([{"CPU": 4, "GPU": 2}], 2, async_validation=True)
    assert (use_gpu, number) == (True, 2)
    assert "2 workers and asynchronous validation take 2 CPUs and a GPU each, the cluster has room for 2 now" in line


def test_workers_that_no_machine_has_room_for_are_announced():
    _, _, [line] = resources(cpus(2, 2), 2, cpus_per_worker=3)
    assert line.startswith("2 workers take 3 CPUs each, the cluster has room for 0 now; training begins when")
    _, number, [line] = resources(cpus(8), 2, device="cuda")
    assert number == 4
    assert "take 4 CPUs and a GPU each, the cluster has room for 0 now" in line


def test_cpus_of_this_machine_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr("pipeline.cluster.get_num_cpus", lambda **_: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)  # as in a SLURM job
    assert known_nodes("local", None)[0]["CPU"] == 8
    assert known_nodes("local", 3)[0]["CPU"] == 3
    assert resources([], IN_PROCESS, device="cpu", is_local=True) == (False, 8, [])
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert known_nodes("local", None)[0]["CPU"] == 64


def test_gpus_that_would_be_idle_are_named():
    one = workers_line((1, 1), use_gpu=True, cpus=4, num_gpus=8)
    assert one == "trains with 1 worker, a GPU and 4 CPUs each; there are 8 GPUs, --num-workers 8 uses all"
    assert workers_line((8, 8), use_gpu=True, cpus=4, num_gpus=8) == "trains with 8 workers, a GPU and 4 CPUs each"
    assert workers_line((2, 2), use_gpu=False, cpus=1, num_gpus=0) == "trains with 2 workers, 1 CPU each"
    assert workers_line(IN_PROCESS, use_gpu=False, cpus=2, num_gpus=0) == "trains in this process, on 2 CPUs"


@pytest.mark.parametrize("is_local", [True, False])
def test_fewer_gpus_than_workers_are_not_passed_over_in_silence(is_local: bool):
    nodes = [{"CPU": 16, "GPU": 2}]
    with pytest.raises(ConfigError, match=r"^4 workers, but 2 GPUs: give --num-workers 2, or say with --device cpu"):
        resources(nodes, 4, is_local=is_local)
    assert resources(nodes, 4, device="cpu", is_local=is_local) == (False, 4, [])
    with pytest.raises(ConfigError, match=r"^4 workers take 4 GPUs, this machine has 2$"):
        resources(nodes, 4, device="cuda", is_local=True)
