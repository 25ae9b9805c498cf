"""Train the Audio Spectrogram Transformer on prepared shards, with DDP over Ray Train workers.

    python jobs/train.py --recipe audioset-balanced --data data --train-splits balanced_train --eval-splits eval \
        --output runs/1
    ray job submit --working-dir . -- python jobs/train.py --recipe esc10 --data s3://bucket/esc10 \
        --train-splits fold2 fold3 fold4 fold5 --eval-splits fold1 --output s3://bucket/runs/1 \
        --num-workers 4 --device cuda

Any key of the recipe can be set on the command line: --lr 1e-4 --epochs 20 --imagenet_pretrain false.
Run again, the same command goes on where it stopped.
"""

if __name__ == "__main__":  # before the imports that follow, which take seconds
    from jobs import entry

    entry.begin()

import argparse
import hashlib
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    ValidationConfig,
    ValidationTaskConfig,
)
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from ast_core.checkpoints import ModelConfig
from ast_core.errors import ConfigError, DataError, UserError
from ast_core.recipe import EXECUTION_KEYS, Recipe
from ast_core.step import Norm
from jobs.common import add_ray_options, output_uri, run
from jobs.ray_session import ray_session
from jobs.recipe_option import read_recipe, recipe_names
from pipeline import storage
from pipeline.cluster import hold
from pipeline.dataset import Clips, PreparedDataset
from pipeline.train import models
from pipeline.train.beside import evaluate_beside
from pipeline.train.checkpointing import CHECKPOINTS
from pipeline.train.feed import layout
from pipeline.train.job import TrainJob, stopped_json
from pipeline.train.judge import REMEDY
from pipeline.train.mlflow_log import check_mlflow
from pipeline.train.report import read_summary
from pipeline.train.report_page import write_run_report
from pipeline.train.state import checkpoint_folders, unlisted_checkpoints
from pipeline.train.worker import train_worker
from pipeline.versions import tool_versions

IN_PROCESS = (0, 0)
"""As --num-workers."""

MAY_CHANGE = [f"recipe.{key}" for key in EXECUTION_KEYS]
"""Where a command may differ from what RUN/config.json says of the run that it goes on with."""

CPUS_BESIDE_GPU = 4
"""CPUs of a worker with a GPU, if there are as many: one computes the step, the others read shards."""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="recipe keys: " + ", ".join(field.name for field in fields(Recipe)),
        allow_abbrev=False,
    )
    parser.add_argument(
        "--recipe", required=True, metavar="NAME|FILE", help=f"{', '.join(recipe_names())}, or a YAML file"
    )
    parser.add_argument("--data", required=True, metavar="URI", help="a prepared data set")
    parser.add_argument("--train-splits", required=True, nargs="+", metavar="SPLIT")
    parser.add_argument("--eval-splits", required=True, nargs="+", metavar="SPLIT")
    parser.add_argument(
        "--output", required=True, metavar="URI", help="folder of the run; on a cluster, storage that all nodes share"
    )
    parser.add_argument(
        "--num-workers",
        type=_num_workers,
        default=(1, 1),
        metavar="N|MIN:MAX",
        help="DDP ranks (default 1); with MIN:MAX as many of them as the cluster has room for, at each moment; 0 "
        "trains in this process, without Ray and saving no checkpoints: for a debugger, or a first try",
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto: cuda if there is a GPU for each worker now; name cuda on a cluster that scales up from none",
    )
    parser.add_argument(
        "--cpus-per-worker",
        type=int,
        metavar="N",
        help=f"default: an equal share of the CPUs, at most {CPUS_BESIDE_GPU} beside a GPU",
    )
    parser.add_argument(
        "--max-failures",
        type=int,
        default=2,
        metavar="N",
        help="how often a failed run goes on from its checkpoint by itself (default 2; -1: always); a node that is "
        "taken away with notice does not count",
    )
    parser.add_argument(
        "--checkpoint-every-s",
        type=float,
        default=600.0,
        metavar="S",
        help="also within epochs (default 600), at a step that is logged",
    )
    parser.add_argument(
        "--resize-every-s",
        type=float,
        default=60.0,
        metavar="S",
        help="with MIN:MAX, how often to look whether there is room for more workers (default 60); with more of them "
        "training goes on from the last checkpoint",
    )
    parser.add_argument(
        "--log-every-steps", type=int, default=20, metavar="N", help="steps between two lines of figures (default 20)"
    )
    parser.add_argument(
        "--cache-dir", metavar="DIR", help="folder on each node's disk that keeps shards of object storage"
    )
    parser.add_argument("--cache-gb", type=float, default=500.0, metavar="GB", help="its size (default 500)")
    parser.add_argument(
        "--evaluate-beside",
        action="store_true",
        help="evaluate an epoch while the next is trained, on CPUs (and a GPU) of one worker more; not with MIN:MAX",
    )
    parser.add_argument("--mlflow", metavar="URI", help="also log to this MLflow tracking server or store")
    add_ray_options(parser)
    return parser


def _num_workers(text: str) -> tuple[int, int]:
    least, _, most = text.partition(":")
    return int(least), int(most or least)


@dataclass(frozen=True)
class ClaimedRun:
    """A run that may begin: what is asked for holds together, and RUN is its own."""

    args: argparse.Namespace
    uri: str
    data: str
    recipe: Recipe
    about: str
    """One line."""

    @property
    def is_finished(self) -> bool:
        return storage.exists(storage.join(self.uri, "summary.json"))


def claim(argv: Sequence[str] | None = None) -> ClaimedRun:
    """Check a command line against its data and RUN, and write down there what the run is.

    Raises:
        ConfigError: options or keys of the recipe do not fit the data or each other, or RUN is that of another run.
        DataError: the data set or a split is not there, or RUN holds something else.
    """
    args, rest = parser().parse_known_args(argv)
    _check_options(args)
    recipe = read_recipe(args.recipe, rest)
    dataset = PreparedDataset.open(args.data)
    train_clips, eval_clips = dataset.clips(args.train_splits), dataset.clips(args.eval_splits)
    recipe = _fit_to_data(recipe, dataset, train_clips, eval_clips)
    norm = choose_norm(recipe, dataset, args.train_splits)
    run = output_uri(args.output)
    if args.evaluate_beside and recipe.patience is not None:
        raise ConfigError("patience decides by an epoch before the next; leave out --evaluate-beside")
    if args.mlflow:
        check_mlflow(args.mlflow)
    whose = "the data set's own" if recipe.norm_stats == "data" else "the recipe's"
    about = (
        f"{len(train_clips):,} clips to train on, {len(eval_clips):,} to evaluate on, {len(dataset.labels)} classes; "
        f"normalised by {whose} mean {norm.mean:.4f} and std {norm.std:.4f}"
    )
    _claim_run(run, ModelConfig(recipe, norm, dataset.labels), dataset, train_clips, eval_clips, args)
    return ClaimedRun(args, run, dataset.uri, recipe, about)


def main(argv: Sequence[str] | None = None) -> int:
    claimed = claim(argv)
    with session(claimed):
        train_run(claimed)
    return 0


@contextmanager
def session(*runs: ClaimedRun) -> Iterator[None]:
    """Hold those runs of one command that are not finished against other jobs, and have Ray where they take workers.

    Raises:
        DataError: another job holds one of them.
    """
    args, unfinished = runs[0].args, [run for run in runs if not run.is_finished]
    with ExitStack() as held:
        for run in unfinished:
            held.enter_context(_sole_job(run.uri, storage.lock(run.uri)))
        if unfinished and args.num_workers != IN_PROCESS:
            held.enter_context(ray_session(args.address, args.num_cpus))
            for run in unfinished:
                if not storage.is_local(run.uri):  # there two clusters, and jobs without workers, are not kept apart
                    held.enter_context(_sole_job(run.uri, hold("train", run.uri)))
        yield


@contextmanager
def _sole_job(run: str, lock: AbstractContextManager[bool]) -> Iterator[None]:
    with lock as is_ours:
        if not is_ours:
            raise DataError(f"another job is training {run}; wait for its end, or stop it")
        yield


def train_run(claimed: ClaimedRun) -> None:
    """Train to the end, or go on where an earlier command stopped, within a `session`; say how it ended."""
    args, run = claimed.args, claimed.uri
    print(claimed.about)
    if claimed.is_finished:
        print("this run is finished")
        _say_results(run)
        return
    if args.num_workers == IN_PROCESS:
        logging.basicConfig(format="%(message)s")  # as Ray shows what workers log
        logging.getLogger("ray").setLevel(logging.WARNING)  # as in workers
    use_gpu, cpus = _resources(args)
    # In this process Ray keeps no list; what workers saved before is there all the same.
    find_checkpoints = checkpoint_folders if args.num_workers == IN_PROCESS else unlisted_checkpoints
    fs, path = storage.resolve(run)
    job = TrainJob(
        data=claimed.data,
        train_splits=args.train_splits,
        eval_splits=args.eval_splits,
        run=run,
        recipe=claimed.recipe.to_dict(),
        use_gpu=use_gpu,
        threads=cpus,
        log_every_steps=args.log_every_steps,
        checkpoint_every_s=args.checkpoint_every_s,
        saves_checkpoints=args.num_workers != IN_PROCESS,
        cache_dir=args.cache_dir and output_uri(args.cache_dir, "--cache-dir"),
        cache_bytes=round(args.cache_gb * 1e9),
        mlflow_uri=args.mlflow,
        evaluate_beside=args.evaluate_beside,
        unlisted_checkpoints=find_checkpoints(storage.join(run, CHECKPOINTS)),
    )
    least, most = args.num_workers
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=asdict(job),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]  # mypy sees Train V1, what runs is V2
            num_workers=most if least == most else args.num_workers,
            elastic_resize_monitor_interval_s=args.resize_every_s,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cpus} | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=RunConfig(  # type: ignore[call-arg]  # the same
            storage_path=path,
            storage_filesystem=fs,
            name=CHECKPOINTS,
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=args.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),  # Ray's own lines; ours come through
        ),
        validation_config=_validation(job, use_gpu) if args.evaluate_beside else None,
    )
    storage.delete(stopped_json(run))
    _fit(trainer)
    if storage.exists(stopped_json(run)):
        raise UserError(storage.read_json(stopped_json(run))["error"])
    _say_results(run)


def _check_options(args: argparse.Namespace) -> None:
    """By themselves; whether the workers find room, `_resources` says once Ray is up."""
    least, most = args.num_workers
    if args.num_workers != IN_PROCESS and not 1 <= least <= most:
        raise ConfigError("--num-workers takes 1 or more, MIN:MAX of these, or 0 for this process")
    for option, is_allowed, allowed in (  # nan is not >= 0 either
        ("--cpus-per-worker", args.cpus_per_worker is None or args.cpus_per_worker >= 1, "1 or more"),
        ("--max-failures", args.max_failures >= -1, "0 or more, or -1 for no limit"),
        ("--checkpoint-every-s", args.checkpoint_every_s >= 0, "0 or more"),
        ("--resize-every-s", args.resize_every_s >= 0, "0 or more"),
        ("--log-every-steps", args.log_every_steps >= 1, "1 or more"),
        ("--cache-gb", 0 <= args.cache_gb < math.inf, "a size, 0 or more"),
    ):
        if not is_allowed:
            given = getattr(args, option.removeprefix("--").replace("-", "_"))
            raise ConfigError(f"{option} is {given}; use {allowed}")
    if args.cache_dir:
        if "://" in args.cache_dir:
            raise ConfigError(f"--cache-dir is {args.cache_dir}; use a folder on the disk of each node")
        output_uri(args.cache_dir, "--cache-dir")  # refuses what the end of a submitted job would delete
    if args.evaluate_beside and args.num_workers == IN_PROCESS:
        raise ConfigError("--evaluate-beside takes workers; leave it out, or give --num-workers 1")
    if args.evaluate_beside and args.num_workers[0] < args.num_workers[1]:
        raise ConfigError("--evaluate-beside takes a fixed --num-workers: MIN:MAX leaves the evaluation no room")


def _fit_to_data(recipe: Recipe, dataset: PreparedDataset, train: Clips, evaluation: Clips) -> Recipe:
    num_classes = len(dataset.labels)
    if recipe.label_dim not in (None, num_classes):
        raise ConfigError(f"label_dim is {recipe.label_dim}; {dataset.uri} has {num_classes} classes, leave it out")
    if recipe.input_fdim != dataset.info["features"]["num_mel_bins"]:
        raise ConfigError(
            f"input_fdim is {recipe.input_fdim}; the data has {dataset.info['features']['num_mel_bins']} mel bins"
        )
    if recipe.loss == "CE":
        for clips in (train, evaluation):
            if (clips.labels.value_lengths().to_numpy() != 1).any():
                raise ConfigError(
                    "loss CE takes exactly one label a clip; this data has clips with several: use loss BCE"
                )
    return replace(recipe, label_dim=num_classes)


def choose_norm(recipe: Recipe, dataset: PreparedDataset, train_splits: Sequence[str]) -> Norm:
    """The recipe's published figures, or those of the training splits."""
    if recipe.norm_stats == "recipe":
        return Norm(recipe.dataset_mean, recipe.dataset_std)
    if recipe.audioset_pretrain:
        print("warning: the AudioSet weights expect the recipe's mean and std; norm_stats data gives them others")
    return Norm(*dataset.norm(train_splits))


def _claim_run(
    run: str,
    config: ModelConfig,
    dataset: PreparedDataset,
    train_clips: Clips,
    eval_clips: Clips,
    args: argparse.Namespace,
) -> None:
    """Write RUN/config.json and RUN/initial, or see that those there are of this same run.

    The model to start from is made here, once, so that only this machine needs the network or the weight file.
    """
    identity: dict[str, Any] = {
        "recipe": config.recipe.to_dict(),
        "train_splits": dataset.fingerprint(args.train_splits),
        "eval_splits": dataset.fingerprint(args.eval_splits),
        "train_layout": layout(train_clips),
    }
    order = {"train": clip_order(train_clips), "eval": clip_order(eval_clips)}
    if _is_begun(run, identity, order):
        return
    model = models.initial_model(config.recipe)
    about = {"data": dataset.uri, "num_workers": list(args.num_workers), "tool_versions": tool_versions()}
    with _sole_job(run, storage.lock(run)):
        if _is_begun(run, identity, order):  # by another job, meanwhile
            return
        storage.write_checked_json(storage.join(run, "config.json"), identity | {"clip_order": order} | about)
        models.save(storage.join(run, "initial"), model.state_dict(), config)


def _is_begun(run: str, identity: dict[str, Any], order: dict[str, str]) -> bool:
    uri = storage.join(run, "config.json")
    if storage.exists(uri):
        _check_same_run(run, storage.read_checked_json(uri, remedy=REMEDY), identity, order)
        return models.exists(storage.join(run, "initial"))
    if not storage.is_empty(run):
        raise DataError(f"{run} is not empty and holds no run; give a new folder as --output")
    return False


def _check_same_run(run: str, there: dict[str, Any], identity: dict[str, Any], order: dict[str, str]) -> None:
    """`there` is RUN's config.json. The same clips in another order are other batches, and other sums of scores."""
    for what in order:
        began_with, given = (list(config.get(f"{what}_splits", {})) for config in (there, identity))
        if given != began_with and set(given) == set(began_with):
            raise ConfigError(
                f"{run} was begun with --{what}-splits {' '.join(began_with)}; give them in this order, or another "
                "--output"
            )
    if differences := _differences({key: there.get(key) for key in identity}, identity):
        raise ConfigError(f"{run} holds another run ({'; '.join(differences[:3])}); give another --output")
    if there.get("clip_order", order) != order:  # earlier versions noted the order of splits alone
        raise ConfigError(
            f"{run} was begun on these clips in another order, the data set was prepared anew; give another --output"
        )


def clip_order(clips: Clips) -> str:
    """A hash of the clips in their order. Without a loop over them in Python: there may be two million."""
    joined = pc.binary_join(pa.ListArray.from_arrays([0, len(clips)], clips.clip_id), "\n")
    return hashlib.sha256(joined[0].as_buffer()).hexdigest()


def _differences(there: Any, here: Any, path: str = "") -> list[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [*here, *(key for key in there if key not in here)]
        return [d for key in keys for d in _differences(there.get(key), here.get(key), f"{path}.{key}".lstrip("."))]
    return [] if there == here or path in MAY_CHANGE else [f"{path} was {there}, is {here}"]


def _resources(args: argparse.Namespace) -> tuple[bool, int]:
    """Whether workers take a GPU each, and CPUs a worker."""
    if args.num_workers == IN_PROCESS:
        use_gpu = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
        return use_gpu, args.cpus_per_worker or os.cpu_count() or 1
    has, (least, most) = ray.cluster_resources(), args.num_workers
    use_gpu = args.device == "cuda" or (args.device == "auto" and has.get("GPU", 0) >= least)
    cpus = args.cpus_per_worker or _share_of_cpus(has, most + args.evaluate_beside, use_gpu, args.address)
    num_tasks = least + args.evaluate_beside
    for kind, wanted in {"CPU": num_tasks * cpus, "GPU": num_tasks * use_gpu}.items():
        if wanted > has.get(kind, 0):
            beside = " with the evaluation beside them" if args.evaluate_beside else ""
            said = f" (--cpus-per-worker {cpus})" if kind == "CPU" and args.cpus_per_worker else ""
            have = f"{least} workers{beside} take {wanted} {kind}s{said}, {{}} has {has.get(kind, 0):.0f}"
            if args.address == "local":
                raise ConfigError(have.format("this machine"))
            print(have.format("the cluster") + " now; training begins when it has grown")
    return use_gpu, cpus


def _share_of_cpus(has: Mapping[str, float], num_tasks: int, use_gpu: bool, address: str) -> int:
    """CPUs of a worker, where the command names none; `has` is what Ray has."""
    num_cpus = int(has.get("CPU", 1))
    if not use_gpu:
        return max(1, num_cpus // num_tasks)
    num_gpus = int(has.get("GPU", 0))
    if address != "local" and num_gpus < num_tasks:  # the nodes that are to come bring CPUs too
        return CPUS_BESIDE_GPU
    return max(1, min(CPUS_BESIDE_GPU, num_cpus // max(1, min(num_tasks, num_gpus))))


def _validation(job: TrainJob, use_gpu: bool) -> ValidationConfig:
    return ValidationConfig(
        evaluate_beside,  # type: ignore[arg-type]  # Ray means: with these arguments
        task_config=ValidationTaskConfig({"job": asdict(job)}),
        ray_remote_kwargs={"num_cpus": job.threads, "num_gpus": int(use_gpu)},
    )


def _fit(trainer: TorchTrainer) -> None:
    # A thread of Ray Train's own, in another process, asks which cluster is its own, and fails where several run.
    ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")
    try:
        trainer.fit()
    except WorkerGroupError as err:
        causes = [getattr(failure, "cause", failure) for failure in err.worker_failures.values()]
        for cause in causes:
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from err
        for cause in causes:
            if isinstance(cause, OSError):  # a full disk, storage that is away
                raise _failed(cause) from err
        raise
    except TrainingFailedError as err:
        raise _failed(err) from err


def _failed(err: Exception) -> UserError:
    line = (str(err).strip().splitlines() or [type(err).__name__])[-1]  # Ray's first line does not name the cause
    return UserError(f"training failed: {line}; the same command goes on from the last checkpoint")


def _say_results(run: str) -> None:
    summary = read_summary(run)

    def line(name: str, figures: dict[str, Any] | None) -> str:
        if figures is None:
            return ""
        shown = {key: "–" if figures[key] is None else f"{figures[key]:.4f}" for key in ("map", "mauc", "accuracy")}
        return f"\n{name:18} mAP {shown['map']}  AUC {shown['mauc']}  accuracy {shown['accuracy']}"

    print(
        line(f"best (epoch {summary['best_epoch']})", summary)
        + line("averaged weights", summary["averaged"])
        + line("running ensemble", summary["running_ensemble"])
        + f"\n{summary['clips_per_s']:.1f} clips/s, {summary['data_wait_share']:.1%} of the time waiting for data"
        + f"\nrun: {run}   best model: {storage.join(run, 'best')}   report: {write_run_report(run)}"
    )


if __name__ == "__main__":
    run(main)
