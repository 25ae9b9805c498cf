"""Analysis of scores beyond the metrics: calibration and confusions between classes. Plain NumPy.

`scores` are between 0 and 1, `targets` are 0 or 1, both `[clips, C]`. A decision is one of the clips × C cells.
"""

from dataclasses import dataclass

import numpy as np

CLIPS_AT_ONCE = 4096
"""Clips in memory at once. AudioSet's evaluation set has 11 million decisions."""


@dataclass(frozen=True)
class Calibration:
    """Calibration figures by bin of score. All bins have the same width; a bin without decisions has NaN."""

    edges: np.ndarray
    decisions: np.ndarray
    mean_score: np.ndarray
    share_true: np.ndarray
    """The share of decisions whose clip has the class. For calibrated scores it equals `mean_score`."""

    @property
    def expected_error(self) -> float:
        """Expected calibration error: the mean over decisions of |mean score − share of true ones| of their bin."""
        return float(np.nansum(np.abs(self.mean_score - self.share_true) * self.decisions) / self.decisions.sum())


def calibration(scores: np.ndarray, targets: np.ndarray, num_bins: int = 10) -> Calibration:
    """Calibration figures of scores. A score on an edge belongs to the bin above; 1 belongs to the last bin."""
    sums = np.zeros((3, num_bins))
    for first in range(0, len(scores), CLIPS_AT_ONCE):
        score = scores[first : first + CLIPS_AT_ONCE].astype(np.float32).ravel()
        target = targets[first : first + CLIPS_AT_ONCE].ravel()
        in_bin = np.minimum((score * num_bins).astype(np.int64), num_bins - 1)
        for total, weights in zip(sums, (None, score, target), strict=True):
            total += np.bincount(in_bin, weights, minlength=num_bins)
    decisions, score_sum, num_true = sums
    with np.errstate(invalid="ignore"):
        means = score_sum / decisions, num_true / decisions
    return Calibration(np.linspace(0, 1, num_bins + 1), decisions.astype(np.int64), *means)


@dataclass(frozen=True)
class Confusion:
    """A pair of classes: how clips that have class `true` and not class `taken_for` score for both."""

    true: int
    taken_for: int
    clips: int
    mean_score: float
    """The mean score for `taken_for`, the class that the clips do not have."""
    mean_true_score: float
    """The mean score for `true`, the class that the clips have."""
    share_above: float
    """The share of clips that score higher for `taken_for`."""


def confusions(scores: np.ndarray, targets: np.ndarray, *, num: int = 20, min_clips: int = 5) -> list[Confusion]:
    """The `num` pairs with the highest `mean_score`, highest first, among those with at least `min_clips` clips."""
    score = scores.astype(np.float32)
    has, lacks = targets, 1 - targets
    clips = has.T @ lacks  # [true, taken for]; a class with itself: 0
    mean = (has.T @ (score * lacks)) / np.maximum(clips, 1)
    mean[clips < max(min_clips, 1)] = -1
    pairs = []
    for at in np.argsort(-mean, axis=None, kind="stable")[:num]:
        true, taken_for = (int(index) for index in np.unravel_index(at, mean.shape))
        if mean[true, taken_for] < 0:
            break
        selected = score[(has[:, true] > 0) & (lacks[:, taken_for] > 0)]
        above = selected[:, taken_for] > selected[:, true]
        figures = selected[:, taken_for].mean(), selected[:, true].mean(), above.mean()
        pairs.append(Confusion(true, taken_for, len(selected), *(float(figure) for figure in figures)))
    return pairs
