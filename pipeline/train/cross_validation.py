"""The results of a cross-validation: a figure for each fold, their mean and their spread."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ast_core.metrics import METRICS, selection_metrics
from ast_core.recipe import Recipe
from pipeline.text_table import text_table
from pipeline.train.evaluation.epoch_results import read_records
from pipeline.train.metrics_log import finite_or_null, read_summary

LAST_EPOCHS = 5


def metric_of(recipe: Recipe) -> str:
    """The name of the metric by which the recipe picks the best epoch."""
    return selection_metrics()[recipe.metrics].name


def summarise_runs(runs: Mapping[str, str], metric: str) -> dict[str, Any]:
    """The content of folds.json, from the finished run of each fold."""
    figures = {fold: _figures(run, metric) for fold, run in runs.items()}
    return summarise(figures, higher_is_better=METRICS[metric].higher_is_better)


def _figures(run: str, metric: str) -> dict[str, Any]:
    """Results of a finished run: the metric by epoch, the best epoch, and the metric of the averaged weights."""
    summary = read_summary(run)
    return {
        "by_epoch": {record["epoch"]: record[metric] for record in read_records(run)},
        "best_epoch": summary["best_epoch"],
        "averaged": summary["averaged"] and summary["averaged"][metric],
    }


def summarise(figures: Mapping[str, Mapping[str, Any]], *, higher_is_better: bool = True) -> dict[str, Any]:
    """The content of folds.json, from `_figures` of each fold. A missing or undefined figure is None.

    `common_epoch` is the epoch with the best mean over the folds.
    """
    shared_epochs = sorted(set.intersection(*(set(fold["by_epoch"]) for fold in figures.values())))
    curves = np.array([[fold["by_epoch"][epoch] for epoch in shared_epochs] for fold in figures.values()], float)
    mean_curve = curves.mean(axis=0) if higher_is_better else -curves.mean(axis=0)
    common_epoch = shared_epochs[int(np.argmax(mean_curve))]
    folds = {
        name: {
            "best": fold["by_epoch"][fold["best_epoch"]],
            "common": fold["by_epoch"][common_epoch],
            "last": float(np.mean(np.array(list(fold["by_epoch"].values())[-LAST_EPOCHS:], float))),
            "averaged": fold["averaged"],
        }
        for name, fold in figures.items()
    }
    columns = {kind: np.array([fold[kind] for fold in folds.values()], float) for kind in next(iter(folds.values()))}
    return {
        "common_epoch": common_epoch,
        "folds": {
            name: {"best_epoch": figures[name]["best_epoch"]} | finite_or_null(fold) for name, fold in folds.items()
        },
        "mean": finite_or_null({kind: float(values.mean()) for kind, values in columns.items()}),
        "std": finite_or_null({kind: float(values.std(ddof=1)) for kind, values in columns.items()}),
    }


def table(found: Mapping[str, Any], metric: str) -> str:
    """The results as a text table."""
    name = METRICS[metric].title
    heads = {
        "best": "at its best",
        "common": f"at epoch {found['common_epoch']}",
        "last": f"last {LAST_EPOCHS} epochs",
        "averaged": "averaged weights",
    }

    def row(label: str, best_epoch: object, figures: Mapping[str, float | None]) -> list[str]:
        shown = ("–" if figures[kind] is None else f"{figures[kind]:.4f}" for kind in heads)
        return [label, str(best_epoch), *shown]

    rows = [row(fold, figures["best_epoch"], figures) for fold, figures in found["folds"].items()]
    rows += [row("mean", "", found["mean"]), row("±", "", found["std"])]
    return "\n".join(
        [
            text_table([name, "best epoch", *heads.values()], rows, "l" + "r" * (1 + len(heads))),
            "Each fold's best epoch is chosen on that fold itself, so that figure is optimistic. "
            f"Epoch {found['common_epoch']} has the best",
            "mean over the folds, as in the reference implementation; it is less optimistic. "
            "± is the standard deviation over folds.",
        ]
    )
