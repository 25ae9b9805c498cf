"""Analysis of scores beyond the metrics: confusions between classes. Plain NumPy.

`scores` are between 0 and 1, `targets` are 0 or 1, both `[clips, C]`.
"""

from dataclasses import dataclass

import numpy as np


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
