"""The logs and tables of a run: metrics.jsonl, TensorBoard, MLflow, Ray's metrics, summary.json and per_class.csv."""

import csv
import hashlib
import io
import json
import logging
import math
import os
import shutil
import stat
import string
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow.fs as pafs
from torch.utils.tensorboard import SummaryWriter

from ast_core.labels import LabelVocabulary
from ast_core.metrics import TaggingMetrics, per_class_columns
from pipeline import ray_metrics, storage
from pipeline.redaction import without_secrets
from pipeline.text_table import text_table
from pipeline.train.metrics_files import MetricsFile
from pipeline.train.mlflow_log import MlflowLog

logger = logging.getLogger(__name__)


def temporary_prefix(what: str, run: str) -> str:
    """Name prefix of the temporary folders that a run creates on a node for one purpose."""
    return f"ast-{what}-{hashlib.sha256(run.encode()).hexdigest()[:12]}-"


def delete_leftovers(prefix: str) -> None:
    """Delete the temporary folders that a crash left."""
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        # Others may write to the temporary folder: links, files and other users' folders are not a run's.
        with suppress(OSError):
            found = folder.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
                shutil.rmtree(folder)


LOCAL_FLUSH_S = 5
"""Seconds after which TensorBoard's events of a local run are on disk."""

REMOTE_FLUSH_S = 120.0
"""Seconds between two uploads of records to object storage. Each checkpoint uploads them too."""


class RunLog:
    """The logger of a run, on rank 0: metrics.jsonl, TensorBoard and MLflow, all readable while the run trains.

    The last rates are also in Ray's metrics (`ray_metrics.training`), for its dashboard.

    On object storage each flush adds files with the new records only, so that the bytes sent grow linearly with the
    records: a part of metrics.jsonl (`metrics_files`), and a TensorBoard event file (TensorBoard reads all event files
    of a folder).

    On resume the records after `last_step` are dropped: the run writes them again.

    A value that is None, NaN or infinite is null in metrics.jsonl and is not sent to TensorBoard or MLflow. With an
    `mlflow_uri`, MLflow gets the same values as TensorBoard, and `mlflow_params` when its run begins: the recipe. On
    resume it also gets what it lacks of the kept records: values that were not sent before the interruption.
    """

    def __init__(
        self,
        run: str,
        last_step: int,
        mlflow_uri: str | None = None,
        mlflow_params: Mapping[str, Any] | None = None,
    ) -> None:
        self._name = quote(without_secrets(run), safe=string.printable)  # Ray's tags are ASCII
        self._metrics = MetricsFile(run, last_step)
        self.epochs = {line["epoch"] for line in map(json.loads, self._metrics.lines) if line["kind"] == "epoch"}
        """Epochs that are logged already."""
        fs, path = storage.resolve(storage.join(run, "tensorboard"))
        self._remote = None if isinstance(fs, pafs.LocalFileSystem) else (fs, path)
        if self._remote is None:
            self._events = path
        else:
            delete_leftovers(prefix := temporary_prefix("tensorboard", run))
            self._events = tempfile.mkdtemp(prefix=prefix)
        purge_step = last_step + 1 if last_step else None
        self._board = SummaryWriter(self._events, purge_step=purge_step, flush_secs=LOCAL_FLUSH_S)
        self._has_new_events = purge_step is not None
        self._flushed_s = time.monotonic()
        self._mlflow = None if mlflow_uri is None else MlflowLog(run, mlflow_uri, mlflow_params or {})
        if self._mlflow is not None:
            for record in map(json.loads, self._metrics.lines):
                values = {name: value for name, value in record.items() if name not in ("kind", "epoch", "step")}
                self._mlflow.add(_points(record["kind"], values), record["step"])

    def step(self, *, epoch: int, step: int, values: Mapping[str, float | None]) -> None:
        self._add("step", epoch, step, values)
        figures = {"step": step, **values}
        for name, gauge in ray_metrics.training().items():
            if (value := figures.get(name)) is not None:
                gauge.set(value, {"run": self._name})

    def epoch(self, *, epoch: int, step: int, values: Mapping[str, float | None]) -> None:
        self._add("epoch", epoch, step, values)
        self.epochs.add(epoch)

    def flush(self) -> None:
        """Write all records to the run's folder before returning. MLflow's are sent asynchronously."""
        self._metrics.flush()
        if self._mlflow is not None:
            self._mlflow.send()
        if self._remote is None:
            self._board.flush()
        else:
            self._upload_events(*self._remote)
        self._flushed_s = time.monotonic()

    def close(self, *, failed: bool = False) -> None:
        self.flush()
        self._metrics.close()
        self._board.close()
        if self._remote is not None:
            shutil.rmtree(self._events)
        if self._mlflow is not None:
            self._mlflow.close("FAILED" if failed else "FINISHED")

    def _upload_events(self, fs: pafs.FileSystem, path: str) -> None:
        """Close the event file and upload it. The next event begins a new file."""
        if not self._has_new_events:
            return
        self._board.close()  # the writer opens a new file with the next event
        fs.create_dir(path, recursive=True)
        pafs.copy_files(self._events, path, destination_filesystem=fs, use_threads=False)
        for file in Path(self._events).iterdir():
            file.unlink()
        self._has_new_events = False

    def _add(self, kind: str, epoch: int, step: int, values: Mapping[str, float | None]) -> None:
        known = finite_or_null(values)
        self._metrics.add({"kind": kind, "epoch": epoch, "step": step} | known)
        points = _points(kind, known)
        for name, value in points.items():
            self._board.add_scalar(name, value, step)
            self._has_new_events = True
        if self._mlflow is not None:
            self._mlflow.add(points, step)
        if self._remote is not None and time.monotonic() - self._flushed_s > REMOTE_FLUSH_S:
            try:
                self.flush()
            except OSError as err:  # the next flush writes these records too; only a checkpoint's flush must not fail
                self._flushed_s = time.monotonic()
                logger.warning(f"the records of the last minutes could not be written yet: {err}")


def _points(kind: str, values: Mapping[str, float | None]) -> dict[str, float]:
    """The values of a record that are known, by their names in TensorBoard and MLflow."""
    group = {"step": "train", "epoch": "eval"}[kind]
    return {f"{group}/{name}": value for name, value in values.items() if value is not None}


def finite_or_null(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """`values` with None for NaN and infinity (d′ of a perfect AUC), which JSON does not have."""
    return {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}


def per_class_csv(
    labels: LabelVocabulary, metrics: TaggingMetrics, train_clips: Sequence[int] | None, eval_clips: Sequence[int]
) -> str:
    """The text of per_class.csv: `index,mid,display_name,ap,auc,train_clips,eval_clips`.

    An undefined metric is empty. Without `train_clips`, if the training clips are unknown, there is no such column.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    counts = {"train_clips": train_clips, "eval_clips": eval_clips}
    known = {name: clips for name, clips in counts.items() if clips is not None}
    writer.writerow(["index", "mid", "display_name", *metrics.per_class, *known])
    values = metrics.per_class.values()
    figures = [["" if math.isnan(value) else f"{value:.6f}" for value in column] for column in values]
    writer.writerows(zip(range(len(labels)), labels.mids, labels.names, *figures, *known.values(), strict=True))
    return out.getvalue()


def per_class_table(text: str) -> str:
    """The classes of a per_class.csv that have evaluation clips, best first, for a terminal."""
    columns = per_class_columns()
    first = columns[0].column
    known = [row for row in csv.DictReader(io.StringIO(text)) if row[first]]
    known.sort(key=lambda row: -float(row[first]))
    counts = {"train_clips": "train", "eval_clips": "eval"}
    if not known or "train_clips" not in known[0]:
        del counts["train_clips"]
    rows = [
        [
            row["display_name"],
            *(f"{float(value):.3f}" if (value := row.get(each.column)) else "–" for each in columns),
            *(row[count] for count in counts),
        ]
        for row in known
    ]
    heads = ["class", *(each.title for each in columns), *counts.values()]
    return text_table(heads, rows, "l" + "r" * (len(heads) - 1))


def write_summary(run: str, summary: Mapping[str, Any]) -> None:
    storage.write_checked_json(storage.join(run, "summary.json"), summary)


def read_summary(run: str) -> dict[str, Any]:
    """The content of RUN/summary.json. Raises DataError if it is missing or damaged."""
    remedy = "restore it, or delete it and run the same training again, which writes it again"
    return storage.read_checked_json(storage.join(run, "summary.json"), remedy=remedy)
