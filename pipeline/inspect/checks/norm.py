"""The check of mean and standard deviation against the published norm, and the likely causes of a difference."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ast_core.features import KALDI128
from ast_core.published_inputs import PublishedInput
from pipeline.inspect import explanations
from pipeline.inspect.checks.check import finding, grade
from pipeline.inspect.dataset_summary import DatasetSummary, SplitSummary
from pipeline.inspect.explanations import published_for
from pipeline.inspect.findings import Finding

NORM_OK = 0.5
"""Two published norms of one public copy differ by this: (-3.38, 3.89), (-3.54, 3.42), YuanGongND/ast#85 and #108."""
NORM_SERIOUS = 2.5
"""11 dB. No selection of clips shifts a mean so far; a wrong scale or format does."""
CAUSE_WITHIN = 1.0
"""A fault is named if it explains the norm to within this."""


def check_norm(summary: DatasetSummary) -> Iterator[Finding]:
    """Mean and standard deviation of raw log-mel, compared with the published norm."""
    published = published_for(summary.labels, summary.features)
    for split in summary.splits:
        figures = norm_figures(split, published)
        if figures is None:
            continue  # no clip, or none with finite values: other checks report that
        what = [f"mean and std {figures['mean']:.2f}, {figures['std']:.2f}"]
        if published is None:
            yield finding("norm", split, "ok", [*what, "none published for these classes and features"], [], figures)
            continue
        counted = figures["as_the_original_counts"]
        what.append(f"{counted['mean']:.2f}, {counted['std']:.2f} with padding and masks, as the reference counts")
        what.append(f"published {published.mean:.2f}, {published.std:.2f} ({published.name})")
        severity = grade(figures["off_by"], warning=NORM_OK, serious=NORM_SERIOUS)
        costs = [explanations.OTHER_NORM, *_norm_causes(figures, published)]
        yield finding("norm", split, severity, what, costs, figures)


def norm_figures(split: SplitSummary, published: PublishedInput | None) -> dict[str, Any] | None:
    """The norm of all frames, of the frames that are not silent, and as the reference script counts.

    That script averages over its training loader (src/get_norm_stats.py of YuanGongND/ast, and issue #16 there), so the
    zeros of padding and masks count. Here they count with their expected share; the script's mixup is ignored.

    Returns None if no clip has finite values.
    """
    rows = np.stack(
        [
            split.column(name).astype(np.float64)
            for name in ("fbank_sum", "fbank_sum_sq", "num_frames", "num_silent_frames")
        ]
    )
    rows = rows[:, np.isfinite(rows).all(axis=0) & (rows[2] > 0)]
    if not rows.shape[1]:
        return None
    total, squares, frames, silent = rows.sum(axis=1)
    num_bins, floor = split.features.num_mel_bins, split.features.floor
    figures: dict[str, Any] = _mean_std(total, squares, frames * num_bins)
    if silent < frames:
        at_floor = silent * num_bins
        figures["without_silent_frames"] = _mean_std(
            total - at_floor * floor, squares - at_floor * floor**2, frames * num_bins - at_floor
        )
    if published:
        filled = np.minimum(rows[2] / published.num_frames, 1).mean()
        # The largest mask width is below freqm, then cut to whole bins; see ast_core/augment/spec_augment.py.
        masked_bins, masked_frames = (published.freqm - 1) / 2, (published.timem - 1) / 2
        kept = filled * (1 - masked_bins / num_bins) * (1 - masked_frames / published.num_frames)
        counted = _mean_std(total, squares, frames * num_bins / kept)
        standard_error = (rows[0] / rows[2]).std() / num_bins / math.sqrt(rows.shape[1])
        nearest = min(_distance(figures, published), _distance(counted, published))
        figures |= {
            "as_the_original_counts": counted,
            "published": {"mean": published.mean, "std": published.std},
            "standard_error": standard_error,
            "off_by": max(0.0, nearest - 2 * standard_error),  # with few clips the mean is uncertain
        }
    return figures


def _mean_std(total: float, squares: float, count: float) -> dict[str, float]:
    mean = float(total / count)
    return {"mean": mean, "std": math.sqrt(max(float(squares / count) - mean**2, 0.0))}


def _distance(figures: Mapping[str, float], published: PublishedInput) -> float:
    return max(abs(figures["mean"] - published.mean), abs(figures["std"] - published.std))


_LN10 = math.log(10)
_SCALE_FAULTS: dict[str, Callable[[float, float], tuple[float, float]]] = {
    "16-bit integers instead of [-1, 1], which adds 2 ln 32768 = 20.8": lambda m, s: (m + 2 * math.log(2**15), s),
    "decibels instead of natural logarithms": lambda m, s: (m * 10 / _LN10, s * 10 / _LN10),
    "base-10 logarithms instead of natural ones": lambda m, s: (m / _LN10, s / _LN10),
    "magnitudes instead of powers": lambda m, s: (m / 2, s / 2),
    "values that are normalised already, by twice the std": lambda m, s: (0.0, 0.5),
    "values that are normalised already": lambda m, s: (0.0, 1.0),
    "hardly any sound: a scale that is divided twice, or empty sound tracks": lambda m, s: (KALDI128.floor, 0.0),
}
"""Faults, and how each would change the published mean and std."""


def _norm_causes(figures: Mapping[str, Any], published: PublishedInput) -> Iterator[str]:
    sound = figures.get("without_silent_frames", figures)
    mean, std, off = sound["mean"], sound["std"], _distance(sound, published)
    if off < _distance(figures, published) - NORM_OK / 2:
        yield f"Digital silence is part of it: without it they would be {mean:.2f}, {std:.2f}."
    if off <= NORM_OK:
        return
    if off > NORM_SERIOUS:
        made = {fault: change(published.mean, published.std) for fault, change in _SCALE_FAULTS.items()}
        misses = {fault: max(abs(mean - m), abs(std - s)) for fault, (m, s) in made.items()}
        likely = min(misses, key=lambda fault: misses[fault])
        yield explanations.FORMAT_FAULT
        if misses[likely] < CAUSE_WITHIN:
            yield f"The figures point to {likely}."
    elif abs(std - published.std) <= NORM_OK:
        louder = "louder" if mean > published.mean else "quieter"
        level_db = abs(mean - published.mean) * 10 / _LN10
        yield f"The spread is the paper's and the level {level_db:.0f} dB {louder}, as if files were normalised."
    else:
        yield explanations.LOWER_SPREAD if std < published.std else explanations.LARGER_SPREAD
