"""Augmentation and normalisation of whole batches, on the device of the batch.

B clips, T frames, M mel bins. The order is that of the reference implementation: mixup → pad or cut → SpecAugment,
which fills with 0 → `(x - mean) / (2 std)` → noise and time roll if the recipe asks for them.

Random numbers are drawn first, on the CPU and for the global batch (`draw`), so that a seed gives the same batch on any
number of workers. Applying them is a pure function. It allocates few arrays of the batch's size, because on a CPU
allocating one takes longer than filling it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ast_core.features import KALDI128, FeatureSettings
from ast_core.recipe import MixupDomain
from ast_core.seeds import rng_for
from ast_core.transfer import to_device

ROLL_FRAMES = 10
NOISE_GAIN = 0.1
MIXUP_BETA = 10.0
"""λ ~ Beta(10, 10), as in the dataloader of `YuanGongND/ast`."""


def mixup_power(a: Tensor, b: Tensor, lam: Tensor | float, nats_per_unit: float = 1.0) -> Tensor:
    """Log-mel of the mixture `λ a + (1 - λ) b` of two uncorrelated waveforms: powers add, weighted λ² and (1 - λ)².

    `a` and `b` are raw log-mel of one shape, `[..., frames, mel bins]`; `lam` in [0, 1] broadcasts against them.
    `b` may be -inf after the end of the second clip. λ = 1 gives `a` exactly, in natural logarithms. `nats_per_unit` is
    that of the features' log scale: 1 for natural logarithms, ln(10) / 10 for decibels.
    """
    lam = torch.as_tensor(lam, dtype=a.dtype, device=a.device)
    mixed = torch.logaddexp(2 * lam.log() + nats_per_unit * a, 2 * torch.log1p(-lam) + nats_per_unit * b)
    return mixed / nats_per_unit


def mixup_log_mel(a: Tensor, b: Tensor, lam: Tensor | float) -> Tensor:
    """`λ a + (1 - λ) b` of the raw log-mel values, as in image recipes. The result is not the log-mel of a mixture."""
    return torch.lerp(b, a, torch.as_tensor(lam, dtype=a.dtype, device=a.device))


def mixup_batch(
    fbank_BTM: Tensor,
    num_frames_B: Tensor,
    partner_BTM: Tensor,
    partner_frames_B: Tensor,
    lam_B: Tensor,
    domain: MixupDomain = "power",
    features: FeatureSettings = KALDI128,
) -> Tensor:
    """Mix each clip with its partner. The result has the clip's length and is 0 after it.

    λ = 1 leaves a clip unchanged. A partner is silent after its end. All values stay at or above the features' floor,
    as those of a real mixture do.
    """
    nats = features.log_scale.nats_per_unit if domain == "power" else 1.0
    lam_B11, ended_BT1 = lam_B.view(-1, 1, 1), ~frames_mask(partner_frames_B, partner_BTM.shape[1]).unsqueeze(2)
    if domain == "power":
        # As mixup_power. After the partner's end, -inf takes the place of 2 log(1 - λ).
        gain_BT1 = (2 * torch.log1p(-lam_B11)).expand(ended_BT1.shape).masked_fill(ended_BT1, -torch.inf)
        mixed = torch.add(2 * lam_B11.log(), fbank_BTM, alpha=nats)
        torch.logaddexp(mixed, torch.add(gain_BT1, partner_BTM, alpha=nats), out=mixed)
    else:
        mixed = mixup_log_mel(fbank_BTM, partner_BTM.masked_fill(ended_BT1, features.floor), lam_B11)
    return mixed.clamp_min_(nats * features.floor).mul_(
        frames_mask(num_frames_B, fbank_BTM.shape[1]).unsqueeze(2) / nats
    )


def frames_mask(num_frames_B: Tensor, num_frames: int) -> Tensor:
    """`[B, T]`, true for the frames that the clip has."""
    return torch.arange(num_frames, device=num_frames_B.device) < num_frames_B.unsqueeze(1)


@dataclass(frozen=True)
class Augmentation:
    """The random numbers of each clip; every array is `[B]`. Starts and widths are in mel bins or frames."""

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
    seed: Sequence[int], num_clips: int, *, num_frames: int, num_mel_bins: int, freqm: int, timem: int, noise: bool
) -> Augmentation:
    """Draw from the reference implementation's distributions.

    The result depends only on `seed`, such as (run's seed, epoch, step), and the other arguments. Each kind has its own
    generator. Masks are drawn as in torchaudio: a real width `v = U·freqm` and a start `U·(size - v)`, both rounded
    down. Noise is uniform in [0, gain), with a gain uniform in [0, 0.1). The roll is uniform over -10 … 9 frames.
    """

    def mask(axis: str, size: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
        width, start = rng_for(f"{axis} mask", seed).random((2, num_clips))
        width *= longest
        return (start * (size - width)).astype(np.int64), width.astype(np.int64)

    masks = (*mask("frequency", num_mel_bins, freqm), *mask("time", num_frames, timem))
    if not noise:  # before a generator is made for it, which takes longer than a batch's draws
        off = np.zeros(num_clips, dtype=np.int64)
        return Augmentation(*masks, noise_gain=off, noise_seed=off, roll_frames=off)
    noise_rng = rng_for("noise", seed)
    return Augmentation(
        *masks,
        noise_gain=noise_rng.random(num_clips) * NOISE_GAIN,
        noise_seed=noise_rng.integers(0, 2**62, num_clips),
        roll_frames=rng_for("roll", seed).integers(-ROLL_FRAMES, ROLL_FRAMES, num_clips),
    )


@dataclass(frozen=True)
class Patchout:
    """The rows (frequency) and columns (time) of the patch grid that are kept, both sorted."""

    rows: np.ndarray
    columns: np.ndarray

    def kept_patches(self, num_columns: int) -> np.ndarray:
        """`[rows × columns]`: indices of the kept patches in a grid of `num_columns`, flattened row by row."""
        return (self.rows[:, None] * num_columns + self.columns).ravel()


def draw_patchout(seed: Sequence[int], grid: tuple[int, int], *, num_rows: int, num_columns: int) -> Patchout | None:
    """Structured patchout (PaSST: Koutini et al., 2022, https://arxiv.org/abs/2110.05069): drop whole rows and columns.

    There is one draw for the global batch, a function of `seed` = (run's seed, epoch, step). All ranks and
    micro-batches drop the same `num_rows` rows and `num_columns` columns, so all clips have the same number of tokens.
    Returns None if nothing is dropped.
    """
    if num_rows == num_columns == 0:
        return None

    def kept(axis: str, size: int, num_dropped: int) -> np.ndarray:
        return np.sort(rng_for(f"patchout {axis}", seed).permutation(size)[num_dropped:])

    return Patchout(kept("rows", grid[0], num_rows), kept("columns", grid[1], num_columns))


def spec_augment(fbank_BTM: Tensor, augmentation: Augmentation) -> Tensor:
    """Set one block of mel bins and one block of frames to 0 in each clip."""
    _, num_frames, num_mel_bins = fbank_BTM.shape
    kept_M = ~_block(augmentation.freq_start, augmentation.freq_width, num_mel_bins, fbank_BTM.device).unsqueeze(1)
    kept_T = ~_block(augmentation.time_start, augmentation.time_width, num_frames, fbank_BTM.device).unsqueeze(2)
    return (fbank_BTM * kept_M).mul_(kept_T)


def normalise(fbank_BTM: Tensor, mean: float, std: float) -> Tensor:
    """`(x - mean) / (2 std)`. The factor 2 is intended: it gives the range that ImageNet weights expect."""
    return torch.sub(fbank_BTM, mean).div_(2 * std)


def noise_and_roll(fbank_BTM: Tensor, augmentation: Augmentation) -> Tensor:
    """Add uniform noise of the drawn gain to each clip, then roll it along time."""
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
    first, end = to_device(np.stack([start, start + width]), device).unsqueeze(2)
    position = torch.arange(size, device=device)
    return (position >= first) & (position < end)
