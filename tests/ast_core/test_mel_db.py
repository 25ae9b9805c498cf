"""Features in decibels equal torchaudio's, and those of the comparison's reference implementation."""

import numpy as np
import pytest
import torch
import torchaudio
from torch import Tensor

from ast_core.augment.mixup import mixup_batch
from ast_core.features import SMALL64, FeatureSettings, log_mel
from ast_core.mel_db import mel_db
from tests.ast_core.test_fbank import noise, read
from tests.reference import AUDIOSET, needs_shared, whole_figures

TOLERANCE_DB = 1e-3


def torchaudios(waveform: Tensor, fft_size: int, settings: FeatureSettings) -> Tensor:
    mel_power = torchaudio.transforms.MelSpectrogram(
        sample_rate=settings.sample_rate_hz,
        n_fft=fft_size,
        win_length=settings.frame_length_samples,
        hop_length=settings.frame_shift_samples,
        f_min=settings.low_freq_hz,
        f_max=settings.upper_freq_hz,
        n_mels=settings.num_mel_bins,
        pad_mode="constant",
        norm="slaney",
        mel_scale="slaney",
    )
    return 10 * mel_power(waveform).clamp_min(1e-10).log10().transpose(-1, -2)


@needs_shared
def test_small64_of_a_real_clip_doubled_equals_the_references():
    ours = log_mel(read(AUDIOSET / "--BfvyPmVMo_20.000.wav"), SMALL64)
    expected = whole_figures("small_features_reference")["small"]
    assert ours.shape == expected.shape == (401, 64)
    assert np.abs(2 * ours.numpy() - expected).max() < TOLERANCE_DB


@pytest.mark.parametrize(
    ("settings", "fft_size"),
    [
        (SMALL64, 4096),
        (FeatureSettings(kind="mel_db", low_freq_hz=0.0), 2048),  # 400 samples a frame
        (FeatureSettings(kind="mel_db", sample_rate_hz=22_050, num_mel_bins=40, high_freq_hz=9000.0), 4096),  # 551
    ],
    ids=["small64", "128 bins", "an odd number of samples"],
)
def test_decibels_equal_torchaudios(settings: FeatureSettings, fft_size: int):
    waveform = noise(3 * 20_000).view(3, 20_000)
    ours, theirs = log_mel(waveform, settings), torchaudios(waveform, fft_size, settings)
    assert ours.shape == theirs.shape == (3, settings.num_frames(20_000), settings.num_mel_bins)
    assert (ours - theirs).abs().max() < TOLERANCE_DB


def test_silence_is_at_the_floor_and_fewer_samples_than_a_frame_are_refused():
    assert log_mel(torch.zeros(16_000), SMALL64).unique().tolist() == [SMALL64.floor] == [-100.0]
    assert [SMALL64.num_frames(n) for n in (1023, 1024, 160_000)] == [0, 3, 401]
    with pytest.raises(ValueError, match="1023 samples; one frame takes 1024"):
        mel_db(torch.zeros(1023))


def test_the_gradient_equals_finite_differences():
    waveform = noise(2 * 1200).double().view(2, 1200).requires_grad_()
    assert torch.autograd.gradcheck(mel_db, waveform, fast_mode=True)


def test_mixup_is_near_the_decibels_of_the_mixture():
    waveforms = noise(16_000, seed=1), noise(16_000, seed=2)
    clip, partner = (log_mel(waveform, SMALL64).unsqueeze(0) for waveform in waveforms)
    frames, lam = torch.tensor([SMALL64.num_frames(16_000)]), torch.tensor([0.4])
    mixed = mixup_batch(clip, frames, partner, frames, lam, features=SMALL64)[0]
    error = mixed - log_mel(0.4 * waveforms[0] + 0.6 * waveforms[1], SMALL64)
    assert abs(error.mean()) < 0.3  # with decibels taken for nats it is 2.8
