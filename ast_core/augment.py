"""Augmentation and normalisation of whole batches, on the device of the batch.

B clips, T frames, M mel bins. The order is the original's: mixup → pad or cut → SpecAugment, which fills 0 →
`(x - mean) / (2 std)` → noise and time roll where the recipe asks.

What is random is drawn beforehand, on the CPU, for the global batch (`draw`), so that a seed gives the same batch on
any number of workers; applying it is a pure function.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ast_core.fbank import POWER_FLOOR

ROLL_FRAMES = 10
NOISE_GAIN = 0.1
STORED_FLOOR = float(torch.tensor(math.log(POWER_FLOOR)).half())
"""The fbank's floor, digital silence, as float16 stores it."""
MIXUP_BETA = 10.0
"""λ ~ Beta(10, 10): `YuanGongND/ast`, dataloader."""


def mixup_power(a: Tensor, b: Tensor, lam: Tensor | float) -> Tensor:
    """Log-mel of `λ a + (1 - λ) b`, were the two waveforms uncorrelated: powers add, weighted λ² and (1 - λ)².

    `a` and `b` are raw log-mel of one shape, `[..., frames, mel bins]`; `lam` in [0, 1] broadcasts against them.
    `b` may be -inf where the second clip has ended; λ = 1 gives `a` exactly.
    """
    lam = torch.as_tensor(lam, dtype=a.dtype, device=a.device)
    return torch.logaddexp(2 * lam.log() + a, 2 * torch.log1p(-lam) + b)


def mixup_batch(
    fbank_BTM: Tensor, num_frames_B: Tensor, partner_BTM: Tensor, partner_frames_B: Tensor, lam_B: Tensor
) -> Tensor:
    """Mix each clip with its partner, to the length of the clip, as the original mixes waveforms; 0 beyond it.

    λ = 1 leaves a clip as it is. Nothing falls below the fbank's floor, as no fbank of a mixture does.
    """
    ended = ~frames_mask(partner_frames_B, partner_BTM.shape[1])
    partner_BTM = partner_BTM.masked_fill(ended.unsqueeze(2), -torch.inf)
    mixed = mixup_power(fbank_BTM, partner_BTM, lam_B.view(-1, 1, 1)).clamp_min(STORED_FLOOR)
    return mixed.masked_fill(~frames_mask(num_frames_B, fbank_BTM.shape[1]).unsqueeze(2), 0.0)


def frames_mask(num_frames_B: Tensor, num_frames: int) -> Tensor:
    """`[B, T]`, true on the frames that the clip has."""
    return torch.arange(num_frames, device=num_frames_B.device) < num_frames_B.unsqueeze(1)


@dataclass(frozen=True)
class Augmentation:
    """One draw a clip; every array is `[B]`. Starts and widths are in mel bins or frames."""

    freq_start: np.ndarray
    freq_width: np.ndarray
    time_start: np.ndarray
    time_width: np.ndarray
    noise_gain: np.ndarray
    noise_seed: np.ndarray
    roll_frames: np.ndarray

    def take(self, positions: np.ndarray) -> "Augmentation":
        return Augmentation(**{name: values[positions] for name, values in vars(self).items()})


def draw(
    rng: np.random.Generator, num_clips: int, *, num_frames: int, num_mel_bins: int, freqm: int, timem: int, noise: bool
) -> Augmentation:
    """The original's distributions.

    Masks are torchaudio's: a real width `v = U·freqm`, a start `U·(size - v)`, both cut to whole bins. Noise is uniform
    in [0, gain), the gain uniform in [0, 0.1); the roll is uniform over -10 … 9 frames.
    """

    def mask(size: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
        width = rng.random(num_clips) * longest
        return (rng.random(num_clips) * (size - width)).astype(np.int64), width.astype(np.int64)

    freq_start, freq_width = mask(num_mel_bins, freqm)
    time_start, time_width = mask(num_frames, timem)
    gain = rng.random(num_clips) * NOISE_GAIN
    seed = rng.integers(0, 2**62, num_clips)
    roll = rng.integers(-ROLL_FRAMES, ROLL_FRAMES, num_clips)
    off = np.zeros(num_clips, dtype=np.int64)
    return Augmentation(
        freq_start, freq_width, time_start, time_width, gain if noise else off, seed, roll if noise else off
    )


def spec_augment(fbank_BTM: Tensor, augmentation: Augmentation) -> Tensor:
    """One block of mel bins and one of frames set to 0 in each clip."""
    _, num_frames, num_mel_bins = fbank_BTM.shape
    kept_M = ~_block(augmentation.freq_start, augmentation.freq_width, num_mel_bins, fbank_BTM.device).unsqueeze(1)
    kept_T = ~_block(augmentation.time_start, augmentation.time_width, num_frames, fbank_BTM.device).unsqueeze(2)
    return fbank_BTM * kept_M * kept_T


def normalise(fbank_BTM: Tensor, mean: float, std: float) -> Tensor:
    """`(x - mean) / (2 std)`: twice the std, on purpose, to meet the range of ImageNet weights."""
    return (fbank_BTM - mean) / (2 * std)


def noise_and_roll(fbank_BTM: Tensor, augmentation: Augmentation) -> Tensor:
    """Uniform noise of the drawn gain on each clip, then a roll along time. Nothing where gain and roll are 0."""
    if not augmentation.noise_gain.any() and not augmentation.roll_frames.any():
        return fbank_BTM
    clips = []
    drawn = zip(fbank_BTM, augmentation.noise_gain, augmentation.noise_seed, augmentation.roll_frames, strict=True)
    for clip_TM, gain, seed, roll in drawn:
        generator = torch.Generator(device=clip_TM.device).manual_seed(int(seed))
        noise = torch.rand(clip_TM.shape, generator=generator, device=clip_TM.device, dtype=clip_TM.dtype)
        clips.append(torch.roll(clip_TM + float(gain) * noise, int(roll), dims=0))
    return torch.stack(clips)


def _block(start: np.ndarray, width: np.ndarray, size: int, device: torch.device) -> Tensor:
    first = torch.as_tensor(start, device=device).unsqueeze(1)
    position = torch.arange(size, device=device)
    return (position >= first) & (position < first + torch.as_tensor(width, device=device).unsqueeze(1))
