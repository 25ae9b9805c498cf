"""What scores say beyond the metrics: whether they are probabilities, and what is taken for what. Plain NumPy.

`scores` are confidences 0 to 1, `targets` 0 or 1, both `[clips, C]`. A decision is one of their clips × C cells.
"""

from dataclasses import dataclass

import numpy as np

CLIPS_AT_ONCE = 4096
"""In memory, as decisions are many: 11 million in AudioSet's evaluation set."""


@dataclass(frozen=True)
class Calibration:
    """By bin of score, all of one width; NaN in a bin without decisions."""

    edges: np.ndarray
    decisions: np.ndarray
    mean_score: np.ndarray
    share_true: np.ndarray
    """Of the decisions, those whose clip has the class. Of calibrated scores it is their mean."""

    @property
    def expected_error(self) -> float:
        """The mean over decisions of how far their bin's mean score is from its share of true ones."""
        return float(np.nansum(np.abs(self.mean_score - self.share_true) * self.decisions) / self.decisions.sum())


def calibration(scores: np.ndarray, targets: np.ndarray, num_bins: int = 10) -> Calibration:
    """A score on an edge is of the bin above; 1 is of the last."""
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
    """Of the clips that have class `true` and not class `taken_for`."""

    true: int
    taken_for: int
    clips: int
    mean_score: float
    """Of the class that they do not have."""
    mean_true_score: float
    """Of the class that they have."""
    share_above: float
    """Those that score higher for the class that they do not have."""


def confusions(scores: np.ndarray, targets: np.ndarray, *, num: int = 20, min_clips: int = 5) -> list[Confusion]:
    """The pairs with the highest `mean_score`, highest first, among those with enough clips to speak of."""
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
        ours = score[(has[:, true] > 0) & (lacks[:, taken_for] > 0)]
        above = ours[:, taken_for] > ours[:, true]
        figures = ours[:, taken_for].mean(), ours[:, true].mean(), above.mean()
        pairs.append(Confusion(true, taken_for, len(ours), *(float(figure) for figure in figures)))
    return pairs
