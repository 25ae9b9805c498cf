"""What the driver of a training tells its ranks, and they it."""

from dataclasses import dataclass, replace
from typing import Any

from ast_core.checkpoints import ModelConfig
from ast_core.models.ast import ASTModel
from ast_core.recipe import Recipe
from pipeline import storage
from pipeline.redaction import without_secrets
from pipeline.train import models


@dataclass(frozen=True)
class TrainJob:
    """What the driver hands to every rank."""

    data: str
    train_splits: list[str]
    eval_splits: list[str]
    run: str
    """Holds `initial`, the model to start from."""
    recipe: dict[str, Any]
    """That of `initial`, but for EXECUTION_KEYS that the run goes on with."""
    use_gpu: bool
    """Ranks have one each, and so has the evaluation beside them. Ray hides no GPU from a task that asked for none."""
    threads: int
    log_every_steps: int
    """Losses are looked at, and logged, this often; checkpoints come at these steps."""
    checkpoint_every_s: float
    """Beside those at the ends of epochs."""
    saves_checkpoints: bool
    """In one process nobody takes them in: Ray's local mode would leave each where it was made."""
    cache_dir: str | None
    cache_bytes: int
    mlflow_uri: str | None
    async_validation: bool
    """In a task of its own while the next epoch is trained; else on the ranks, in between."""
    unlisted_checkpoints: list[str]
    """To go on from, the earliest first, where Ray knows of none."""


def read_initial_model(job: TrainJob) -> tuple[ASTModel, ModelConfig]:
    model, config = models.read(storage.join(job.run, "initial"))
    return model, replace(config, recipe=Recipe(**job.recipe))


def stopped_json(run: str) -> str:
    """Why a run ended that would end so again: the workers' word to the driver, and to themselves when Ray retries."""
    return storage.join(run, "stopped.json")


def record_stop(run: str, err: Exception) -> None:
    storage.write_json(stopped_json(run), {"error": without_secrets(str(err))})
