"""Reading and writing models by URI, on disk or object storage: model folders and other projects' checkpoints."""

import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import torch
from torch import Tensor

from ast_core.calibration import ModelCalibration
from ast_core.checkpoints import (
    CALIBRATION_FILE,
    CHECKPOINT_FILES,
    CONFIG_FILE,
    TORCH_WEIGHTS_FILE,
    WEIGHTS_FILE,
    ModelConfig,
    read_checkpoint,
    save_model,
)
from ast_core.errors import ConfigError, DataError, UserError
from ast_core.features import FeatureSettings
from ast_core.labels import LabelVocabulary
from ast_core.models import create_model
from ast_core.models.registry import model_kind
from ast_core.models.tagger import Tagger
from ast_core.recipe import Recipe
from pipeline import storage
from pipeline.dataset import PreparedDataset

COPY_BYTES = 1 << 24

CLASSES_SHOWN = 5
"""Number of classes that an error message names."""


@dataclass(frozen=True)
class Start:
    """A trained model to start from."""

    uri: str
    model: Tagger
    config: ModelConfig


def start_from(uri: str, recipe: Recipe, features: FeatureSettings) -> Start:
    """The model at `uri`, in any format, to start a run of `recipe` on data with `features` from.

    Raises:
        ConfigError: it is of another kind or size, or was trained on other features.
    """
    found = find(uri)
    model, config = read(found)
    if config.recipe.model != recipe.model:
        raise ConfigError(f"--init-from {uri} is the model {config.recipe.model}, this run's is {recipe.model}")
    if reason := model_kind(recipe.model).why_no_start_from(config.recipe, recipe):
        raise ConfigError(f"--init-from {uri} {reason}")
    if other := features.differences(config.features):
        raise ConfigError(f"--init-from {uri} was trained on other features than those of this data set: {other}")
    return Start(found, model, config)


def class_order(of_model: LabelVocabulary, of_data: LabelVocabulary) -> list[int] | None:
    """The model's index of each class of the data; None if model and data have different classes.

    Classes are compared by name, because a Hugging Face folder has nothing else, and the MIDs of a list may be the
    numbers of its rows; then by MID, as names may be translated. The order may differ, as in the published Speech
    Commands checkpoint.
    """
    both = ((of_model.names, of_data.names), (of_model.mids, of_data.mids))
    for theirs, ours in both:
        if len(set(theirs)) == len(theirs) and sorted(theirs) == sorted(ours):
            return [theirs.index(label) for label in ours]
    return list(range(len(of_data))) if any(theirs == ours for theirs, ours in both) else None


def differing(of_model: LabelVocabulary, of_data: LabelVocabulary) -> str:
    """One line that names some of the classes that only one of two vocabularies has."""
    parts = []
    for who, ours, theirs in (("only the model has", of_model, of_data), ("only the data has", of_data, of_model)):
        known = {*theirs.mids, *theirs.names}
        missing = [
            name for mid, name in zip(ours.mids, ours.names, strict=True) if mid not in known and name not in known
        ]
        if missing:
            more = f" and {len(missing) - CLASSES_SHOWN:,} more" if len(missing) > CLASSES_SHOWN else ""
            parts.append(f"{who} {', '.join(map(repr, missing[:CLASSES_SHOWN]))}{more}")
    return "; ".join(parts) or "several classes have the same name"


def columns_for(uri: str, config: ModelConfig, dataset: PreparedDataset) -> list[int]:
    """The column of each class of a data set in the scores of the model at `uri`.

    Raises:
        DataError: the model's features or classes are not those of the data set.
    """
    if other := dataset.features.differences(config.features):
        raise DataError(
            f"{uri} was trained on other features than {dataset.uri} has: {other}; prepare the data again with "
            f"--features {config.features.option}"
        )
    columns = class_order(config.labels, dataset.labels)
    if columns is None:
        raise DataError(
            f"{uri} was trained for other labels ({len(config.labels)} classes) than {dataset.uri} has "
            f"({len(dataset.labels)}): {differing(config.labels, dataset.labels)}"
        )
    return columns


def initial_model(recipe: Recipe, start: Start | None = None, labels: LabelVocabulary | None = None) -> Tagger:
    """The model that training starts from: pretrained as the recipe says, with new weights drawn by the seed.

    With `start` it has that model's weights, also those of the head if `labels` are the same classes.

    Raises:
        DataError: the weights cannot be fetched or do not fit.
    """
    torch.manual_seed(recipe.seed)
    if start is not None:
        model = create_model(**recipe.model_args())
        model.start_from(start.model, None if labels is None else class_order(start.config.labels, labels))
        return model
    with ExitStack() as stack:
        weights: dict[str, Any] = {
            key: stack.enter_context(_local_weights(value)) if key.endswith("_weights") and value is not None else value
            for key, value in recipe.initial_weights().items()
        }
        return create_model(**recipe.model_args(), **weights)


def exists(uri: str) -> bool:
    return all(storage.exists(storage.join(uri, name)) for name in (WEIGHTS_FILE, CONFIG_FILE))


def save(uri: str, state: Mapping[str, Tensor], config: ModelConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, state, config)
        publish(Path(folder), uri)


def find(uri: str) -> str:
    """The absolute URI of a checkpoint in any format: `uri` itself, or the best model if `uri` is a run."""
    fs, path = storage.resolve(uri)
    if fs.get_file_info(path).is_file:
        return storage.absolute(uri)
    for folder in (uri, storage.join(uri, "best")):
        if any(storage.exists(storage.join(folder, name)) for name in (WEIGHTS_FILE, TORCH_WEIGHTS_FILE)):
            return storage.absolute(folder)
    raise DataError(
        f"{uri} is neither a file of weights, nor a folder with {WEIGHTS_FILE}, nor a run with a best model"
    )


def sha256(model: Tagger, config: ModelConfig) -> str:
    """A hash of a model's weights and config, which is the same in every format."""
    digest = hashlib.sha256(config.to_json().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def calibration_file(uri: str) -> str:
    """The file with the calibration of the model at `uri`, which is the result of `find`.

    Raises:
        ConfigError: the model is a file of weights, beside which no calibration can lie.
    """
    fs, path = storage.resolve(uri)
    if fs.get_file_info(path).is_file:
        raise ConfigError(
            f"{uri} is a file of weights, and a calibration lies in a model's folder: first make one with "
            "jobs/export.py --format ours"
        )
    return storage.join(uri, CALIBRATION_FILE)


def read_calibration(uri: str, model: Tagger, config: ModelConfig) -> ModelCalibration | None:
    """The calibration of the model at `uri`, which is the result of `find`; None if it has none.

    Raises:
        DataError: the file is damaged, or was made for other weights or classes.
    """
    fs, path = storage.resolve(uri)
    if fs.get_file_info(path).is_file or not storage.exists(file := calibration_file(uri)):
        return None
    remedy = "run jobs/calibrate.py again, or delete it"
    value = storage.read_checked_json(file, remedy=remedy, is_required=lambda _: True)
    if value.get("model_sha256") != sha256(model, config):
        raise DataError(f"{file} was made for other weights than those beside it; {remedy}")
    return ModelCalibration.from_dict(value, config.labels, origin=file)


def write_calibration(uri: str, made: ModelCalibration, model: Tagger, config: ModelConfig) -> str:
    """Write the calibration of the model at `uri`, which is the result of `find`, and return the file's URI."""
    file = calibration_file(uri)
    storage.write_checked_json(file, made.to_dict(config.labels) | {"model_sha256": sha256(model, config)})
    return file


def read(uri: str, **given: Any) -> tuple[Tagger, ModelConfig]:
    """Read the model at `uri` with `read_checkpoint`, to which `given` is passed. A remote model is copied first."""
    with local_copy(uri) as path, _errors_name_uri(uri, path):
        return read_checkpoint(path, **given)


@contextmanager
def _local_weights(uri: str) -> Iterator[str]:
    """The path of a weight file on this machine's disk. A local file need not exist."""
    if "://" not in uri:
        yield uri
        return
    if not storage.exists(uri):
        raise DataError(f"there is no weight file {uri}")
    with local_copy(uri) as path, _errors_name_uri(uri, path):
        yield path


@contextmanager
def _errors_name_uri(uri: str, path: str) -> Iterator[None]:
    """Replace `path`, a temporary copy, by `uri` in the text of errors."""
    try:
        yield
    except UserError as err:
        raise type(err)(str(err).replace(path, uri)) from err


@contextmanager
def local_copy(uri: str) -> Iterator[str]:
    """A path on this machine's disk with the weight file or model folder `uri`; a remote one is copied."""
    fs, path = storage.resolve(uri)
    if isinstance(fs, pafs.LocalFileSystem):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="ast-checkpoint-") as folder:
        if fs.get_file_info(path).is_file:
            copy = Path(folder) / Path(path).name
            _copy(fs, path, copy)
            yield str(copy)
            return
        existing = [name for name in CHECKPOINT_FILES if storage.exists(storage.join(uri, name))]
        for name in existing:
            if name != TORCH_WEIGHTS_FILE or WEIGHTS_FILE not in existing:
                _copy(fs, f"{path}/{name}", Path(folder) / name)
        yield folder


def _copy(fs: pafs.FileSystem, path: str, target: Path) -> None:
    with fs.open_input_file(path) as source, open(target, "wb") as file:
        shutil.copyfileobj(source, file, COPY_BYTES)


def publish(path: Path, uri: str) -> None:
    """Copy a local file, or the files of a folder, to `uri`. The config is last: a folder that has it is complete."""
    if path.is_file():
        with open(path, "rb") as source:
            storage.write_file(uri, lambda file: shutil.copyfileobj(source, file, COPY_BYTES))
        return
    for part in sorted(path.iterdir(), key=lambda part: (part.name == CONFIG_FILE, part.name)):
        publish(part, storage.join(uri, part.name))
