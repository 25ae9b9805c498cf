"""What the jobs of a cluster have in common: whose Ray it is, named actors, and the nodes kept for GPU work.

A cluster has one actor of a name at a time, so jobs find each other by the name.
"""

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import ray
from ray._private.utils import get_num_cpus
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

NAMESPACE = "ast-ray"
NOT_ON_GPU_NODES = {"ast-ray/reserved-for": "!gpu"}
"""Label selector for tasks and actors: any node except those with the label `ast-ray/reserved-for=gpu`. Without it they
would take CPUs that the ranks of a training need, and the autoscaler could start GPU nodes for them."""

ASK_AGAIN_S = 0.2
"""Seconds between two checks whether the name of an ended actor is free."""


def end(actor: Any, name: str) -> None:
    """End an actor and wait until its name is free, for the next job of this process."""
    ray.kill(actor)
    with suppress(ValueError):
        while ray.get_actor(name, namespace=NAMESPACE) == actor:
            time.sleep(ASK_AGAIN_S)


def usable_cpus() -> int:
    """The CPUs that this process may use. Ray itself counts a container's, but not those of SLURM or `taskset`."""
    counted = max(1, int(get_num_cpus(override_docker_cpu_warning=True)))
    return min(counted, len(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else counted


def resources_of_nodes() -> list[Mapping[str, float]]:
    """The resources of each machine of the cluster that is up, by Ray's names. A task needs one machine with enough."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def on_this_node() -> dict[str, Any]:
    """Options of an actor that lives as long as this process. If the actor's own process ends, Ray starts it again."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return {
        "namespace": NAMESPACE,
        "num_cpus": 0,
        "max_restarts": -1,
        "max_task_retries": -1,
        "scheduling_strategy": here,
    }


def ray_is_ours() -> bool:
    """Whether this process has started its Ray, rather than joined one."""
    node = ray._private.worker._global_node  # Ray has no public way to ask
    return node is not None and bool(node.head)
