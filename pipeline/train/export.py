"""A checkpoint in another format: read it, check the output, write it."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.fs as pafs

from ast_core.calibration import ModelCalibration
from ast_core.checkpoints import (
    CALIBRATION_FILE,
    CHECKPOINT_FILES,
    ModelConfig,
    save_huggingface,
    save_model,
    save_original,
)
from ast_core.errors import ConfigError
from ast_core.labels import LabelVocabulary
from ast_core.models.tagger import Tagger
from ast_core.recipe import Recipe
from pipeline import storage
from pipeline.train import models
from pipeline.train.model_card import CARD_FILE
from pipeline.train.onnx_export import OnnxForm, write_onnx

SUFFIXES = {"original": ".pth", "onnx": ".onnx", "onnx-waveform": ".onnx"}
"""Suffixes of the formats that are one file. The other formats are folders."""


@dataclass(frozen=True)
class Checkpoint:
    """What is exported."""

    uri: str
    model: Tagger
    config: ModelConfig
    """Without the local paths of the weights from which training started."""
    calibration: ModelCalibration | None


def read(checkpoint: str, recipe: Recipe | None, labels: str | None, *, calibrated: bool = False) -> Checkpoint:
    """Read a checkpoint in any format.

    Args:
        recipe: for a file of weights that is not a published one.
        labels: the URI of its classes, a CSV file with index,mid,display_name.
        calibrated: read its calibration too, if it has one.
    """
    uri, vocabulary = models.find(checkpoint), None if labels is None else read_labels(labels)
    model, config = models.read(uri, recipe=recipe, labels=vocabulary)
    calibration = models.read_calibration(uri, model, config) if calibrated else None
    recipe = replace(config.recipe, imagenet_weights=None, audioset_weights=None)
    return Checkpoint(uri, model, replace(config, recipe=recipe), calibration)


def read_labels(uri: str) -> LabelVocabulary:
    """Read a CSV file with index,mid,display_name. Raises DataError if it is not one."""
    return LabelVocabulary.from_csv(storage.read_text(uri), origin=uri)


def check_output(output: str, output_format: str, *, force: bool) -> None:
    """Refuse an output that exists, before any work. With `force`, a file or a model folder may be replaced.

    Raises:
        ConfigError: the output exists, or its name does not fit the format.
    """
    fs, path = storage.resolve(output)
    found, suffix = fs.get_file_info(path), SUFFIXES.get(output_format)
    if suffix is None:
        if found.is_file or not (storage.is_empty(output) or (force and _contains_only_a_model(output))):
            raise ConfigError(
                f"{output} exists and is not empty; give a new folder, or --force to replace a model folder"
            )
    elif not output.endswith(suffix):
        raise ConfigError(f"--output is {output}, and the format is one file; give a name that ends in {suffix}")
    elif found.type != pafs.FileType.NotFound and not (force and found.is_file):
        raise ConfigError(f"{output} exists; give another --output, or --force to replace a file")


def _contains_only_a_model(folder: str) -> bool:
    return {file.rsplit("/", 1)[-1] for file in storage.list_files(folder, recursive=True)} <= {
        *CHECKPOINT_FILES,
        CALIBRATION_FILE,
        CARD_FILE,
    }


def write(output: str, output_format: str, checkpoint: Checkpoint, onnx: OnnxForm) -> list[str]:
    """Write a model to a file or folder, which appears when it is complete. Returns lines about the result.

    Args:
        onnx: settings of the two ONNX formats.
    """
    lines: list[str] = []
    with tempfile.TemporaryDirectory(prefix="ast-export-") as folder:
        made = Path(folder) / "made"
        model, config = checkpoint.model, checkpoint.config
        match output_format:
            case "ours":
                save_model(made, model.state_dict(), config)
                if checkpoint.calibration is not None:
                    models.write_calibration(str(made), checkpoint.calibration, model, config)
                else:  # with --force, that of the model which is replaced
                    storage.delete(storage.join(output, CALIBRATION_FILE))
            case "original":
                save_original(made, model)
            case "huggingface":
                save_huggingface(made, model.state_dict(), config)
                storage.delete(storage.join(output, CALIBRATION_FILE))
            case "onnx" | "onnx-waveform":
                lines = write_onnx(made, checkpoint.uri, model, config, onnx)
        models.publish(made, output)
    return lines
