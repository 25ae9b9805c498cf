"""Cross-validate: train on all folds but one and evaluate on that one, for each fold in turn.

    python jobs/crossval.py --recipe esc10 --data esc10 --output runs/esc10
    python jobs/crossval.py --recipe esc50 --data s3://bucket/esc50 --output s3://bucket/runs/esc50 --num-workers 4 \
        --audioset_pretrain true --audioset_weights audioset_10_10_0.4593.pth --lr 1e-5

A fold is a split of the data set. All other options, and the keys of the recipe, are those of jobs/train.py, and
OUTPUT/FOLD is a run as it makes them. Run again, the same command goes on where it stopped.
"""

if __name__ == "__main__":  # before the imports that follow, which take seconds
    from jobs import entry

    entry.begin()

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ast_core.errors import ConfigError
from ast_core.metrics import METRICS, selection_metrics
from jobs import train
from jobs.common import output_uri, run
from jobs.recipe_option import read_recipe
from pipeline import storage
from pipeline.dataset import PreparedDataset
from pipeline.train.evaluation.epoch_results import read_records
from pipeline.train.metrics_log import finite_or_null, read_summary

LAST_EPOCHS = 5
SET_HERE = ("--train-splits", "--eval-splits")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--recipe", required=True, metavar="NAME|FILE")
    parser.add_argument("--data", required=True, metavar="URI", help="a prepared data set")
    parser.add_argument("--output", required=True, metavar="URI", help="folder of the runs and of folds.json")
    parser.add_argument("--splits", nargs="+", metavar="FOLD", help="two or more (default: all splits of the data set)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args, passed_on = parser().parse_known_args(argv)
    output = output_uri(args.output)
    if refused := [word for word in passed_on if word.partition("=")[0] in SET_HERE]:
        raise ConfigError(f"{refused[0]} is set for each fold; give all folds as --splits")
    dataset = PreparedDataset.open(args.data)
    folds = args.splits or dataset.splits
    if len(folds) < 2:
        raise ConfigError(f"cross-validation takes two folds or more; {', '.join(folds)} is one")
    dataset.clips(folds)  # refuses what is not there before anything is written
    where = ["--recipe", args.recipe, "--data", args.data, *passed_on]
    commands = {
        fold: [
            *(*where, "--output", storage.join(output, fold), "--eval-splits", fold),
            *("--train-splits", *(other for other in folds if other != fold)),
        ]
        for fold in folds
    }
    _, keys = train.parser().parse_known_args(commands[folds[0]])
    metric = selection_metrics()[read_recipe(args.recipe, keys).metrics].name
    runs = {fold: train.claim(command) for fold, command in commands.items()}  # all, before one is trained
    with train.session(*runs.values()):
        for fold, run in runs.items():
            print(f"\n{fold}", flush=True)
            train.train_run(run)
    found = summarise(
        {fold: _figures(storage.join(output, fold), metric) for fold in folds},
        higher_is_better=METRICS[metric].higher_is_better,
    )
    storage.write_json(storage.join(output, "folds.json"), {"metric": metric} | found)
    print(f"\n{table(found, metric)}\nfigures: {storage.join(output, 'folds.json')}")
    return 0


def _figures(run: str, metric: str) -> dict[str, Any]:
    """Of a finished run: the metric by epoch, and what its summary says."""
    summary = read_summary(run)
    return {
        "by_epoch": {record["epoch"]: record[metric] for record in read_records(run)},
        "best_epoch": summary["best_epoch"],
        "averaged": summary["averaged"] and summary["averaged"][metric],
    }


def summarise(figures: Mapping[str, Mapping[str, Any]], *, higher_is_better: bool = True) -> dict[str, Any]:
    """What folds.json holds of the folds' `_figures`; a figure that is not there or undefined is None.

    `common_epoch` is the one epoch that is best in the mean over the folds.
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
    """For a terminal."""
    name = METRICS[metric].title
    heads = {
        "best": "at its best",
        "common": f"at epoch {found['common_epoch']}",
        "last": f"last {LAST_EPOCHS} epochs",
        "averaged": "averaged weights",
    }
    width = max(len(label) for label in (*found["folds"], name))

    def line(label: str, best_epoch: object, figures: Mapping[str, float | None]) -> str:
        shown = ("–" if figures[kind] is None else f"{figures[kind]:.4f}" for kind in heads)
        cells = (f"{figure:>{len(head)}}" for figure, head in zip(shown, heads.values(), strict=True))
        return f"{label:{width}}  {best_epoch:>10}  {'  '.join(cells)}"

    return "\n".join(
        [
            f"{name:{width}}  best epoch  {'  '.join(heads.values())}",
            *(line(fold, figures["best_epoch"], figures) for fold, figures in found["folds"].items()),
            line("mean", "", found["mean"]),
            line("±", "", found["std"]),
            "Each fold's best epoch is chosen on that fold itself, which flatters. "
            f"Epoch {found['common_epoch']} is the best in the mean over",
            "the folds, as the original's script chooses it, which flatters less. "
            "± is the standard deviation over folds.",
        ]
    )


if __name__ == "__main__":
    run(main)
