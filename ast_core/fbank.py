"""Kaldi-compatible log-mel filter banks, batched, on any device, with gradients.

The same function as `torchaudio.compliance.kaldi.fbank(htk_compat=True, window_type="hanning", dither=0,
use_energy=False, num_mel_bins=128, frame_shift=10)`, which works on one clip at a time. The steps and constants follow
Kaldi's feature extraction (https://kaldi-asr.org/doc/feat.html).
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

SAMPLE_RATE_HZ = 16_000
NUM_MEL_BINS = 128
FRAME_LENGTH_MS = 25.0
FRAME_SHIFT_MS = 10.0
LOW_FREQ_HZ = 20.0
PREEMPHASIS = 0.97
POWER_FLOOR = torch.finfo(torch.float32).eps
"""Log-mel values never fall below `log(POWER_FLOOR)` = -15.94: digital silence."""


def num_frames_of(
    num_samples: int,
    *,
    sample_rate_hz: int = SAMPLE_RATE_HZ,
    frame_length_ms: float = FRAME_LENGTH_MS,
    frame_shift_ms: float = FRAME_SHIFT_MS,
) -> int:
    """Frames that fit wholly into `num_samples` (Kaldi's `snip_edges`): 998 for 10 s."""
    length, shift = _samples(sample_rate_hz, frame_length_ms), _samples(sample_rate_hz, frame_shift_ms)
    return 0 if num_samples < length else 1 + (num_samples - length) // shift


def fbank(
    waveform: Tensor,
    *,
    sample_rate_hz: int = SAMPLE_RATE_HZ,
    num_mel_bins: int = NUM_MEL_BINS,
    frame_length_ms: float = FRAME_LENGTH_MS,
    frame_shift_ms: float = FRAME_SHIFT_MS,
) -> Tensor:
    """Natural log of mel powers.

    Args:
        waveform: `[..., samples]`, floating point, full scale at [-1, 1] (not 16-bit integers: AST's norm figures
            assume this scale). Its mean should be taken off before, as the recipes do.

    Returns:
        `[..., frames, num_mel_bins]` in the dtype of `waveform`.

    Raises:
        ValueError: the waveform is shorter than one frame, or not floating point.
    """
    if not waveform.is_floating_point():
        raise ValueError(f"waveform is {waveform.dtype}; give floating point in [-1, 1]")
    length, shift = _samples(sample_rate_hz, frame_length_ms), _samples(sample_rate_hz, frame_shift_ms)
    if waveform.shape[-1] < length:
        raise ValueError(f"waveform has {waveform.shape[-1]} samples; one frame takes {length}")
    # In torchaudio's order of operations: under a strong DC offset float32 rounding alone is worth 1e-3.
    frames = waveform.unfold(-1, length, shift)
    frames = frames - frames.mean(dim=-1, keepdim=True)
    # A frame's first sample has no predecessor within the frame; whatever stands there, the window is 0.
    frames = F.pad(frames[..., 1:] - PREEMPHASIS * frames[..., :-1], (1, 0))
    frames = frames * _hann(length, waveform.dtype, waveform.device)
    fft_size = 1 << (length - 1).bit_length()
    spectrum = torch.fft.rfft(frames, n=fft_size)
    power = spectrum.real.square() + spectrum.imag.square()
    mel = _mel_filters(num_mel_bins, fft_size, sample_rate_hz, waveform.dtype, waveform.device)
    return (power @ mel).clamp_min(POWER_FLOOR).log()


def _samples(sample_rate_hz: int, duration_ms: float) -> int:
    return int(sample_rate_hz * duration_ms * 0.001)


# What is kept must also serve a later call that wants gradients, hence `inference_mode(False)`.
@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _hann(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.hann_window(length, periodic=False, dtype=dtype, device=device)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _mel_filters(
    num_mel_bins: int, fft_size: int, sample_rate_hz: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """`[fft_size // 2 + 1, num_mel_bins]`: triangles of equal width on the mel scale `1127 ln(1 + f / 700)`."""

    def mel(freq_hz: Tensor) -> Tensor:
        return 1127.0 * torch.log1p(freq_hz / 700.0)

    low, high = mel(torch.tensor([LOW_FREQ_HZ, sample_rate_hz / 2], dtype=torch.float64))
    step = (high - low) / (num_mel_bins + 1)
    left = low + step * torch.arange(num_mel_bins, dtype=torch.float64)
    points = mel(torch.arange(fft_size // 2 + 1, dtype=torch.float64) * (sample_rate_hz / fft_size)).unsqueeze(1)
    triangles = torch.minimum((points - left) / step, (left + 2 * step - points) / step).clamp_min(0)
    return triangles.to(dtype=dtype, device=device)
