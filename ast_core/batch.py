"""A batch of raw log-mel, and the function that makes the network's input from it.

B clips, K of them mixed, T frames, M mel bins, C classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ast_core.augment.augmentation import Drawn
from ast_core.features import KALDI128, FeatureSettings

G = TypeVar("G", "Batch", "Partners")


@dataclass(frozen=True)
class Partners:
    """The mixup partners of K clips of a batch. Clips that are not mixed have none, which saves reading and copying."""

    position: np.ndarray
    """`[K]`, ascending: indices in the batch of the clips that are mixed."""
    fbank_KTM: Tensor
    num_frames_K: Tensor
    lam_K: Tensor
    """The clip's share of the mixture; the partner has 1 - λ."""


@dataclass(frozen=True)
class Batch:
    """Raw log-mel as stored, padded with 0 or cut to the recipe's number of frames, with targets and mixup partners."""

    fbank_BTM: Tensor
    num_frames_B: Tensor
    target_BC: Tensor
    """Labels, already mixed by λ."""
    weight_B: Tensor
    """1, or 0 for padding: a clip that only makes all ranks' batches the same size."""
    partners: Partners | None = None
    """None if no clip of the batch is mixed."""
    features: FeatureSettings = KALDI128
    """The settings of `fbank_BTM`, whose log scale and floor augmentations need."""

    def __len__(self) -> int:
        return len(self.num_frames_B)

    def to(self, device: torch.device) -> "Batch":
        return _each_tensor(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """The batch in page-locked memory, from which it is copied to a GPU while the CPU goes on."""
        return _each_tensor(self, Tensor.pin_memory)

    def part(self, begin: int, end: int) -> "Batch":
        part = _each_tensor(replace(self, partners=None), lambda tensor: tensor[begin:end])
        if self.partners is None:
            return part
        first, last = np.searchsorted(self.partners.position, [begin, end])
        partners = _each_tensor(self.partners, lambda tensor: tensor[first:last])
        return replace(part, partners=replace(partners, position=self.partners.position[first:last] - begin))


def _each_tensor(group: G, change: Callable[[Tensor], Tensor]) -> G:
    changed: dict[str, Any] = {
        name: change(value) if isinstance(value, Tensor) else _each_tensor(value, change)
        for name, value in vars(group).items()
        if isinstance(value, Tensor | Partners)
    }
    return replace(group, **changed)


@dataclass(frozen=True)
class Norm:
    """How raw log-mel is normalised: `(x - mean) / (divisor * std)`."""

    mean: float
    std: float
    divisor: float = 2.0
    """2 for the AST and the comparison's models, 1 for PSLA's."""


def normalise(fbank_BTM: Tensor, mean: float, std: float, divisor: float = 2.0) -> Tensor:
    """`(x - mean) / (divisor * std)`. The factor 2 is intended: it gives the range that ImageNet weights expect."""
    return torch.sub(fbank_BTM, mean).div_(divisor * std)


def model_input(batch: Batch, norm: Norm, augmentations: Sequence[Drawn] = ()) -> Tensor:
    """The network's input `[B, T, M]` in float32: augmentations of raw log-mel, normalisation, and the others."""
    fbank_BTM = batch.fbank_BTM.to(torch.float32, copy=True)
    for drawn in augmentations:
        if drawn.acts_on == "raw":
            fbank_BTM = drawn.apply(fbank_BTM, batch)
    fbank_BTM = normalise(fbank_BTM, norm.mean, norm.std, norm.divisor)
    for drawn in augmentations:
        if drawn.acts_on == "normalised":
            fbank_BTM = drawn.apply(fbank_BTM, batch)
    return fbank_BTM
