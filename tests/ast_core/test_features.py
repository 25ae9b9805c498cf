"""Feature settings: their checks and names, what earlier versions wrote, and features through the table of kinds."""

import json
import subprocess
import sys

import pytest
import torch

from ast_core.errors import ConfigError
from ast_core.fbank import fbank
from ast_core.features import FEATURES, KALDI128, FeatureSettings, log_mel

EARLIER = {
    "kind": "kaldi log-mel fbank",
    "sample_rate_hz": 16_000,
    "num_mel_bins": 128,
    "frame_length_ms": 25.0,
    "frame_shift_ms": 10.0,
    "low_freq_hz": 20.0,
    "window": "hanning",
    "waveform_scale": 1.0,
    "stored_as": "float16",
}
"""The features in the dataset.json of versions before settings could be chosen."""


def read(value: object) -> FeatureSettings:
    return FeatureSettings.from_mapping(value, origin="here")


def test_the_features_of_earlier_data_sets_are_kaldi128():
    assert read(EARLIER) == KALDI128 == FEATURES["kaldi128"]
    assert KALDI128.to_dict().keys() >= EARLIER.keys()


@pytest.mark.parametrize(
    "settings", [KALDI128, FeatureSettings(sample_rate_hz=32_000, num_mel_bins=64, high_freq_hz=14_000.0)]
)
def test_settings_are_read_back_as_written(settings: FeatureSettings):
    assert read(json.loads(json.dumps(settings.to_dict()))) == settings


def test_half_the_sample_rate_is_the_default_upper_frequency():
    assert read({"high_freq_hz": 8000}) == KALDI128
    assert FeatureSettings(sample_rate_hz=32_000).upper_freq_hz == 16_000


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"num_mel_bins": 3}, "num_mel_bins is 3; use 4 to 1024"),
        ({"num_mel_bins": 64.0}, "num_mel_bins is 64.0; use a whole number"),
        ({"mel_bins": 64}, "no feature setting 'mel_bins'; use num_mel_bins"),
        ({"kind": "mfcc"}, "kind is mfcc; use kaldi_fbank or mel_db"),
        ({"kind": ["mel_db"]}, r"kind is \['mel_db'\]; use kaldi_fbank or mel_db"),
        ({"sample_rate_hz": True}, "sample_rate_hz is True; use a whole number"),
        ({"frame_shift_ms": "10"}, "frame_shift_ms is '10'; use a number"),
        ({"frame_length_ms": 0}, "frame_length_ms is 0.0; use more than 0, and 1000 or less"),
        ({"low_freq_hz": -1}, "low_freq_hz is -1.0; use 0 to less than half the sample rate, 8000"),
        ({"sample_rate_hz": 16}, "sample_rate_hz is 16; use 1000 to 192000"),
        ({"frame_shift_ms": 30}, "frame_shift_ms is 30.0; use frame_length_ms, 25, or less"),
        ({"frame_length_ms": float("nan")}, "frame_length_ms is nan; use a finite number"),
        ({"low_freq_hz": 8000}, "low_freq_hz is 8000.0; use 0 to less than half the sample rate, 8000"),
        (
            {"high_freq_hz": 9000},
            "high_freq_hz is 9000.0; use more than low_freq_hz, 20, to half the sample rate, 8000",
        ),
        ({"window": "hamming"}, "window is 'hamming'; only 'hanning' is supported"),
        ([64], "features are a mapping from keys to values, not list"),
    ],
)
def test_settings_that_are_not_allowed_are_refused_in_one_line(value: object, message: str):
    with pytest.raises(ConfigError, match=f"^here: {message}$"):
        read(value)


def test_differences_and_option_name_what_is_not_the_default():
    settings = FeatureSettings(num_mel_bins=64, frame_shift_ms=20.0)
    assert settings.differences(KALDI128) == "num_mel_bins is 64, not 128, frame_shift_ms is 20.0, not 10.0"
    assert KALDI128.differences(KALDI128) == ""
    assert (KALDI128.option, settings.option) == ("kaldi128", """'{"num_mel_bins": 64, "frame_shift_ms": 20.0}'""")


def test_frames_and_seconds_follow_the_settings():
    assert [FeatureSettings(frame_shift_ms=ms).num_frames(160_000) for ms in (10.0, 20.0)] == [998, 499]
    assert FeatureSettings(frame_shift_ms=20.0).seconds(50) == 1.0
    assert FeatureSettings(sample_rate_hz=22_050).seconds(1) == 220 / 22_050  # whole samples


def test_log_mel_computes_the_settings_features():
    settings = FeatureSettings(sample_rate_hz=8000, num_mel_bins=40, frame_shift_ms=12.5, low_freq_hz=60.0)
    waveform = 0.1 * torch.randn(8000, generator=torch.Generator().manual_seed(0))
    expected = fbank(waveform, sample_rate_hz=8000, num_mel_bins=40, frame_shift_ms=12.5, low_freq_hz=60.0)
    assert torch.equal(log_mel(waveform, settings), expected)
    assert expected.shape == (settings.num_frames(8000), 40)
    assert log_mel(torch.zeros(8000), settings).half().unique().tolist() == [settings.floor]


@pytest.mark.parametrize("settings", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("freq_hz", [250.0, 800.0, 1500.0, 4000.0])
def test_a_tone_is_loudest_in_the_bin_at_its_place_on_the_mel_scale(settings: FeatureSettings, freq_hz: float):
    tone = torch.sin(2 * torch.pi * freq_hz / settings.sample_rate_hz * torch.arange(16_000))
    low, high, at = map(settings.mel, (settings.low_freq_hz, settings.upper_freq_hz, freq_hz))
    expected = (settings.num_mel_bins + 1) * (at - low) / (high - low) - 1
    assert abs(log_mel(tone, settings).mean(0).argmax().item() - expected) <= 0.6


def test_settings_are_read_without_numpy_and_pytorch():
    code = "import sys, ast_core.features; print({'numpy', 'torch'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
