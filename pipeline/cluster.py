"""Named actors, of which a cluster has one at a time: jobs find each other by them."""

import time
from contextlib import suppress
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

NAMESPACE = "ast-ray"
ASK_AGAIN_S = 0.2
"""An actor that has just ended may still have its name."""


def end(actor: Any, name: str) -> None:
    """And wait until its name is free, for the next job of this process."""
    ray.kill(actor)
    with suppress(ValueError):
        while ray.get_actor(name, namespace=NAMESPACE) == actor:
            time.sleep(ASK_AGAIN_S)


def on_this_node() -> dict[str, Any]:
    """Options of an actor that ends with this process, and sooner only if its own process does: then it begins anew."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return {
        "namespace": NAMESPACE,
        "num_cpus": 0,
        "max_restarts": -1,
        "max_task_retries": -1,
        "scheduling_strategy": here,
    }
