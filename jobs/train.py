"""Train a tagger on a prepared data set, with DDP on Ray Train workers. The recipe names the model.

    python jobs/train.py --recipe audioset-balanced --data data --train-splits balanced_train --eval-splits eval \\
        --output runs/1
    ray job submit --working-dir . -- python jobs/train.py --recipe esc10 --data s3://bucket/esc10 \\
        --train-splits fold2 fold3 fold4 fold5 --eval-splits fold1 --output s3://bucket/runs/1 \\
        --num-workers 4 --device cuda

Any recipe key can be set on the command line: --lr 1e-4 --epochs 20 --imagenet_pretrain false.
To resume, run the same command again.
"""

# This file is long because it declares and checks the options of a training. The training
# itself is in `pipeline/train/fit.py`.

if __name__ == "__main__":  # before the imports that follow, which take seconds
    from jobs import entry

    entry.begin()

import argparse
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from ast_core.errors import ConfigError
from jobs.common import MAX_CPUS, JobParser, add_ray_options, output_uri, run
from jobs.recipe_option import help_on_keys, overridden, read_recipe, recipe_names
from pipeline.train.settings import CPUS_WITH_GPU, IN_PROCESS, LONGEST_WAIT_S, TrainSettings

if TYPE_CHECKING:
    from pipeline.lease import Held
    from pipeline.train.fit import ClaimedRun

LONGEST_S, MAX_CACHE_GB = 30 * 86_400.0, 1e9
"""Upper bounds of options: a month, and an exabyte."""


def parser() -> argparse.ArgumentParser:
    parser = JobParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=help_on_keys(),
        allow_abbrev=False,
    )
    parser.add_argument(
        "--recipe", required=True, metavar="NAME|FILE", help=f"{', '.join(recipe_names())}, or a YAML file"
    )
    parser.add_argument("--data", required=True, metavar="URI", help="a prepared data set")
    parser.add_argument("--train-splits", required=True, nargs="+", metavar="SPLIT", help="splits to train on")
    parser.add_argument("--eval-splits", required=True, nargs="+", metavar="SPLIT", help="splits to evaluate on")
    parser.add_argument(
        "--output",
        required=True,
        metavar="URI",
        help="folder for the run; on a cluster, on storage that all nodes share",
    )
    parser.add_argument(
        "--num-workers",
        type=_num_workers,
        default=(1, 1),
        metavar="N|MIN:MAX",
        help="number of DDP ranks (default 1); with MIN:MAX, as many as the cluster has room for at each moment; 0 "
        "trains in this process, without Ray and without checkpoints, for a debugger or a first try",
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto: cuda if there is a GPU now; give cuda on a cluster that scales up from no GPU",
    )
    parser.add_argument(
        "--cpus-per-worker",
        type=int,
        metavar="N",
        help=f"CPUs of each worker (default: the most with which all fit, at most {CPUS_WITH_GPU} with a GPU)",
    )
    parser.add_argument(
        "--max-failures",
        type=int,
        default=2,
        metavar="N",
        help="how often a failed run restarts from its checkpoint by itself (default 2; -1: always); a node that is "
        "taken away with notice does not count",
    )
    parser.add_argument(
        "--checkpoint-every-s",
        type=float,
        default=600.0,
        metavar="S",
        help="seconds between checkpoints within an epoch (default 600); they are saved at logged steps",
    )
    parser.add_argument(
        "--resize-every-s",
        type=float,
        default=60.0,
        metavar="S",
        help="with MIN:MAX, seconds between checks for room for more workers (default 60); with more workers, "
        "training restarts from the last checkpoint",
    )
    parser.add_argument(
        "--longest-wait-s",
        type=float,
        default=LONGEST_WAIT_S,
        metavar="S",
        help="end if the cluster has had no room for the workers for so long, at the start or after losing machines "
        f"(default {LONGEST_WAIT_S:.0f}; 0: wait without end); the same command resumes",
    )
    parser.add_argument(
        "--log-every-steps", type=int, default=20, metavar="N", help="steps between two logged steps (default 20)"
    )
    parser.add_argument(
        "--cache-dir", metavar="DIR", help="folder on each node's disk that caches shards of object storage"
    )
    parser.add_argument("--cache-gb", type=float, default=500.0, metavar="GB", help="size of the cache (default 500)")
    parser.add_argument(
        "--async-validation",
        action="store_true",
        help="evaluate an epoch while the next one trains; takes CPUs (and a GPU) of one more worker; not with MIN:MAX",
    )
    parser.add_argument(  # the option's name in earlier versions
        "--evaluate-beside", dest="async_validation", action="store_true", help=argparse.SUPPRESS
    )
    parser.add_argument(
        "--init-from",
        metavar="MODEL",
        help="start from a trained model instead of the recipe's weights: a run, a model folder, a Hugging "
        "Face folder or a published .pth; its norm is used, and its head if the classes are the same",
    )
    parser.add_argument("--mlflow", metavar="URI", help="also log to this MLflow tracking server or store")
    add_ray_options(parser)
    return parser


def _num_workers(text: str) -> tuple[int, int]:
    """The lowest and highest number of workers. Raises ArgumentTypeError."""
    least, _, most = text.partition(":")
    try:
        return int(least), int(most or least)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of workers; use a number, or MIN:MAX") from None


def read_settings(argv: Sequence[str] | None = None) -> TrainSettings:
    """Read the settings from a command line. Raises ConfigError for an invalid option or recipe key."""
    args, rest = parser().parse_known_args(argv)
    _check_options(args)
    keys = overridden(rest)
    if option := next((key for key in keys if key in vars(args)), None):
        raise ConfigError(f"{option} is not a recipe key; the option is --{option.replace('_', '-')}")
    given = vars(args) | {
        "recipe": read_recipe(args.recipe, rest),
        "overrides": frozenset(keys),
        "output": output_uri(args.output),
        "cache_dir": args.cache_dir and output_uri(args.cache_dir, "--cache-dir"),
    }
    return TrainSettings(**given)


def claim(argv: Sequence[str] | None = None) -> "ClaimedRun":
    """Claim the run that a command line describes (`fit.claim`)."""
    settings = read_settings(argv)
    from pipeline.train import fit  # PyTorch and Ray, which `--help` does not need

    return fit.claim(settings)


def session(*runs: "ClaimedRun") -> "AbstractContextManager[Mapping[str, Held]]":
    """A `fit.session` with Ray on this machine or the cluster at --address."""
    from jobs.ray_session import ray_session
    from pipeline.train import fit

    return fit.session(*runs, ray_session=ray_session)


def main(argv: Sequence[str] | None = None) -> int:
    claimed = claim(argv)
    from pipeline.train.fit import train_run

    with session(claimed) as held:
        train_run(claimed, held)
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """Check each option by itself. `pipeline.train.resources` checks the resources once Ray runs."""
    least, most = args.num_workers
    if args.num_workers != IN_PROCESS and not 1 <= least <= most:
        given = least if least == most else f"{least}:{most}"
        raise ConfigError(f"--num-workers is {given}; use 1 or more, MIN:MAX, or 0 for this process")
    for option, is_allowed, allowed in (  # nan is not >= 0 either
        ("--cpus-per-worker", args.cpus_per_worker is None or 1 <= args.cpus_per_worker <= MAX_CPUS, "1 or more"),
        ("--max-failures", args.max_failures >= -1, "0 or more, or -1 for no limit"),
        ("--checkpoint-every-s", 0 <= args.checkpoint_every_s <= LONGEST_S, f"0 to {LONGEST_S:,.0f}"),
        ("--resize-every-s", 0 <= args.resize_every_s <= LONGEST_S, f"0 to {LONGEST_S:,.0f}"),
        ("--longest-wait-s", 0 <= args.longest_wait_s <= LONGEST_S, f"0 to {LONGEST_S:,.0f}"),
        ("--log-every-steps", args.log_every_steps >= 1, "1 or more"),
        ("--cache-gb", 0 <= args.cache_gb <= MAX_CACHE_GB, "a size, 0 or more"),
    ):
        if not is_allowed:
            given = getattr(args, option.removeprefix("--").replace("-", "_"))
            raise ConfigError(f"{option} is {given}; use {allowed}")
    if args.cache_dir:
        if "://" in args.cache_dir:
            raise ConfigError(f"--cache-dir is {args.cache_dir}; use a folder on the disk of each node")
        output_uri(args.cache_dir, "--cache-dir")  # refuses a folder that Ray deletes with a submitted job
    if args.async_validation and args.num_workers == IN_PROCESS:
        raise ConfigError("--async-validation needs workers; leave it out, or give --num-workers 1")
    if args.async_validation and args.num_workers[0] < args.num_workers[1]:
        raise ConfigError("--async-validation needs a fixed --num-workers, not MIN:MAX; leave one of the two out")


if __name__ == "__main__":
    run(main)
