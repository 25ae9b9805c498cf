"""Read and write models: our model folder, the reference implementation's `.pth`, and Hugging Face's folder.

Our model folder is `model.safetensors` and `config.json`. All three formats contain the same tensors bit for bit, under
different names. `onnx.py` writes ONNX.
"""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ast_core.batch import Norm
from ast_core.checkpoints import huggingface
from ast_core.checkpoints.original import load_original
from ast_core.checkpoints.published import recognise_published
from ast_core.checksums import file_sha256, with_checksum, without_checksum
from ast_core.errors import ConfigError, DataError
from ast_core.features import FEATURES, KALDI128, FeatureSettings
from ast_core.labels import LabelVocabulary
from ast_core.models import create_model
from ast_core.models.pretrained import has_zero_image_heads, to_huggingface, under_our_names
from ast_core.models.tagger import Tagger
from ast_core.recipe import Recipe
from ast_core.text_files import decode_text
from ast_core.weight_files import load_weights, read_weights

logger = logging.getLogger(__name__)
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"
TORCH_WEIGHTS_FILE = "pytorch_model.bin"
"""The weights in older Hugging Face folders, which have no `model.safetensors`."""
CALIBRATION_FILE = "calibration.json"
"""Thresholds and calibrated scores (`ast_core.calibration`). A model works without it."""
CHECKPOINT_FILES = (CONFIG_FILE, PREPROCESSOR_FILE, WEIGHTS_FILE, TORCH_WEIGHTS_FILE)
WEIGHTS_KEY = "weights_sha256"
"""Key of our `config.json` with the SHA-256 of `model.safetensors`."""
RESTORE = "restore it from a copy, or use another checkpoint"
OUR_KEY = "ast_ray"
"""Key of a Hugging Face `config.json` that we wrote. It contains our whole config, with MIDs and the recipe."""


@dataclass(frozen=True)
class ModelConfig:
    """All that is needed to use a trained model: its recipe, the features and norm of its input, and its classes."""

    recipe: Recipe
    norm: Norm
    labels: LabelVocabulary
    features: FeatureSettings = KALDI128

    def __post_init__(self) -> None:
        if self.features.num_mel_bins != self.recipe.input_fdim:
            raise ConfigError(
                f"input_fdim is {self.recipe.input_fdim}, but the features have {self.features.num_mel_bins} mel bins"
            )

    def to_dict(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.to_dict(),
            "features": self.features.to_dict(),
            "norm": asdict(self.norm),
            "labels": [{"mid": m, "display_name": n} for m, n in zip(self.labels.mids, self.labels.names, strict=True)],
        }

    def to_json(self) -> str:
        return _to_json(self.to_dict())

    @classmethod
    def from_dict(cls, value: Any, *, origin: object) -> "ModelConfig":
        try:
            labels, recipe = value["labels"], Recipe(**value["recipe"])
            # Earlier versions recorded no features: they computed all settings of kaldi128, with the model's bins.
            features = value.get("features", {"num_mel_bins": recipe.input_fdim})
            return cls(
                recipe=recipe,
                norm=Norm(**value["norm"]),
                labels=LabelVocabulary(
                    tuple(label["mid"] for label in labels), tuple(label["display_name"] for label in labels)
                ),
                features=FeatureSettings.from_mapping(features, origin="features"),
            )
        except (ConfigError, ValueError, KeyError, TypeError) as err:
            raise DataError(f"{origin} is damaged or of another version ({type(err).__name__}: {err})") from err

    @classmethod
    def from_json(cls, text: str, *, origin: object) -> "ModelConfig":
        try:
            value = json.loads(text)
        except ValueError as err:
            raise DataError(f"{origin} is damaged or of another version ({type(err).__name__}: {err})") from err
        return cls.from_dict(value, origin=origin)


def read_checkpoint(
    path: str | os.PathLike[str],
    *,
    recipe: Recipe | None = None,
    labels: LabelVocabulary | None = None,
    norm: Norm | None = None,
) -> tuple[Tagger, ModelConfig]:
    """Read a model from our folder, a Hugging Face folder or a weight file. It is in evaluation mode, on the CPU.

    A weight file does not contain its recipe and classes. The published files of the AST and of PSLA are recognised by
    their shapes, and a warning says which one was assumed. For other files, and for those of `save_original`, give
    `recipe` (model, its shape, and the norm unless `norm` is given) and `labels`. Given arguments win over those of a
    published file.

    Raises:
        DataError: the checkpoint is missing, damaged or not recognised, or its shape or a setting is not supported.
        ConfigError: `recipe`, `labels` or `norm` is given for a folder, which contains them.
    """
    source = Path(path)
    if not source.is_dir():
        return _read_file(source, recipe, labels, norm)
    if (recipe, labels, norm) != (None, None, None):
        raise ConfigError(f"{source} contains its recipe, labels and norm; give them only for a weight file")
    if _is_huggingface(source):
        return _read_huggingface(source)
    return load_model(source)


def save_model(folder: str | os.PathLike[str], state: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Write a model folder. `state` is the state dict of the model."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    save_file(_on_cpu(state), target / WEIGHTS_FILE)
    checked = with_checksum(config.to_dict() | {WEIGHTS_KEY: file_sha256(target / WEIGHTS_FILE)})
    (target / CONFIG_FILE).write_text(_to_json(checked), encoding="utf-8")


def load_model(folder: str | os.PathLike[str]) -> tuple[Tagger, ModelConfig]:
    """Read the model folder that `save_model` wrote. The model is in evaluation mode, on the CPU.

    A folder without checksums, which an earlier version wrote, is read without verification.

    Raises:
        DataError: a file is missing or damaged, or weights and config were not written together.
    """
    source = Path(folder)
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        if not (source / name).is_file():
            raise DataError(f"{source} is not a model folder: {name} is missing")
    file = source / CONFIG_FILE
    value = without_checksum(_read_json(file), origin=file, remedy=RESTORE)
    config = ModelConfig.from_dict(value, origin=file)
    weights = source / WEIGHTS_FILE
    if WEIGHTS_KEY in value and file_sha256(weights) != value[WEIGHTS_KEY]:
        raise DataError(f"{weights} is damaged, or not the weights that {CONFIG_FILE} was written with; {RESTORE}")
    return _build_model(config, read_weights(source / WEIGHTS_FILE), source), config


def save_huggingface(folder: str | os.PathLike[str], state: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Write a folder for `transformers`: `AutoModelForAudioClassification` and `pipeline("audio-classification")`.

    The tensors are the same. The logits of `transformers` differ slightly, because it has one epsilon for all norms
    (see `huggingface.py`).
    """
    if config.recipe.model != "ast":
        raise ConfigError(f"the format of Hugging Face is for the model ast, this is {config.recipe.model}; use ours")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    settings, extractor = huggingface.to_configs(config.recipe, config.norm, config.labels, config.features)
    save_file(_on_cpu(to_huggingface(state)), target / WEIGHTS_FILE, metadata={"format": "pt"})
    (target / PREPROCESSOR_FILE).write_text(_to_json(extractor), encoding="utf-8")
    (target / CONFIG_FILE).write_text(_to_json(settings | {OUR_KEY: config.to_dict()}), encoding="utf-8")


def _is_huggingface(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file() and "model_type" in _read_json(folder / CONFIG_FILE)


def _read_huggingface(folder: Path) -> tuple[Tagger, ModelConfig]:
    if not (folder / PREPROCESSOR_FILE).is_file():
        raise DataError(f"{folder} has no {PREPROCESSOR_FILE}, which contains the norm of the input; add it")
    weights = [folder / name for name in (WEIGHTS_FILE, TORCH_WEIGHTS_FILE) if (folder / name).is_file()]
    if not weights:
        raise DataError(f"{folder} has neither {WEIGHTS_FILE} nor {TORCH_WEIGHTS_FILE}; add one of them")
    settings, extractor = _read_json(folder / CONFIG_FILE), _read_json(folder / PREPROCESSOR_FILE)
    config = ModelConfig(*huggingface.from_configs(settings, extractor, origin=folder))
    if OUR_KEY in settings:
        config = _own_config(settings, extractor) or config
    return _build_model(config, under_our_names(read_weights(weights[0])), folder), config


def _own_config(settings: dict[str, Any], extractor: dict[str, Any]) -> ModelConfig | None:
    """Our config in a Hugging Face `config.json`. None if one of the two files has changed since we wrote it."""
    try:
        config = ModelConfig.from_dict(settings[OUR_KEY], origin=OUR_KEY)
        written = huggingface.to_configs(config.recipe, config.norm, config.labels, config.features)
    except (ConfigError, DataError):
        return None
    found = {key: settings.get(key) for key in written[0]}, {key: extractor.get(key) for key in written[1]}
    return config if found == written else None


def _read_file(
    file: Path, recipe: Recipe | None, labels: LabelVocabulary | None, norm: Norm | None
) -> tuple[Tagger, ModelConfig]:
    if recipe is None and (file.parent / CONFIG_FILE).is_file():
        raise DataError(f"{file} is a part of a model folder; give the folder {file.parent}")
    stored = read_weights(file)
    state = under_our_names(stored)
    if (recipe is None or labels is None) and not has_zero_image_heads(stored):
        known = recognise_published(state, origin=file)
        if known is not None:
            recipe, labels = recipe or known[0], labels or known[1]
            logger.warning(
                f"{file} is taken for the published checkpoint of its shape: {len(labels)} classes, {labels.names[0]} "
                f"first and {labels.names[-1]} last, input of mean {recipe.dataset_mean} and std {recipe.dataset_std}"
            )
    missing = [key for key, value in {"recipe": recipe, "labels": labels}.items() if value is None]
    if recipe is None or labels is None:
        raise DataError(
            f"{file} is not a published checkpoint; give its {' and its '.join(missing)} "
            "(a recipe has the model and its shape: model_size, fstride, tstride, input_fdim, input_tdim)"
        )
    if norm is None and recipe.norm_stats != "recipe":
        raise DataError(f"{file} does not contain the norm of its input; give norm, or a recipe with norm_stats recipe")
    if recipe.features not in FEATURES:
        raise DataError(f"{file} does not contain its feature settings; give a recipe with {' or '.join(FEATURES)}")
    config = ModelConfig(
        recipe=replace(recipe, label_dim=recipe.label_dim or len(labels)),
        norm=norm or Norm(recipe.dataset_mean, recipe.dataset_std, recipe.norm_divisor),
        labels=labels,
        features=replace(FEATURES[recipe.features], num_mel_bins=recipe.input_fdim),
    )
    return load_original(_new_model(config, file), state, origin=file).eval(), config


def _build_model(config: ModelConfig, state: Mapping[str, Tensor], origin: object) -> Tagger:
    model = _new_model(config, origin)
    load_weights(model, state, origin)
    return model.eval()


def _new_model(config: ModelConfig, origin: object) -> Tagger:
    if config.recipe.label_dim != len(config.labels):
        raise DataError(f"{origin}: label_dim is {config.recipe.label_dim}, but there are {len(config.labels)} labels")
    return create_model(**config.recipe.model_args())


def _on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in state.items()}


def _to_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(decode_text(file.read_bytes(), file))
    except ValueError as err:
        raise DataError(f"{file} is not valid JSON: {err}") from err
    if not isinstance(value, dict):
        raise DataError(f"{file} contains {type(value).__name__}, not the settings of a model")
    return value
