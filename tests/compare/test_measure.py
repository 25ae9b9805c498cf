"""Costs of a model: what the task that measures asks Ray for, the size of its batches, and too little memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from ast_core.batch import Norm
from ast_core.checkpoints import ModelConfig
from ast_core.errors import UserError
from ast_core.features import KALDI128
from ast_core.labels import LabelVocabulary
from ast_core.recipe import Recipe
from pipeline.compare import measure
from pipeline.train import models
from pipeline.train.settings import IN_PROCESS, TrainSettings

SETTINGS = TrainSettings(recipe=Recipe(), data="data", train_splits=[], eval_splits=[], output="out")


@pytest.mark.parametrize(
    ("nodes", "changes", "expected"),
    [
        ([{"CPU": 2.0, "GPU": 1.0}], {}, (True, 2)),
        ([{"CPU": 16.0, "GPU": 1.0}], {}, (True, 4)),
        ([{"CPU": 64.0}, {"CPU": 2.0, "GPU": 1.0}], {"address": "auto"}, (True, 2)),
        ([{"CPU": 2.0, "GPU": 1.0}], {"device": "cpu"}, (False, 2)),
        ([{"CPU": 4.0}], {"num_workers": (3, 3)}, (False, 1)),
        ([{"CPU": 4.0}], {"cpus_per_worker": 3}, (False, 3)),
    ],
)
def test_the_task_that_measures_asks_for_no_more_than_a_worker_of_the_training(
    nodes: list[dict[str, float]], changes: dict[str, Any], expected: tuple[bool, int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(measure, "resources_of_nodes", lambda: nodes)
    assert measure.task_resources(replace(SETTINGS, **changes)) == expected


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small model whose recipe sends two clips through the network at once."""
    monkeypatch.setattr(measure, "MEASURED_S", 0.01)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    recipe = Recipe(model="linear", label_dim=2, input_tdim=48, timem=0, micro_batch_size=2)
    labels = LabelVocabulary.from_names(["dog", "cat"])
    config = ModelConfig(recipe, Norm(0.0, 1.0, 2.0), labels, KALDI128)
    models.save(str(tmp_path / "model"), models.initial_model(recipe).state_dict(), config)
    return str(tmp_path / "model")


def test_a_batch_is_no_larger_than_the_recipes_micro_batch(model: str):
    assert measure.model_costs(model, SETTINGS)["inference"]["batch_clips"] == 2


def test_too_little_memory_is_one_line(model: str, monkeypatch: pytest.MonkeyPatch):
    def run_out(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(measure, "predict", run_out)
    with pytest.raises(
        UserError, match=r"^the machine has too little memory to measure it; run the same command again"
    ):
        measure.model_costs(model, replace(SETTINGS, num_workers=IN_PROCESS))
