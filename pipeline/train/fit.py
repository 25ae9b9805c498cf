"""A training run from its settings to its results: check, reserve RUN, train with Ray Train, resume."""

import logging
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

import ray
import torch
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.exceptions import OutOfMemoryError, RayError
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
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from ast_core.batch import Norm
from ast_core.checkpoints import ModelConfig
from ast_core.errors import ConfigError, UserError
from ast_core.features import FEATURES
from ast_core.labels import LabelVocabulary
from ast_core.metrics import key_metrics
from ast_core.models.registry import model_kind
from ast_core.models.tagger import Tagger
from ast_core.recipe import DATA, Recipe
from pipeline import storage
from pipeline.cluster import ray_is_ours, resources_of_nodes
from pipeline.dataset import Clips, PreparedDataset
from pipeline.lease import Held
from pipeline.locks import exclusive
from pipeline.os_errors import explain, nearly_full
from pipeline.redaction import without_secrets
from pipeline.train import data_checks, models, run_folder
from pipeline.train.async_validation import RETRIED, validate_checkpoint
from pipeline.train.checkpoints import CHECKPOINTS, checkpoint_folders, unlisted_checkpoints
from pipeline.train.data_identity import data_identity
from pipeline.train.evaluation.run_report import write_run_report
from pipeline.train.metrics_log import read_summary
from pipeline.train.mlflow_log import check_mlflow
from pipeline.train.network_interface import NodeAddressConfig
from pipeline.train.resources import check_execution, known_nodes, worker_resources, workers_line
from pipeline.train.room import EndLongWaits
from pipeline.train.run_folder import RunIdentity
from pipeline.train.settings import IN_PROCESS, TrainSettings
from pipeline.train.worker import train_worker
from pipeline.train.worker_config import TrainJob, stopped_json

COORDINATOR_S = 60.0
"""Longest wait for the actor through which Ray Train requests resources. After it training begins without the actor."""


@dataclass(frozen=True)
class ClaimedRun:
    """A run that may begin: its settings are consistent, and RUN is reserved for it."""

    settings: TrainSettings
    uri: str
    data: str
    recipe: Recipe
    about: Sequence[str]
    """Lines for the user: the data, the norm, and warnings."""
    identity: RunIdentity
    take_over: Callable[[], None] | None
    """A function to call before training starts (`run_folder.reserve_folder`)."""

    @property
    def is_finished(self) -> bool:
        return storage.exists(storage.join(self.uri, "summary.json"))


def claim(settings: TrainSettings) -> ClaimedRun:
    """Check settings against the data, this machine and RUN, and record the run's identity in RUN.

    Raises:
        ConfigError: options or recipe keys do not fit the data or each other, or RUN belongs to another run.
        DataError: the data set or a split does not exist, or RUN contains something else.
    """
    recipe, run = settings.recipe, settings.output
    dataset = PreparedDataset.open(settings.data)
    splits = {"train": settings.train_splits, "eval": settings.eval_splits}
    clips = {what: dataset.clips(of) for what, of in splits.items()}
    recipe = _fit_to_data(recipe, dataset, *clips.values())
    recipe, lines = data_checks.fit_warmup(recipe, len(clips["train"]))
    lines += data_checks.step_lines(recipe, len(clips["train"]))
    lines += data_checks.check_classes(recipe, dataset.labels, *clips.values())
    for what, name in {"train": "training", "eval": "evaluation"}.items():
        lines += data_checks.length_lines(
            clips[what].num_frames, recipe.input_tdim, name, dataset.features, timem=recipe.timem
        )
        lines += data_checks.silence_lines(Norm(*dataset.norm(splits[what])), name)
    lines += data_checks.overlap_lines(clips["train"], clips["eval"], settings.train_splits, settings.eval_splits)
    if settings.async_validation and recipe.patience is not None:
        raise ConfigError("patience needs the result of an epoch before the next; leave out --async-validation")
    if settings.mlflow:
        check_mlflow(settings.mlflow)
    nodes = known_nodes(settings.address, settings.num_cpus)
    if nodes is not None and not storage.exists(storage.join(run, "summary.json")):
        check_execution(recipe, use_gpu=worker_resources(settings, nodes).use_gpu)
    init_from = None
    if settings.init_from is not None:
        if recipe.audioset_pretrain:
            raise ConfigError("--init-from and audioset_pretrain both name weights to start from; give one")
        start = cache(partial(models.start_from, settings.init_from, recipe, dataset.features))
        # If the run has started from this model, the model need not exist any more.
        model = without_secrets(storage.absolute(settings.init_from))
        init_from = model, run_folder.recorded_start_norm(run, model) or start().config.norm
        recipe = _from_own_model(recipe, init_from[1], settings.overrides)
    norm = choose_norm(recipe, dataset, settings.train_splits)
    config = ModelConfig(_without_keys(recipe), norm, dataset.labels, dataset.features)
    data = data_identity(dataset, splits, clips)
    identity = RunIdentity.of(config, data, data_uri=dataset.uri, init_from=init_from, num_workers=settings.num_workers)
    make_model = partial(_initial_model, recipe, dataset.labels, None if settings.init_from is None else start)
    take_over = run_folder.reserve_folder(run, identity, config, make_model)
    lines += [] if take_over else run_folder.changed_features_lines(run, identity)
    whose = "the data set's own" if recipe.norm_stats == "data" else "the recipe's"
    about = (
        f"{len(clips['train']):,} clips to train on, {len(clips['eval']):,} to evaluate on, "
        f"{len(dataset.labels)} classes; normalised by {whose} mean {norm.mean:.4f} and std {norm.std:.4f}"
    )
    return ClaimedRun(settings, run, dataset.uri, config.recipe, [about, *lines], identity, take_over)


@contextmanager
def session(
    *runs: ClaimedRun, ray_session: Callable[[str, int | None], AbstractContextManager[None]]
) -> Iterator[Mapping[str, Held]]:
    """Lock the unfinished runs of one command, and start Ray if they need workers. Yields the locks by the runs' URIs.

    Raises:
        DataError: another job has locked one of them.
    """
    settings, unfinished = runs[0].settings, [run for run in runs if not run.is_finished]
    held: dict[str, Held] = {}
    with ExitStack() as locked:
        for run in unfinished:
            if storage.is_local(run.uri):  # before Ray is started
                held[run.uri] = locked.enter_context(exclusive("train", run.uri))
        for run in unfinished:
            storage.check_writable(run.uri)
        if unfinished and settings.num_workers != IN_PROCESS:
            locked.enter_context(ray_session(settings.address, settings.num_cpus))
        for run in unfinished:
            if run.uri not in held:
                held[run.uri] = locked.enter_context(exclusive("train", run.uri))
        yield held


def train_run(claimed: ClaimedRun, held: Mapping[str, Held]) -> None:
    """Train a run to the end, or resume it, within a `session`, with its locks. Prints data, warnings and results."""
    settings, run = claimed.settings, claimed.uri
    print(*claimed.about, sep="\n", flush=True)
    if claimed.is_finished:
        print("this run is finished", results(run, claimed.recipe), sep="\n")
        return
    if settings.num_workers == IN_PROCESS:
        logging.basicConfig(format="%(message)s")  # the format in which Ray shows the logs of workers
        logging.getLogger("ray").setLevel(logging.WARNING)  # the same level as in workers
    nodes = [] if settings.num_workers == IN_PROCESS else resources_of_nodes()
    wanted = worker_resources(settings, nodes)
    use_gpu, cpus = wanted.use_gpu, wanted.cpus
    check_execution(claimed.recipe, use_gpu=use_gpu)
    if not wanted.has_room(nodes):
        print(f"{wanted.room_line(nodes)} now; training begins when it has grown", flush=True)
    print(workers_line(wanted, _num_gpus()), flush=True)
    if claimed.take_over is not None:
        claimed.take_over()
    run_folder.check_reservation(run, claimed.identity)
    # In this process Ray keeps no list of checkpoints, but workers may have saved some before.
    find_checkpoints = checkpoint_folders if settings.num_workers == IN_PROCESS else unlisted_checkpoints
    fs, path = storage.resolve(run)
    job = TrainJob(
        data=claimed.data,
        train_splits=settings.train_splits,
        eval_splits=settings.eval_splits,
        data_identity=dict(claimed.identity.data),
        run=run,
        recipe=claimed.recipe.to_dict(),
        use_gpu=use_gpu,
        threads=cpus,
        log_every_steps=settings.log_every_steps,
        checkpoint_every_s=settings.checkpoint_every_s,
        saves_checkpoints=settings.num_workers != IN_PROCESS,
        cache_dir=settings.cache_dir,
        cache_bytes=round(settings.cache_gb * 1e9),
        mlflow_uri=settings.mlflow,
        async_validation=settings.async_validation,
        unlisted_checkpoints=find_checkpoints(storage.join(run, CHECKPOINTS)),
        lock=asdict(held[run]),
    )
    least, most = settings.num_workers
    trainer = _Trainer(
        train_worker,
        train_loop_config=asdict(job),
        torch_config=NodeAddressConfig(),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]  # mypy sees Train V1; V2 runs
            num_workers=most if least == most else (least, most),  # type: ignore[arg-type]  # the same
            elastic_resize_monitor_interval_s=settings.resize_every_s,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cpus} | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=RunConfig(  # type: ignore[call-arg]  # the same
            storage_path=path,
            storage_filesystem=fs,
            name=CHECKPOINTS,
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=settings.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),  # for Ray's own lines; ours are still shown
            callbacks=[EndLongWaits(wanted, settings.longest_wait_s)],  # type: ignore[list-item]  # the same
        ),
        validation_config=_validation(job, use_gpu) if settings.async_validation else None,
    )
    storage.delete(stopped_json(run))
    _fit(trainer, run)
    if storage.exists(stopped_json(run)):
        raise UserError(storage.read_json(stopped_json(run))["error"])
    print(results(run, claimed.recipe))


def _fit_to_data(recipe: Recipe, dataset: PreparedDataset, train: Clips, evaluation: Clips) -> Recipe:
    num_classes = len(dataset.labels)
    if recipe.label_dim not in (None, num_classes):
        raise ConfigError(f"label_dim is {recipe.label_dim}; {dataset.uri} has {num_classes} classes, leave it out")
    _check_features(recipe, dataset)
    if recipe.loss == "CE":
        for clips in (train, evaluation):
            if (clips.labels.value_lengths().to_numpy() != 1).any():
                raise ConfigError(
                    "loss CE takes exactly one label a clip; this data has clips with several: use loss BCE"
                )
    return replace(recipe, label_dim=num_classes)


def _check_features(recipe: Recipe, dataset: PreparedDataset) -> None:
    """Raise ConfigError if the data set has other features than the recipe, or another number of bins."""
    num_mel_bins = dataset.features.num_mel_bins
    if recipe.features != DATA and (other := dataset.features.differences(FEATURES[recipe.features])):
        raise ConfigError(
            f"the recipe is for the features {recipe.features}, and {dataset.uri} has others: {other}; prepare the "
            f"data again with --features {recipe.features}, or set features {DATA} and input_fdim {num_mel_bins}"
        )
    if recipe.input_fdim != num_mel_bins:
        raise ConfigError(
            f"input_fdim is {recipe.input_fdim}, and {dataset.uri} has {num_mel_bins} mel bins; set input_fdim "
            f"{num_mel_bins}"
        )


def _initial_model(recipe: Recipe, labels: LabelVocabulary, start: Callable[[], models.Start] | None) -> Tagger:
    return models.initial_model(recipe, None if start is None else start(), labels)


def _without_keys(recipe: Recipe) -> Recipe:
    """`recipe` for RUN's files and the workers: without keys in URIs, because only this command reads weight files."""
    imagenet, audioset = (
        None if uri is None else without_secrets(uri) for uri in (recipe.imagenet_weights, recipe.audioset_weights)
    )
    return replace(recipe, imagenet_weights=imagenet, audioset_weights=audioset)


def _from_own_model(recipe: Recipe, norm: Norm, overrides: Collection[str]) -> Recipe:
    """`recipe` for a run that starts from a model with this norm: with the norm, and without other weights."""
    recipe = replace(recipe, **model_kind(recipe.model).random_weights, imagenet_weights=None)
    if recipe.norm_stats == "data" and "norm_stats" in overrides:
        return recipe
    of_model: dict[str, Any] = {"dataset_mean": norm.mean, "dataset_std": norm.std, "norm_divisor": norm.divisor}
    not_given = {key: value for key, value in of_model.items() if key not in overrides}
    return replace(recipe, norm_stats="recipe", **not_given)


def choose_norm(recipe: Recipe, dataset: PreparedDataset, train_splits: Sequence[str]) -> Norm:
    """The recipe's published norm, or that of the training splits."""
    if recipe.norm_stats == "recipe":
        return Norm(recipe.dataset_mean, recipe.dataset_std, recipe.norm_divisor)
    if recipe.audioset_pretrain:
        print("warning: the AudioSet weights expect the recipe's mean and std; norm_stats data gives them others")
    norm = Norm(*dataset.norm(train_splits), recipe.norm_divisor)
    data_checks.check_norm(norm, train_splits)
    return norm


def _num_gpus() -> int:
    """GPUs of the cluster, or of this machine if Ray is not there."""
    if not ray.is_initialized():
        return torch.cuda.device_count()
    return sum(int(node.get("GPU", 0)) for node in resources_of_nodes())


def _validation(job: TrainJob, use_gpu: bool) -> ValidationConfig:
    return ValidationConfig(
        validate_checkpoint,  # type: ignore[arg-type]  # Ray passes the arguments of task_config
        task_config=ValidationTaskConfig({"job": asdict(job)}),
        ray_remote_kwargs={"num_cpus": job.threads, "num_gpus": int(use_gpu), "retry_exceptions": list(RETRIED)},
    )


class _Trainer(TorchTrainer):
    """A trainer without two actors that our runs do not need.

    One is for Ray's data sets: our workers read the shards themselves. The other frees the workers' CPUs if the
    trainer's own process dies. It is left out if this Ray ends then: it asks Ray's dashboard, which a Ray of our own
    does not have, and prints a warning every second.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]  # mypy sees Train V1
        unused = (DatasetsCallback, *([PlacementGroupCleanerCallback] if ray_is_ours() else []))
        return [one for one in callbacks if not isinstance(one, unused)]


def _fit(trainer: TorchTrainer, run: str) -> None:
    # A thread of Ray Train in another process looks for its cluster, and fails if several run on this machine.
    ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")
    if ray.is_initialized():
        # The controller waits 5 s for this actor, and prints tracebacks if its process takes longer to start.
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
                raise UserError(f"training failed, its checkpoints are complete: {line}") from err
        for cause in causes:
            if isinstance(death := getattr(cause, "health_check_failure", cause), RayError):
                raise _died(death) from err
        if isinstance(err, WorkerGroupError):
            raise
        raise _failed(err) from err


def _died(death: RayError) -> UserError:
    """The process or the machine of a worker ended, as often as --max-failures allows."""
    if isinstance(death, OutOfMemoryError):
        why = "Ray ended it because its machine was nearly out of memory: lower batch_size, or set micro_batch_size"
    else:
        first = next(iter(str(death).strip().splitlines()), type(death).__name__)
        why = f"{first} If its machine was out of memory, lower batch_size, or set micro_batch_size"
    return UserError(f"training failed: a worker died. {why}; the same command resumes from the last checkpoint")


def _failed(err: Exception) -> UserError:
    line = (str(err).strip().splitlines() or [type(err).__name__])[-1]  # Ray's first line does not name the cause
    return UserError(f"training failed: {line}; the same command resumes from the last checkpoint")


def results(run: str, recipe: Recipe) -> str:
    """The results of a finished run in a few lines; writes its report page."""
    summary = read_summary(run)
    models_of = {
        f"best (epoch {summary['best_epoch']})": summary,
        "averaged weights": summary["averaged"],
        "running ensemble": summary["running_ensemble"],
    }
    lines = []
    for name, figures in models_of.items():
        if figures is not None:
            shown = [
                f"{metric.title} {'–' if (value := figures.get(metric.name)) is None else format(value, '.4f')}"
                for metric in key_metrics()
            ]
            lines.append(f"{name:18} {'  '.join(shown)}")
    if recipe.wa_start is not None and recipe.wa_end is not None and summary["epochs"] < recipe.wa_end:
        num_averaged = max(0, summary["epochs"] - recipe.wa_start + 1)
        lines.append(
            f"the run ended after epoch {summary['epochs']}, so the averaged weights are those of {num_averaged} "
            f"epochs in place of {recipe.wa_end - recipe.wa_start + 1}"
        )
    waiting = f"{summary['data_wait_share']:.1%} of the time waiting for data"
    lines.append(f"{summary['clips_per_s']:.1f} clips/s, {waiting}")
    lines.append(f"run: {run}   best model: {storage.join(run, 'best')}   report: {write_run_report(run)}")
    return "\n".join(["", *lines])
