"""The comparison's recipes have the values of the run scripts of their references, and build their models."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ast_core.models import create_model
from ast_core.recipe import Recipe, load_recipe

FILES = Path(__file__).parents[2] / "jobs" / "recipes"
COMMON = {"sampling": "weighted", "loss": "BCE", "warmup": True, "warmup_steps": None, "lrscheduler_decay": 0.5}
COMMON |= {"adam_beta1": 0.95, "adam_beta2": 0.999, "weight_decay": 5e-7, "noise": False, "metrics": "mAP"}
COMPARISON = {"epochs": 10, "lrscheduler_start": 2, "lrscheduler_step": 1, "wa_start": 1, "wa_end": 5}
COMPARISON |= {"norm_divisor": 2.0}
LARGE = COMPARISON | {"input_tdim": 1024, "input_fdim": 128, "features": "kaldi128"}
AUGMENTED = LARGE | {"freqm": 36, "timem": 192, "mixup": 0.3, "dataset_mean": -3.6788461, "dataset_std": 4.3739743}
PSLA = {"input_tdim": 1056, "freqm": 48, "timem": 192, "mixup": 0.5, "dataset_mean": -4.6476, "dataset_std": 4.5699}
PSLA |= {"norm_divisor": 1.0, "batch_size": 100, "lrscheduler_step": 5, "imagenet_pretrain": True}
EXPECTED: dict[str, dict[str, Any]] = {
    "compare-talnet": AUGMENTED | {"lr": 4e-4, "batch_size": 100},
    "compare-cnn-transformer": AUGMENTED | {"lr": 4e-4, "batch_size": 400, "transformer_dropout": 0.25},
    "compare-resnet50": LARGE
    | {"lr": 1.6e-4, "batch_size": 188, "freqm": 48, "timem": 192, "mixup": 0.5, "imagenet_pretrain": True}
    | {"dataset_mean": -3.3458831, "dataset_std": 4.1563106},
    "compare-ast": AUGMENTED | {"lr": 1e-5, "batch_size": 20, "imagenet_pretrain": True},
    "psla-efficientnet": PSLA | {"lr": 1e-4, "epochs": 30, "lrscheduler_start": 10, "wa_start": 16, "wa_end": 30},
    "psla-efficientnet-balanced": PSLA
    | {"lr": 1e-3, "epochs": 60, "lrscheduler_start": 35, "wa_start": 41, "wa_end": 60, "sampling": "uniform"},
}
PARAMETERS = {
    "compare-talnet": 25.76,
    "compare-cnn-transformer": 32.06,
    "compare-talnet-small": 10.52,
    "compare-cnn-transformer-small": 12.10,
    "compare-resnet50": 25.66,
    "psla-efficientnet": 13.64,
    "psla-efficientnet-balanced": 13.64,
}
"""Millions, of 527 classes."""


def recipe_of(name: str) -> Recipe:
    return load_recipe((FILES / f"{name}.yaml").read_text(encoding="utf-8"), {}, origin=name)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_recipe_has_the_published_values(name: str):
    recipe = recipe_of(name).to_dict()
    expected = COMMON | EXPECTED[name]
    assert {key: recipe[key] for key in expected} == expected


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_recipe_builds_the_published_model(name: str):
    with torch.device("meta"):
        model = create_model(**recipe_of(name).model_args() | {"label_dim": 527})
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(
        PARAMETERS[name], abs=0.006
    )
