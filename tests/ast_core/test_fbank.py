"""`fbank` equals Kaldi's for clips and batches, and is differentiable."""

from collections.abc import Callable
from itertools import product
from pathlib import Path

import av
import numpy as np
import pytest
import soxr
import torch
import torchaudio
from scipy.signal import lfilter
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ast_core.fbank
from ast_core.batch import normalise
from ast_core.fbank import POWER_FLOOR, fbank
from ast_core.features import KALDI128, FeatureSettings
from tests.reference import AUDIOSET, SHARED, figures, needs_shared, whole_figures

TOLERANCE = 1e-3
"""In nats."""
KALDI_NAMES = {
    "frame_length_ms": "frame_length",
    "frame_shift_ms": "frame_shift",
    "sample_rate_hz": "sample_frequency",
    "num_mel_bins": "num_mel_bins",
    "low_freq_hz": "low_freq",
    "high_freq_hz": "high_freq",
}
ESC10_CLASSES = [
    "001 - Dog bark",
    "002 - Rain",
    "003 - Sea waves",
    "004 - Baby cry",
    "005 - Clock tick",
    "006 - Person sneeze",
    "007 - Helicopter",
    "008 - Chainsaw",
    "009 - Rooster",
    "010 - Fire crackling",
]


def kaldi(waveform: Tensor, **settings: float) -> Tensor:
    """torchaudio's fbank of one clip `[samples]`, called as in the reference implementation."""
    return torchaudio.compliance.kaldi.fbank(
        waveform.unsqueeze(0),
        **{"sample_frequency": KALDI128.sample_rate_hz, "num_mel_bins": 128, "frame_shift": 10} | settings,
        htk_compat=True,
        use_energy=False,
        window_type="hanning",
        dither=0.0,
    )


def noise(num_samples: int, *, seed: int = 0, gain: float = 0.1) -> Tensor:
    return torch.randn(num_samples, generator=torch.Generator().manual_seed(seed)) * gain


def tone(num_samples: int, freq_hz: float = 440.0) -> Tensor:
    return torch.sin(2 * torch.pi * freq_hz * torch.arange(num_samples) / KALDI128.sample_rate_hz)


def speech_like() -> Tensor:
    """Two seconds of a buzz with a pitch from 90 to 240 Hz, filtered by three formants, with a pause."""
    pitch_hz = np.linspace(90, 240, 2 * KALDI128.sample_rate_hz)
    signal = np.diff(np.floor(np.cumsum(pitch_hz / KALDI128.sample_rate_hz)), prepend=0)
    for formant_hz, bandwidth_hz in ((700, 80), (1220, 90), (2600, 120)):
        radius = np.exp(-np.pi * bandwidth_hz / KALDI128.sample_rate_hz)
        signal = lfilter(
            [1], [1, -2 * radius * np.cos(2 * np.pi * formant_hz / KALDI128.sample_rate_hz), radius**2], signal
        )
    signal[12_000:16_000] = 0
    return torch.from_numpy(0.5 * signal / np.abs(signal).max()).float()


def music_like() -> Tensor:
    """Four chords of notes with five harmonics, which decay to silence."""
    t = torch.arange(KALDI128.sample_rate_hz) / KALDI128.sample_rate_hz
    chords = ((220, 277, 330), (247, 294, 370), (196, 247, 294), (110, 220, 440))
    notes = [[(freq_hz * k, 1 / k) for freq_hz in chord for k in range(1, 6)] for chord in chords]
    tones = [sum(gain * torch.sin(2 * torch.pi * freq_hz * t) for freq_hz, gain in note) for note in notes]
    return torch.cat([0.1 * tone * torch.exp(-12 * t) for tone in tones])


WAVEFORMS = {
    "speech": speech_like,
    "music": music_like,
    "noise": lambda: noise(10 * KALDI128.sample_rate_hz),
    "faint noise": lambda: noise(KALDI128.sample_rate_hz, gain=1e-4),
    "tone": lambda: 0.5 * tone(KALDI128.sample_rate_hz),
    "silence": lambda: torch.zeros(KALDI128.sample_rate_hz),
    "silence, then noise": lambda: torch.cat([torch.zeros(8000), noise(8000)]),
    "clipping": lambda: (20 * tone(KALDI128.sample_rate_hz)).clamp(-1, 1),
    "click": lambda: torch.nn.functional.one_hot(torch.tensor(5000), KALDI128.sample_rate_hz).float(),
    "DC offset": lambda: noise(KALDI128.sample_rate_hz) + 0.5,
    "one frame": lambda: noise(400),
    "a minute": lambda: noise(60 * KALDI128.sample_rate_hz),
}


@pytest.mark.parametrize("name", WAVEFORMS)
def test_fbank_equals_kaldis(name: str):
    waveform = WAVEFORMS[name]()
    ours, theirs = fbank(waveform), kaldi(waveform)
    assert (ours.shape, ours.dtype) == (theirs.shape, torch.float32)
    assert (ours - theirs).abs().max() < TOLERANCE


SETTINGS = [
    {"num_mel_bins": 64},
    {"num_mel_bins": 23},
    {"frame_length_ms": 20.0},
    {"frame_length_ms": 32.0},  # 512 samples, a power of two
    {"frame_shift_ms": 5.0},
    {"frame_shift_ms": 12.5},
    {"sample_rate_hz": 8000},
    {"sample_rate_hz": 32_000, "low_freq_hz": 50.0, "high_freq_hz": 14_000.0},
    {"num_mel_bins": 64, "low_freq_hz": 0.0},
    *(
        dict(zip(KALDI_NAMES, values, strict=False))
        for values in product((20.0, 32.0), (5.0, 12.5), (8000, 22_050, 44_100), (23, 80, 200))
    ),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_fbank_equals_kaldis_at_other_settings(settings: dict):
    waveform = torch.cat([noise(7001), speech_like()[:7000], music_like()[:7000]])
    theirs = kaldi(waveform, **{KALDI_NAMES[key]: value for key, value in settings.items()})
    ours = fbank(waveform, **settings)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < TOLERANCE


def test_the_fbank_of_ten_minutes_equals_kaldis():
    num_frames, shift, length = 1000, 160, 400
    waveform = torch.cat([noise(60 * KALDI128.sample_rate_hz, seed=minute, gain=2.0**-minute) for minute in range(10)])
    ours = fbank(waveform)
    assert ours.shape == (59_998, KALDI128.num_mel_bins)
    for first in range(0, len(ours), num_frames):
        samples = waveform[first * shift : (first + num_frames - 1) * shift + length]
        assert (ours[first : first + num_frames] - kaldi(samples)).abs().max() < TOLERANCE


class LargestTensor(TorchDispatchMode):
    """Records the size in bytes of the largest tensor that an operation makes."""

    num_bytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.num_bytes = max(self.num_bytes, made.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("shape", [(9_600_000,), (600, 16_000)], ids=["a long clip", "many clips"])
def test_no_intermediate_tensor_is_larger_than_result_and_waveform(shape: tuple[int, ...]):
    waveform = torch.zeros(shape)
    with LargestTensor() as largest:
        result = fbank(waveform)
    assert largest.num_bytes == max(result.nbytes, waveform.nbytes)


@pytest.mark.parametrize(
    "shape",
    [(1, 16_000), (6, 8000), (2, 3, 8000), (40, 8000), (3, 200_000), (2, 1, 2, 200_000), (1100, 400)],
    ids=str,
)
def test_a_batch_gives_the_fbanks_of_its_clips(shape: tuple[int, ...]):
    """The shapes give blocks of all clips, of some clips, and of a part of a clip."""
    batch = noise(int(np.prod(shape))).view(shape)
    one_by_one = torch.stack([fbank(clip) for clip in batch.view(-1, shape[-1])])
    together = fbank(batch)
    assert together.shape == (*shape[:-1], KALDI128.num_frames(shape[-1]), KALDI128.num_mel_bins)
    torch.testing.assert_close(together.view_as(one_by_one), one_by_one, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "batch",
    [noise(2 * 8000).view(8000, 2).T, noise(6 * 8000).view(3, 2, 8000).transpose(0, 1)],
    ids=["interleaved channels", "clips of channels"],
)
def test_a_batch_need_not_be_contiguous(batch: Tensor):
    assert not batch.is_contiguous()
    torch.testing.assert_close(fbank(batch), fbank(batch.contiguous()), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("shape", [(0, 16_000), (2, 0, 16_000)], ids=str)
def test_an_empty_batch_gives_no_fbanks(shape: tuple[int, ...]):
    assert fbank(torch.zeros(shape)).shape == (*shape[:-1], 98, KALDI128.num_mel_bins)


def test_float64_input_gives_float64_close_to_kaldis():
    waveform = noise(KALDI128.sample_rate_hz).double()
    ours = fbank(waveform)
    assert ours.dtype == torch.float64
    assert (ours - kaldi(waveform)).abs().max() < TOLERANCE
    assert (ours - fbank(waveform.float())).abs().max() < TOLERANCE


def test_digital_silence_is_at_the_floor():
    assert torch.all(fbank(torch.zeros(800)) == torch.tensor(POWER_FLOOR).log())


def test_ten_seconds_have_998_frames():
    assert KALDI128.num_frames(160_000) == 998


@pytest.mark.parametrize("settings", [{}, {"frame_length_ms": 20.0, "frame_shift_ms": 5.0}, {"sample_rate_hz": 8000}])
def test_num_frames_of_is_the_length_of_the_fbank(settings: dict):
    first = next(n for n in range(1000) if FeatureSettings(**settings).num_frames(n))
    for num_samples in [*range(first, first + 3), *range(first, 4000, 79), 16_000, 16_239, 16_240]:
        assert FeatureSettings(**settings).num_frames(num_samples) == len(fbank(torch.zeros(num_samples), **settings))
    assert [FeatureSettings(**settings).num_frames(n) for n in (0, 1, first - 1)] == [0, 0, 0]
    with pytest.raises(ValueError, match=f"{first - 1} samples; one frame takes {first}"):
        fbank(torch.zeros(first - 1), **settings)


@pytest.mark.parametrize("at_once", [1, 2, 4, 1024])
def test_the_gradient_equals_finite_differences_for_any_block_size(at_once: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ast_core.fbank, "FRAMES_AT_ONCE", at_once)
    waveform = noise(2 * 720).double().view(2, 720).requires_grad_()  # three frames each
    assert torch.autograd.gradcheck(fbank, waveform, fast_mode=True)


def test_the_gradient_equals_kaldis():
    def gradient(function: Callable[[Tensor], Tensor]) -> Tensor:
        waveform = noise(20 * KALDI128.sample_rate_hz).double().requires_grad_()  # two blocks
        log_mel = function(waveform)
        weights = torch.randn(log_mel.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (log_mel * weights).sum().backward()
        return waveform.grad

    ours, theirs = gradient(fbank), gradient(kaldi)
    assert (ours - theirs).norm() < TOLERANCE * theirs.norm()


def test_the_gradient_is_finite_even_in_silence():
    waveform = torch.cat([torch.zeros(800), noise(800)]).requires_grad_()
    fbank(waveform).sum().backward()
    assert waveform.grad.isfinite().all()
    assert waveform.grad[1000:].abs().sum() > 0


def test_a_first_call_in_inference_mode_allows_later_gradients():
    settings = {"frame_length_ms": 21.0, "num_mel_bins": 24}  # used nowhere else, so nothing is cached yet
    with torch.inference_mode():
        fbank(noise(400), **settings)
    waveform = noise(400).requires_grad_()
    fbank(waveform, **settings).sum().backward()
    assert waveform.grad.isfinite().all()


def test_autocast_does_not_change_the_precision():
    waveform = noise(8000)
    with torch.autocast("cpu", torch.bfloat16):
        inside = fbank(waveform)
    assert torch.equal(inside, fbank(waveform))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int64, torch.float16, torch.bfloat16])
def test_integer_and_half_precision_samples_are_refused(dtype: torch.dtype):
    with pytest.raises(ValueError, match=f"{dtype}; give float32 or float64 in \\[-1, 1\\]"):
        fbank(torch.zeros(800, dtype=dtype))


def read(path: Path) -> Tensor:
    """The first channel of a file at 16 kHz, with its mean subtracted."""
    with av.open(str(path)) as container:
        rate_hz = container.streams.audio[0].rate
        frames = [frame.to_ndarray() for frame in container.decode(audio=0)]
    waveform = soxr.resample(np.concatenate(frames, axis=1)[0], rate_hz, KALDI128.sample_rate_hz)
    return torch.from_numpy(waveform - waveform.mean())


@needs_shared
@pytest.mark.parametrize("name", ESC10_CLASSES)
def test_fbank_equals_kaldis_on_recordings(name: str):
    recordings = sorted((SHARED / "data" / "esc10" / name).glob("*.ogg"))[:3]
    assert len(recordings) == 3
    for recording in recordings:
        waveform = read(recording)
        assert (fbank(waveform) - kaldi(waveform)).abs().max() < TOLERANCE


@needs_shared
def test_the_fbank_of_a_real_clip_equals_the_reference_loaders():
    ours, expected = fbank(read(AUDIOSET / "--BfvyPmVMo_20.000.wav")), whole_figures("clip_fbank_reference")["fbank"]
    assert ours.shape == expected.shape
    assert np.abs(ours.numpy() - expected).max() < TOLERANCE


def test_padding_and_normalising_equal_the_reference_loaders():
    expected = figures("clip_fbank_reference")
    num_missing = len(expected["normalised"]) - len(expected["fbank"])
    padded = torch.nn.functional.pad(torch.from_numpy(expected["fbank"]), (0, 0, 0, num_missing))
    normalised = normalise(padded, -4.2677393, 4.5689974).numpy()
    np.testing.assert_allclose(normalised, expected["normalised"], rtol=0, atol=1e-6)


@needs_shared
def test_the_fbank_of_mixed_waveforms_equals_the_references():
    mixed = whole_figures("mixup_reference")
    a, b, lam = (torch.from_numpy(mixed["waveform_a"]), torch.from_numpy(mixed["waveform_b"]), float(mixed["lam"]))
    assert np.abs(fbank(lam * a + (1 - lam) * b).numpy() - mixed["fbank"]).max() < TOLERANCE
