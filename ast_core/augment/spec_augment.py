"""SpecAugment: masks of random frequency bands and time spans.

B clips, T frames, M mel bins.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ast_core.augment.augmentation import Augmentation, Values
from ast_core.seeds import rng_for
from ast_core.settings import settings
from ast_core.transfer import to_device

if TYPE_CHECKING:
    from ast_core.batch import Batch


@settings
class SpecAugment(Augmentation):
    """Set one block of mel bins and one block of frames to 0 in each clip.

    Masks are drawn as in torchaudio, which the reference implementation uses: a real width `v = U·freqm` and a start
    `U·(size - v)`, both rounded down.
    """

    freqm: int
    timem: int

    @property
    def is_off(self) -> bool:
        return self.freqm == self.timem == 0

    def draw(self, seed: Sequence[int], num_clips: int, num_frames: int, num_mel_bins: int) -> Values:
        """Starts and widths, in mel bins or frames."""

        def mask(axis: str, size: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
            width, start = rng_for(f"{axis} mask", seed).random((2, num_clips))
            width *= longest
            return (start * (size - width)).astype(np.int64), width.astype(np.int64)

        freq_start, freq_width = mask("frequency", num_mel_bins, self.freqm)
        time_start, time_width = mask("time", num_frames, self.timem)
        return {
            "freq_start": freq_start,
            "freq_width": freq_width,
            "time_start": time_start,
            "time_width": time_width,
        }

    def apply(self, fbank_BTM: Tensor, values: Values, batch: "Batch") -> Tensor:
        _, num_frames, num_mel_bins = fbank_BTM.shape
        device = fbank_BTM.device
        kept_M = ~_block(values["freq_start"], values["freq_width"], num_mel_bins, device).unsqueeze(1)
        kept_T = ~_block(values["time_start"], values["time_width"], num_frames, device).unsqueeze(2)
        return (fbank_BTM * kept_M).mul_(kept_T)


def _block(start: np.ndarray, width: np.ndarray, size: int, device: torch.device) -> Tensor:
    first, end = to_device(np.stack([start, start + width]), device).unsqueeze(2)
    position = torch.arange(size, device=device)
    return (position >= first) & (position < end)
