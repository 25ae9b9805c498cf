"""What becomes of an epoch's scores: metrics, running ensemble, the best model.

Its memory is RUN/evaluation, so that whoever evaluates, rank 0 or a task beside the training, goes on from the epochs
before; an epoch that is evaluated twice writes the same files twice. An epoch is noted after all those before it.
"""

import hashlib
import io
import itertools
import logging
import math
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ast_core.checkpoints import ModelConfig
from ast_core.errors import DataError
from ast_core.metrics import TaggingMetrics
from pipeline import storage
from pipeline.dataset import Clips
from pipeline.train import models
from pipeline.train.evaluation.scores import write_scores
from pipeline.train.evaluation.scoring import class_counts, score_metrics, selection_metric
from pipeline.train.metrics_log import finite_or_null, per_class_csv

logger = logging.getLogger(__name__)

REMEDY = "restore it from a copy, or train into another --output"
"""For a damaged file that nothing but another training could write."""

PERFECT = 1 - 1e-9
"""A mean of ones over classes, but for rounding."""

NUM_SUMS_KEPT = 3
"""A run resumes from one of two checkpoints, and then asks for the sum of the epoch before."""

_ZIP = b"PK"
"""The beginning of what `torch.save` writes."""


def defer(run: str, epoch: int, loss: float, state: Mapping[str, Tensor]) -> None:
    """Keep the weights of an epoch whose evaluation failed until `EpochResults.note` has taken account of it."""
    whole = io.BytesIO()
    torch.save({"loss": loss, "model": dict(state)}, whole)
    data = whole.getvalue()
    storage.write_bytes(_file(run, epoch, "pt"), hashlib.sha256(data).hexdigest().encode() + b"\n" + data)
    storage.delete(_file(run, epoch, "json"))  # of other weights: the epoch is trained twice after some kills


def read_deferred(run: str, epoch: int) -> tuple[float, dict[str, Tensor]] | None:
    """Loss and weights, on the CPU; None where none are kept, or what is kept is damaged."""
    uri = _file(run, epoch, "pt")
    if not storage.exists(uri):
        return None
    data = storage.read_bytes(uri)
    if not data.startswith(_ZIP):  # as an earlier version wrote it, without a digest
        digest, _, data = data.partition(b"\n")
        if hashlib.sha256(data).hexdigest().encode() != digest:
            logger.warning(f"passing over {uri}: it is damaged")
            return None
    kept = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return kept["loss"], kept["model"]


def read_records(run: str) -> list[dict[str, Any]]:
    """The records of all epochs that were evaluated, in their order."""
    uris = storage.list_files(storage.join(run, "evaluation"), suffix=".json")
    return sorted((_read_record(uri) for uri in uris), key=lambda record: record["epoch"])


def _read_record(uri: str) -> dict[str, Any]:
    return storage.read_checked_json(uri, remedy=REMEDY)


def _file(run: str, epoch: int, suffix: str) -> str:
    return storage.join(run, "evaluation", f"epoch-{epoch:04d}.{suffix}")


def _best_file(run: str) -> str:
    return storage.join(run, "best", "epoch.json")


def selection_order(record: Mapping[str, Any]) -> tuple[float, int]:
    """A sort key for epochs: the best has the highest. Of equal epochs the earlier is better, as in the original.

    Only where the figure is perfect, as with a handful of evaluation clips from the first epochs on, does it no longer
    tell epochs apart: then the later one is better, which was trained for longer.

    An epoch that was evaluated twice replaces itself where the figures are equal, so its files are written again.
    """
    figure, epoch = record["headline"], record["epoch"]
    if figure is None or math.isnan(figure):
        return -math.inf, -epoch
    return figure, epoch if figure >= PERFECT else -epoch


@dataclass(frozen=True)
class EpochResults:
    run: str
    config: ModelConfig
    train_clips: Clips
    eval_clips: Clips
    _read: dict[str, tuple[float | None, dict[str, Any]]] = field(default_factory=dict)
    """When each epoch's file was written that has been read, and what it holds."""

    def record(self, epoch: int, loss: float | None, scores: np.ndarray, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Take account of the scores `[clips, C]` of an epoch, counted from 1, and of the weights that gave them.

        Returns the epoch's record; its `headline` is the figure that picks the best.
        """
        before, recipe, best = self.records(epoch - 1), self.config.recipe, self.best()
        score_sum = scores + self._read_sum(before[-1]) if before else scores
        metrics = score_metrics(scores, self.eval_clips)
        ensemble = score_metrics(score_sum / (len(before) + 1), self.eval_clips)
        figures = finite_or_null({"loss": loss, "headline": selection_metric(metrics, recipe)})
        record: dict[str, Any] = {"epoch": epoch, **figures}
        record |= {
            "is_best": best is None or selection_order(record) >= selection_order(best),
            **finite_or_null(metrics.scalars()),
            "running_ensemble": finite_or_null(ensemble.scalars()),
            "score_sum_sha256": self._write_sum(epoch, score_sum),
        }
        if record["is_best"]:
            storage.write_json(_best_file(self.run), None)
            models.save(storage.join(self.run, "best"), state, self.config)
            self._write_per_class(metrics)
            write_scores(self.run, scores, self.eval_clips)
            storage.write_checked_json(_best_file(self.run), record)
        storage.write_checked_json(_file(self.run, epoch, "json"), record)
        self._read.pop(_file(self.run, epoch, "json"), None)  # where clocks are coarse, the time may not tell
        storage.delete(_file(self.run, epoch, "pt"))
        return record

    def best(self) -> dict[str, Any] | None:
        """The record of what RUN/best holds; None where it holds nothing, or a kill came while it was written.

        Not always a record of RUN/evaluation: where a kill came between an epoch's evaluation and its checkpoint, the
        epoch was trained again, and is its own rival. The weights that it displaced are gone.
        """
        uri = _best_file(self.run)
        if storage.exists(uri):
            if storage.read_json(uri) is None:
                return None
            return storage.read_checked_json(uri, remedy="restore it, or delete it: the best of the epochs counts then")
        # A run that an earlier version began.
        return max(self._all_records(), key=selection_order, default=None)

    def first_missing(self) -> int:
        """The first epoch that has no record."""
        noted = {record["epoch"] for record in self._all_records()}
        return next(epoch for epoch in itertools.count(1) if epoch not in noted)

    def records(self, last_epoch: int) -> list[dict[str, Any]]:
        """The records of the epochs evaluated so far, up to this one, in their order."""
        return [record for record in self._all_records() if record["epoch"] <= last_epoch]

    def _all_records(self) -> list[dict[str, Any]]:
        """Each file is read once, and again when it has been written again: perhaps by a task beside the training."""
        folder = storage.join(self.run, "evaluation")
        written_s, records = storage.modified_s(folder, suffix=".json"), []
        for uri in storage.list_files(folder, suffix=".json"):
            at_s = written_s.get(posixpath.basename(uri))  # None where the file system does not know
            if at_s is None or uri not in self._read or self._read[uri][0] != at_s:
                self._read[uri] = at_s, _read_record(uri)
            records.append(self._read[uri][1])
        return sorted(records, key=lambda record: record["epoch"])

    def _write_sum(self, epoch: int, score_sum: np.ndarray) -> str:
        """Returns the file's SHA-256."""
        whole = io.BytesIO()
        np.save(whole, score_sum)
        storage.write_bytes(_file(self.run, epoch, "npy"), whole.getvalue())
        if epoch > NUM_SUMS_KEPT:
            storage.delete(_file(self.run, epoch - NUM_SUMS_KEPT, "npy"))
        return hashlib.sha256(whole.getvalue()).hexdigest()

    def _read_sum(self, record: Mapping[str, Any]) -> np.ndarray:
        uri = _file(self.run, record["epoch"], "npy")
        data = storage.read_bytes(uri)
        if record.get("score_sum_sha256", "") not in ("", hashlib.sha256(data).hexdigest()):
            raise DataError(f"{uri} is damaged; {REMEDY}")
        return np.load(io.BytesIO(data), allow_pickle=False)

    def _write_per_class(self, metrics: TaggingMetrics) -> None:
        num_classes = len(self.config.labels)
        counts = [class_counts(clips, num_classes) for clips in (self.train_clips, self.eval_clips)]
        text = per_class_csv(self.config.labels, metrics, *counts)
        storage.write_bytes(storage.join(self.run, "per_class.csv"), text.encode())
