"""Configuration that the driver sends to every rank, and the file through which ranks tell it to stop."""

from dataclasses import dataclass, replace
from typing import Any

from ast_core.checkpoints import ModelConfig
from ast_core.models.tagger import Tagger
from ast_core.recipe import Recipe
from pipeline import storage
from pipeline.dataset import Clips, PreparedDataset
from pipeline.lease import Held
from pipeline.redaction import without_secrets
from pipeline.train import models
from pipeline.train.data_identity import check_unchanged


@dataclass(frozen=True)
class TrainJob:
    """The configuration of one rank."""

    data: str
    train_splits: list[str]
    eval_splits: list[str]
    data_identity: dict[str, Any]
    """`data_identity` of the splits when the run was claimed."""
    run: str
    """The run's folder. It contains `initial`, the model to start from."""
    recipe: dict[str, Any]
    """The recipe of `initial`, with the EXECUTION_KEYS of this command."""
    use_gpu: bool
    """Whether each rank, and asynchronous validation, has a GPU. Ray hides no GPU from a task that requested none."""
    threads: int
    log_every_steps: int
    """Steps between two logs. Losses are checked, and checkpoints saved, only at these steps."""
    checkpoint_every_s: float
    """Seconds between checkpoints within an epoch. There is also one after each epoch."""
    saves_checkpoints: bool
    """False in one process: Ray's local mode collects no checkpoints and would leave each where it was written."""
    cache_dir: str | None
    cache_bytes: int
    mlflow_uri: str | None
    async_validation: bool
    """Evaluate an epoch in a separate task while the next one trains; otherwise on the ranks, between epochs."""
    unlisted_checkpoints: list[str]
    """Checkpoints to resume from, earliest first, if Ray's list has none."""
    lock: dict[str, Any] | None = None
    """The fields of the run's lock (`Held`)."""

    def open_data(self) -> tuple[PreparedDataset, Clips, Clips]:
        """The data set, the clips to train on and the clips to evaluate on.

        Raises:
            DataError: it has been prepared again since the run was claimed.
        """
        dataset = PreparedDataset.open(self.data)
        splits = {"train": self.train_splits, "eval": self.eval_splits}
        clips = {what: dataset.clips(of) for what, of in splits.items()}
        check_unchanged(self.data_identity, dataset, splits, clips)
        return dataset, clips["train"], clips["eval"]

    def check_lock(self) -> None:
        """Raise LeaseLostError if another job has taken the run over: this one must not write any more."""
        if self.lock is not None:
            Held(**self.lock).check()


def read_initial_model(job: TrainJob) -> tuple[Tagger, ModelConfig]:
    model, config = models.read(storage.join(job.run, "initial"))
    return model, replace(config, recipe=Recipe(**job.recipe))


def stopped_json(run: str) -> str:
    """The file with the error that ended a run and would end it again. The driver and restarted ranks read it."""
    return storage.join(run, "stopped.json")


def record_stop(run: str, err: Exception) -> None:
    storage.write_json(stopped_json(run), {"error": without_secrets(str(err))})
