"""A new kind of features takes one function and one entry of KINDS: shards, norm, mixup and training follow it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ast_core.checkpoints import load_model
from ast_core.features import KINDS, FeatureKind, FeatureSettings, LogScale, whole_frames
from jobs import train
from pipeline.dataset import PreparedDataset
from tests import fakes

KIND = "spectrogram_in_decibels"
SETTINGS = {"kind": KIND, "num_mel_bins": 80, "frame_length_ms": 10.0}
POWER_FLOOR = 1e-8


def spectrogram(waveform: Tensor, *, num_mel_bins: int, frame_length_ms: float, frame_shift_ms: float, **_: object):
    """The lowest bins of a plain spectrogram, in decibels, at 16 kHz."""
    frames = waveform.unfold(-1, int(16 * frame_length_ms), int(16 * frame_shift_ms))
    power = torch.fft.rfft(frames).abs().square()[..., :num_mel_bins]
    return 10 * power.clamp_min(POWER_FLOOR).log10()


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch):
    decibels = LogScale("decibels", "dB", math.log(10) / 10)
    kind = FeatureKind(f"{__name__}:spectrogram", whole_frames, decibels, POWER_FLOOR, window="none")
    monkeypatch.setitem(KINDS, KIND, kind)


def test_a_new_kind_of_features_is_prepared_and_trained(tmp_path: Path):
    settings, data, run = FeatureSettings(**SETTINGS), str(tmp_path / "data"), tmp_path / "run"
    fakes.write_data(data, splits=[("train", 24), ("eval", 8)], settings=settings)
    opened = PreparedDataset.open(data)
    assert (opened.features, opened.info["features"]["log_scale"]) == (settings, "decibels")
    rows = fakes.shard_rows(data)
    assert np.array(rows["train_000"]["fbank"]).shape == (50, 80)
    assert settings.floor == -80.0 <= min(np.min(row["fbank"]) for row in rows.values())
    keys = fakes.SMALL_RECIPE | {"features": "data", "input_fdim": "80", "norm_stats": "data", "epochs": "2"}
    argv = [word for key, value in keys.items() for word in (f"--{key}", value)]
    splits = ["--train-splits", "train", "--eval-splits", "eval"]
    base = ["--recipe", "audioset-balanced", "--wa_start", "1", "--wa_end", "2", "--data", data, "--output", str(run)]
    assert train.main([*base, *splits, "--num-workers", "0", *argv]) == 0
    assert math.isfinite(json.loads((run / "summary.json").read_text())["map"])
    assert load_model(run / "best")[1].features == settings
