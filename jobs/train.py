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
import logging
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from typing import Any

import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.exceptions import RayError
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
from ast_core.errors import ConfigError, UserError
from ast_core.labels import LabelVocabulary
from ast_core.model import ASTModel
from ast_core.recipe import Recipe
from ast_core.step import Norm
from jobs.common import MAX_CPUS, add_ray_options, output_uri, run
from jobs.ray_session import ray_session
from jobs.recipe_option import overridden, read_recipe, recipe_names
from pipeline import storage
from pipeline.cluster import hold
from pipeline.dataset import Clips, PreparedDataset
from pipeline.os_errors import explain, nearly_full
from pipeline.redaction import without_secrets
from pipeline.train import data_checks, models, run_folder
from pipeline.train.beside import evaluate_beside
from pipeline.train.checkpointing import CHECKPOINTS
from pipeline.train.job import TrainJob, stopped_json
from pipeline.train.mlflow_log import check_mlflow
from pipeline.train.report import read_summary
from pipeline.train.report_page import write_run_report
from pipeline.train.resources import (
    CPUS_BESIDE_GPU,
    IN_PROCESS,
    check_precision,
    known_resources,
    worker_resources,
)
from pipeline.train.run_folder import RunIdentity
from pipeline.train.state import checkpoint_folders, unlisted_checkpoints
from pipeline.train.worker import train_worker

COORDINATOR_S = 60.0
"""How long training waits for the actor by which Ray Train asks for resources; it begins without it then."""

LONGEST_S, MAX_CACHE_GB = 30 * 86_400.0, 1e9
"""Bounds of options that nobody will miss: a month, and an exabyte."""


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
    parser.add_argument(
        "--init-from",
        metavar="MODEL",
        help="start from a trained model instead of what the recipe names: a run, a model's folder, a Hugging Face "
        "folder or a published .pth; its norm is taken over, and its head where the classes are the same",
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
    about: Sequence[str]
    """What is trained on what, and what to know of it, a line each."""
    identity: RunIdentity
    take_over: Callable[[], None] | None
    """To be called before training starts (`run_folder.claim_folder`)."""

    @property
    def is_finished(self) -> bool:
        return storage.exists(storage.join(self.uri, "summary.json"))


def claim(argv: Sequence[str] | None = None) -> ClaimedRun:
    """Check a command line against its data, this machine and RUN, and write down there what the run is.

    Raises:
        ConfigError: options or keys of the recipe do not fit the data or each other, or RUN is that of another run.
        DataError: the data set or a split is not there, or RUN holds something else.
    """
    args, rest = parser().parse_known_args(argv)
    _check_options(args)
    recipe = read_recipe(args.recipe, rest)
    dataset = PreparedDataset.open(args.data)
    splits = {"train": args.train_splits, "eval": args.eval_splits}
    clips = {what: dataset.clips(of) for what, of in splits.items()}
    recipe = _fit_to_data(recipe, dataset, *clips.values())
    recipe, lines = data_checks.fit_warmup(recipe, len(clips["train"]))
    lines += data_checks.step_lines(recipe, len(clips["train"]))
    lines += data_checks.check_classes(recipe, dataset.labels, *clips.values())
    for what, name in {"train": "training", "eval": "evaluation"}.items():
        lines += data_checks.length_lines(clips[what].num_frames, recipe.input_tdim, name)
        lines += data_checks.silence_lines(Norm(*dataset.norm(splits[what])), name)
    lines += data_checks.overlap_lines(clips["train"], clips["eval"], args.train_splits, args.eval_splits)
    run = output_uri(args.output)
    if args.evaluate_beside and recipe.patience is not None:
        raise ConfigError("patience decides by an epoch before the next; leave out --evaluate-beside")
    if args.mlflow:
        check_mlflow(args.mlflow)
    has = known_resources(args.address, args.num_cpus)
    if has is not None and not storage.exists(storage.join(run, "summary.json")):
        check_precision(recipe, use_gpu=_resources(args, has)[0])
    init_from = None
    if args.init_from is not None:
        if recipe.audioset_pretrain:
            raise ConfigError("--init-from and audioset_pretrain both name weights to start from; give one")
        start = cache(partial(models.start_from, args.init_from, recipe))
        # It need not be there any more where the run began from it.
        model = without_secrets(storage.absolute(args.init_from))
        init_from = model, run_folder.norm_begun_from(run, model) or start().config.norm
        recipe = _from_own_model(recipe, init_from[1], overridden(rest))
    norm = choose_norm(recipe, dataset, args.train_splits)
    config = ModelConfig(_without_keys(recipe), norm, dataset.labels)
    identity = RunIdentity.of(config, dataset, splits, clips, init_from=init_from, num_workers=args.num_workers)
    make_model = partial(_initial_model, recipe, dataset.labels, None if args.init_from is None else start)
    take_over = run_folder.claim_folder(run, identity, config, make_model)
    whose = "the data set's own" if recipe.norm_stats == "data" else "the recipe's"
    about = (
        f"{len(clips['train']):,} clips to train on, {len(clips['eval']):,} to evaluate on, "
        f"{len(dataset.labels)} classes; normalised by {whose} mean {norm.mean:.4f} and std {norm.std:.4f}"
    )
    return ClaimedRun(args, run, dataset.uri, config.recipe, [about, *lines], identity, take_over)


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
            held.enter_context(run_folder.sole_job(run.uri, storage.lock(run.uri)))
            storage.check_writable(run.uri)
        if unfinished and args.num_workers != IN_PROCESS:
            held.enter_context(ray_session(args.address, args.num_cpus))
            for run in unfinished:
                if not storage.is_local(run.uri):  # there two clusters, and jobs without workers, are not kept apart
                    held.enter_context(run_folder.sole_job(run.uri, hold("train", run.uri)))
        yield


def train_run(claimed: ClaimedRun) -> None:
    """Train to the end, or go on where an earlier command stopped, within a `session`; say how it ended."""
    args, run = claimed.args, claimed.uri
    print(*claimed.about, sep="\n", flush=True)
    if claimed.is_finished:
        print("this run is finished")
        _say_results(run)
        return
    if args.num_workers == IN_PROCESS:
        logging.basicConfig(format="%(message)s")  # as Ray shows what workers log
        logging.getLogger("ray").setLevel(logging.WARNING)  # as in workers
    use_gpu, cpus = _resources(args)
    check_precision(claimed.recipe, use_gpu=use_gpu)
    if claimed.take_over is not None:
        claimed.take_over()
    run_folder.check_claim(run, claimed.identity)
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
    _fit(trainer, run)
    if storage.exists(stopped_json(run)):
        raise UserError(storage.read_json(stopped_json(run))["error"])
    _say_results(run)


def _check_options(args: argparse.Namespace) -> None:
    """By themselves; whether the workers find room, `_resources` says once Ray is up."""
    least, most = args.num_workers
    if args.num_workers != IN_PROCESS and not 1 <= least <= most:
        raise ConfigError("--num-workers takes 1 or more, MIN:MAX of these, or 0 for this process")
    for option, is_allowed, allowed in (  # nan is not >= 0 either
        ("--cpus-per-worker", args.cpus_per_worker is None or 1 <= args.cpus_per_worker <= MAX_CPUS, "1 or more"),
        ("--max-failures", args.max_failures >= -1, "0 or more, or -1 for no limit"),
        ("--checkpoint-every-s", 0 <= args.checkpoint_every_s <= LONGEST_S, f"0 to {LONGEST_S:,.0f}"),
        ("--resize-every-s", 0 <= args.resize_every_s <= LONGEST_S, f"0 to {LONGEST_S:,.0f}"),
        ("--log-every-steps", args.log_every_steps >= 1, "1 or more"),
        ("--cache-gb", 0 <= args.cache_gb <= MAX_CACHE_GB, "a size, 0 or more"),
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


def _initial_model(recipe: Recipe, labels: LabelVocabulary, start: Callable[[], models.Start] | None) -> ASTModel:
    return models.initial_model(recipe, None if start is None else start(), labels)


def _without_keys(recipe: Recipe) -> Recipe:
    """`recipe` as RUN's files and the workers have it: weight files are read by this command alone, maybe with keys."""
    imagenet, audioset = (
        None if uri is None else without_secrets(uri) for uri in (recipe.imagenet_weights, recipe.audioset_weights)
    )
    return replace(recipe, imagenet_weights=imagenet, audioset_weights=audioset)


def _from_own_model(recipe: Recipe, norm: Norm, overrides: Collection[str]) -> Recipe:
    """`recipe` for a run that starts from a model of that norm: it takes the norm over and names no other weights."""
    recipe = replace(recipe, imagenet_pretrain=False, imagenet_weights=None)
    if recipe.norm_stats == "data" or {"dataset_mean", "dataset_std"} & set(overrides):
        return recipe
    return replace(recipe, dataset_mean=norm.mean, dataset_std=norm.std)


def choose_norm(recipe: Recipe, dataset: PreparedDataset, train_splits: Sequence[str]) -> Norm:
    """The recipe's published figures, or those of the training splits."""
    if recipe.norm_stats == "recipe":
        return Norm(recipe.dataset_mean, recipe.dataset_std)
    if recipe.audioset_pretrain:
        print("warning: the AudioSet weights expect the recipe's mean and std; norm_stats data gives them others")
    norm = Norm(*dataset.norm(train_splits))
    data_checks.check_norm(norm, train_splits)
    return norm


def _resources(args: argparse.Namespace, has: Mapping[str, float] | None = None) -> tuple[bool, int]:
    """Whether workers take a GPU each, and CPUs a worker, where `has` is what there is: by default what Ray has."""
    is_joined = has is None
    if has is None:
        has = {} if args.num_workers == IN_PROCESS else ray.cluster_resources()
    use_gpu, cpus, lacking = worker_resources(
        num_workers=args.num_workers,
        device=args.device,
        cpus_per_worker=args.cpus_per_worker,
        evaluate_beside=args.evaluate_beside,
        is_local=args.address == "local",
        has=has,
    )
    if is_joined:
        print("".join(f"{line}\n" for line in lacking), end="", flush=True)
    return use_gpu, cpus


def _validation(job: TrainJob, use_gpu: bool) -> ValidationConfig:
    return ValidationConfig(
        evaluate_beside,  # type: ignore[arg-type]  # Ray means: with these arguments
        task_config=ValidationTaskConfig({"job": asdict(job)}),
        ray_remote_kwargs={"num_cpus": job.threads, "num_gpus": int(use_gpu)},
    )


def _fit(trainer: TorchTrainer, run: str) -> None:
    # A thread of Ray Train's own, in another process, asks which cluster is its own, and fails where several run.
    ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")
    if ray.is_initialized():
        # The controller waits 5 s for this actor, and where its process takes longer to start, prints tracebacks.
        with suppress(RayError):
            ray.get(get_or_create_autoscaling_coordinator().__ray_ready__.remote(), timeout=COORDINATOR_S)
    try:
        trainer.fit()
    except TrainingFailedError as err:
        failures = list(err.worker_failures.values()) if isinstance(err, WorkerGroupError) else [err]
        causes = [getattr(failure, "cause", getattr(failure, "controller_failure", failure)) for failure in failures]
        for cause in causes:
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from err
        for cause in causes:
            if line := explain(cause, nearly_full(run, tempfile.gettempdir()) or "a temporary folder, or the run's"):
                raise UserError(f"training failed, its checkpoints are whole: {line}") from err
        if isinstance(err, WorkerGroupError):
            raise
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
