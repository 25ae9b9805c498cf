"""What a training step costs in theory, and what a device could do at best: their quotient is the utilisation (MFU).

N tokens, D width.
"""

import re
from typing import NamedTuple

import torch

from ast_core.models.ast import ASTModel
from ast_core.models.shapes import PATCH_SIZE
from ast_core.recipe import Recipe


class Peak(NamedTuple):
    """FLOP/s of matrix products, at best."""

    half: float
    """Of bf16 and fp16 with float32 sums, without sparsity; V100 and T4 have fp16 alone."""
    fp32: float
    """Of float32, without TF32: PyTorch takes that for convolutions, of which AST has one, and else when told to."""


PEAK_FLOPS = {
    "B200": Peak(2250e12, 75e12),
    "H200 NVL": Peak(835e12, 60e12),
    "H200": Peak(989e12, 67e12),
    "H100 NVL": Peak(835e12, 60e12),
    "H100 PCIe": Peak(756e12, 51e12),
    "H100": Peak(989e12, 67e12),
    "A100": Peak(312e12, 19.5e12),
    "A10G": Peak(70e12, 35e12),
    "A10": Peak(125e12, 31.2e12),
    "A40": Peak(150e12, 37.4e12),
    "L40S": Peak(362e12, 91.6e12),
    "L40": Peak(181e12, 90.5e12),
    "L4": Peak(121e12, 30.3e12),
    "RTX 4090": Peak(165e12, 82.6e12),
    "RTX 3090": Peak(71e12, 35.6e12),
    "V100": Peak(125e12, 15.7e12),
    "T4": Peak(65e12, 8.1e12),
}
"""NVIDIA's data sheets of the cards (SXM where nothing is said), and its white papers of Volta, Turing, Ampere and Ada.
Longer names come first."""
OTHER_CARDS = {"MIG", "Laptop", "D"}
"""Words that make a name that of a slice of the card, or of a slower one."""


def forward_flops(model: ASTModel, num_tokens: int) -> int:
    """Of one clip of which `num_tokens` go through the blocks: matrix products, two operations a multiply-add."""
    dim, num_classes = model.v.embed_dim, model.label_dim
    patch_embedding = 2 * model.v.patch_embed.num_patches * PATCH_SIZE**2 * dim

    def block(num_queries: int) -> int:
        # k and v: 4 N D². Of each query, q and the way out: 4 D²; the MLP, four times as wide: 16 D²; scores and their
        # sums over values: 4 N D.
        return 4 * num_tokens * dim**2 + num_queries * (20 * dim**2 + 4 * num_tokens * dim)

    blocks = (len(model.v.blocks) - 1) * block(num_tokens) + block(model.v.num_prefix_tokens)
    return patch_embedding + blocks + 2 * dim * num_classes


def training_flops(model: ASTModel, recipe: Recipe) -> int:
    """Of one clip: forward, and twice that on the way back. What activation checkpointing computes again is no gain."""
    rows, columns = model.v.patch_embed.grid_size
    num_patches = (rows - recipe.patchout_f) * (columns - recipe.patchout_t)
    return 3 * forward_flops(model, model.v.num_prefix_tokens + num_patches)


def utilisation(
    clips_per_s: float, model: ASTModel, recipe: Recipe, device: torch.device, num_devices: int = 1
) -> float | None:
    """MFU: the share of the devices' peak, in the recipe's precision, that training at this rate makes use of.

    None where the peak is not known, as of a CPU, so that no utilisation is made up.
    """
    peak = peak_flops(device, recipe.precision)
    return None if peak is None else clips_per_s * training_flops(model, recipe) / (peak * num_devices)


def peak_flops(device: torch.device, precision: str) -> float | None:
    return peak_flops_of(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


def peak_flops_of(device_name: str, precision: str) -> float | None:
    if OTHER_CARDS & set(device_name.split()):
        return None
    peak = next((peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)
    if peak is None:
        return None
    return peak.fp32 if precision == "fp32" else peak.half
