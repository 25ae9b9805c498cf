"""`fbank` is Kaldi's, for a batch as for a clip, and lets gradients through."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torchaudio
from torch import Tensor

from ast_core.augment import normalise
from ast_core.fbank import NUM_MEL_BINS, POWER_FLOOR, SAMPLE_RATE_HZ, fbank, num_frames_of
from tests.reference import AUDIOSET, figures, needs_shared

TOLERANCE = 1e-3
"""DESIGN.md, "Exactness"; in nats."""


def kaldi(waveform: Tensor, **settings: float) -> Tensor:
    """The original's call, for one clip `[samples]`."""
    return torchaudio.compliance.kaldi.fbank(
        waveform.unsqueeze(0),
        **{"sample_frequency": SAMPLE_RATE_HZ, "num_mel_bins": 128, "frame_shift": 10} | settings,
        htk_compat=True,
        use_energy=False,
        window_type="hanning",
        dither=0.0,
    )


def noise(num_samples: int, *, seed: int = 0, gain: float = 0.1) -> Tensor:
    return torch.randn(num_samples, generator=torch.Generator().manual_seed(seed)) * gain


def tone(num_samples: int, freq_hz: float = 440.0) -> Tensor:
    return torch.sin(2 * torch.pi * freq_hz * torch.arange(num_samples) / SAMPLE_RATE_HZ)


WAVEFORMS = {
    "noise": lambda: noise(10 * SAMPLE_RATE_HZ),
    "faint noise": lambda: noise(SAMPLE_RATE_HZ, gain=1e-4),
    "tone": lambda: 0.5 * tone(SAMPLE_RATE_HZ),
    "silence": lambda: torch.zeros(SAMPLE_RATE_HZ),
    "silence, then noise": lambda: torch.cat([torch.zeros(8000), noise(8000)]),
    "clipping": lambda: (20 * tone(SAMPLE_RATE_HZ)).clamp(-1, 1),
    "click": lambda: torch.nn.functional.one_hot(torch.tensor(5000), SAMPLE_RATE_HZ).float(),
    "DC offset": lambda: noise(SAMPLE_RATE_HZ) + 0.5,
    "one frame": lambda: noise(400),
    "a minute": lambda: noise(60 * SAMPLE_RATE_HZ),
}


@pytest.mark.parametrize("name", WAVEFORMS)
def test_fbank_equals_kaldis(name: str):
    waveform = WAVEFORMS[name]()
    ours, theirs = fbank(waveform), kaldi(waveform)
    assert (ours.shape, ours.dtype) == (theirs.shape, torch.float32)
    assert (ours - theirs).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "settings",
    [
        {"num_mel_bins": 64},
        {"num_mel_bins": 23},
        {"frame_length_ms": 20.0, "frame_shift_ms": 5.0},
        {"frame_length_ms": 32.0},  # 512 samples, a power of two
        {"frame_shift_ms": 12.5},
        {"sample_rate_hz": 22_050, "num_mel_bins": 80},
    ],
    ids=str,
)
def test_fbank_equals_kaldis_at_other_settings(settings: dict):
    names = {
        "frame_length_ms": "frame_length",
        "frame_shift_ms": "frame_shift",
        "sample_rate_hz": "sample_frequency",
        "num_mel_bins": "num_mel_bins",
    }
    theirs = kaldi(noise(16_001), **{names[key]: value for key, value in settings.items()})
    ours = fbank(noise(16_001), **settings)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < TOLERANCE


def test_a_batch_gives_what_its_clips_give_alone():
    batch = torch.stack([noise(8000, seed=seed) for seed in range(6)]).view(2, 3, 8000)
    alone = torch.stack([fbank(clip) for clip in batch.flatten(0, 1)]).view(2, 3, 48, NUM_MEL_BINS)
    torch.testing.assert_close(fbank(batch), alone, rtol=0, atol=1e-4)


def test_double_precision_stays_double_and_close_to_kaldis():
    waveform = noise(SAMPLE_RATE_HZ).double()
    ours = fbank(waveform)
    assert ours.dtype == torch.float64
    assert (ours - kaldi(waveform)).abs().max() < TOLERANCE
    assert (ours - fbank(waveform.float())).abs().max() < TOLERANCE


def test_digital_silence_stands_at_the_floor():
    assert torch.all(fbank(torch.zeros(800)) == torch.tensor(POWER_FLOOR).log())


def test_ten_seconds_have_998_frames():
    assert num_frames_of(160_000) == 998


@pytest.mark.parametrize("settings", [{}, {"frame_length_ms": 20.0, "frame_shift_ms": 5.0}, {"sample_rate_hz": 8000}])
def test_num_frames_of_is_the_length_of_the_output(settings: dict):
    first = next(n for n in range(1000) if num_frames_of(n, **settings))
    for num_samples in [*range(first, first + 3), *range(first, 4000, 79), 16_000, 16_239, 16_240]:
        assert num_frames_of(num_samples, **settings) == len(fbank(torch.zeros(num_samples), **settings))
    assert [num_frames_of(n, **settings) for n in (0, 1, first - 1)] == [0, 0, 0]
    with pytest.raises(ValueError, match=f"{first - 1} samples; one frame takes {first}"):
        fbank(torch.zeros(first - 1), **settings)


def test_the_gradient_is_that_of_finite_differences():
    waveform = noise(720).double().requires_grad_()
    assert torch.autograd.gradcheck(fbank, waveform, fast_mode=True)


def test_the_gradient_is_finite_even_in_silence():
    waveform = torch.cat([torch.zeros(800), noise(800)]).requires_grad_()
    fbank(waveform).sum().backward()
    assert waveform.grad.isfinite().all()
    assert waveform.grad[1000:].abs().sum() > 0


def test_a_first_call_in_inference_mode_does_not_spoil_later_gradients():
    settings = {"frame_length_ms": 21.0, "num_mel_bins": 24}  # used nowhere else: nothing is cached yet
    with torch.inference_mode():
        fbank(noise(400), **settings)
    waveform = noise(400).requires_grad_()
    fbank(waveform, **settings).sum().backward()
    assert waveform.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int16, torch.int64])
def test_integer_samples_are_refused(dtype: torch.dtype):
    with pytest.raises(ValueError, match=f"{dtype}; give floating point in \\[-1, 1\\]"):
        fbank(torch.zeros(800, dtype=dtype))


def read_wav(path: Path) -> Tensor:
    with av.open(str(path)) as container:
        assert container.streams.audio[0].rate == SAMPLE_RATE_HZ
        frames = [frame.to_ndarray() for frame in container.decode(audio=0)]
    return torch.from_numpy(np.concatenate(frames, axis=1)[0])


@needs_shared
def test_a_real_clip_equals_the_originals_loader_before_and_after_normalising():
    waveform = read_wav(AUDIOSET / "--BfvyPmVMo_20.000.wav")
    expected = figures("clip_fbank_reference")
    ours = fbank(waveform - waveform.mean())
    assert ours.shape == expected["fbank"].shape
    assert np.abs(ours.numpy() - expected["fbank"]).max() < TOLERANCE
    padded = torch.nn.functional.pad(ours, (0, 0, 0, 1024 - len(ours)))
    normalised = normalise(padded, -4.2677393, 4.5689974).numpy()
    assert np.abs(normalised - expected["normalised"]).max() < TOLERANCE / (2 * 4.5689974)
