"""Cross-validation: for each fold, train on all other folds and evaluate on this one.

    python jobs/crossval.py --recipe esc10 --data esc10 --output runs/esc10
    python jobs/crossval.py --recipe esc50 --data s3://bucket/esc50 --output s3://bucket/runs/esc50 --num-workers 4 \\
        --audioset_pretrain true --audioset_weights audioset_10_10_0.4593.pth --lr 1e-5

A fold is a split of the data set; docs/data.md, "Lists without splits", writes folds into a list. All other options and
the recipe keys are those of jobs/train.py. OUTPUT/FOLD is the run of a fold. To resume, run the same command again.

esc50 has one label a clip and trains with cross-entropy, whose scores compare the classes of a clip. For tags with
thresholds add --loss BCE --metrics mAP.
"""

if __name__ == "__main__":  # before the imports that follow, which take seconds
    from jobs import entry

    entry.begin()

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ast_core.errors import ConfigError
from jobs import train
from jobs.common import JobParser, output_uri, run
from jobs.recipe_option import read_recipe
from pipeline import storage

if TYPE_CHECKING:
    from pipeline.dataset import PreparedDataset

SET_HERE = ("--train-splits", "--eval-splits")
RARELY_FOLDS = frozenset({"train", "test", "eval", "evaluation", "val", "valid", "validation", "dev"})


def parser() -> argparse.ArgumentParser:
    parser = JobParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--recipe", required=True, metavar="NAME|FILE", help="as in jobs/train.py")
    parser.add_argument("--data", required=True, metavar="URI", help="a prepared data set")
    parser.add_argument("--output", required=True, metavar="URI", help="folder for the runs and folds.json")
    parser.add_argument("--splits", nargs="+", metavar="FOLD", help="two or more splits (default: all of the data set)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args, passed_on = parser().parse_known_args(argv)
    from pipeline.dataset import PreparedDataset  # PyTorch and Ray, which `--help` does not need
    from pipeline.train import cross_validation
    from pipeline.train.fit import train_run

    output = output_uri(args.output)
    if refused := [word for word in passed_on if word.partition("=")[0] in SET_HERE]:
        raise ConfigError(f"{refused[0]} is set by the job for each fold; give all folds as --splits")
    dataset = PreparedDataset.open(args.data)
    folds = folds_of(dataset, args.splits)
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
    metric = cross_validation.metric_of(read_recipe(args.recipe, keys))
    runs = {fold: train.claim(command) for fold, command in commands.items()}  # all of them before any is trained
    with train.session(*runs.values()) as held:
        for fold, run in runs.items():
            print(f"\n{fold}", flush=True)
            train_run(run, held)
    found = cross_validation.summarise_runs({fold: storage.join(output, fold) for fold in folds}, metric)
    storage.write_json(storage.join(output, "folds.json"), {"metric": metric} | found)
    print(f"\n{cross_validation.table(found, metric)}\nfigures: {storage.join(output, 'folds.json')}")
    return 0


def folds_of(dataset: "PreparedDataset", given: Sequence[str] | None) -> list[str]:
    """The splits that are folds: those given, or all. Prints a line about those without clips, and about usual splits.

    Raises:
        ConfigError: fewer than two are left.
    """
    splits = given or dataset.splits
    num_clips = {split: dataset.info["splits"].get(split, {}).get("clips") for split in splits}  # None: no such split
    if empty := [split for split, number in num_clips.items() if number == 0]:
        print(f"left out, as they have no clips: {', '.join(empty)}")
    folds = [split for split in splits if num_clips[split] != 0]
    if len(folds) < 2:
        which = f"{folds[0]} is one" if folds else "none has clips"
        has_more = len(dataset.splits) > len(splits)
        others = f"give more of {', '.join(dataset.splits)} as --splits, or " if has_more else ""
        raise ConfigError(
            f"cross-validation needs two folds or more; {which}; {others}write fold1, fold2, … into the list's column "
            "split, and prepare it into a new --output"
        )
    if usual := [fold for fold in folds if fold.lower() in RARELY_FOLDS]:
        sizes = ", ".join(f"{fold} {num_clips[fold] or 0:,}" for fold in folds)
        print(
            f"warning: splits called {', '.join(usual)} are rarely folds of equal size (clips: {sizes}); each is "
            "trained on and evaluated on in turn"
        )
    return folds


if __name__ == "__main__":
    run(main)
