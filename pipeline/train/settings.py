"""What a user asks for of a training. Imports neither PyTorch nor Ray, so that `--help` answers at once."""

from collections.abc import Collection
from dataclasses import dataclass

from ast_core.recipe import Recipe

IN_PROCESS = (0, 0)
"""The value of --num-workers that trains in the command's own process."""

CPUS_WITH_GPU = 4
"""CPUs of a worker with a GPU, if the machine has enough: one runs the step, the others read shards."""

LONGEST_WAIT_S = 3600.0
"""How long a training waits for room for its workers, if the command does not say."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What a user asks for: recipe, data, output, and how to compute. These are the options of jobs/train.py."""

    recipe: Recipe
    overrides: Collection[str] = ()
    """Recipe keys that the command line sets."""
    data: str
    train_splits: list[str]
    eval_splits: list[str]
    output: str
    """Absolute URI of the run."""
    num_workers: tuple[int, int] = (1, 1)
    """The fewest and the most workers; `IN_PROCESS` trains without workers."""
    device: str = "auto"
    cpus_per_worker: int | None = None
    max_failures: int = 2
    checkpoint_every_s: float = 600.0
    resize_every_s: float = 60.0
    longest_wait_s: float = LONGEST_WAIT_S
    log_every_steps: int = 20
    cache_dir: str | None = None
    cache_gb: float = 500.0
    async_validation: bool = False
    init_from: str | None = None
    mlflow: str | None = None
    address: str = "local"
    num_cpus: int | None = None
