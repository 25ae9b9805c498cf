"""The CPUs and the GPU of a worker, checked before a run starts if the cluster's resources are known by then."""

import os
from collections.abc import Mapping

import ray
import torch

from ast_core.errors import ConfigError
from ast_core.execution import for_device
from ast_core.recipe import Recipe
from pipeline.train.settings import CPUS_WITH_GPU, IN_PROCESS


def known_resources(address: str, num_cpus: int | None) -> Mapping[str, float] | None:
    """CPUs and GPUs that workers can have; None for a cluster that this process has not joined yet."""
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
    """Whether each worker has a GPU, the CPUs of a worker, and a line for each resource that a cluster lacks now.

    Raises:
        ConfigError: this machine has too few CPUs or GPUs. A cluster may still grow.
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
            option = f" (--cpus-per-worker {cpus})" if kind == "CPU" and cpus_per_worker else ""
            line = f"{least} workers{validation} take {wanted} {kind}s{option}, {{}} has {has.get(kind, 0):.0f}"
            if is_local:
                raise ConfigError(line.format("this machine"))
            lacking.append(line.format("the cluster") + " now; training begins when it has grown")
    return use_gpu, cpus, lacking


def _share_of_cpus(has: Mapping[str, float], num_tasks: int, use_gpu: bool, is_local: bool) -> int:
    """CPUs of a worker if the command does not say; `has` is what Ray has."""
    num_cpus = int(has.get("CPU", 1))
    if not use_gpu:
        return max(1, num_cpus // num_tasks)
    num_gpus = int(has.get("GPU", 0))
    if not is_local and num_gpus < num_tasks:  # nodes that join later bring CPUs too
        return CPUS_WITH_GPU
    return max(1, min(CPUS_WITH_GPU, num_cpus // max(1, min(num_tasks, num_gpus))))


def check_precision(recipe: Recipe, *, use_gpu: bool) -> None:
    """Raise ConfigError if the workers' device cannot train in the recipe's precision."""
    if not use_gpu and recipe.precision == "fp16":
        for_device(recipe, torch.device("cpu"))
