"""Kaldi-compatible log-mel filter banks: batched, on any device, differentiable.

It computes the same as `torchaudio.compliance.kaldi.fbank(htk_compat=True, window_type="hanning", dither=0,
use_energy=False)`, which works on one clip at a time. The steps and constants follow Kaldi's feature extraction
(https://kaldi-asr.org/doc/feat.html).
"""

from collections.abc import Callable
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ast_core.features import KALDI128, KINDS, FeatureSettings, whole_frames

PREEMPHASIS = 0.97
POWER_FLOOR = KINDS["kaldi_fbank"].power_floor

FRAMES_AT_ONCE = 1024
FRAMES_AT_ONCE_ON_GPU = 65_536
"""Frames in one block, with an FFT of USUAL_FFT_SIZE. A frame then needs about 7 KB: a block should fit into a CPU's
cache, or fill a GPU."""
USUAL_FFT_SIZE = 512
MEL_GROUPS = 8
"""A mel filter covers few FFT bins, so multiplying by groups of neighbouring filters skips most of the zeros."""

Filters = list[tuple[slice, Tensor]]
"""Mel filters in groups: the FFT bins that a group covers, and its weights `[FFT bins, filters]`."""


def fbank(
    waveform: Tensor,
    *,
    sample_rate_hz: int = KALDI128.sample_rate_hz,
    num_mel_bins: int = KALDI128.num_mel_bins,
    frame_length_ms: float = KALDI128.frame_length_ms,
    frame_shift_ms: float = KALDI128.frame_shift_ms,
    low_freq_hz: float = KALDI128.low_freq_hz,
    high_freq_hz: float | None = KALDI128.high_freq_hz,
) -> Tensor:
    """The natural logarithm of mel powers. The keywords are the fields of `ast_core.features.FeatureSettings`.

    Memory besides the waveform: twice the result, and 7 MB in float32 (0.5 GB on a GPU) for any length of input. With
    gradients, autograd keeps about 5 KB more for each frame.

    Args:
        waveform: `[..., samples]`, float32 or float64, full scale at [-1, 1]; the published norms assume this scale.
            Subtract its mean first, as the preparation does.

    Returns:
        `[..., frames, num_mel_bins]` in the dtype of `waveform`.

    Raises:
        ConfigError: a setting is not allowed.
        ValueError: the waveform is shorter than one frame, or neither float32 nor float64.
    """
    settings = FeatureSettings(
        sample_rate_hz=sample_rate_hz,
        num_mel_bins=num_mel_bins,
        frame_length_ms=frame_length_ms,
        frame_shift_ms=frame_shift_ms,
        low_freq_hz=low_freq_hz,
        high_freq_hz=high_freq_hz,
    )
    check_waveform(waveform, settings)
    fft_size = next_power_of_two(settings.frame_length_samples)
    window = _hann(settings.frame_length_samples, waveform.dtype, waveform.device)
    filters = _mel_filters(settings, waveform.dtype, waveform.device)
    log_mel = partial(_log_mel, window=window, filters=filters, fft_size=fft_size)
    return in_blocks(waveform, settings, log_mel, fft_size)


def check_waveform(waveform: Tensor, settings: FeatureSettings) -> None:
    """Raise ValueError if the waveform is shorter than one frame, or neither float32 nor float64."""
    if waveform.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"waveform is {waveform.dtype}; give float32 or float64 in [-1, 1]")
    length = settings.frame_length_samples
    if waveform.shape[-1] < length:
        raise ValueError(f"waveform has {waveform.shape[-1]} samples; one frame takes {length}")


def in_blocks(
    waveform: Tensor, settings: FeatureSettings, log_mel: Callable[[Tensor], Tensor], fft_size: int
) -> Tensor:
    """`[..., frames, mel bins]` of all whole frames in a waveform `[..., samples]`, computed in little memory.

    `log_mel` computes a block: `[clips, frames, samples]` → `[clips · frames, mel bins]`.
    """
    length, shift = settings.frame_length_samples, settings.frame_shift_samples
    *batch, num_samples = waveform.shape
    num_frames = whole_frames(num_samples, length, shift)
    if 0 in batch:  # MKL's FFT would refuse it
        return waveform.new_empty(*batch, num_frames, settings.num_mel_bins)
    frames = waveform.reshape(-1, num_samples).unfold(-1, length, shift)  # a view: [clips, frames, samples]
    usual = FRAMES_AT_ONCE if waveform.device.type == "cpu" else FRAMES_AT_ONCE_ON_GPU
    at_once = max(1, usual * USUAL_FFT_SIZE // fft_size)
    # A block is several whole clips or a part of one clip, so that concatenated blocks keep the order of the clips.
    blocks = [part for clips in frames.split(max(1, at_once // num_frames)) for part in clips.split(at_once, dim=1)]
    with torch.autocast(waveform.device.type, enabled=False):  # the error of bf16 products would be 0.03 nats
        values = torch.cat([log_mel(block) for block in blocks])
    return values.view(*batch, num_frames, settings.num_mel_bins)


def _log_mel(frames: Tensor, window: Tensor, filters: Filters, fft_size: int) -> Tensor:
    """`[clips, frames, samples]` → `[clips · frames, mel bins]`."""
    # The order of operations is exactly torchaudio's. Between the partials of a clean tone, or with a strong DC offset,
    # another rounding in float32 changes the result by 1e-3; so does a fused multiply-add.
    frames = (frames - frames.mean(dim=-1, keepdim=True)).flatten(0, 1)
    # A frame's first sample has no predecessor within the frame; the window is 0 there.
    frames = (frames[:, 1:] - PREEMPHASIS * frames[:, :-1]) * window[1:]
    padded = F.pad(frames, (1, fft_size - len(window)))
    return mel_powers(padded, filters).clamp_min(POWER_FLOOR).log()


def mel_powers(frames: Tensor, filters: Filters) -> Tensor:
    """Windowed frames, padded to the FFT's size, `[frames, FFT size]` → powers `[frames, mel bins]`."""
    spectrum = torch.fft.rfft(frames)
    power = spectrum.real.square() + spectrum.imag.square()
    return torch.cat([power[:, fft_bins] @ weights for fft_bins, weights in filters], dim=1)


def next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


# A cached tensor must also serve a later call with gradients, so it is not an inference tensor.
@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _hann(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.hann_window(length, periodic=False, dtype=dtype, device=device)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _mel_filters(settings: FeatureSettings, dtype: torch.dtype, device: torch.device) -> Filters:
    """Triangular filters of equal width on the mel scale `1127 ln(1 + f / 700)`, grouped.

    The weights are computed in float32 as in torchaudio, because rounding decides the weights of filters that are
    narrower than an FFT bin.
    """
    num_bins, fft_size = settings.num_mel_bins, next_power_of_two(settings.frame_length_samples)
    low, high = map(settings.mel, (settings.low_freq_hz, settings.upper_freq_hz))
    step = (high - low) / (num_bins + 1)
    left, centre, right = (low + (torch.arange(num_bins) + corner) * step for corner in (0.0, 1.0, 2.0))
    fft_freq_hz = torch.arange(fft_size // 2) * (settings.sample_rate_hz / fft_size)
    mel = 1127.0 * (1.0 + fft_freq_hz / 700.0).log().unsqueeze(1)
    triangles = torch.minimum((mel - left) / (centre - left), (right - mel) / (right - centre)).clamp_min(0)
    return grouped(triangles.to(device, dtype))


def grouped(filters: Tensor) -> Filters:
    """Groups of neighbouring filters, from the lowest up, for weights `[FFT bins, mel bins]`."""
    groups = []
    for group in filters.chunk(MEL_GROUPS, dim=1):
        covered = group.any(dim=1).nonzero().flatten().tolist()
        fft_bins = slice(min(covered, default=0), max(covered, default=-1) + 1)
        groups.append((fft_bins, group[fft_bins].contiguous()))
    return groups
