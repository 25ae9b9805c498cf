"""The results of a finished run of a comparison, read from its folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ast_core.checkpoints.folder import WEIGHTS_KEY
from ast_core.errors import DataError
from ast_core.metrics import METRICS
from pipeline import storage
from pipeline.compare.plan import PlannedRun
from pipeline.train.evaluation.scores import Scores, read_scores, scores_file
from pipeline.train.metrics_files import read_records
from pipeline.train.metrics_log import read_summary
from pipeline.train.settings import IN_PROCESS

LAST_EPOCHS = 5


@dataclass(frozen=True)
class RunResult:
    planned: PlannedRun
    config: Mapping[str, Any]
    """RUN/config.json."""
    summary: Mapping[str, Any]
    epochs: Sequence[Mapping[str, Any]]
    """The record of each epoch in metrics.jsonl."""
    memory_gb: float | None
    """Largest amount of device memory; on a CPU, of the process. None if the process trained other runs too."""
    scores: Scores
    """The scores of the best epoch."""
    weights_sha256: str | None
    """The SHA-256 of the best model's weights."""

    @property
    def best_model(self) -> str:
        return best_model(self.planned)

    def last_epochs(self) -> dict[str, float | None]:
        """The mean of each metric over the last `LAST_EPOCHS` epochs; None if it is undefined in one of them."""
        return {name: mean_or_none([one.get(name) for one in self.epochs[-LAST_EPOCHS:]]) for name in METRICS}


def best_model(planned: PlannedRun) -> str:
    return storage.join(planned.settings.output, "best")


def mean_or_none(values: Sequence[float | None]) -> float | None:
    """The mean; None if a value is unknown."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def read_result(planned: PlannedRun) -> RunResult:
    """Read the results of a finished run.

    Raises:
        DataError: a file is missing or damaged.
    """
    run = planned.settings.output
    scores = read_scores(run)
    if scores is None:
        raise DataError(f"{scores_file(run)} is missing; restore it, or delete {run}, and run the same command again")
    config = storage.read_checked_json(storage.join(run, "config.json"))
    records = read_records(run)
    memory = [one["memory_gb"] for one in records if one["kind"] == "step" and one.get("memory_gb") is not None]
    is_shared = config["num_workers"] == list(IN_PROCESS) and config["computed"]["device"] == "cpu"
    return RunResult(
        planned=planned,
        config=config,
        summary=read_summary(run),
        epochs=[one for one in records if one["kind"] == "epoch"],
        memory_gb=max(memory) if memory and not is_shared else None,
        scores=scores,
        weights_sha256=storage.read_json(storage.join(best_model(planned), "config.json")).get(WEIGHTS_KEY),
    )
