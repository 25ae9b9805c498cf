"""Tagging metrics, equal to scikit-learn's average precision and ROC AUC, also for tied scores.

A class without positives has no AP and no AUC; a class without negatives has no AUC. Undefined values are NaN, and
means leave them out.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from ast_core.bootstrap import basic_interval, times_drawn

if TYPE_CHECKING:  # PyTorch is imported only by the functions that need it: reading a recipe imports this module
    from torch import Tensor


class ScoredClips:
    """Scores and targets of clips, both `[clips, classes]`, and each class's AP and AUC, which are computed once."""

    def __init__(self, score: np.ndarray, target: np.ndarray) -> None:
        self.score, self.target = score, target

    @cached_property
    def _ap_and_auc(self) -> np.ndarray:
        num_classes = self.score.shape[1]
        pairs = [_ap_and_auc(self.score[:, c], self.target[:, c] > 0.5) for c in range(num_classes)]
        return np.array(pairs, dtype=np.float64).T

    @property
    def ap(self) -> np.ndarray:
        """`[classes]`, NaN for a class without positives."""
        return self._ap_and_auc[0]

    @property
    def auc(self) -> np.ndarray:
        """`[classes]`, NaN for a class without positives or without negatives."""
        return self._ap_and_auc[1]


@dataclass(frozen=True)
class PerClass:
    """The values `[classes]` of which a metric is the mean: a column of per_class.csv."""

    column: str
    title: str
    compute: Callable[[ScoredClips], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric. Training, evaluation, reports and the recipe take their metrics from the table METRICS."""

    name: str
    """Key in records and JSON files."""
    title: str
    """Name on pages and in the terminal."""
    compute: Callable[[ScoredClips], float]
    higher_is_better: bool = True
    per_class: PerClass | None = None
    selected_as: str | None = None
    """The value of the recipe key `metrics` with which this metric selects the best epoch; None if it may not."""
    is_key_figure: bool = True
    """Whether log lines, the summary in the terminal and the curves of the report show it."""

    @property
    def may_select_best(self) -> bool:
        return self.selected_as is not None


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            name="map",
            title="mAP",
            compute=lambda clips: _mean_of_defined(clips.ap),
            per_class=PerClass("ap", "AP", lambda clips: clips.ap),
            selected_as="mAP",
        ),
        Metric(
            name="mauc",
            title="AUC",
            compute=lambda clips: _mean_of_defined(clips.auc),
            per_class=PerClass("auc", "AUC", lambda clips: clips.auc),
        ),
        Metric(
            name="d_prime",
            title="d′",
            compute=lambda clips: d_prime(_mean_of_defined(clips.auc)),
            is_key_figure=False,
        ),
        Metric(
            name="accuracy",
            title="accuracy",
            compute=lambda clips: float((clips.score.argmax(axis=1) == clips.target.argmax(axis=1)).mean()),
            selected_as="acc",
        ),
    )
}
"""All metrics, by name, in the order in which they are shown."""


def per_class_columns() -> list[PerClass]:
    """The columns of per_class.csv with values of metrics. Classes are sorted by the first."""
    return [metric.per_class for metric in METRICS.values() if metric.per_class is not None]


def key_metrics() -> list[Metric]:
    return [metric for metric in METRICS.values() if metric.is_key_figure]


def selection_metrics() -> dict[str, Metric]:
    """The metrics that may select the best epoch, by the value of the recipe key `metrics`."""
    return {metric.selected_as: metric for metric in METRICS.values() if metric.selected_as is not None}


PERFECT = 1 - 1e-9
"""A mean of ones over classes, apart from rounding."""


def selection_order(figure: float | None, epoch: int, metric: Metric) -> tuple[float, int]:
    """A sort key for epochs: the best epoch by the selection metric, whose value is `figure`, has the highest.

    If two epochs have the same value, the earlier one is better, as in the reference implementation. If the metric is
    perfect, as with few evaluation clips, it cannot tell epochs apart, and the later one is better: it was trained for
    longer.

    An epoch that is evaluated twice with the same result replaces itself, so its files are written again.
    """
    if figure is None or math.isnan(figure):
        return -math.inf, -epoch
    if not metric.higher_is_better:
        return -figure, -epoch
    return figure, epoch if figure >= PERFECT else -epoch


@dataclass(frozen=True)
class TaggingMetrics:
    """The METRICS of a set of clips. An undefined value is NaN; means are over the classes that are defined."""

    values: Mapping[str, float]
    """Value by name of the metric."""
    per_class: Mapping[str, np.ndarray]
    """Values `[classes]` by `PerClass.column`."""

    @property
    def ap(self) -> np.ndarray:
        return self.per_class["ap"]

    @property
    def auc(self) -> np.ndarray:
        return self.per_class["auc"]

    @property
    def map(self) -> float:
        return self.values["map"]

    @property
    def mauc(self) -> float:
        return self.values["mauc"]

    @property
    def d_prime(self) -> float:
        return self.values["d_prime"]

    @property
    def accuracy(self) -> float:
        return self.values["accuracy"]

    def scalars(self) -> dict[str, float]:
        return dict(self.values)


def tagging_metrics(score: np.ndarray, target: np.ndarray) -> TaggingMetrics:
    """Metrics of `score` (only its order counts) against `target` (0 or 1), both `[clips, classes]`.

    `accuracy` is the share of clips whose highest score is that of their first label, as in the reference
    implementation. `d_prime` is √2 · Φ⁻¹(mean AUC).

    Raises:
        ValueError: the shapes differ, there are no clips, or a score is NaN.
    """
    clips = ScoredClips(*_checked(score, target))
    return TaggingMetrics(
        values={name: metric.compute(clips) for name, metric in METRICS.items()},
        per_class={each.column: each.compute(clips) for each in per_class_columns()},
    )


def bootstrap_map(
    score: np.ndarray, target: np.ndarray, *, num_resamples: int = 1000, seed: int = 0, confidence: float = 0.95
) -> tuple[float, float]:
    """Confidence interval (low, high) of the `map` of the population of clips, by the basic bootstrap over clips.

    `ast_core.bootstrap` describes the resamples and the interval. Resamples in which no class is defined do not count;
    if none counts, both bounds are NaN.

    The quantiles themselves would be too high: a resample repeats positives, which raises the AP, most of all that of
    rare classes. For the same reason `map` is somewhat too high and may be near the upper bound.

    It needs 4 bytes of memory a score, 12 a label, and up to 4 KB a clip.

    Raises:
        ValueError: as in `tagging_metrics`; or no resamples; or a confidence that is not between 0 and 1.
    """
    if num_resamples < 1 or not 0 < confidence < 1:
        raise ValueError(f"num_resamples is {num_resamples}, confidence {confidence}; use 1 or more, between 0 and 1")
    maps = resampled_map(score, target, num_resamples=num_resamples, seed=seed)
    return basic_interval(tagging_metrics(score, target).map, maps, confidence)


def resampled_map(score: np.ndarray, target: np.ndarray, *, num_resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """The `map` in each resample of the clips (`ast_core.bootstrap.times_drawn`), `[resamples]`; NaN where undefined.

    Raises:
        ValueError: as in `tagging_metrics`.
    """
    import torch

    score, target = _checked(score, target)
    positive = target > 0.5
    classes = [_ranked(score[:, c], positive[:, c]) for c in np.flatnonzero(positive.any(axis=0))]
    blocks = times_drawn(len(score), num_resamples, seed)
    return np.concatenate([_maps(classes, torch.from_numpy(drawn)) for drawn in blocks])


def d_prime(auc: float) -> float:
    """√2 · Φ⁻¹(AUC), which is ±inf for an AUC of 1 or 0."""
    if not 0 < auc < 1:
        return math.nan if math.isnan(auc) else math.copysign(math.inf, auc - 0.5)
    return math.sqrt(2) * NormalDist().inv_cdf(auc)


def _checked(score: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    score, target = np.asarray(score), np.asarray(target)
    if score.shape != target.shape or score.ndim != 2 or len(score) == 0:
        raise ValueError(f"score is {score.shape} and target {target.shape}; give the same [clips, classes], clips > 0")
    if np.isnan(score).any():
        raise ValueError("a score is NaN: the model diverged")
    return score, target


def _thresholds(score: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The clips by falling score, and the numbers of clips and of positives that reach each distinct score."""
    order = np.argsort(score)[::-1]
    ranked = score[order]
    reach = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1) + 1
    return order, reach, np.cumsum(positive[order])[reach - 1]


def _ap_and_auc(score: np.ndarray, positive: np.ndarray) -> tuple[float, float]:
    """AP and AUC from the counts of true and false positives at each distinct threshold, from the highest down."""
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    if num_positive == 0:
        return math.nan, math.nan
    _, reach, true = _thresholds(score, positive)
    new_true = np.diff(true, prepend=0)
    ap = float((new_true * (true / reach)).sum() / num_positive)
    if num_negative == 0:
        return ap, math.nan
    new_false = np.diff(reach - true, prepend=0)
    auc = float((new_false * (true - new_true / 2)).sum() / (num_positive * num_negative))
    return ap, auc


@dataclass(frozen=True)
class _Ranked:
    """Indices of a class's clips and positives, from the highest score down to that of the last positive.

    Only the distinct scores of positives are thresholds that change an AP. `…_begin` says for each threshold where the
    clips begin that it adds to those of the threshold above.
    """

    clips: "Tensor"
    clips_begin: "Tensor"
    positives: "Tensor"
    positives_begin: "Tensor"


def _ranked(score: np.ndarray, positive: np.ndarray) -> _Ranked:
    import torch

    order, reach, true = _thresholds(score, positive)
    has_positives = np.diff(true, prepend=0) > 0
    reach, true = reach[has_positives], true[has_positives]
    clips = order[: reach[-1]]
    indices = (clips, np.append(0, reach[:-1]), clips[positive[clips]], np.append(0, true[:-1]))
    return _Ranked(*(torch.from_numpy(values.astype(np.int32)) for values in indices))


def _maps(classes: list[_Ranked], times_drawn: "Tensor") -> np.ndarray:
    """The `map` of each resample. `times_drawn` is float32 `[clips, resamples]`; its sums are exact below 2²⁴ clips."""
    import torch
    from torch.nn.functional import embedding_bag

    ap = torch.full((len(classes), times_drawn.shape[1]), torch.nan, dtype=torch.float64)
    for c, ranked in enumerate(classes):
        # Clips and positives that each threshold adds, `[thresholds, resamples]`, and how many reach it.
        reach = embedding_bag(ranked.clips, times_drawn, ranked.clips_begin, mode="sum").double().cumsum(0)
        new_true = embedding_bag(ranked.positives, times_drawn, ranked.positives_begin, mode="sum").double()
        true = new_true.cumsum(0)
        ap[c] = (new_true * true / reach.clamp_min(1)).sum(0) / true[-1]  # 0 / 0: no positive was drawn
    return ap.nanmean(0).numpy()


def _mean_of_defined(values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else math.nan
