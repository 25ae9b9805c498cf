"""Compare models: train several recipes, or variants of one, on the same data, and put the results on one page.

    python jobs/compare.py --recipes compare-talnet compare-resnet50 compare-ast --data data \\
        --train-splits balanced_train unbalanced_train --eval-splits eval --output comparison
    python jobs/compare.py --recipes small --vary lr=1e-4,3e-4 --seeds 3 --data mine --train-splits train \\
        --eval-splits test --output comparison
    python jobs/compare.py --recipes esc50 mine.yaml --data esc50 --folds fold1 fold2 --output comparison

All other options (--num-workers, --device, --address, --init-from and so on) and the recipe keys are those of
jobs/train.py, and count for every model. The runs are trained one after the other. OUTPUT/MODEL/seed-SEED is a run like
any other; OUTPUT/comparison.json has the figures, and OUTPUT/comparison.html is the page. To resume, or to add a
recipe, run the command again: finished runs are not trained again.
"""

if __name__ == "__main__":  # before the imports that follow, which take seconds
    from jobs import entry

    entry.begin()

import argparse
from collections.abc import Sequence

from ast_core.errors import ConfigError
from jobs import train
from jobs.common import JobParser, output_uri, run
from pipeline.compare import plan


def parser() -> argparse.ArgumentParser:
    parser = JobParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--recipes", required=True, nargs="+", metavar="NAME|FILE", help="one model each; as --recipe in jobs/train.py"
    )
    parser.add_argument("--data", required=True, metavar="URI", help="a prepared data set")
    parser.add_argument("--train-splits", nargs="+", metavar="SPLIT", help="splits to train on")
    parser.add_argument("--eval-splits", nargs="+", metavar="SPLIT", help="splits to evaluate on")
    parser.add_argument(
        "--folds",
        nargs="+",
        metavar="SPLIT",
        help="instead of the two: evaluate on each of these splits, after training on all other splits of the data set",
    )
    parser.add_argument("--output", required=True, metavar="URI", help="folder for the runs and the comparison")
    parser.add_argument(
        "--vary",
        nargs="+",
        default=[],
        metavar="KEY=VALUE,VALUE",
        help="a model for each value of a recipe key; of several keys, for each combination",
    )
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="runs of each model, with the recipe's seed and the next ones"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args, passed_on = parser().parse_known_args(argv)
    output = output_uri(args.output)
    splits = _splits(args)
    models = (
        (
            plan.model_name(recipe, variant),
            recipe,
            train.read_settings(_command(args, splits, recipe, variant, passed_on)),
        )
        for recipe in args.recipes
        for variant in plan.variants(args.vary)
    )
    folds = plan.folds(args.data, args.folds) if args.folds else None
    runs = plan.planned_runs(plan.named(models), output, num_seeds=args.seeds, folds=folds)
    from jobs.ray_session import ray_session
    from pipeline.compare.comparison import compare

    compare(runs, output, ray_session=ray_session)
    return 0


def _splits(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The splits to train on and to evaluate on; with --folds, placeholders that each fold replaces."""
    if args.folds:
        if args.train_splits or args.eval_splits:
            raise ConfigError("--folds sets the splits of each run; leave out --train-splits and --eval-splits")
        return args.folds, args.folds
    if not args.train_splits or not args.eval_splits:
        raise ConfigError("give --train-splits and --eval-splits, or --folds")
    return args.train_splits, args.eval_splits


def _command(
    args: argparse.Namespace,
    splits: tuple[list[str], list[str]],
    recipe: str,
    variant: dict[str, str],
    more: Sequence[str],
) -> list[str]:
    """The command line of jobs/train.py for a model."""
    if refused := [word for word in more if word.partition("=")[0] == "--recipe"]:
        raise ConfigError(f"{refused[0]} is an option of jobs/train.py; give --recipes")
    train_splits, eval_splits = splits
    return [
        *("--recipe", recipe, "--data", args.data, "--output", args.output),
        *("--train-splits", *train_splits, "--eval-splits", *eval_splits, *more),
        *(word for key, value in variant.items() for word in (f"--{key}", value)),
    ]


if __name__ == "__main__":
    run(main)
