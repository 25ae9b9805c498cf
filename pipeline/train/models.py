"""Model folders by URI: `model.safetensors` and `config.json`, on local disk or object storage."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ast_core.checkpoints import CONFIG_FILE, WEIGHTS_FILE, ModelConfig, load_model, save_model
from ast_core.model import ASTModel
from ast_core.recipe import Recipe
from pipeline import storage


def initial_model(recipe: Recipe) -> ASTModel:
    """The model that training starts from: pretrained as the recipe says; what is new in it is drawn by the seed.

    Raises DataError where weights cannot be fetched or do not fit.
    """
    torch.manual_seed(recipe.seed)
    return ASTModel(
        **recipe.model_args(),
        imagenet_pretrain=recipe.imagenet_pretrain,
        audioset_pretrain=recipe.audioset_pretrain,
        imagenet_weights=recipe.imagenet_weights,
        audioset_weights=recipe.audioset_weights,
    )


def exists(uri: str) -> bool:
    return all(storage.exists(storage.join(uri, name)) for name in (WEIGHTS_FILE, CONFIG_FILE))


def save(uri: str, state: Mapping[str, Tensor], config: ModelConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, state, config)
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            storage.write_bytes(storage.join(uri, name), (Path(folder) / name).read_bytes())


def load(uri: str) -> tuple[ASTModel, ModelConfig]:
    """The model in evaluation mode, on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            (Path(folder) / name).write_bytes(storage.read_bytes(storage.join(uri, name)))
        return load_model(folder)


def load_config(uri: str) -> ModelConfig:
    file = storage.join(uri, CONFIG_FILE)
    return ModelConfig.from_json(storage.read_bytes(file).decode(), origin=file)
