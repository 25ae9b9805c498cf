"""Tagging metrics, equal to scikit-learn's average precision and ROC AUC, ties included.

A class without positives has no AP and no AUC, one without negatives no AUC: they are NaN and left out of the means.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True)
class TaggingMetrics:
    """`ap` and `auc` are `[classes]`, NaN where undefined; the rest are numbers over the classes that are defined."""

    ap: np.ndarray
    auc: np.ndarray
    map: float
    mauc: float
    d_prime: float
    accuracy: float

    def scalars(self) -> dict[str, float]:
        return {"map": self.map, "mauc": self.mauc, "d_prime": self.d_prime, "accuracy": self.accuracy}


def tagging_metrics(score: np.ndarray, target: np.ndarray) -> TaggingMetrics:
    """Metrics of `score` (any monotone confidence) against `target` (0 or 1), both `[clips, classes]`.

    `accuracy` is the share of clips whose highest score is on their (first) label, as the original computes it.
    `d_prime` is √2 · Φ⁻¹(mean AUC).

    Raises:
        ValueError: shapes differ, no clips, or a score that is not a number.
    """
    score, target = np.asarray(score), np.asarray(target)
    if score.shape != target.shape or score.ndim != 2 or len(score) == 0:
        raise ValueError(f"score {score.shape} and target {target.shape} must be one [clips, classes], clips > 0")
    if np.isnan(score).any():
        raise ValueError("a score is NaN: the model diverged")
    pairs = [_ap_and_auc(score[:, c], target[:, c] > 0.5) for c in range(score.shape[1])]
    ap, auc = np.array(pairs, dtype=np.float64).T
    mauc = _mean_of_defined(auc)
    return TaggingMetrics(
        ap=ap,
        auc=auc,
        map=_mean_of_defined(ap),
        mauc=mauc,
        d_prime=d_prime(mauc),
        accuracy=float((score.argmax(axis=1) == target.argmax(axis=1)).mean()),
    )


def d_prime(auc: float) -> float:
    """√2 · Φ⁻¹(AUC); ±inf at an AUC of 1 or 0."""
    if not 0 < auc < 1:
        return math.nan if math.isnan(auc) else math.copysign(math.inf, auc - 0.5)
    return math.sqrt(2) * NormalDist().inv_cdf(auc)


def _ap_and_auc(score: np.ndarray, positive: np.ndarray) -> tuple[float, float]:
    """Both from the counts of true and false positives at each distinct threshold, from the highest down."""
    num_positive = int(positive.sum())
    num_negative = len(positive) - num_positive
    if num_positive == 0:
        return math.nan, math.nan
    order = np.argsort(score)[::-1]
    ranked = score[order]
    threshold = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]), len(ranked) - 1)
    true = np.cumsum(positive[order])[threshold]
    new_true = np.diff(true, prepend=0)
    ap = float((new_true * (true / (threshold + 1))).sum() / num_positive)
    if num_negative == 0:
        return ap, math.nan
    new_false = np.diff(threshold + 1 - true, prepend=0)
    auc = float((new_false * (true - new_true / 2)).sum() / (num_positive * num_negative))
    return ap, auc


def _mean_of_defined(values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else math.nan
