"""What a worker takes: a GPU or none, and CPUs. Judged before a run is claimed where that can be known."""

import os
from collections.abc import Mapping

import ray
import torch

from ast_core.errors import ConfigError
from ast_core.execution import for_device
from ast_core.recipe import Recipe

IN_PROCESS = (0, 0)
"""The value of --num-workers that trains in the command's own process."""

CPUS_WITH_GPU = 4
"""CPUs of a worker with a GPU, if there are as many: one computes the step, the others read shards."""


def known_resources(address: str, num_cpus: int | None) -> Mapping[str, float] | None:
    """CPUs and GPUs that workers can have; None of a cluster that is not joined yet."""
    if ray.is_initialized():
        return ray.cluster_resources()
    if address != "local":
        return None
    return {"CPU": num_cpus or os.cpu_count() or 1, "GPU": torch.cuda.device_count()}


def worker_resources(
    *,
    num_workers: tuple[int, int],
    device: str,
    cpus_per_worker: int | None,
    async_validation: bool,
    is_local: bool,
    has: Mapping[str, float],
) -> tuple[bool, int, list[str]]:
    """Whether workers take a GPU each, the CPUs of a worker, and a line for each thing that a cluster lacks now.

    Raises:
        ConfigError: this machine, which does not grow, has not enough of something.
    """
    if num_workers == IN_PROCESS:
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device cuda takes a GPU, this machine has none that PyTorch can use; use cpu")
        use_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        return use_gpu, cpus_per_worker or os.cpu_count() or 1, []
    least, most = num_workers
    use_gpu = device == "cuda" or (device == "auto" and has.get("GPU", 0) >= least)
    cpus = cpus_per_worker or _share_of_cpus(has, most + async_validation, use_gpu, is_local)
    num_tasks = least + async_validation
    lacking = []
    for kind, wanted in {"CPU": num_tasks * cpus, "GPU": num_tasks * use_gpu}.items():
        if wanted > has.get(kind, 0):
            validation = " and asynchronous validation" if async_validation else ""
            said = f" (--cpus-per-worker {cpus})" if kind == "CPU" and cpus_per_worker else ""
            have = f"{least} workers{validation} take {wanted} {kind}s{said}, {{}} has {has.get(kind, 0):.0f}"
            if is_local:
                raise ConfigError(have.format("this machine"))
            lacking.append(have.format("the cluster") + " now; training begins when it has grown")
    return use_gpu, cpus, lacking


def _share_of_cpus(has: Mapping[str, float], num_tasks: int, use_gpu: bool, is_local: bool) -> int:
    """CPUs of a worker, where the command names none; `has` is what Ray has."""
    num_cpus = int(has.get("CPU", 1))
    if not use_gpu:
        return max(1, num_cpus // num_tasks)
    num_gpus = int(has.get("GPU", 0))
    if not is_local and num_gpus < num_tasks:  # the nodes that are to come bring CPUs too
        return CPUS_WITH_GPU
    return max(1, min(CPUS_WITH_GPU, num_cpus // max(1, min(num_tasks, num_gpus))))


def check_precision(recipe: Recipe, *, use_gpu: bool) -> None:
    """Raise ConfigError for a precision that the workers' device cannot train in."""
    if not use_gpu and recipe.precision == "fp16":
        for_device(recipe, torch.device("cpu"))
