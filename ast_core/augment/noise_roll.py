"""Noise and a roll along time.

B clips, T frames, M mel bins.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ast_core.augment.augmentation import Augmentation, Values
from ast_core.seeds import rng_for
from ast_core.settings import settings

if TYPE_CHECKING:
    from ast_core.batch import Batch

ROLL_FRAMES = 10
NOISE_GAIN = 0.1


@settings
class NoiseRoll(Augmentation):
    """Add uniform noise to each clip, then roll it along time, as the reference implementation does.

    Noise is uniform in [0, gain), with a gain uniform in [0, 0.1). The roll is uniform over -10 … 9 frames.
    """

    noise: bool

    @property
    def is_off(self) -> bool:
        return not self.noise

    def draw(self, seed: Sequence[int], num_clips: int, num_frames: int, num_mel_bins: int) -> Values:
        noise_rng = rng_for("noise", seed)
        return {
            "noise_gain": noise_rng.random(num_clips) * NOISE_GAIN,
            "noise_seed": noise_rng.integers(0, 2**62, num_clips),
            "roll_frames": rng_for("roll", seed).integers(-ROLL_FRAMES, ROLL_FRAMES, num_clips),
        }

    def apply(self, fbank_BTM: Tensor, values: Values, batch: "Batch") -> Tensor:
        clips = []
        drawn = zip(fbank_BTM, values["noise_gain"], values["noise_seed"], values["roll_frames"], strict=True)
        for clip_TM, gain, seed, roll in drawn:
            generator = torch.Generator(device=clip_TM.device).manual_seed(int(seed))
            noise = torch.rand(clip_TM.shape, generator=generator, device=clip_TM.device, dtype=clip_TM.dtype)
            clips.append(torch.roll(clip_TM + float(gain) * noise, int(roll), dims=0))
        return torch.stack(clips)
