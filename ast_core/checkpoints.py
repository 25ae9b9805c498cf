"""Models in and out: our own folder (`model.safetensors` + `config.json`), and the original's `.pth`."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ast_core.errors import DataError
from ast_core.labels import LabelVocabulary
from ast_core.model import ASTModel
from ast_core.pretrained import from_original
from ast_core.recipe import Recipe
from ast_core.step import Norm
from ast_core.weight_files import load_weights, read_weights

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class ModelConfig:
    """All that is needed to use a trained model: what it was trained by, its input's norm and its classes."""

    recipe: Recipe
    norm: Norm
    labels: LabelVocabulary

    def to_json(self) -> str:
        value = {
            "recipe": self.recipe.to_dict(),
            "norm": {"mean": self.norm.mean, "std": self.norm.std},
            "labels": [{"mid": m, "display_name": n} for m, n in zip(self.labels.mids, self.labels.names, strict=True)],
        }
        return json.dumps(value, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, origin: object) -> "ModelConfig":
        try:
            value: dict[str, Any] = json.loads(text)
            labels = value["labels"]
            return cls(
                recipe=Recipe(**value["recipe"]),
                norm=Norm(**value["norm"]),
                labels=LabelVocabulary(
                    tuple(label["mid"] for label in labels), tuple(label["display_name"] for label in labels)
                ),
            )
        except (ValueError, KeyError, TypeError) as err:
            raise DataError(f"{origin} is damaged or of another version ({type(err).__name__}: {err})") from err


def save_model(folder: str | os.PathLike[str], state: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Write a model's folder. `state` is the state dict of an `ASTModel`."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    save_file({key: value.detach().cpu().contiguous() for key, value in state.items()}, target / WEIGHTS_FILE)
    (target / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")


def load_model(folder: str | os.PathLike[str]) -> tuple[ASTModel, ModelConfig]:
    """The model of a folder that `save_model` wrote, in evaluation mode, on the CPU."""
    source = Path(folder)
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        if not (source / name).is_file():
            raise DataError(f"{source} is no model folder: {name} is missing")
    config = ModelConfig.from_json((source / CONFIG_FILE).read_text(encoding="utf-8"), origin=source / CONFIG_FILE)
    model = ASTModel(**config.recipe.model_args(), imagenet_pretrain=False)
    load_weights(model, read_weights(source / WEIGHTS_FILE), source)
    return model.eval(), config


def load_original(model: ASTModel, source: str | os.PathLike[str] | Mapping[str, Tensor]) -> ASTModel:
    """Fill `model` from a checkpoint of the original implementation: a `.pth` path, or its state dict.

    The `module.` prefix and the unused image heads are expected; any other missing or surplus key is a DataError.
    """
    state = source if isinstance(source, Mapping) else read_weights(source)
    origin = "the state dict" if isinstance(source, Mapping) else os.fspath(source)
    load_weights(model, from_original(state), origin)
    return model
