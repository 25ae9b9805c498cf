"""Evaluation of checkpoints on splits of a data set: their scores, the mean of these scores, and its metrics.

N clips, C classes.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from ast_core.errors import ConfigError
from ast_core.labels import LabelVocabulary
from ast_core.metrics import TaggingMetrics, bootstrap_map
from pipeline.dataset import Clips, PreparedDataset
from pipeline.redaction import without_secrets
from pipeline.train import models
from pipeline.train.data.feed import Targets
from pipeline.train.evaluation import ensemble
from pipeline.train.evaluation.scoring import class_counts, score_metrics
from pipeline.train.metrics_log import finite_or_null, per_class_csv, per_class_table


@dataclass(frozen=True)
class Place:
    """Where checkpoints are scored."""

    device: str
    """cpu, cuda, or auto: cuda if there is a GPU."""
    address: str
    """The cluster's address, or local: Ray on this machine, which no other job uses."""
    session: Callable[[], AbstractContextManager[None]]
    """Has Ray there for the duration of a block."""


@dataclass(frozen=True)
class Evaluation:
    """The results of checkpoints on clips."""

    checkpoints: Sequence[str]
    labels: LabelVocabulary
    splits: Sequence[str]
    clips: Clips
    scores_NC: np.ndarray
    """The mean of the checkpoints' scores (sigmoids)."""
    metrics: TaggingMetrics
    of_members: Sequence[dict[str, float]]
    """The metrics of each checkpoint by itself."""
    map_interval: tuple[float, float] | None

    def lines(self, *, per_class: bool) -> list[str]:
        """The figures as text: a line for each member of an ensemble, one for all, and a table of the classes."""
        lines, num_members = [], len(self.of_members)
        if num_members > 1:
            members = zip(self.checkpoints, self.of_members, strict=True)
            lines = [f"{_figures_line(figures)}  {uri}" for uri, figures in members]
        name = f"  ensemble of {num_members}" if num_members > 1 else ""
        figures = _figures_line(self.metrics.scalars(), self.map_interval)
        lines.append(f"{figures}{name}  on {len(self.clips):,} clips of {', '.join(self.splits)}")
        if per_class:
            counts = class_counts(self.clips, len(self.labels))
            lines.append(per_class_table(per_class_csv(self.labels, self.metrics, None, counts)))
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The figures for a JSON file."""
        names, interval = [without_secrets(uri) for uri in self.checkpoints], self.map_interval
        members = zip(names, self.of_members, strict=True)
        return {
            "checkpoints": names,
            **finite_or_null(self.metrics.scalars()),
            "map_interval": interval if interval is not None and np.isfinite(interval).all() else None,
            "members": [{"checkpoint": uri} | finite_or_null(figures) for uri, figures in members],
        }


def evaluate_checkpoints(
    checkpoints: Sequence[str], data: str, splits: Sequence[str], place: Place, *, num_resamples: int
) -> Evaluation:
    """Score a checkpoint, or the ensemble of several, on splits. Prints how much of the clips the models do not hear.

    Args:
        num_resamples: of the bootstrap for the mAP's interval; 0 is none.

    Raises:
        DataError: the data set, a split or a checkpoint does not exist, or they do not fit together; or a checkpoint
            gives scores that are not numbers.
        ConfigError: the device is cuda, and this machine has no GPU.
    """
    dataset = PreparedDataset.open(data)
    clips = dataset.clips(splits)
    found = [models.find(uri) for uri in checkpoints]
    members = [ensemble.read_member(uri, dataset) for uri in found]
    for line in ensemble.length_lines(members, clips, dataset.features):
        print(line, flush=True)
    scores = score_clips(members, dataset, clips, place)
    # Before all that follows: this names a checkpoint whose scores are not numbers.
    of_members = [score_metrics(some, clips, without_secrets(uri)) for uri, some in zip(found, scores, strict=True)]
    mean_scores = np.mean(scores, axis=0)
    interval = None
    if num_resamples:
        target = Targets(clips, len(dataset.labels))(np.arange(len(clips)))
        interval = bootstrap_map(mean_scores, target, num_resamples=num_resamples)
    return Evaluation(
        checkpoints=found,
        labels=dataset.labels,
        splits=splits,
        clips=clips,
        scores_NC=mean_scores,
        metrics=score_metrics(mean_scores, clips),
        of_members=[metrics.scalars() for metrics in of_members],
        map_interval=interval,
    )


def score_clips(
    members: Sequence[ensemble.Member], dataset: PreparedDataset, clips: Clips, place: Place
) -> list[np.ndarray]:
    """Scores `[N, C]` of each member, computed on Ray."""
    with place.session():
        use_gpu = uses_gpu(place)
        device, threads = place.device if use_gpu else "cpu", _threads(place, len(members))
        return ensemble.scores(members, dataset, clips, device=device, use_gpu=use_gpu, threads=threads)


def uses_gpu(place: Place) -> bool:
    """Whether a GPU is used. Raises ConfigError if it is asked for and cannot come."""
    has_gpu = ray.cluster_resources().get("GPU", 0) >= 1
    if place.device == "cuda" and not has_gpu:
        if place.address == "local":
            raise ConfigError("--device cuda needs a GPU, this machine has none; use cpu")
        print("--device cuda needs a GPU, the cluster has none now; scoring begins when it has one", flush=True)
    return place.device == "cuda" or (place.device == "auto" and has_gpu)


def _threads(place: Place, num_checkpoints: int) -> int:
    """Threads per checkpoint: an equal share of this machine; one on a cluster, where other jobs may use the rest."""
    num_cpus = ray.cluster_resources().get("CPU", 1) if place.address == "local" else 1
    return max(1, int(num_cpus) // num_checkpoints)


def _figures_line(figures: dict[str, float], interval: tuple[float, float] | None = None) -> str:
    """The figures as one line: `map 0.4590 [0.4512, 0.4668]  mauc 0.9755  …`"""
    words = {name: f"{name} {value:.4f}" for name, value in figures.items()}
    if interval is not None:
        words["map"] += f" [{interval[0]:.4f}, {interval[1]:.4f}]"
    return "  ".join(words.values())
