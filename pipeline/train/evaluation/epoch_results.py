"""The results of each epoch: metrics, running ensemble, and the choice of the best model.

All state is in RUN/evaluation, so that rank 0 and an asynchronous validation task can continue each other's work. An
epoch that is evaluated twice writes the same files twice. Epochs are recorded in order.
"""

import hashlib
import io
import itertools
import logging
import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ast_core.checkpoints import ModelConfig
from ast_core.errors import DataError
from ast_core.metrics import TaggingMetrics, selection_metrics, selection_order
from pipeline import storage
from pipeline.dataset import Clips
from pipeline.train import models
from pipeline.train.evaluation.scores import write_scores
from pipeline.train.evaluation.scoring import class_counts, score_metrics, selection_metric
from pipeline.train.metrics_log import finite_or_null, per_class_csv

logger = logging.getLogger(__name__)

REMEDY = "restore it from a copy, or train into another --output"
"""What to do about a damaged file that only another training could write."""

_ZIP = b"PK"
"""The beginning of what `torch.save` writes."""


def defer(run: str, epoch: int, loss: float, state: Mapping[str, Tensor]) -> None:
    """Keep the weights of an epoch whose evaluation failed until `EpochResults.record` has recorded its scores."""
    whole = io.BytesIO()
    torch.save({"loss": loss, "model": dict(state)}, whole)
    data = whole.getvalue()
    storage.write_bytes(_file(run, epoch, "pt"), hashlib.sha256(data).hexdigest().encode() + b"\n" + data)
    storage.delete(_file(run, epoch, "json"))  # from other weights: after some crashes an epoch is trained twice


def read_deferred(run: str, epoch: int) -> tuple[float, dict[str, Tensor]] | None:
    """The loss and weights that `defer` kept, on the CPU; None if there are none, or the file is damaged."""
    uri = _file(run, epoch, "pt")
    if not storage.exists(uri):
        return None
    data = storage.read_bytes(uri)
    if not data.startswith(_ZIP):  # as an earlier version wrote it, without a digest
        digest, _, data = data.partition(b"\n")
        if hashlib.sha256(data).hexdigest().encode() != digest:
            logger.warning(f"skipping the damaged file {uri}")
            return None
    kept = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return kept["loss"], kept["model"]


def read_records(run: str) -> list[dict[str, Any]]:
    """The records of all evaluated epochs, in order."""
    uris = storage.list_files(storage.join(run, "evaluation"), suffix=".json")
    return _evaluated(map(_read_record, uris))


def _evaluated(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of epochs that were not skipped, in order."""
    return sorted((one for one in records if not one.get("is_skipped")), key=lambda record: record["epoch"])


def _read_record(uri: str) -> dict[str, Any]:
    return storage.read_checked_json(uri, remedy=REMEDY)


def _file(run: str, epoch: int, suffix: str) -> str:
    return storage.join(run, "evaluation", f"epoch-{epoch:04d}.{suffix}")


def _best_file(run: str) -> str:
    return storage.join(run, "best", "epoch.json")


@dataclass(frozen=True)
class EpochResults:
    run: str
    config: ModelConfig
    train_clips: Clips
    eval_clips: Clips
    _read: dict[str, tuple[float | None, dict[str, Any]]] = field(default_factory=dict)
    """Records that were read, by URI, with the modification time of their file."""

    def record(self, epoch: int, loss: float | None, scores: np.ndarray, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Record the scores `[clips, C]` of an epoch, counted from 1; `state` contains the weights that gave them.

        Returns the epoch's record. Its `headline` is the selection metric.
        """
        before, recipe, best = self.records(epoch - 1), self.config.recipe, self.best()
        score_sum = scores + self._read_sum(before[-1]) if before else scores
        metrics = score_metrics(scores, self.eval_clips)
        ensemble = score_metrics(score_sum / (len(before) + 1), self.eval_clips)
        figures = finite_or_null({"loss": loss, "headline": selection_metric(metrics, recipe)})
        record: dict[str, Any] = {"epoch": epoch, **figures}
        record |= {
            "is_best": best is None or self._order(record) >= self._order(best),
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
        self._read.pop(_file(self.run, epoch, "json"), None)  # a coarse clock may give the same modification time
        storage.delete(_file(self.run, epoch, "pt"))
        return record

    def skip(self, epoch: int) -> None:
        """Record that an epoch cannot be evaluated any more, because its weights are gone.

        Without this record, no later epoch could be recorded. The running ensemble is the mean of the other epochs.
        """
        logger.warning(f"epoch {epoch} was not evaluated, and its weights are gone: the results are without it")
        storage.write_checked_json(_file(self.run, epoch, "json"), {"epoch": epoch, "is_skipped": True})
        self._read.pop(_file(self.run, epoch, "json"), None)

    def best(self) -> dict[str, Any] | None:
        """The record of the model in RUN/best; None if there is none, or a crash interrupted its writing.

        It may differ from the epoch's record in RUN/evaluation: after a crash between an epoch's evaluation and its
        checkpoint the epoch is trained twice, and RUN/best keeps the better of the two results.
        """
        uri = _best_file(self.run)
        if storage.exists(uri):
            if storage.read_json(uri) is None:
                return None
            return storage.read_checked_json(uri, remedy="restore it, or delete it: the best of the epochs counts then")
        # A run of an earlier version has no such file.
        return max(_evaluated(self._all_records()), key=self._order, default=None)

    def _order(self, record: Mapping[str, Any]) -> tuple[float, int]:
        return selection_order(record["headline"], record["epoch"], selection_metrics()[self.config.recipe.metrics])

    def epochs_since_best(self, last_epoch: int) -> int:
        """Epochs since the last one that was better than all before, of those evaluated so far, up to `last_epoch`."""
        records = self.records(last_epoch)
        if not records:
            return 0
        # Unlike in `selection_order`, a perfect epoch after a perfect one is not better.
        return records[-1]["epoch"] - max(records, key=lambda one: (self._order(one)[0], -one["epoch"]))["epoch"]

    def first_missing(self) -> int:
        """The number of the first epoch that is neither evaluated nor skipped."""
        recorded = {record["epoch"] for record in self._all_records()}
        return next(epoch for epoch in itertools.count(1) if epoch not in recorded)

    def records(self, last_epoch: int) -> list[dict[str, Any]]:
        """The records of the evaluated epochs up to `last_epoch`, in order."""
        return [record for record in _evaluated(self._all_records()) if record["epoch"] <= last_epoch]

    def _all_records(self) -> list[dict[str, Any]]:
        """All records, also of skipped epochs. A file is read again if it changed: another process may write it."""
        folder = storage.join(self.run, "evaluation")
        written_s, records = storage.modified_s(folder, suffix=".json"), []
        for uri in storage.list_files(folder, suffix=".json"):
            at_s = written_s.get(posixpath.basename(uri))  # None if the file system does not record it
            if at_s is None or uri not in self._read or self._read[uri][0] != at_s:
                self._read[uri] = at_s, _read_record(uri)
            records.append(self._read[uri][1])
        return records

    def _write_sum(self, epoch: int, score_sum: np.ndarray) -> str:
        """Write the sum of the scores up to an epoch. Returns the file's SHA-256."""
        whole = io.BytesIO()
        np.save(whole, score_sum)
        storage.write_bytes(_file(self.run, epoch, "npy"), whole.getvalue())
        return hashlib.sha256(whole.getvalue()).hexdigest()

    def delete_sums(self, first_kept: int) -> None:
        """Delete the sums of scores that neither the epoch after `first_kept` needs, nor the first without a record.

        An epoch's sum needs that of the last evaluated epoch before it.
        """
        needed = self.records(min(first_kept, self.first_missing() - 1))
        first_kept = needed[-1]["epoch"] if needed else 0
        for uri in storage.list_files(storage.join(self.run, "evaluation"), suffix=".npy"):
            if int(posixpath.basename(uri).removeprefix("epoch-").removesuffix(".npy")) < first_kept:
                storage.delete(uri)

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
