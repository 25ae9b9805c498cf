"""Cross-validation: for each fold, train on all other folds and evaluate on this one.

    python jobs/crossval.py --recipe esc10 --data esc10 --output runs/esc10
    python jobs/crossval.py --recipe esc50 --data s3://bucket/esc50 --output s3://bucket/runs/esc50 --num-workers 4 \
        --audioset_pretrain true --audioset_weights audioset_10_10_0.4593.pth --lr 1e-5

A fold is a split of the data set. All other options and the recipe keys are those of jobs/train.py. OUTPUT/FOLD is the
run of a fold. To resume, run the same command again.
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
from pipeline.text_table import text_table
from pipeline.train.evaluation.epoch_results import read_records
from pipeline.train.fit import train_run
from pipeline.train.metrics_log import finite_or_null, read_summary

LAST_EPOCHS = 5
SET_HERE = ("--train-splits", "--eval-splits")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--recipe", required=True, metavar="NAME|FILE", help="as in jobs/train.py")
    parser.add_argument("--data", required=True, metavar="URI", help="a prepared data set")
    parser.add_argument("--output", required=True, metavar="URI", help="folder for the runs and folds.json")
    parser.add_argument("--splits", nargs="+", metavar="FOLD", help="two or more splits (default: all of the data set)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args, passed_on = parser().parse_known_args(argv)
    output = output_uri(args.output)
    if refused := [word for word in passed_on if word.partition("=")[0] in SET_HERE]:
        raise ConfigError(f"{refused[0]} is set by the job for each fold; give all folds as --splits")
    dataset = PreparedDataset.open(args.data)
    folds = args.splits or dataset.splits
    if len(folds) < 2:
        raise ConfigError(f"cross-validation needs two folds or more; {', '.join(folds)} is one")
    dataset.clips(folds)  # refuses missing splits before anything is written
    common = ["--recipe", args.recipe, "--data", args.data, *passed_on]
    commands = {
        fold: [
            *(*common, "--output", storage.join(output, fold), "--eval-splits", fold),
            *("--train-splits", *(other for other in folds if other != fold)),
        ]
        for fold in folds
    }
    _, keys = train.parser().parse_known_args(commands[folds[0]])
    metric = selection_metrics()[read_recipe(args.recipe, keys).metrics].name
    runs = {fold: train.claim(command) for fold, command in commands.items()}  # all of them before any is trained
    with train.session(*runs.values()):
        for fold, run in runs.items():
            print(f"\n{fold}", flush=True)
            train_run(run)
    found = summarise(
        {fold: _figures(storage.join(output, fold), metric) for fold in folds},
        higher_is_better=METRICS[metric].higher_is_better,
    )
    storage.write_json(storage.join(output, "folds.json"), {"metric": metric} | found)
    print(f"\n{table(found, metric)}\nfigures: {storage.join(output, 'folds.json')}")
    return 0


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


if __name__ == "__main__":
    run(main)
