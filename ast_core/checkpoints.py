"""Models in and out: our own folder (`model.safetensors` + `config.json`), and the original's `.pth`."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ast_core.errors import DataError
from ast_core.labels import LabelVocabulary
from ast_core.model import ASTModel
from ast_core.pretrained import from_original
from ast_core.recipe import Recipe
from ast_core.step import Norm

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
    def from_json(cls, text: str) -> "ModelConfig":
        value: dict[str, Any] = json.loads(text)
        labels = value["labels"]
        return cls(
            recipe=Recipe(**value["recipe"]),
            norm=Norm(**value["norm"]),
            labels=LabelVocabulary(
                tuple(label["mid"] for label in labels), tuple(label["display_name"] for label in labels)
            ),
        )


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
    config = ModelConfig.from_json((source / CONFIG_FILE).read_text(encoding="utf-8"))
    model = ASTModel(**config.recipe.model_args(), imagenet_pretrain=False)
    _load_strictly(model, load_file(source / WEIGHTS_FILE), str(source))
    return model.eval(), config


def load_original(model: ASTModel, source: str | os.PathLike[str] | Mapping[str, Tensor]) -> ASTModel:
    """Fill `model` from a checkpoint of the original implementation: a `.pth` path, or its state dict.

    The `module.` prefix and the unused image heads are expected; any other missing or surplus key is a DataError.
    """
    if isinstance(source, Mapping):
        state, origin = source, "the state dict"
    else:
        origin = os.fspath(source)
        if not os.path.isfile(origin):
            raise DataError(f"there is no checkpoint {origin}")
        state = torch.load(origin, map_location="cpu", weights_only=True)
    _load_strictly(model, from_original(state), origin)
    return model


def _load_strictly(model: ASTModel, state: Mapping[str, Tensor], origin: str) -> None:
    expected = model.state_dict()
    missing, surplus = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    wrong = [key for key in expected.keys() & state.keys() if expected[key].shape != state[key].shape]
    if missing or surplus:
        raise DataError(f"{origin} does not fit the model: missing {missing[:3]}, surplus {surplus[:3]}")
    if wrong:
        key = sorted(wrong)[0]
        raise DataError(f"{origin} does not fit: {key} is {tuple(state[key].shape)}, not {tuple(expected[key].shape)}")
    model.load_state_dict(state)
