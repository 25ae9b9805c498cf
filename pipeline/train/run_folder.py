"""The folder of a run and the run's identity: `config.json` identifies the run, `initial/` is the model it starts from.

The first command that writes to a folder reserves it. Once a step was logged or saved, only a command with the same
settings can continue the run. Until then a command with other settings replaces the run, because nothing is lost.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ast_core.batch import Norm
from ast_core.checkpoints import ModelConfig
from ast_core.errors import ConfigError, DataError
from ast_core.features import KALDI128
from ast_core.models.tagger import Tagger
from ast_core.recipe import EXECUTION_KEYS, Recipe
from ast_core.schedule import WARMUP_STEPS
from pipeline import storage
from pipeline.locks import exclusive
from pipeline.redaction import without_secrets
from pipeline.train import models
from pipeline.train.checkpoints import CHECKPOINTS, checkpoint_folders
from pipeline.train.data_identity import changed_content, has_other_sound
from pipeline.train.evaluation.epoch_results import REMEDY
from pipeline.train.metrics_files import has_records
from pipeline.versions import tool_versions

MAY_CHANGE = [f"recipe.{key}" for key in EXECUTION_KEYS]
"""Settings in which a command that resumes a run may differ from RUN/config.json."""

INITIAL = "initial"
FILES_WITHOUT_TRAINING = (
    *(INITIAL, "tensorboard", "metrics", CHECKPOINTS),
    *("metrics.jsonl", "mlflow.json", "report.html", "nonfinite.json", "stopped.json"),
)
"""Files in RUN of a command that trained no step. They are deleted when another command replaces the run."""


@dataclass(frozen=True)
class RunIdentity:
    """The settings that identify a run, the identity of its data, and `about`: recorded facts that may change."""

    settings: Mapping[str, Any]
    data: Mapping[str, Any]
    """`data_identity` of the splits."""
    about: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        data: Mapping[str, Any],
        *,
        data_uri: str,
        init_from: tuple[str, Norm] | None,
        num_workers: Sequence[int],
    ) -> "RunIdentity":
        """`init_from` is a model's URI and its norm."""
        settings: dict[str, Any] = {"recipe": config.recipe.to_dict(), "features": config.features.to_dict()}
        if init_from is not None:
            model, norm = init_from
            settings["init_from"] = {"model": model, "mean": norm.mean, "std": norm.std}
        about = {
            "data": without_secrets(data_uri),
            "num_workers": list(num_workers),
            "tool_versions": tool_versions(),
        }
        return cls(settings, data, about)


def reserve_folder(
    run: str, identity: RunIdentity, config: ModelConfig, make_model: Callable[[], Tagger]
) -> Callable[[], None] | None:
    """Write RUN/config.json and RUN/initial, or check that those that exist belong to this same run.

    The model to start from is created here, once, so that only this machine needs the network or the weight file.

    Returns a function to call before training starts, while the job has the lock of RUN; None if nothing is left to
    do. On object storage only that function writes to a folder that another command reserved. It checks again, because
    that command may have started to train meanwhile.

    Raises:
        ConfigError: RUN belongs to another run.
        DataError: RUN contains something else, or another job is training it.
    """
    if _is_started(run, identity):
        return None
    before = _read(run)
    if before is not None and not storage.is_local(run):

        def take_over() -> None:
            if not _is_started(run, identity):
                _write(run, identity, config, make_model())

        return take_over
    model = make_model()
    with exclusive("train", run):
        if _read(run) != before:  # another command reserved it meanwhile, and may be about to train
            check_reservation(run, identity)
        elif not _is_started(run, identity):
            _write(run, identity, config, model)
    return None


def check_reservation(run: str, identity: RunIdentity) -> None:
    """Raise ConfigError if RUN is not this run, or no longer: another command may have reserved it meanwhile."""
    _check_same_run(run, _read(run) or {}, identity)


def changed_features_lines(run: str, identity: RunIdentity) -> list[str]:
    """A warning if features of the same sound were stored again since RUN began."""
    if not changed_content(_read(run) or {}, identity.data):
        return []
    return [
        f"warning: the data set was prepared again since {run} began, and its features are not equal to the bit: "
        "another kind of CPU or decoder made them, or a few recordings are others now"
    ]


def recorded_start_norm(run: str, model: str) -> Norm | None:
    """The norm of the model that RUN started from, if that model is `model`. The model itself may be gone by now."""
    recorded = _read(run) or {}
    start = recorded.get("init_from")
    if not isinstance(start, dict) or start.get("model") != model or not models.exists(storage.join(run, INITIAL)):
        return None
    return Norm(start["mean"], start["std"], recorded["recipe"].get("norm_divisor", 2.0))


def has_trained(run: str) -> bool:
    """Whether a step of RUN was logged or saved, or an epoch was evaluated."""
    return (
        has_records(run)
        or bool(storage.list_files(storage.join(run, "evaluation")))
        or bool(checkpoint_folders(storage.join(run, CHECKPOINTS)))
    )


def record_computed(run: str, computed: Mapping[str, Any]) -> None:
    """Write the precision, attention etc. that the workers use into RUN/config.json; the recipe may ask for others."""
    config = _read(run) or {}
    if config.get("computed") != computed:
        storage.write_checked_json(_config_json(run), config | {"computed": dict(computed)})


def _config_json(run: str) -> str:
    return storage.join(run, "config.json")


def _read(run: str) -> dict[str, Any] | None:
    """RUN/config.json; None if no command has reserved RUN."""
    if not storage.exists(_config_json(run)):
        return None
    return storage.read_checked_json(_config_json(run), remedy=REMEDY)


def _is_of_a_run(recorded: Any) -> bool:
    """Whether a config.json is a run's. Models and other programs have files of this name too."""
    return isinstance(recorded, dict) and {"recipe", "train_splits", "eval_splits"} <= recorded.keys()


def _is_started(run: str, identity: RunIdentity) -> bool:
    """Whether RUN is this run, and the model that it starts from is complete."""
    recorded = _read(run)
    if recorded is None and storage.is_empty(run):
        return False
    if not _is_of_a_run(recorded):
        raise DataError(f"{run} is not empty and holds no run; give a new folder as --output")
    assert recorded is not None
    try:
        _check_same_run(run, recorded, identity)
    except ConfigError:
        if has_trained(run):
            raise
        return False
    return models.exists(storage.join(run, INITIAL))


def _write(run: str, identity: RunIdentity, config: ModelConfig, model: Tagger) -> None:
    """Write what `_is_started` found missing. A run that has trained can only lack its initial model."""
    if not has_trained(run):
        if _read(run) is not None:
            for name in FILES_WITHOUT_TRAINING:
                storage.delete(storage.join(run, name))
        storage.write_checked_json(_config_json(run), {**identity.settings, **identity.data, **identity.about})
    models.save(storage.join(run, INITIAL), model.state_dict(), config)


def _check_same_run(run: str, recorded: dict[str, Any], identity: RunIdentity) -> None:
    """Raise ConfigError if `recorded`, RUN's config.json, is of another run.

    The order of the clips counts too: another order gives other batches and other sums of scores.
    """
    of_clips = {key: identity.data[key] for key in ("train_splits", "eval_splits", "train_layout")}
    for what in ("train", "eval"):
        began_with, given = (list(config.get(f"{what}_splits", {})) for config in (recorded, of_clips))
        if given != began_with and set(given) == set(began_with):
            raise ConfigError(
                f"{run} was begun with --{what}-splits {' '.join(began_with)}; give them in this order, or another "
                "--output"
            )
    compared = {"init_from": None} | dict(identity.settings) | of_clips
    if differences := _differences({key: _with_old_defaults(recorded).get(key) for key in compared}, compared):
        raise ConfigError(f"{run} holds another run ({'; '.join(differences[:3])}); give another --output")
    order = identity.data["clip_order"]
    if recorded.get("clip_order", order) != order:  # earlier versions recorded only the order of the splits
        raise ConfigError(
            f"{run} was begun on these clips in another order: the data set was prepared again; give another --output"
        )
    changed = changed_content(recorded, identity.data)
    if "labels" in changed:
        raise ConfigError(
            f"{run} was begun with other labels.csv: the data set was prepared again; give another --output"
        )
    if changed and has_other_sound(recorded, identity.data):
        raise ConfigError(
            f"{run} was begun on other sound of these clips: the data set was prepared again; give another --output"
        )


def _with_old_defaults(recorded: dict[str, Any]) -> dict[str, Any]:
    """A config.json with what earlier versions did without recording it: one kind of features, 1,000 warm-up steps, and
    the other keys' defaults."""
    recipe = recorded.get("recipe")
    if not isinstance(recipe, dict):
        return recorded
    defaults = Recipe().to_dict() | {"warmup_steps": WARMUP_STEPS if recipe.get("warmup", True) else None}
    return {"features": KALDI128.to_dict()} | recorded | {"recipe": defaults | recipe}


def _differences(recorded: Any, given: Any, path: str = "") -> list[str]:
    if isinstance(recorded, dict) and isinstance(given, dict):
        keys = [*given, *(key for key in recorded if key not in given)]
        return [d for key in keys for d in _differences(recorded.get(key), given.get(key), f"{path}.{key}".lstrip("."))]
    return [] if recorded == given or path in MAY_CHANGE else [f"{path} was {recorded}, is {given}"]
