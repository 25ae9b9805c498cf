"""No part of a training step makes the CPU wait for the GPU.

Without a GPU, PyTorch's fake tensors represent tensors on a GPU. They have no values, so any operation that reads one
(`.item()`, `bool`, `nonzero`, indexing by a mask) raises an error. Copies between CPU and GPU are recorded.
This does not test the backward pass and noise, which need a GPU, and the inside of kernels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ast_core.execution import set_execution
from ast_core.models.patchout import draw_patchout
from ast_core.step import make_optimizer, make_scaler, train_step
from ast_core.transfer import to_device
from tests.ast_core import small

GPU = torch.device("cuda")
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Copies(TorchDispatchMode):
    """Records copies between CPU and GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: list[Tensor] = []
        self.num_copies = 0
        self.waited_for: list[str] = []

    def pin(self, tensor: Tensor) -> Tensor:
        self.pinned.append(tensor.clone())
        return self.pinned[-1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in COPIES:
            source = args[COPIES.index(func)]
            if source.device.type != out.device.type:
                self.num_copies += 1
                is_pinned = any(source is tensor for tensor in self.pinned)
                if not (is_pinned and kwargs.get("non_blocking")):
                    self.waited_for.append(f"{source.dtype} {list(source.shape)}, {source.device} to {out.device}")
        return out


@contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Copies]:
    """Page-locking needs a real GPU, so it is only recorded."""
    with FakeTensorMode(allow_non_fake_inputs=True), Copies() as copies, monkeypatch.context() as patched:
        patched.setattr(Tensor, "pin_memory", lambda tensor: copies.pin(tensor))
        patched.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patched.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        patched.setattr(torch.cuda, "get_device_name", lambda _device: "a fake GPU")
        yield copies


def set_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16"},
        {"precision": "fp16", "grad_clip": 1.0, "patchout_f": 1, "patchout_t": 1},
        {"precision": "fp32", "micro_batch_size": 3, "loss": "CE", "mixup_domain": "log_mel"},
    ],
    ids=str,
)
def test_no_step_waits_for_the_gpu(changes: dict, monkeypatch: pytest.MonkeyPatch):
    recipe, model, whole = small.recipe(**changes), small.model(), small.batch(5)
    with fake_gpu(monkeypatch) as copies:
        set_execution(model, GPU, recipe)
        model.to(GPU)
        optimizer, scaler = make_optimizer(model, recipe), make_scaler(recipe, GPU)
        monkeypatch.setattr(Tensor, "backward", lambda _loss: set_gradients(model))
        copies.num_copies, copies.waited_for = 0, []  # do not count copies of the weights
        for step in range(2):  # the first step makes the optimizer's state
            patchout = draw_patchout((step,), (8, 4), num_rows=recipe.patchout_f, num_columns=recipe.patchout_t)
            drawn = small.augmentations(5, seed=step, noise=False, mixup_domain=recipe.mixup_domain)
            args = {"recipe": recipe, "norm": small.NORM, "lr": 1e-3, "num_clips_global": 5}
            batch = whole.pinned().to(GPU)
            loss = train_step(model, optimizer, batch, drawn, **args, patchout=patchout, scaler=scaler)
        assert loss.device.type == "cuda"
        assert copies.waited_for == []
        assert copies.num_copies > 2 * 7  # more than the copies of the batch
        with pytest.raises(DataDependentOutputException):
            loss.item()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_no_step_waits_for_a_real_gpu(precision: str):
    """In this mode PyTorch raises an error if the CPU waits."""
    recipe, model = small.recipe(precision=precision, grad_clip=1.0, micro_batch_size=2, patchout_t=1), small.model()
    set_execution(model, GPU, recipe)
    model.to(GPU)
    optimizer, scaler = make_optimizer(model, recipe), make_scaler(recipe, GPU)
    patchout, drawn = draw_patchout((0,), (8, 4), num_rows=0, num_columns=1), small.augmentations(5)
    args = {"recipe": recipe, "norm": small.NORM, "lr": 1e-3, "num_clips_global": 5}
    pinned = small.batch(5).pinned()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            loss = train_step(model, optimizer, pinned.to(GPU), drawn, **args, patchout=patchout, scaler=scaler)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss)


@pytest.mark.parametrize("values", [np.arange(5), np.zeros((2, 0)), np.array([[True], [False]])], ids=str)
def test_an_array_keeps_its_values_and_its_type(values: np.ndarray):
    moved = to_device(values, torch.device("cpu"))
    np.testing.assert_array_equal(moved.numpy(), values)
    assert moved.numpy().dtype == values.dtype
