"""The CPUs and the GPU of a worker on clusters of several machines."""

import os
from collections.abc import Sequence
from typing import Any

import pytest
import ray

from ast_core.errors import ConfigError
from ast_core.recipe import Recipe
from pipeline.train.resources import Node, WorkerResources, known_nodes, worker_resources, workers_line
from pipeline.train.settings import IN_PROCESS, TrainSettings


def resources(nodes: Sequence[Node], num_workers: int | tuple[int, int], **options: Any) -> WorkerResources:
    numbers = (num_workers, num_workers) if isinstance(num_workers, int) else num_workers
    places = {"data": "data", "train_splits": ["train"], "eval_splits": ["eval"], "output": "/run", "address": "auto"}
    return worker_resources(
        TrainSettings(recipe=Recipe(model="ast"), **places | {"num_workers": numbers} | options), nodes
    )


def fitting(nodes: Sequence[Node], num_workers: int | tuple[int, int], **options: Any) -> tuple[bool, int]:
    """Whether workers that fit on these machines have GPUs, and the CPUs of each."""
    wanted = resources(nodes, num_workers, **options)
    assert wanted.has_room(nodes)
    return wanted.use_gpu, wanted.cpus


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
    assert fitting(cpus(*nodes), num_workers) == (False, expected)


def test_a_worker_with_a_gpu_takes_cpus_of_the_machine_of_its_gpu():
    nodes = [{"CPU": 64}, {"CPU": 4, "GPU": 2}]
    assert fitting(nodes, 2) == (True, 2)
    assert fitting([*nodes, {"CPU": 32, "GPU": 4}], 6) == (True, 2)
    assert fitting([{"CPU": 2, "GPU": 1}], 1, address="local") == (True, 2)
    assert fitting([{"CPU": 2, "GPU": 1}] * 2, (1, 4)) == (True, 2)
    nodes = [{"CPU": 4, "GPU": 2}]
    wanted = resources(nodes, 2, async_validation=True)
    assert (wanted.use_gpu, wanted.cpus, wanted.has_room(nodes)) == (True, 2, False)
    line = "2 workers and asynchronous validation take 2 CPUs and a GPU each, the cluster has room for 2"
    assert wanted.room_line(nodes) == line


def test_workers_that_no_machine_has_room_for_are_announced():
    wanted = resources(cpus(2, 2), 2, cpus_per_worker=3)
    assert not wanted.has_room(cpus(2, 2))
    assert wanted.room_line(cpus(2, 2)) == "2 workers take 3 CPUs each, the cluster has room for 0"
    wanted = resources(cpus(8), 1, device="cuda")
    assert not wanted.has_room(cpus(8))
    assert wanted.room_line(cpus(8)) == "1 worker takes 4 CPUs and a GPU, the cluster has room for 0"
    others = "2 workers take 1 CPU each, the cluster has room for 2, part of which other work has"
    assert resources(cpus(2), 2).room_line(cpus(2)) == others


def test_cpus_of_this_machine_are_those_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr("pipeline.cluster.get_num_cpus", lambda **_: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)  # as in a SLURM job
    assert known_nodes("local", None)[0]["CPU"] == 8
    assert known_nodes("local", 3)[0]["CPU"] == 3
    assert fitting([], IN_PROCESS, device="cpu", address="local") == (False, 8)
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert known_nodes("local", None)[0]["CPU"] == 64


def test_gpus_that_would_be_idle_are_named():
    one = workers_line(WorkerResources((1, 1), use_gpu=True, cpus=4), num_gpus=8)
    assert one == "trains with 1 worker, a GPU and 4 CPUs each; there are 8 GPUs, --num-workers 8 uses all"
    eight = workers_line(WorkerResources((8, 8), use_gpu=True, cpus=4), num_gpus=8)
    assert eight == "trains with 8 workers, a GPU and 4 CPUs each"
    assert workers_line(WorkerResources((2, 2), False, cpus=1), num_gpus=0) == "trains with 2 workers, 1 CPU each"
    assert workers_line(WorkerResources(IN_PROCESS, False, cpus=2), 0) == "trains in this process, on 2 CPUs"


@pytest.mark.parametrize("address", ["local", "auto"])
def test_fewer_gpus_than_workers_are_not_passed_over_in_silence(address: str):
    nodes = [{"CPU": 16, "GPU": 2}]
    with pytest.raises(ConfigError, match=r"^4 workers, but 2 GPUs: give --num-workers 2, or say with --device cpu"):
        resources(nodes, 4, address=address)
    assert fitting(nodes, 4, device="cpu", address=address) == (False, 4)
    with pytest.raises(ConfigError, match=r"^4 workers take 4 GPUs, this machine has 2$"):
        resources(nodes, 4, device="cuda", address="local")
