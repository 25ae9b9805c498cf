"""Copies of a recording have nearly the same log-mel at some shift; other recordings do not."""

from pathlib import Path

import numpy as np
import pytest

from ast_core.errors import DataError
from pipeline.dataset import PreparedDataset
from pipeline.inspect.same_sound import log_mel_correlation, read_fbank
from pipeline.prepare.audio.features import clip_fbank
from pipeline.train.data.fbank_reader import FbankReader
from tests import fakes

RNG = np.random.default_rng(0)
FBANK = RNG.normal(-6, 3, (60, 16)).astype(np.float16)


def fine(fbank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x = fbank.astype(np.float64)
    loud = x.max(axis=1) >= x.max() - 6.9
    x = x - x[loud].mean(axis=0)
    return x - x.mean(axis=1, keepdims=True), loud


def test_the_correlation_is_that_of_its_definition():
    other = RNG.normal(-4, 2, (40, 16)).astype(np.float16)
    other[5:9] -= 15  # frames that are not loud
    (a, loud_a), (b, loud_b) = fine(FBANK), fine(other)
    assert loud_b.sum() == 36
    best = -1.0
    for lag in range(-39, 60):
        pairs = [(t + lag, t) for t in range(40) if 0 <= t + lag < 60 and loud_a[t + lag] and loud_b[t]]
        if len(pairs) >= 18:
            x, y = (np.stack([rows[p[side]] for p in pairs]) for side, rows in enumerate((a, b)))
            best = max(best, (x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum()))
    assert log_mel_correlation(FBANK, other, 1.0) == pytest.approx(best, abs=1e-9)
    assert log_mel_correlation(other, FBANK, 1.0) == pytest.approx(best, abs=1e-9)
    in_decibels = [fbank.astype(np.float64) * 10 / np.log(10) for fbank in (FBANK, other)]
    assert log_mel_correlation(*in_decibels, np.log(10) / 10) == pytest.approx(best, abs=1e-9)


def test_a_shift_and_a_gain_change_little_and_a_short_overlap_does_not_count():
    assert log_mel_correlation(FBANK, FBANK, 1.0) == pytest.approx(1)
    later = FBANK[15:].astype(np.float32) - 1.5
    assert log_mel_correlation(FBANK, later, 1.0) > 0.97
    ends_with_its_beginning = np.concatenate([RNG.normal(-6, 3, (55, 16)), FBANK[:5]])
    assert log_mel_correlation(FBANK[:20], ends_with_its_beginning, 1.0) < 0.5


def test_noises_and_bangs_of_one_kind_are_different_recordings():
    bang = np.repeat([1, 0.3, 0.05, 0.001, 0], 3200).astype(np.float32)
    noises = [fakes.noise(1.0, seed) for seed in (1, 2)]
    for shape in (1.0, bang):
        first, second = (clip_fbank(noise * shape) for noise in noises)
        assert log_mel_correlation(first, second, 1.0) < 0.3
        louder = clip_fbank(np.roll(noises[0] * shape, 1234) / 3)
        assert log_mel_correlation(first, louder, 1.0) > 0.6
    assert log_mel_correlation(first, np.full_like(first, -15.9), 1.0) == -1


def test_stored_log_mel_is_read_from_any_row_group(tone_data: str):
    clips = PreparedDataset.open(tone_data).clips(["train"])
    with FbankReader(clips) as reader:
        for number in (0, 17, 19, 40, 47):
            shard, row = clips.shards[clips.shard_of[number]], int(clips.row[number])
            np.testing.assert_array_equal(read_fbank(shard, row), reader[number])


def test_a_damaged_shard_is_named(tmp_path: Path, tone_data: str):
    clips = PreparedDataset.open(tone_data).clips(["eval"])
    damaged = tmp_path / "shard.parquet"
    damaged.write_bytes(Path(clips.shards[0]).read_bytes()[:-30])
    with pytest.raises(DataError, match=r"shard.parquet is damaged \(.*\); run the preparation again$"):
        read_fbank(str(damaged), 0)
