"""Operations of a training step, the peak rate of a device, and the utilisation (MFU) that follows from both."""

import re
from typing import NamedTuple

import torch

from ast_core.models.tagger import Tagger
from ast_core.recipe import Recipe


class Peak(NamedTuple):
    """Peak FLOP/s of matrix products."""

    half: float
    """bf16 and fp16 with float32 sums, without sparsity. V100 and T4 have only fp16."""
    fp32: float
    """float32 without TF32. By default PyTorch uses TF32 for convolutions only; the AST has one."""


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
"""From NVIDIA's data sheets (SXM unless the name says otherwise) and its white papers on Volta, Turing, Ampere and Ada.
The first match counts, so longer names come first."""
OTHER_CARDS = {"MIG", "Laptop", "D"}
"""Words in a device name that mean a slice of a card or a slower variant."""


def training_flops(model: Tagger, recipe: Recipe) -> int:
    """Operations of one clip: forward, and twice that for backward. Recomputed activations do not count."""
    return 3 * model.forward_flops(recipe.patchout_f, recipe.patchout_t)


def utilisation(
    clips_per_s: float, model: Tagger, recipe: Recipe, device: torch.device, num_devices: int = 1
) -> float | None:
    """MFU: the share of the devices' peak, in the recipe's precision, that training at this rate uses.

    None if the peak is unknown, as for a CPU.
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
