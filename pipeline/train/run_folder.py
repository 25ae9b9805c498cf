"""RUN: whose it is. `config.json` says what the run is, and `initial/` is the model that it starts from.

A folder is claimed by the first command that writes there. It goes on with the same settings alone once a step of it
was logged or saved; until then a command with other settings takes its place, since nothing would be lost.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ast_core.batch import Norm
from ast_core.checkpoints import ModelConfig
from ast_core.errors import ConfigError, DataError
from ast_core.models.ast import ASTModel
from ast_core.recipe import EXECUTION_KEYS
from ast_core.schedule import WARMUP_STEPS
from pipeline import storage
from pipeline.dataset import Clips, PreparedDataset
from pipeline.locks import exclusive
from pipeline.redaction import without_secrets
from pipeline.train import models
from pipeline.train.checkpoints import CHECKPOINTS, checkpoint_folders
from pipeline.train.data.feed import layout
from pipeline.train.evaluation.epoch_results import REMEDY
from pipeline.train.metrics_files import has_records
from pipeline.versions import tool_versions

MAY_CHANGE = [f"recipe.{key}" for key in EXECUTION_KEYS]
"""Where a command may differ from what RUN/config.json says of the run that it goes on with."""

INITIAL = "initial"
FILES_WITHOUT_TRAINING = (
    *(INITIAL, "tensorboard", "metrics", CHECKPOINTS),
    *("metrics.jsonl", "mlflow.json", "report.html", "nonfinite.json", "stopped.json"),
)
"""What a command that trained no step may leave in RUN; goes when another one takes its place."""


@dataclass(frozen=True)
class RunIdentity:
    """What makes a run this run and no other; `about` is recorded beside it and may change."""

    settings: Mapping[str, Any]
    order: Mapping[str, str]
    about: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        dataset: PreparedDataset,
        splits: Mapping[str, Sequence[str]],
        clips: Mapping[str, Clips],
        *,
        init_from: tuple[str, Norm] | None,
        num_workers: Sequence[int],
    ) -> "RunIdentity":
        """`splits` and `clips` have the keys `train` and `eval`; `init_from` is a model's URI and its norm."""
        settings: dict[str, Any] = {
            "recipe": config.recipe.to_dict(),
            "train_splits": dataset.fingerprint(splits["train"]),
            "eval_splits": dataset.fingerprint(splits["eval"]),
            "train_layout": layout(clips["train"]),
        }
        if init_from is not None:
            model, norm = init_from
            settings["init_from"] = {"model": model, "mean": norm.mean, "std": norm.std}
        data = without_secrets(dataset.uri)
        about = {"data": data, "num_workers": list(num_workers), "tool_versions": tool_versions()}
        return cls(settings, {what: clip_order(clips[what]) for what in ("train", "eval")}, about)


def clip_order(clips: Clips) -> str:
    """A hash of the clips in their order. Without a loop over them in Python: there may be two million."""
    joined = pc.binary_join(pa.ListArray.from_arrays([0, len(clips)], clips.clip_id), "\n")
    return hashlib.sha256(joined[0].as_buffer()).hexdigest()


def reserve_folder(
    run: str, identity: RunIdentity, config: ModelConfig, make_model: Callable[[], ASTModel]
) -> Callable[[], None] | None:
    """Write RUN/config.json and RUN/initial, or see that those there are of this same run.

    The model to start from is made here, once, so that only this machine needs the network or the weight file.

    Returns what is still to be called before training starts, within the job's hold of RUN: on object storage a folder
    that another command claimed is taken over there alone, as that command may be training by now.

    Raises:
        ConfigError: RUN is that of another run.
        DataError: RUN holds something else, or another job is training it.
    """
    if _is_begun(run, identity):
        return None
    before = _read(run)
    if before is not None and not storage.is_local(run):
        return lambda: _write(run, identity, config, make_model())
    model = make_model()
    with exclusive("train", run):
        if _read(run) != before:  # another command claimed it meanwhile, and may be about to train
            check_reservation(run, identity)
        elif not _is_begun(run, identity):
            _write(run, identity, config, model)
    return None


def check_reservation(run: str, identity: RunIdentity) -> None:
    """Raise ConfigError where RUN is not this run, or no longer: another command may have claimed it meanwhile."""
    _check_same_run(run, _read(run) or {}, identity)


def recorded_start_norm(run: str, model: str) -> Norm | None:
    """The norm of the model that RUN was begun from, if that is `model`, which may be gone by now."""
    said = (_read(run) or {}).get("init_from")
    if not isinstance(said, dict) or said.get("model") != model or not models.exists(storage.join(run, INITIAL)):
        return None
    return Norm(said["mean"], said["std"])


def has_trained(run: str) -> bool:
    """Whether a step of RUN was logged or saved, or an epoch evaluated."""
    return (
        has_records(run)
        or bool(storage.list_files(storage.join(run, "evaluation")))
        or bool(checkpoint_folders(storage.join(run, CHECKPOINTS)))
    )


def record_computed(run: str, computed: Mapping[str, Any]) -> None:
    """Write into RUN/config.json what the workers compute in, beside what the recipe asks for."""
    config = _read(run) or {}
    if config.get("computed") != computed:
        storage.write_checked_json(_config_json(run), config | {"computed": dict(computed)})


def _config_json(run: str) -> str:
    return storage.join(run, "config.json")


def _read(run: str) -> dict[str, Any] | None:
    """RUN/config.json; None where nobody has claimed RUN."""
    if not storage.exists(_config_json(run)):
        return None
    return storage.read_checked_json(_config_json(run), remedy=REMEDY)


def _is_begun(run: str, identity: RunIdentity) -> bool:
    """Whether RUN is this run, and all there that it begins with."""
    there = _read(run)
    if there is None:
        if not storage.is_empty(run):
            raise DataError(f"{run} is not empty and holds no run; give a new folder as --output")
        return False
    try:
        _check_same_run(run, there, identity)
    except ConfigError:
        if has_trained(run):
            raise
        return False
    return models.exists(storage.join(run, INITIAL))


def _write(run: str, identity: RunIdentity, config: ModelConfig, model: ASTModel) -> None:
    if _read(run) is not None:
        for name in FILES_WITHOUT_TRAINING:
            storage.delete(storage.join(run, name))
    what = {**identity.settings, "clip_order": dict(identity.order), **identity.about}
    storage.write_checked_json(_config_json(run), what)
    models.save(storage.join(run, INITIAL), model.state_dict(), config)


def _check_same_run(run: str, there: dict[str, Any], identity: RunIdentity) -> None:
    """`there` is RUN's config.json. The same clips in another order are other batches, and other sums of scores."""
    settings, order = dict(identity.settings), dict(identity.order)
    for what in order:
        began_with, given = (list(config.get(f"{what}_splits", {})) for config in (there, settings))
        if given != began_with and set(given) == set(began_with):
            raise ConfigError(
                f"{run} was begun with --{what}-splits {' '.join(began_with)}; give them in this order, or another "
                "--output"
            )
    compared = {"init_from": None} | settings
    if differences := _differences({key: _as_of_now(there).get(key) for key in compared}, compared):
        raise ConfigError(f"{run} holds another run ({'; '.join(differences[:3])}); give another --output")
    if there.get("clip_order", order) != order:  # earlier versions noted the order of splits alone
        raise ConfigError(
            f"{run} was begun on these clips in another order, the data set was prepared anew; give another --output"
        )


def _as_of_now(there: dict[str, Any]) -> dict[str, Any]:
    """A config.json with what earlier versions did without saying it: 1,000 steps of warm-up, whatever the run."""
    recipe = there.get("recipe")
    if not isinstance(recipe, dict) or "warmup_steps" in recipe:
        return there
    return there | {"recipe": recipe | {"warmup_steps": WARMUP_STEPS if recipe.get("warmup", True) else None}}


def _differences(there: Any, here: Any, path: str = "") -> list[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [*here, *(key for key in there if key not in here)]
        return [d for key in keys for d in _differences(there.get(key), here.get(key), f"{path}.{key}".lstrip("."))]
    return [] if there == here or path in MAY_CHANGE else [f"{path} was {there}, is {here}"]
