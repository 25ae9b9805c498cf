"""What a run leaves behind for people: metrics.jsonl, TensorBoard, MLflow, summary.json and per_class.csv."""

import csv
import hashlib
import io
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
from torch.utils.tensorboard import SummaryWriter

from ast_core.errors import DataError
from ast_core.labels import LabelVocabulary
from ast_core.metrics import TaggingMetrics
from pipeline import storage
from pipeline.train.mlflow_log import MlflowLog


def temporary_prefix(what: str, run: str) -> str:
    """Of a node's temporary folders that a run makes for something."""
    return f"ast-{what}-{hashlib.sha256(run.encode()).hexdigest()[:12]}-"


def delete_left_over(prefix: str) -> None:
    """The temporary folders that a kill left."""
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        shutil.rmtree(folder)


class RunLog:
    """Records of a run, on rank 0. Files are written whole at each `flush`, so they may lie on object storage.

    On resume the records after `last_step` are dropped: the run writes them again.

    A value that is not known, None or NaN, or infinite is null in metrics.jsonl and has no point elsewhere. With an
    `mlflow_uri` MLflow gets the same values as TensorBoard, and at its run's beginning `mlflow_params`: the recipe.
    """

    def __init__(
        self,
        run: str,
        last_step: int,
        mlflow_uri: str | None = None,
        mlflow_params: Mapping[str, Any] | None = None,
    ) -> None:
        self._metrics = storage.join(run, "metrics.jsonl")
        self._lines: list[str] = []
        if storage.exists(self._metrics):
            self._lines = list(_lines_up_to(self._metrics, last_step))
        self.epochs = {line["epoch"] for line in map(json.loads, self._lines) if line["kind"] == "epoch"}
        """Those that are logged."""
        # A local run is watched while it goes on; elsewhere event files are copied at each flush.
        fs, path = storage.resolve(storage.join(run, "tensorboard"))
        self._remote = None if isinstance(fs, pafs.LocalFileSystem) else (fs, path)
        if self._remote is None:
            self._events = path
        else:
            delete_left_over(prefix := temporary_prefix("tensorboard", run))
            self._events = tempfile.mkdtemp(prefix=prefix)
        self._board = SummaryWriter(self._events, purge_step=last_step + 1 if last_step else None)
        self._mlflow = None if mlflow_uri is None else MlflowLog(run, mlflow_uri, mlflow_params or {})

    def step(self, *, epoch: int, step: int, values: Mapping[str, float | None]) -> None:
        self._add("step", epoch, step, values, "train")

    def epoch(self, *, epoch: int, step: int, values: Mapping[str, float | None]) -> None:
        self._add("epoch", epoch, step, values, "eval")
        self.epochs.add(epoch)

    def flush(self) -> None:
        storage.write_bytes(self._metrics, "".join(f"{line}\n" for line in self._lines).encode())
        self._board.flush()
        if self._mlflow is not None:
            self._mlflow.send()
        if self._remote is not None:
            fs, path = self._remote
            fs.create_dir(path, recursive=True)
            pafs.copy_files(self._events, path, destination_filesystem=fs, use_threads=False)

    def close(self, *, failed: bool = False) -> None:
        self.flush()
        self._board.close()
        if self._remote is not None:
            shutil.rmtree(self._events)
        if self._mlflow is not None:
            self._mlflow.close("FAILED" if failed else "FINISHED")

    def _add(self, kind: str, epoch: int, step: int, values: Mapping[str, float | None], group: str) -> None:
        known = finite_or_null(values)
        self._lines.append(json.dumps({"kind": kind, "epoch": epoch, "step": step} | known))
        points = {f"{group}/{name}": value for name, value in known.items() if value is not None}
        for name, value in points.items():
            self._board.add_scalar(name, value, step)
        if self._mlflow is not None:
            self._mlflow.add(points, step)


def _lines_up_to(uri: str, last_step: int) -> Iterator[str]:
    for number, line in enumerate(storage.read_text(uri).splitlines(), start=1):
        try:
            record = json.loads(line)
            kind, epoch, step = record["kind"], record["epoch"], record["step"]
        except (ValueError, KeyError, TypeError):
            kind, epoch, step = "", 0, 0
        if kind not in ("step", "epoch") or not isinstance(epoch, int) or not isinstance(step, int):
            raise DataError(
                f"{uri}: line {number} is damaged; restore the file, or delete it: training goes on, and its records "
                "begin there"
            )
        if step <= last_step:
            yield line


def finite_or_null(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """JSON knows neither infinity (d′ of a perfect AUC) nor NaN (no class has both kinds of clips)."""
    return {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}


def per_class_csv(
    labels: LabelVocabulary, metrics: TaggingMetrics, train_clips: Sequence[int], eval_clips: Sequence[int]
) -> str:
    """`index,mid,display_name,ap,auc,train_clips,eval_clips`; empty where a figure is undefined."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["index", "mid", "display_name", "ap", "auc", "train_clips", "eval_clips"])
    figures = [
        ["" if math.isnan(value) else f"{value:.6f}" for value in column] for column in (metrics.ap, metrics.auc)
    ]
    writer.writerows(zip(range(len(labels)), labels.mids, labels.names, *figures, train_clips, eval_clips, strict=True))
    return out.getvalue()


def per_class_table(text: str) -> str:
    """The classes of a per_class.csv that have evaluation clips, best first, for a terminal."""
    rows = [row for row in csv.DictReader(io.StringIO(text)) if row["ap"]]
    rows.sort(key=lambda row: -float(row["ap"]))
    width = max([len("class"), *(len(row["display_name"]) for row in rows)])
    lines = [f"{'class':{width}}      AP     AUC  train  eval"]
    for row in rows:
        auc = f"{float(row['auc']):7.3f}" if row["auc"] else "      –"
        counts = f"{row['train_clips']:>5}  {row['eval_clips']:>4}"
        lines.append(f"{row['display_name']:{width}}  {float(row['ap']):6.3f} {auc}  {counts}")
    return "\n".join(lines)


def write_summary(run: str, summary: Mapping[str, Any]) -> None:
    storage.write_checked_json(storage.join(run, "summary.json"), summary)


def read_summary(run: str) -> dict[str, Any]:
    """Raises DataError where it is missing or damaged."""
    remedy = "restore it, or delete it and run the same training again, which writes it again"
    return storage.read_checked_json(storage.join(run, "summary.json"), remedy=remedy)
