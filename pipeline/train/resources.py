"""The CPUs and the GPU of a worker, checked before a run starts if the cluster's resources are known by then."""

import math
from collections.abc import Mapping, Sequence

import ray
import torch

from ast_core.errors import ConfigError
from ast_core.execution import for_device
from ast_core.recipe import Recipe
from pipeline.cluster import resources_of_nodes, usable_cpus
from pipeline.train.settings import CPUS_WITH_GPU, IN_PROCESS

Node = Mapping[str, float]
"""The number of CPUs and GPUs of a machine, by Ray's names."""


def known_nodes(address: str, num_cpus: int | None) -> list[Node] | None:
    """What workers can have on each machine; None for a cluster that this process has not joined yet."""
    if ray.is_initialized():
        return resources_of_nodes()
    if address != "local":
        return None
    return [{"CPU": num_cpus or usable_cpus(), "GPU": torch.cuda.device_count()}]


def worker_resources(
    *,
    num_workers: tuple[int, int],
    device: str,
    cpus_per_worker: int | None,
    async_validation: bool,
    is_local: bool,
    nodes: Sequence[Node],
) -> tuple[bool, int, list[str]]:
    """Whether each worker has a GPU, the CPUs of a worker, and a line if a cluster lacks room for the workers now.

    A worker is on one machine, so what counts is how many workers each machine has room for.

    Raises:
        ConfigError: this machine has too few CPUs or GPUs; a cluster may still grow. Or there are GPUs, but fewer than
            workers, and nobody has said which device to use.
    """
    if num_workers == IN_PROCESS:
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device cuda takes a GPU, this machine has none that PyTorch can use; use cpu")
        use_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        return use_gpu, cpus_per_worker or usable_cpus(), []
    least, most = num_workers
    num_cpus, num_gpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU"))
    if device == "auto" and 0 < num_gpus < least:
        wait = "" if is_local else ", or with --device cuda that more GPUs will come"
        raise ConfigError(
            f"{least} workers, but {num_gpus} GPU{'s' if num_gpus > 1 else ''}: give --num-workers {num_gpus}, or say "
            f"with --device cpu that all train on CPUs{wait}"
        )
    use_gpu = device == "cuda" or (device == "auto" and num_gpus > 0)
    cpus = cpus_per_worker or _share_of_cpus(nodes, most + async_validation, use_gpu)
    num_tasks, room = least + async_validation, _room(nodes, cpus, use_gpu)
    if room >= num_tasks:
        return use_gpu, cpus, []
    workers = f"{least} workers{' and asynchronous validation' if async_validation else ''}"
    if not is_local:
        each = f"{cpus} CPU{'s' if cpus > 1 else ''}{' and a GPU' if use_gpu else ''}"
        lacking = f"{workers} take {each} each, the cluster has room for {room} now; training begins when it has grown"
        return use_gpu, cpus, [lacking]
    lacks_gpus = use_gpu and num_gpus < num_tasks
    kind, has, wanted = ("GPU", num_gpus, num_tasks) if lacks_gpus else ("CPU", num_cpus, num_tasks * cpus)
    option = f" (--cpus-per-worker {cpus})" if kind == "CPU" and cpus_per_worker else ""
    raise ConfigError(f"{workers} take {wanted} {kind}s{option}, this machine has {has}")


def _room(nodes: Sequence[Node], cpus: int, use_gpu: bool) -> int:
    """How many workers fit on these machines, if nothing else runs there."""
    return sum(int(min(node.get("CPU", 0) // cpus, node.get("GPU", 0) if use_gpu else math.inf)) for node in nodes)


def _share_of_cpus(nodes: Sequence[Node], num_tasks: int, use_gpu: bool) -> int:
    """CPUs of a worker if the command does not say: the most with which all of them fit, and 1 if they never do.

    If there are fewer GPUs than workers, those fit for which there is a GPU. Others wait for more machines like these.
    """
    num_gpus = int(sum(node.get("GPU", 0) for node in nodes))
    if use_gpu and num_gpus == 0:  # nodes that join later bring CPUs too
        return CPUS_WITH_GPU
    most = CPUS_WITH_GPU if use_gpu else int(max((node.get("CPU", 0) for node in nodes), default=1))
    wanted = min(num_tasks, num_gpus) if use_gpu else num_tasks
    return next((cpus for cpus in range(most, 1, -1) if _room(nodes, cpus, use_gpu) >= wanted), 1)


def workers_line(num_workers: tuple[int, int], *, use_gpu: bool, cpus: int, num_gpus: int) -> str:
    """Which device the run trains on, for those who did not say. `num_gpus` are there."""
    least, most = num_workers
    number = f"{least}" if least == most else f"{least} to {most}"
    each = f"{'a GPU and ' if use_gpu else ''}{cpus} CPU{'s' if cpus > 1 else ''}"
    line = f"trains with {number} worker{'s' if most > 1 else ''}, {each} each"
    if num_workers == IN_PROCESS:
        line = f"trains in this process, on {'the GPU' if use_gpu else f'{cpus} CPUs'}"
    idle = (
        f"; there are {num_gpus} GPUs, --num-workers {num_gpus} uses all" if use_gpu and max(most, 1) < num_gpus else ""
    )
    return line + idle


def check_precision(recipe: Recipe, *, use_gpu: bool) -> None:
    """Raise ConfigError if the workers' device cannot train in the recipe's precision."""
    if not use_gpu and recipe.precision == "fp16":
        for_device(recipe, torch.device("cpu"))
