"""What Ray keeps for the jobs of one cluster: actors with a name, of which there is one at a time."""

import posixpath
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import storage

NAMESPACE = "ast-ray"
ASK_AGAIN_S = 0.2
"""An actor that has just ended may still have its name."""


@contextmanager
def hold(purpose: str, uri: str) -> Iterator[bool]:
    """Hold `uri` for a purpose against the other jobs of the cluster; False where one of them does.

    A job holds it no longer than it lives.
    """
    fs, path = storage.resolve(uri)
    name = f"{purpose} {fs.type_name}:{posixpath.normpath(path)}"  # one for all spellings and options of a URI
    try:
        holder: Any = ray.remote(_Holder).options(name=name, **on_this_node()).remote()
    except ValueError:  # Ray gives a name once
        yield False
        return
    try:
        yield True
    finally:
        end(holder, name)


class _Holder:
    """Does nothing: its name is the lock, and Ray frees it when the job is over, however it ends."""


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
