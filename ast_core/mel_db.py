"""Mel spectrograms in decibels on Slaney's mel scale: batched, on any device, differentiable.

It computes `10 · log10(max(power, 1e-10))` of the powers of `torchaudio.transforms.MelSpectrogram(norm="slaney",
mel_scale="slaney", center=True, pad_mode="constant")`, in blocks as `ast_core.fbank` does.
"""

from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torchaudio.functional import melscale_fbanks

from ast_core.fbank import Filters, check_waveform, grouped, in_blocks, mel_powers, next_power_of_two
from ast_core.features import KINDS, SMALL64, FeatureSettings

POWER_FLOOR = KINDS["mel_db"].power_floor


def mel_db(
    waveform: Tensor,
    *,
    sample_rate_hz: int = SMALL64.sample_rate_hz,
    num_mel_bins: int = SMALL64.num_mel_bins,
    frame_length_ms: float = SMALL64.frame_length_ms,
    frame_shift_ms: float = SMALL64.frame_shift_ms,
    low_freq_hz: float = SMALL64.low_freq_hz,
    high_freq_hz: float | None = SMALL64.high_freq_hz,
) -> Tensor:
    """Mel powers in decibels. The keywords are the fields of `ast_core.features.FeatureSettings`.

    Frames are centred on the multiples of the frame shift, with silence before and after the waveform. The FFT has four
    times as many points as a frame has samples, rounded up to a power of two, so that narrow filters cover some too.

    Args:
        waveform: `[..., samples]`, float32 or float64, full scale at [-1, 1]. Subtract its mean first, as the
            preparation does.

    Returns:
        `[..., frames, num_mel_bins]` in the dtype of `waveform`.

    Raises:
        ConfigError: a setting is not allowed.
        ValueError: the waveform is shorter than one frame, or neither float32 nor float64.
    """
    settings = FeatureSettings(
        kind="mel_db",
        sample_rate_hz=sample_rate_hz,
        num_mel_bins=num_mel_bins,
        frame_length_ms=frame_length_ms,
        frame_shift_ms=frame_shift_ms,
        low_freq_hz=low_freq_hz,
        high_freq_hz=high_freq_hz,
    )
    check_waveform(waveform, settings)
    length = settings.frame_length_samples
    fft_size = _fft_size(length)
    window = torch.hann_window(length, dtype=waveform.dtype, device=waveform.device)
    filters = _mel_filters(settings, waveform.dtype, waveform.device)
    decibels = partial(_decibels, window=window, filters=filters, fft_size=fft_size)
    return in_blocks(F.pad(waveform, ((length + 1) // 2, length // 2)), settings, decibels, fft_size)


def _decibels(frames: Tensor, window: Tensor, filters: Filters, fft_size: int) -> Tensor:
    """`[clips, frames, samples]` → `[clips · frames, mel bins]`."""
    # The frame is in the middle of the FFT, as in torch.stft. Elsewhere, rounding changes quiet bins by 0.003 dB.
    before = (fft_size - len(window)) // 2
    frames = F.pad(frames.flatten(0, 1) * window, (before, fft_size - len(window) - before))
    return 10 * mel_powers(frames, filters).clamp_min(POWER_FLOOR).log10()


def _fft_size(length: int) -> int:
    return next_power_of_two(4 * length)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # cached tensors must also serve a later call with gradients
def _mel_filters(settings: FeatureSettings, dtype: torch.dtype, device: torch.device) -> Filters:
    """Triangular filters of equal area, grouped."""
    filters = melscale_fbanks(
        n_freqs=_fft_size(settings.frame_length_samples) // 2 + 1,
        f_min=settings.low_freq_hz,
        f_max=settings.upper_freq_hz,
        n_mels=settings.num_mel_bins,
        sample_rate=settings.sample_rate_hz,
        norm="slaney",
        mel_scale="slaney",
    )
    return grouped(filters.to(device, dtype))
