"""The bootstrap over clips: resamples, intervals, and p-values of differences between models.

Resamples depend only on the number of clips and the seed, so all models that score the same clips have the same
resamples, and their differences are paired.
"""

import math
from collections.abc import Iterator

import numpy as np

RESAMPLES_AT_ONCE = 64
"""Resamples computed at once: 256 bytes of counts a clip, so that those of 20,000 clips fit into a CPU's cache."""

ROUNDING = 1e-12
"""Differences that are nearer to each other than this are equal."""


def times_drawn(num_clips: int, num_resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each clip is in each resample: float32 `[clips, resamples]`, some resamples at a time.

    A resample has as many clips, drawn with replacement: the rows `rng.integers(clips, size=clips)` of one
    `rng = default_rng(seed)`.
    """
    rng = np.random.default_rng(seed)
    for first in range(0, num_resamples, RESAMPLES_AT_ONCE):
        drawn = np.empty((num_clips, min(RESAMPLES_AT_ONCE, num_resamples - first)), dtype=np.float32)
        for resample in range(drawn.shape[1]):
            drawn[:, resample] = np.bincount(rng.integers(num_clips, size=num_clips), minlength=num_clips)
        yield drawn


def resampled_mean(values: np.ndarray, *, num_resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """The mean of `values` `[clips]` in each resample, `[resamples]`: of hits, it is the accuracy."""
    blocks = times_drawn(len(values), num_resamples, seed)
    return np.concatenate([values.astype(np.float64) @ drawn for drawn in blocks]) / len(values)


def basic_interval(estimate: float, resampled: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval (low, high) of what `estimate` estimates, from its value in each resample.

    The bounds are `2 estimate - q`, where `q` are the quantiles `(1 ± confidence) / 2` of the resamples (Davison and
    Hinkley, "Bootstrap Methods and their Application", 1997, section 5.2). Resamples in which it is NaN do not count;
    if none counts, both bounds are NaN.
    """
    defined = resampled[~np.isnan(resampled)]
    if len(defined) == 0:
        return math.nan, math.nan
    low, high = 2 * estimate - np.quantile(defined, [(1 + confidence) / 2, (1 - confidence) / 2])
    return float(low), float(high)


def p_value(difference: float, resampled: np.ndarray) -> float:
    """How likely a difference at least as far from 0 would be, if there were none in the population of clips.

    The resamples, shifted so that they are around 0, stand for that case (Hall and Wilson, "Two Guidelines for
    Bootstrap Hypothesis Testing", 1991). With n resamples the smallest value is 1 / (n + 1). NaN if the difference is
    undefined.
    """
    defined = resampled[~np.isnan(resampled)]
    if math.isnan(difference) or len(defined) == 0:
        return math.nan
    as_far = np.abs(defined - difference) >= abs(difference) - ROUNDING
    return float((1 + as_far.sum()) / (1 + len(defined)))


def holm(p_values: np.ndarray) -> np.ndarray:
    """p-values of several tests, adjusted so that the chance of even one false finding is at most the level of each.

    S. Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979. NaN stays, and does not count as a test.
    """
    adjusted = np.array(p_values, dtype=np.float64)
    order = np.argsort(adjusted)[: np.count_nonzero(~np.isnan(adjusted))]  # NaN are last
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * adjusted[order]), 1)
    return adjusted
