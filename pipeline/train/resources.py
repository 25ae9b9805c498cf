"""The CPUs and the GPU of a worker, checked before a run starts if the cluster's resources are known by then."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
import torch

from ast_core.errors import ConfigError
from ast_core.execution import check_device
from ast_core.recipe import Recipe
from pipeline.cluster import resources_of_nodes, usable_cpus
from pipeline.train.settings import CPUS_WITH_GPU, IN_PROCESS, TrainSettings

Node = Mapping[str, float]
"""The number of CPUs and GPUs of a machine, by Ray's names."""


def known_nodes(address: str, num_cpus: int | None) -> list[Node] | None:
    """What workers can have on each machine; None for a cluster that this process has not joined yet."""
    if ray.is_initialized():
        return resources_of_nodes()
    if address != "local":
        return None
    return [{"CPU": num_cpus or usable_cpus(), "GPU": torch.cuda.device_count()}]


@dataclass(frozen=True)
class WorkerResources:
    """What the workers of a training ask for."""

    num_workers: tuple[int, int]
    """The fewest and the most."""
    use_gpu: bool
    """Whether each worker has a GPU."""
    cpus: int
    """CPUs of each worker."""
    async_validation: bool = False
    """Whether the validation takes as much as one more worker."""

    @property
    def num_tasks(self) -> int:
        """How many processes must have room at once."""
        return self.num_workers[0] + self.async_validation

    def has_room(self, nodes: Sequence[Node]) -> bool:
        """Whether they fit on these machines, if nothing else runs there."""
        return self.num_workers == IN_PROCESS or _room(nodes, self.cpus, self.use_gpu) >= self.num_tasks

    def __str__(self) -> str:
        least = self.num_workers[0]
        return f"{least} worker{'s' if least > 1 else ''}{' and asynchronous validation' * self.async_validation}"

    def room_line(self, nodes: Sequence[Node]) -> str:
        """What they ask for, and for how many of them these machines have room."""
        each = f"{self.cpus} CPU{'s' if self.cpus > 1 else ''}{' and a GPU' if self.use_gpu else ''}"
        takes = f"{self} take {each} each" if self.num_tasks > 1 else f"{self} takes {each}"
        room = _room(nodes, self.cpus, self.use_gpu)
        used = ", part of which other work has" if room >= self.num_tasks else ""
        return f"{takes}, the cluster has room for {room}{used}"


def worker_resources(settings: TrainSettings, nodes: Sequence[Node]) -> WorkerResources:
    """What each worker of a training gets.

    A worker is on one machine, so what counts is how many workers each machine has room for.

    Raises:
        ConfigError: this machine has too few CPUs or GPUs; a cluster may still grow. Or there are GPUs, but fewer than
            workers, and nobody has said which device to use.
    """
    device, is_local = settings.device, settings.address == "local"
    if settings.num_workers == IN_PROCESS:
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device cuda takes a GPU, this machine has none that PyTorch can use; use cpu")
        use_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        return WorkerResources(IN_PROCESS, use_gpu, settings.cpus_per_worker or usable_cpus())
    least, most = settings.num_workers
    num_cpus, num_gpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU"))
    if device == "auto" and 0 < num_gpus < least:
        wait = "" if is_local else ", or with --device cuda that more GPUs will come"
        raise ConfigError(
            f"{least} workers, but {num_gpus} GPU{'s' if num_gpus > 1 else ''}: give --num-workers {num_gpus}, or say "
            f"with --device cpu that all train on CPUs{wait}"
        )
    use_gpu = device == "cuda" or (device == "auto" and num_gpus > 0)
    cpus = settings.cpus_per_worker or _share_of_cpus(nodes, most + settings.async_validation, use_gpu)
    wanted = WorkerResources(settings.num_workers, use_gpu, cpus, settings.async_validation)
    if is_local and not wanted.has_room(nodes):
        lacks_gpus, number = use_gpu and num_gpus < wanted.num_tasks, wanted.num_tasks
        kind, has, takes = ("GPU", num_gpus, number) if lacks_gpus else ("CPU", num_cpus, number * cpus)
        option = f" (--cpus-per-worker {cpus})" if kind == "CPU" and settings.cpus_per_worker else ""
        verb, plural = "take" if number > 1 else "takes", "s" if takes > 1 else ""
        raise ConfigError(f"{wanted} {verb} {takes} {kind}{plural}{option}, this machine has {has}")
    return wanted


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


def workers_line(wanted: WorkerResources, num_gpus: int) -> str:
    """Which device the run trains on, for those who did not say. `num_gpus` are there."""
    (least, most), cpus = wanted.num_workers, wanted.cpus
    number = f"{least}" if least == most else f"{least} to {most}"
    each = f"{'a GPU and ' if wanted.use_gpu else ''}{cpus} CPU{'s' if cpus > 1 else ''}"
    line = f"trains with {number} worker{'s' if most > 1 else ''}, {each} each"
    if wanted.num_workers == IN_PROCESS:
        line = f"trains in this process, on {'the GPU' if wanted.use_gpu else f'{cpus} CPUs'}"
    is_idle = wanted.use_gpu and max(most, 1) < num_gpus
    idle = f"; there are {num_gpus} GPUs, --num-workers {num_gpus} uses all" if is_idle else ""
    return line + idle


def check_execution(recipe: Recipe, *, use_gpu: bool) -> None:
    """Raise ConfigError if the workers' device cannot train with the recipe's precision, float8 or attention."""
    check_device(recipe, torch.device("cuda" if use_gpu else "cpu"))
