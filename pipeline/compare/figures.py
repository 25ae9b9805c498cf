"""The figures of a comparison, from the scores of its runs. Plain NumPy.

R runs of a model: one for each seed and fold. The figure of a model is the mean over its runs. In a resample, all runs
that are evaluated on the same clips have the same resample of them, so that differences between models are paired.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ast_core.bootstrap import basic_interval, holm, p_value, resampled_mean
from ast_core.errors import DataError
from ast_core.metrics import METRICS, resampled_map, tagging_metrics
from pipeline.compare.results import RunResult, mean_or_none
from pipeline.train.metrics_log import finite_or_null

NUM_RESAMPLES, SEED, CONFIDENCE = 1000, 0, 0.95
RESAMPLED = ("map", "accuracy")
"""The metrics that have intervals and differences."""
CLASSES_OF_A_PAIR = 10
"""Classes of a pair in comparison.json: those with the largest differences."""

Figures = dict[str, Any]


@dataclass(frozen=True)
class ScoredModel:
    """The metrics of a model's runs, in the order of the runs, and its resampled metrics."""

    values: Mapping[str, np.ndarray]
    """By metric: `[R]`."""
    ap: np.ndarray
    """`[C]`: the AP of each class, mean over the runs in which it is defined."""
    resampled: Mapping[str, np.ndarray]
    """By metric of `RESAMPLED`: `[resamples]`."""

    def mean(self, metric: str) -> float:
        return float(self.values[metric].mean())


def scored(results: Sequence[RunResult]) -> ScoredModel:
    """The metrics of the runs of one model: those of the best epoch in the summary, and resampled ones from its scores.

    Runs of an earlier version stored scores as float16, whose ties move a metric. Resampled metrics are moved back by
    as much, so that they are around the exact figure.
    """
    values = {name: np.array([_number(one.summary.get(name)) for one in results]) for name in METRICS}
    seeds = {fold: SEED + i for i, fold in enumerate(dict.fromkeys(one.planned.fold for one in results))}
    resampled, ap = [], []
    for one in results:
        score, target = one.scores.scores.astype(np.float32), one.scores.targets()
        stored = tagging_metrics(score, target)
        hits = score.argmax(axis=1) == target.argmax(axis=1)
        how: dict[str, int] = {"num_resamples": NUM_RESAMPLES, "seed": seeds[one.planned.fold]}
        of_run = {"map": resampled_map(score, target, **how), "accuracy": resampled_mean(hits, **how)}
        resampled.append(
            {name: of - stored.values[name] + _number(one.summary.get(name)) for name, of in of_run.items()}
        )
        ap.append(stored.ap)
    means = {name: np.mean([of_run[name] for of_run in resampled], axis=0) for name in RESAMPLED}
    return ScoredModel(values, _mean_of_defined(np.stack(ap)), means)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _mean_of_defined(values: np.ndarray) -> np.ndarray:
    """The mean over the first axis, without NaN; NaN where all are."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(axis=0) / known.sum(axis=0)


def check_same_clips(results: Sequence[RunResult]) -> None:
    """Raise DataError if runs of one fold were evaluated on other clips, or on the same in another order."""
    first: dict[str | None, RunResult] = {}
    for one in results:
        reference = first.setdefault(one.planned.fold, one)
        if not one.scores.clip_id.equals(reference.scores.clip_id):
            raise DataError(
                f"{one.planned.title} and {reference.planned.title} were evaluated on other clips, or in another "
                "order: the data set was prepared again between them; compare into another --output"
            )


def model_figures(results: Sequence[RunResult], model: ScoredModel) -> Figures:
    """The figures of one model for comparison.json, apart from its costs and class names."""
    seeds = sorted({one.planned.seed for one in results})
    by_seed = np.array([[one.planned.seed == seed for one in results] for seed in seeds])
    figures: Figures = {name: finite(model.mean(name)) for name in METRICS}
    for metric, resampled in model.resampled.items():
        bounds = interval(model.mean(metric), resampled)
        figures[f"{metric}_interval"] = bounds and np.clip(bounds, 0, 1).tolist()  # the method knows no limits
        of_seeds = np.array([model.values[metric][runs].mean() for runs in by_seed])
        figures[f"{metric}_std_over_seeds"] = finite(float(of_seeds.std(ddof=1))) if len(seeds) > 1 else None
    averaged = [one.summary["averaged"] for one in results]
    return figures | {
        "last_epochs": mean_of([one.last_epochs() for one in results]),
        "averaged": mean_of(averaged) if all(averaged) else None,
        "training": {
            "clips_per_s": float(np.mean([one.summary["clips_per_s"] for one in results])),
            "hours": sum(one.summary["train_s"] for one in results) / 3600,
            "memory_gb": max((one.memory_gb for one in results if one.memory_gb is not None), default=None),
            "devices": sorted({one.config["computed"]["device"] for one in results}),
            "workers": sorted({one.summary["world_size"] for one in results}),
        },
        "runs": [
            {
                "uri": one.planned.settings.output,
                "seed": one.planned.seed,
                "fold": one.planned.fold,
                "epochs": one.summary["epochs"],
                "best_epoch": one.summary["best_epoch"],
            }
            | {name: finite(float(values[run])) for name, values in model.values.items()}
            | {"last_epochs": one.last_epochs(), "weights_sha256": one.weights_sha256}
            for run, one in enumerate(results)
        ],
        "curves": curves(results),
        "ap": [finite(value) for value in model.ap.tolist()],
    }


def curves(results: Sequence[RunResult]) -> Figures:
    """`epoch`, and the loss and each metric after each epoch that all runs have, means over the runs."""
    by_epoch = [{record["epoch"]: record for record in one.epochs} for one in results]
    epochs = sorted(set.intersection(*(set(run) for run in by_epoch)))
    means = [mean_of([run[epoch] for run in by_epoch], ("loss", *METRICS)) for epoch in epochs]
    return {"epoch": epochs} | {name: [of_epoch[name] for of_epoch in means] for name in ("loss", *METRICS)}


def pair_figures(
    models: Mapping[str, ScoredModel], results: Mapping[str, Sequence[RunResult]], class_names: Sequence[str]
) -> list[Figures]:
    """For each two models: the first minus the second, their ensemble, and the classes in which they differ most."""
    pairs: list[Figures] = []
    for first, second in itertools.combinations(models, 2):
        one, other = models[first], models[second]
        pair: Figures = {"models": [first, second]}
        for metric in one.resampled:
            difference = one.mean(metric) - other.mean(metric)
            resampled = one.resampled[metric] - other.resampled[metric]
            pair[metric] = {
                "difference": finite(difference),
                "interval": interval(difference, resampled),
                "p": finite(p_value(difference, resampled)),
            }
        pair["ensemble"] = ensemble_figures(results[first], results[second])
        pair["classes"] = class_differences(one.ap - other.ap, class_names)
        pairs.append(pair)
    for metric in RESAMPLED:
        adjusted = holm(np.array([pair[metric]["p"] for pair in pairs], dtype=np.float64))
        for pair, p in zip(pairs, adjusted.tolist(), strict=True):
            pair[metric]["p_holm"] = finite(p)
    return pairs


def ensemble_figures(first: Sequence[RunResult], second: Sequence[RunResult]) -> Figures:
    """The metrics of the mean scores of two models, run by run, and their mean over the runs."""
    metrics = [
        tagging_metrics((one.scores.scores.astype(np.float32) + other.scores.scores) / 2, one.scores.targets())
        for one, other in zip(first, second, strict=True)
    ]
    return {name: finite(float(np.mean([of_run.values[name] for of_run in metrics]))) for name in METRICS}


def class_differences(difference: np.ndarray, names: Sequence[str]) -> list[Figures]:
    """The classes in which two models' APs differ most, largest difference first."""
    known = [i for i in np.argsort(-np.abs(difference), kind="stable").tolist() if not math.isnan(difference[i])]
    return [{"index": i, "name": names[i], "difference": float(difference[i])} for i in known[:CLASSES_OF_A_PAIR]]


def interval(estimate: float, resampled: np.ndarray) -> list[float] | None:
    bounds = basic_interval(estimate, resampled, CONFIDENCE)
    return list(bounds) if np.isfinite(bounds).all() else None


def mean_of(records: Sequence[Mapping[str, Any]], names: Sequence[str] = tuple(METRICS)) -> Figures:
    """The mean of each figure over records; None if a record has none."""
    return {name: mean_or_none([record.get(name) for record in records]) for name in names}


def finite(value: float) -> float | None:
    """The value, or None for NaN and infinity, which JSON does not have."""
    return finite_or_null({"value": value})["value"]
