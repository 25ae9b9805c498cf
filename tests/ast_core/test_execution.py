"""How a model is computed: settings of the machine that must not change the result."""

import json
import os
import subprocess
import sys
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from ast_core import execution
from ast_core.errors import ConfigError
from ast_core.execution import check_device, for_device, set_attention
from ast_core.recipe import Recipe
from tests.ast_core import small

CPU, GPU = torch.device("cpu"), torch.device("cuda")

PRODUCT = """
import json
import torch
from ast_core.execution import autocast
from ast_core.recipe import Recipe

torch.manual_seed(0)
layer, x = torch.nn.Linear(768, 3072), torch.randn(8, 512, 768)
torch.set_num_threads(2)
expected = layer(x)
with torch.no_grad(), autocast(torch.device("cpu"), Recipe(precision="bf16")):
    found = layer(x).float()
print(json.dumps([torch.get_num_threads(), ((found - expected).abs().max() / expected.std()).item()]))
"""


def test_products_in_bf16_are_whole_if_the_environment_limits_threads():
    """On CPUs with instructions for bf16, half of the product was missing."""
    env = os.environ | {"OMP_THREAD_LIMIT": "1"}
    printed = subprocess.check_output([sys.executable, "-c", PRODUCT], env=env, text=True)
    num_threads, difference = json.loads(printed)
    assert num_threads == 1
    assert difference < 0.05


@pytest.mark.parametrize(
    ("keys", "device", "reason"),
    [
        ({"float8": True, "precision": "fp32"}, CPU, "float8 needs precision bf16, but precision is fp32"),
        (
            {"float8": True},
            (8, 6),
            "float8 needs a GPU with compute capability 8.9 or more; this one has 8.6",
        ),
        ({"attention": "fa4"}, CPU, "attention fa4 needs a GPU; use auto"),
        (
            {"attention": "fa4", "precision": "fp32"},
            (9, 0),
            "attention fa4 needs precision bf16 or fp16, but precision is fp32",
        ),
        (
            {"attention": "fa4"},
            (8, 9),
            "attention fa4 needs a GPU with compute capability 9 or 10; this one has 8.9",
        ),
        (
            {"attention": "fa4", "model": "cnn_transformer"},
            (9, 0),
            "attention fa4 is for the model ast, but model is cnn_transformer; use auto",
        ),
    ],
    ids=str,
)
def test_float8_and_fa4_are_refused_where_they_cannot_run(
    keys: dict[str, Any], device: torch.device | tuple[int, int], reason: str, monkeypatch: pytest.MonkeyPatch
):
    """GPUs and installed packages are mocked."""
    monkeypatch.setattr(execution, "_is_installed", lambda package: True)
    if isinstance(device, tuple):
        with_gpu(device, monkeypatch)
    with pytest.raises(ConfigError) as refused:
        for_device(Recipe(**keys), GPU if isinstance(device, tuple) else device)
    assert str(refused.value) == reason


def test_the_command_asks_no_gpu_what_it_can_do(monkeypatch: pytest.MonkeyPatch):
    """The GPU of the command's machine may be older than those of the workers."""
    monkeypatch.setattr(execution, "_is_installed", lambda package: True)
    with_gpu((7, 5), monkeypatch)
    check_device(Recipe(float8=True), GPU)
    check_device(Recipe(attention="fa4"), GPU)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"model_size": "base384"}, 1),
        ({"model_size": "tiny224"}, 3),
        ({"model_size": "base384", "input_tdim": 512}, 3),
        ({"model_size": "tiny224", "input_tdim": 512}, None),  # all twelve at once
        ({"model_size": "base384", "micro_batch_size": 5}, 5),
        ({"model_size": "base384", "precision": "fp32"}, None),  # fused attention stores no scores
        ({"model": "linear"}, None),
    ],
    ids=str,
)
def test_an_ast_in_bf16_on_a_cpu_trains_in_parts(
    keys: dict[str, Any], expected: int | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(execution, "_has_bf16", lambda device: True)
    recipe = Recipe(**{"precision": "bf16", "batch_size": 12, "label_dim": 4, **keys})
    assert for_device(recipe, CPU).micro_batch_size == expected
    evaluated = for_device(recipe, CPU, trains=False)  # with fused attention
    assert (evaluated.micro_batch_size, evaluated.attention) == (recipe.micro_batch_size, "fused")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert for_device(recipe, GPU).micro_batch_size == recipe.micro_batch_size


def with_gpu(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


@pytest.mark.parametrize(
    ("keys", "package", "install"),
    [
        ({"float8": True}, "torchao", "pip install 'ast-ray[float8]'"),
        ({"attention": "fa4"}, "flash-attn-4", "pip install --pre flash-attn-4"),
    ],
    ids=str,
)
def test_a_missing_package_is_named_with_its_command(
    keys: dict[str, Any], package: str, install: str, monkeypatch: pytest.MonkeyPatch
):
    with_gpu((9, 0), monkeypatch)
    monkeypatch.setattr(execution, "_is_installed", lambda name: name != package)
    with pytest.raises(ConfigError, match=f"needs .*: {install}$".replace("[", r"\[")):
        check_device(Recipe(**keys), GPU)
    monkeypatch.setattr(execution, "_is_installed", lambda name: True)
    check_device(Recipe(**keys), GPU)


def test_without_its_package_a_name_is_not_installed():
    assert execution._is_installed("torch")
    assert not execution._is_installed("no-such-package-of-ours")


def test_a_command_whose_own_machine_has_no_gpu_leaves_the_gpus_to_the_workers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(execution, "_is_installed", lambda name: True)
    check_device(Recipe(float8=True, attention="fa4"), GPU)


def test_evaluation_uses_neither_float8_nor_fa4():
    recipe = for_device(small.recipe(float8=True, attention="fa4"), CPU, trains=False)
    assert (recipe.float8, recipe.attention) == (False, "fused")
    assert for_device(small.recipe(attention="plain"), CPU, trains=False).attention == "plain"


def test_fa4_is_activated_once_and_another_recipe_restores_the_default(monkeypatch: pytest.MonkeyPatch):
    """PyTorch's registry is mocked: activation itself needs the package and a GPU."""
    active: list[str] = []
    activate, restore, cudnn = Mock(side_effect=active.append), Mock(side_effect=active.clear), Mock()
    attention = torch.nn.attention
    monkeypatch.setattr(attention, "activate_flash_attention_impl", activate)
    monkeypatch.setattr(attention, "restore_flash_attention_impl", restore)
    monkeypatch.setattr(attention, "current_flash_attention_impl", lambda: active[0] if active else None)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", cudnn)
    model, fa4 = small.model(), small.recipe(attention="fa4", precision="bf16")
    assert [set_attention(model, GPU, fa4) for _ in range(2)] == ["fa4", "fa4"]
    activate.assert_called_once_with("FA4")
    cudnn.assert_called_once_with(False)  # SDPA would prefer it
    assert all(module.fused_attn for module in model.modules() if hasattr(module, "fused_attn"))
    assert set_attention(model, GPU, small.recipe()) == "fused"
    restore.assert_called_once_with()
    cudnn.assert_called_with(True)
