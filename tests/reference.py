"""Figures of the reference implementation, and the weights with which they were made.

`tests/fixtures/README.md` describes the excerpt that is part of this repository. Tests that need more are skipped if
`../shared` is missing.
"""

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ast_core.recipe import Recipe

SHARED = Path(__file__).parents[2] / "shared"
WHOLE = SHARED / "fixtures"
EXCERPT = Path(__file__).parent / "fixtures"
AUDIOSET = SHARED / "data" / "audioset"
IMAGE_CLASSES = 1000

needs_shared = pytest.mark.skipif(not WHOLE.is_dir(), reason=f"needs recordings or lists in {SHARED}")


def figures(name: str) -> Mapping[str, np.ndarray]:
    """The excerpt of `NAME.npz` in this repository."""
    return _read(EXCERPT / f"{name}.npz")


def whole_figures(name: str) -> Mapping[str, np.ndarray]:
    """All of `NAME.npz` in `../shared`."""
    return _read(WHOLE / f"{name}.npz")


@cache
def _read(file: Path) -> Mapping[str, np.ndarray]:
    with np.load(file) as archive:
        return dict(archive)


@cache
def described() -> dict[str, Any]:
    """The content of `ast_reference.json`: the cases, and key names and shapes of the reference implementation."""
    return json.loads((EXCERPT / "ast_reference.json").read_text(encoding="utf-8"))


def draw(name: str, shape: tuple[int, ...], salt: str) -> Tensor:
    """A random weight that depends only on its key in the reference's state dict, its shape and a salt."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(f"{salt}/{name}".encode())))
    normal = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    is_norm = name.endswith("norm.weight") or ".norm1.weight" in name or ".norm2.weight" in name
    if is_norm or name == "mlp_head.0.weight":
        return normal.mul_(0.1).add_(1)
    if name.endswith("bias") or "token" in name or "pos_embed" in name:
        return normal.mul_(0.1)
    return normal.div_(math.sqrt(math.prod(shape[1:]) if len(shape) > 1 else shape[0]))


def draw_all(shapes: Mapping[str, tuple[int, ...]], salt: str) -> dict[str, Tensor]:
    return {name: draw(name, tuple(shape), salt) for name, shape in shapes.items()}


def original_shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """The reference's keys and shapes for an `ASTModel`: the same, and two unused image heads."""
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    dim = shapes["v.cls_token"][-1]
    heads = {"weight": (IMAGE_CLASSES, dim), "bias": (IMAGE_CLASSES,)}
    return shapes | {f"v.{head}.{kind}": shape for head in ("head", "head_dist") for kind, shape in heads.items()}


def learning_rates(recipe: Recipe, steps_per_epoch: int) -> Iterator[float]:
    """The learning rate of each step of the reference implementation's loop, with PyTorch's scheduler."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=recipe.lr)
    milestones = list(range(recipe.lrscheduler_start, 1000, recipe.lrscheduler_step))
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=recipe.lrscheduler_decay)
    global_step = 0
    for _ in range(recipe.epochs):
        for _ in range(steps_per_epoch):
            if global_step <= 1000 and global_step % 50 == 0 and recipe.warmup:
                for group in optimizer.param_groups:
                    group["lr"] = global_step / 1000 * recipe.lr
            yield optimizer.param_groups[0]["lr"]
            global_step += 1
        optimizer.step()
        scheduler.step()
