"""Foreign weights made to fit: key names, and positional embeddings on other patch grids. Pure functions."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ast_core.errors import DataError

Grid = tuple[int, int]
"""Patches along frequency, patches along time."""

NUM_PREFIX_TOKENS = 2
"""Class token and distillation token stand before the patches."""

AUDIOSET_GRID: Grid = (12, 101)
"""128 mel bins × 1024 frames in 16×16 patches at stride 10."""


def resize_pos_embed(pos_embed: Tensor, grid: Grid, new_grid: Grid) -> Tensor:
    """Cut the middle out of each axis that is too long; stretch bilinearly what is too short.

    As the original's constructor does: first time, then frequency. `pos_embed` is `[1, 2 + F·T, dim]`.
    """
    prefix, patches = pos_embed[:, :NUM_PREFIX_TOKENS], pos_embed[:, NUM_PREFIX_TOKENS:]
    image = patches.transpose(1, 2).reshape(1, -1, *grid)
    for axis in (1, 0):
        old, new = grid[axis], new_grid[axis]
        if new <= old:
            image = image.narrow(2 + axis, old // 2 - new // 2, new)
        else:
            size = (new, image.shape[3]) if axis == 0 else (image.shape[2], new)
            image = F.interpolate(image, size=size, mode="bilinear")
    return torch.cat([prefix, image.flatten(2).transpose(1, 2)], dim=1)


def from_deit(state: Mapping[str, Tensor], new_grid: Grid) -> dict[str, Tensor]:
    """timm's DeiT-distilled weights for our transformer: colours summed, grid adapted, image heads dropped."""
    missing = {"patch_embed.proj.weight", "pos_embed", "cls_token", "dist_token"} - state.keys()
    if missing:
        raise DataError(f"these are not DeiT-distilled weights: {sorted(missing)[0]!r} is missing")
    adapted = {key: value for key, value in state.items() if not key.startswith("head")}
    adapted["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].sum(dim=1, keepdim=True)
    side = round((state["pos_embed"].shape[1] - NUM_PREFIX_TOKENS) ** 0.5)
    adapted["pos_embed"] = resize_pos_embed(state["pos_embed"], (side, side), new_grid)
    return adapted


def from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The original implementation's state dict under our names: no `module.`, no unused image heads."""
    renamed = {key.removeprefix("module."): value for key, value in state.items()}
    return {key: value for key, value in renamed.items() if not key.startswith("v.head")}


def from_audioset(state: Mapping[str, Tensor], new_grid: Grid) -> dict[str, Tensor]:
    """A full-AudioSet checkpoint of the original (base384, stride 10, 1024 frames), classifier off, on another grid."""
    renamed = {key: value for key, value in from_original(state).items() if not key.startswith("mlp_head")}
    num_tokens = NUM_PREFIX_TOKENS + AUDIOSET_GRID[0] * AUDIOSET_GRID[1]
    if "v.pos_embed" not in renamed or renamed["v.pos_embed"].shape[1] != num_tokens:
        raise DataError(
            f"not an AudioSet checkpoint at stride 10 and 1024 frames: v.pos_embed of {num_tokens} tokens expected"
        )
    renamed["v.pos_embed"] = resize_pos_embed(renamed["v.pos_embed"], AUDIOSET_GRID, new_grid)
    return renamed
