"""Convert weights of other projects: key names, and positional embeddings for other patch grids. Pure functions.

Our key names are those of the reference implementation without `module.`: `v.blocks.0.attn.qkv.weight`,
`mlp_head.1.bias`.
"""

import re
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ast_core.errors import DataError
from ast_core.models.shapes import Grid

NUM_PREFIX_TOKENS = 2
"""The class token and the distillation token come before the patches."""

AUDIOSET_GRID: Grid = (12, 101)
"""Patch grid of 128 mel bins × 1024 frames with 16 × 16 patches at stride 10."""

IMAGE_HEADS = ("v.head.", "v.head_dist.")
"""DeiT's two classifiers. The reference implementation has them in its state dict but never uses them."""
IMAGE_CLASSES = 1000

HUGGINGFACE_PREFIX = "audio_spectrogram_transformer."
_HUGGINGFACE_BLOCK = f"{HUGGINGFACE_PREFIX}encoder.layer.N"
_TO_HUGGINGFACE = {
    "v.cls_token": f"{HUGGINGFACE_PREFIX}embeddings.cls_token",
    "v.dist_token": f"{HUGGINGFACE_PREFIX}embeddings.distillation_token",
    "v.pos_embed": f"{HUGGINGFACE_PREFIX}embeddings.position_embeddings",
    "v.patch_embed.proj": f"{HUGGINGFACE_PREFIX}embeddings.patch_embeddings.projection",
    "v.blocks.N.norm1": f"{_HUGGINGFACE_BLOCK}.layernorm_before",
    "v.blocks.N.attn.q": f"{_HUGGINGFACE_BLOCK}.attention.attention.query",
    "v.blocks.N.attn.k": f"{_HUGGINGFACE_BLOCK}.attention.attention.key",
    "v.blocks.N.attn.v": f"{_HUGGINGFACE_BLOCK}.attention.attention.value",
    "v.blocks.N.attn.proj": f"{_HUGGINGFACE_BLOCK}.attention.output.dense",
    "v.blocks.N.norm2": f"{_HUGGINGFACE_BLOCK}.layernorm_after",
    "v.blocks.N.mlp.fc1": f"{_HUGGINGFACE_BLOCK}.intermediate.dense",
    "v.blocks.N.mlp.fc2": f"{_HUGGINGFACE_BLOCK}.output.dense",
    "v.norm": f"{HUGGINGFACE_PREFIX}layernorm",
    "mlp_head.0": "classifier.layernorm",
    "mlp_head.1": "classifier.dense",
}
"""Our names → names in the files of `ASTForAudioClassification`. Its state dict in memory has others since 5.x."""
_FROM_HUGGINGFACE = {theirs: ours for ours, theirs in _TO_HUGGINGFACE.items()}


def resize_pos_embed(pos_embed: Tensor, grid: Grid, new_grid: Grid) -> Tensor:
    """Cut the middle out of an axis that is too long; interpolate bilinearly along an axis that is too short.

    Time comes first, then frequency, as in the reference implementation. `pos_embed` is `[1, 2 + F·T, dim]`.
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
    """timm's distilled DeiT weights for our transformer: colours summed, positions resized, image heads removed."""
    missing = {"patch_embed.proj.weight", "pos_embed", "cls_token", "dist_token"} - state.keys()
    if missing:
        raise DataError(f"these are not DeiT-distilled weights: {sorted(missing)[0]!r} is missing")
    adapted = {key: value for key, value in state.items() if not key.startswith("head")}
    adapted["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].sum(dim=1, keepdim=True)
    side = round((state["pos_embed"].shape[1] - NUM_PREFIX_TOKENS) ** 0.5)
    adapted["pos_embed"] = resize_pos_embed(state["pos_embed"], (side, side), new_grid)
    return adapted


def from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reference implementation's state dict with our names, without the unused image heads."""
    renamed = _renamed(state, lambda key: key.removeprefix("module."))
    return {key: value for key, value in renamed.items() if not key.startswith(IMAGE_HEADS)}


def to_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict with image heads of zeros, as the reference implementation has it.

    Its loader is strict, so the heads must be present; they do not affect the output.
    """
    like = state["v.cls_token"]
    heads = {}
    for head in IMAGE_HEADS:
        heads[f"{head}weight"] = like.new_zeros(IMAGE_CLASSES, like.shape[-1])
        heads[f"{head}bias"] = like.new_zeros(IMAGE_CLASSES)
    return dict(state) | heads


def has_zero_image_heads(state: Mapping[str, Tensor]) -> bool:
    """Whether `to_original` made this state dict: it has image heads, and they are all zero."""
    heads = [value for key, value in state.items() if key.removeprefix("module.").startswith(IMAGE_HEADS)]
    return bool(heads) and not any(value.any() for value in heads)


def from_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's `ASTForAudioClassification` weights with our names; query, key and value become one tensor."""
    renamed = _renamed(state, lambda key: _translated(key, _FROM_HUGGINGFACE))
    for query in [key for key in renamed if ".attn.q." in key]:
        parts = [query.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in renamed for part in parts):
            renamed[query.replace(".attn.q.", ".attn.qkv.")] = torch.cat([renamed.pop(part) for part in parts])
    return renamed


def to_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict with the names of `ASTForAudioClassification`; query, key and value become separate tensors."""
    parts: dict[str, Tensor] = {}
    for key, value in state.items():
        if ".attn.qkv." in key:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                parts[key.replace(".attn.qkv.", f".attn.{part}.")] = piece
        else:
            parts[key] = value
    return _renamed(parts, lambda key: _translated(key, _TO_HUGGINGFACE))


def under_our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the reference implementation, Hugging Face or this project, with our names.

    The keys tell which it is. The prefix `module.` may be missing.
    """
    if any(key.startswith(HUGGINGFACE_PREFIX) for key in state):
        return from_huggingface(state)
    return from_original(state)


def _renamed(state: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    renamed = {rename(key): value for key, value in state.items()}
    if len(renamed) < len(state):
        raise DataError("these weights mix two naming schemes: two keys mean the same tensor; remove one of the two")
    return renamed


def _translated(key: str, names: Mapping[str, str]) -> str:
    """`key` translated by `names`, which has N for a block number. An unknown key is kept; the loader refuses it."""
    kind = next((kind for kind in (".weight", ".bias") if key.endswith(kind)), "")
    stem = key.removesuffix(kind)
    number = next(iter(re.findall(r"\.\d+\.", stem)), ".N.")
    translated = names.get(stem.replace(number, ".N.", 1))
    return key if translated is None else translated.replace(".N.", number) + kind


def from_audioset(state: Mapping[str, Tensor], new_grid: Grid) -> dict[str, Tensor]:
    """An AudioSet checkpoint (base384, stride 10, 1024 frames) for another patch grid, without its classifier.

    It may have the names of any project.
    """
    renamed = {key: value for key, value in under_our_names(state).items() if not key.startswith("mlp_head")}
    num_tokens = NUM_PREFIX_TOKENS + AUDIOSET_GRID[0] * AUDIOSET_GRID[1]
    if "v.pos_embed" not in renamed or renamed["v.pos_embed"].shape[1] != num_tokens:
        raise DataError(
            f"not an AudioSet checkpoint at stride 10 and 1024 frames: v.pos_embed of {num_tokens} tokens expected; "
            "to start from a model of another shape, use --init-from"
        )
    return on_grid(renamed, AUDIOSET_GRID, new_grid)


def on_grid(state: Mapping[str, Tensor], grid: Grid, new_grid: Grid) -> dict[str, Tensor]:
    """The weights of an AST with patch grid `grid`, in our names, for an AST with `new_grid`."""
    return {**state, "v.pos_embed": resize_pos_embed(state["v.pos_embed"], grid, new_grid)}
