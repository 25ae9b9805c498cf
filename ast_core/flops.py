"""What a training step costs in theory, and what a device could do at best: their quotient is the utilisation (MFU).

N tokens, D width.
"""

import re

import torch

from ast_core.model import PATCH_SIZE, ASTModel
from ast_core.recipe import Recipe

PEAK_FLOPS = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A40": 150e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}
"""FLOP/s of matrix products in bf16 (V100 and T4, which lack it: fp16) with float32 sums, without sparsity: NVIDIA's
data sheets of the cards (SXM where nothing is said) and its white papers of Ampere and Ada. Longer names come first."""
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


def peak_flops(device: torch.device) -> float | None:
    """A second, at best; None where that is not known, as of a CPU, so that no utilisation is made up."""
    return peak_flops_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_flops_of(device_name: str) -> float | None:
    if OTHER_CARDS & set(device_name.split()):
        return None
    return next((peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)
