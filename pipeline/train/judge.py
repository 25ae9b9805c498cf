"""What becomes of an epoch's scores: metrics, running ensemble, the best model.

Its memory is RUN/evaluation, so that whoever evaluates, rank 0 or a task beside the training, goes on from the epochs
before; an epoch that is evaluated twice writes the same files twice. An epoch is noted after all those before it.
"""

import io
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ast_core.checkpoints import ModelConfig
from ast_core.metrics import TaggingMetrics
from pipeline import storage
from pipeline.dataset import Clips
from pipeline.train import models
from pipeline.train.evaluation import class_counts, headline, score_metrics
from pipeline.train.report import finite_or_null, per_class_csv
from pipeline.train.scores import write_scores

NUM_SUMS_KEPT = 3
"""A run resumes from one of two checkpoints, and then asks for the sum of the epoch before."""


def put_off(run: str, epoch: int, loss: float, state: Mapping[str, Tensor]) -> None:
    """Keep the weights of an epoch whose evaluation failed until `Judge.note` has taken account of it."""
    kept = {"loss": loss, "model": dict(state)}
    storage.write_file(_file(run, epoch, "pt"), lambda file: torch.save(kept, file))
    storage.delete(_file(run, epoch, "json"))  # of other weights: the epoch is trained twice after some kills


def read_put_off(run: str, epoch: int) -> tuple[float, dict[str, Tensor]] | None:
    """Loss and weights, on the CPU; None where none are kept."""
    uri = _file(run, epoch, "pt")
    if not storage.exists(uri):
        return None
    kept = torch.load(io.BytesIO(storage.read_bytes(uri)), map_location="cpu", weights_only=True)
    return kept["loss"], kept["model"]


def _file(run: str, epoch: int, suffix: str) -> str:
    return storage.join(run, "evaluation", f"epoch-{epoch:04d}.{suffix}")


def _best_file(run: str) -> str:
    return storage.join(run, "best", "epoch.json")


@dataclass(frozen=True)
class Judge:
    run: str
    config: ModelConfig
    train_clips: Clips
    eval_clips: Clips

    def note(self, epoch: int, loss: float | None, scores: np.ndarray, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Take account of the scores `[clips, C]` of an epoch, counted from 1, and of the weights that gave them.

        Returns the epoch's record; its `headline` is the figure that picks the best.
        """
        before, recipe, best = self.records(epoch - 1), self.config.recipe, self.best()
        metrics = score_metrics(scores, self.eval_clips)
        score_sum = scores + self._read_sum(before[-1]["epoch"]) if before else scores
        ensemble = score_metrics(score_sum / (len(before) + 1), self.eval_clips)
        figure = headline(metrics, recipe)
        record = {
            "epoch": epoch,
            "loss": loss,
            "headline": figure,
            "is_best": best is None or (figure, -epoch) >= (best["headline"], -best["epoch"]),
            **finite_or_null(metrics.scalars()),
            "running_ensemble": finite_or_null(ensemble.scalars()),
        }
        self._write_sum(epoch, score_sum)
        if record["is_best"]:
            storage.write_json(_best_file(self.run), None)
            models.save(storage.join(self.run, "best"), state, self.config)
            self._write_per_class(metrics)
            write_scores(self.run, scores, self.eval_clips)
            storage.write_json(_best_file(self.run), record)
        storage.write_json(_file(self.run, epoch, "json"), record)
        storage.delete(_file(self.run, epoch, "pt"))
        return record

    def best(self) -> dict[str, Any] | None:
        """The record of what RUN/best holds; None where it holds nothing, or a kill came while it was written.

        Not always a record of RUN/evaluation: where a kill came between an epoch's evaluation and its checkpoint, the
        epoch was trained again, and is its own rival. The weights that it displaced are gone.
        """
        uri = _best_file(self.run)
        if storage.exists(uri):
            return storage.read_json(uri)
        # A run that an earlier version began.
        return max(self._all_records(), key=lambda record: record["headline"], default=None)

    def first_missing(self) -> int:
        """The first epoch that has no record."""
        noted = {record["epoch"] for record in self._all_records()}
        return next(epoch for epoch in itertools.count(1) if epoch not in noted)

    def records(self, last_epoch: int) -> list[dict[str, Any]]:
        """Of the epochs evaluated so far, up to this one, in their order."""
        return [record for record in self._all_records() if record["epoch"] <= last_epoch]

    def _all_records(self) -> list[dict[str, Any]]:
        uris = storage.list_files(storage.join(self.run, "evaluation"), suffix=".json")
        return sorted(map(storage.read_json, uris), key=lambda record: record["epoch"])

    def _write_sum(self, epoch: int, score_sum: np.ndarray) -> None:
        whole = io.BytesIO()
        np.save(whole, score_sum)
        storage.write_bytes(_file(self.run, epoch, "npy"), whole.getvalue())
        if epoch > NUM_SUMS_KEPT:
            storage.delete(_file(self.run, epoch - NUM_SUMS_KEPT, "npy"))

    def _read_sum(self, epoch: int) -> np.ndarray:
        return np.load(io.BytesIO(storage.read_bytes(_file(self.run, epoch, "npy"))), allow_pickle=False)

    def _write_per_class(self, metrics: TaggingMetrics) -> None:
        num_classes = len(self.config.labels)
        counts = [class_counts(clips, num_classes) for clips in (self.train_clips, self.eval_clips)]
        text = per_class_csv(self.config.labels, metrics, *counts)
        storage.write_bytes(storage.join(self.run, "per_class.csv"), text.encode())
