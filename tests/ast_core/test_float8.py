"""Training with float8 products: near bf16, with the same parameters, and for training only."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ast_core import ASTModel
from ast_core.checkpoints import ModelConfig, load_model, save_model
from ast_core.errors import ConfigError
from ast_core.execution import for_device, set_execution
from ast_core.labels import LabelVocabulary
from ast_core.recipe import Recipe
from ast_core.step import make_optimizer, predict, train_step
from tests.ast_core import small

CPU = torch.device("cpu")
NUM_STEPS = 30
LARGEST_ROUNDING = 2**-3
"""Relative, of a number with 2 bits of mantissa, as float8 has for gradients (e5m2)."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On small tensors threads wait for each other longer than they work."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


def model_of(recipe: Recipe) -> ASTModel:
    """Three blocks, of which two are in float8: emulation is slow."""
    model = small.model()
    model.v.blocks = model.v.blocks[:3]
    set_execution(model, CPU, recipe)
    return model


def bf16(**changes: Any) -> Recipe:
    return small.recipe(precision="bf16", **changes)


def trained(recipe: Recipe, num_steps: int) -> tuple[ASTModel, Tensor]:
    """The model after `num_steps` steps on three batches in turns, and the losses."""
    model = model_of(recipe)
    optimizer, losses = make_optimizer(model, recipe), []
    for step in range(num_steps):
        batch, drawn = small.batch(6, seed=step % 3), small.augmentations(6, seed=step, noise=False)
        args = {"recipe": recipe, "norm": small.NORM, "lr": 3e-4, "num_clips_global": 6}
        losses.append(train_step(model, optimizer, batch, drawn, **args))
    return model, torch.stack(losses)


def test_losses_in_float8_stay_near_those_in_bf16():
    """A loss averages many rounded numbers, so it must differ by less than one of them may."""
    pytest.importorskip("torchao")
    losses = {name: trained(bf16(float8=name == "float8"), NUM_STEPS)[1] for name in ("bf16", "float8")}
    difference = (losses["float8"] / losses["bf16"] - 1).abs()
    assert 1e-3 < difference.max() < LARGEST_ROUNDING
    for curve in losses.values():
        assert curve[-3:].mean() < 0.5 * curve[:3].mean()  # so it is no bound on a loss that does not move


def test_float8_has_the_same_parameters_and_evaluates_as_bf16():
    pytest.importorskip("torchao")
    model, _ = trained(bf16(float8=True), 1)
    plain = model_of(bf16())
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert all(parameter.grad is not None for parameter in model.parameters())
    plain.load_state_dict(model.state_dict())
    scores = [predict(each.eval(), small.batch(4), recipe=bf16(), norm=small.NORM) for each in (model, plain)]
    torch.testing.assert_close(*scores, rtol=0, atol=0)
    in_training = [each.train()(small.log_mel(2)) for each in (model, plain)]
    assert not torch.equal(*in_training)


def test_float8_layers_are_those_of_all_blocks_but_the_last():
    float8_linear = pytest.importorskip("torchao.float8.float8_linear").Float8Linear
    model = small.model()
    set_execution(model, CPU, bf16(float8=True))
    layers = [layer for block in model._training_blocks for layer in block.modules() if isinstance(layer, nn.Linear)]
    assert len(layers) == 11 * 4  # query, key and value; projection; two of the MLP
    assert all(isinstance(layer, float8_linear) for layer in layers)
    assert not any(isinstance(layer, float8_linear) for layer in model.modules())


def test_activation_checkpointing_in_float8_computes_the_same():
    pytest.importorskip("torchao")
    models = [trained(bf16(float8=True, activation_checkpointing=on), 1)[0] for on in (False, True)]
    for plain, checkpointed in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_a_model_trained_in_float8_loads_without_torchao(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    recipe = small.recipe(precision="bf16", float8=True)
    labels = LabelVocabulary.from_names([f"class {i}" for i in range(small.NUM_CLASSES)])
    save_model(tmp_path / "m", small.model().state_dict(), ModelConfig(recipe, small.NORM, labels))
    for name in ("torchao", "torchao.float8"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    model, config = load_model(tmp_path / "m")
    monkeypatch.setattr("ast_core.execution._is_installed", lambda package: False)
    assert config.recipe.float8
    used = for_device(config.recipe, CPU, trains=False)
    assert not used.float8
    assert predict(model, small.batch(2), recipe=used, norm=small.NORM).isfinite().all()


def test_float8_is_a_key_of_the_ast():
    with pytest.raises(ConfigError, match=r"^float8 is a key of the model ast, but model is linear; leave it out$"):
        Recipe(model="linear", float8=True)
