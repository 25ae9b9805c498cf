"""What every augmentation offers to the feed and to the training step.

B clips, T frames, M mel bins.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ast_core.augment.registry import ActsOn, create_augmentations
from ast_core.recipe import Recipe

if TYPE_CHECKING:
    from ast_core.batch import Batch

Values = Mapping[str, np.ndarray]
"""Random numbers by name; every array is `[B]`."""


class Augmentation:
    """A random change of the clips of a batch. A subclass is a class of `settings`.

    Random numbers are drawn first, on the CPU and for the global batch, so that a seed gives the same batch on any
    number of ranks. Applying them is a function of the batch and of these numbers.
    """

    @property
    def is_off(self) -> bool:
        """Whether the settings leave every clip unchanged. Nothing is drawn then."""
        return False

    @property
    def partner_share(self) -> float:
        """The share of the clips that get a partner (`Batch.partners`).

        Partners and their λ are drawn with the order of the epoch and not by `draw`, because the feed needs them to
        plan its reads. The feed mixes the labels by λ.
        """
        return 0.0

    def draw(self, seed: Sequence[int], num_clips: int, num_frames: int, num_mel_bins: int) -> Values:
        """The random numbers of a global batch of `num_clips`.

        They depend only on `seed` = (run's seed, epoch, step) and the other arguments. `rng_for` gives each purpose a
        generator of its own, so that no augmentation changes the draws of another.
        """
        return {}

    def apply(self, fbank_BTM: Tensor, values: Values, batch: "Batch") -> Tensor:
        """The augmented clips, float32 on the device of the batch. `fbank_BTM` may be overwritten, `batch` may not.

        Frames after the end of a clip are 0 before normalisation, and stay 0 (`frames_mask`). Allocate few arrays of
        the batch's size: on a CPU, allocating one takes longer than filling it.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Drawn:
    """An augmentation with the random numbers of some clips."""

    augmentation: Augmentation
    acts_on: ActsOn
    values: Values

    def apply(self, fbank_BTM: Tensor, batch: "Batch") -> Tensor:
        return self.augmentation.apply(fbank_BTM, self.values, batch)


def draw_augmentations(recipe: Recipe, seed: Sequence[int], num_clips: int) -> tuple[Drawn, ...]:
    """The recipe's augmentations, in order, with the random numbers of a global batch of `num_clips`."""
    return tuple(
        Drawn(augmentation, acts_on, augmentation.draw(seed, num_clips, recipe.input_tdim, recipe.input_fdim))
        for acts_on, augmentation in create_augmentations(recipe)
    )


def take(augmentations: Sequence[Drawn], positions: np.ndarray) -> tuple[Drawn, ...]:
    """The augmentations with the random numbers of the clips at `positions`."""
    return tuple(
        Drawn(one.augmentation, one.acts_on, {name: values[positions] for name, values in one.values.items()})
        for one in augmentations
    )


def partner_share(recipe: Recipe) -> float:
    """The share of the clips for which the feed reads a partner."""
    return max((augmentation.partner_share for _, augmentation in create_augmentations(recipe)), default=0.0)


def frames_mask(num_frames_B: Tensor, num_frames: int) -> Tensor:
    """`[B, T]`, true for the frames that the clip has."""
    return torch.arange(num_frames, device=num_frames_B.device) < num_frames_B.unsqueeze(1)
