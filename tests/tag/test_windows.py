"""Windows: which parts of a recording are scored, from blocks that come one by one."""

import itertools
import math

import numpy as np
import pytest
import torch

from ast_core.errors import ConfigError
from ast_core.features import KALDI128, SMALL64
from pipeline.prepare.audio.blocks import Block, Lost
from pipeline.prepare.audio.features import clip_fbank
from pipeline.prepare.clip import Reason
from pipeline.tag.predictor import Predictor
from pipeline.tag.windows import Window, Windower, WindowSettings, fbank_windows, padded, window_starts
from pipeline.tag.work import settings_for
from tests import fakes
from tests.tag import stub

SETTINGS = WindowSettings.of(KALDI128, 100, None, None)
HALF = WindowSettings.of(KALDI128, 100, 1.0, 0.5)


def blocks(waveform: np.ndarray, sizes: list[int], begin_s: float = 0.0) -> list[Block]:
    cuts = np.cumsum([0, *sizes, len(waveform)])
    parts = [waveform[a:b] for a, b in itertools.pairwise(cuts) if a < len(waveform)]
    return [Block(begin_s if i == 0 else None, part, 1.0) for i, part in enumerate(parts)]


def spans(windows: list[Window]) -> list[tuple[float, float]]:
    return [(window.start_s, window.end_s) for window in windows]


@pytest.mark.parametrize(
    ("length", "starts"),
    [(1, [0]), (10, [0]), (12, [0]), (13, [0, 3]), (20, [0, 10]), (22, [0, 10]), (23, [0, 10, 13])],
)
def test_the_last_window_ends_with_the_recording(length: int, starts: list[int]):
    assert window_starts(length, 10, 10, min_tail=3) == starts


def test_windows_overlap_by_their_hop():
    assert window_starts(30, 10, 4, min_tail=1) == [0, 4, 8, 12, 16, 20]
    assert window_starts(31, 10, 4, min_tail=1) == [0, 4, 8, 12, 16, 20, 21]


@pytest.mark.parametrize("sizes", [[], [7], [16_000], [40_000, 1, 16_000], [100] * 300])
@pytest.mark.parametrize("settings", [SETTINGS, HALF])
def test_windows_do_not_depend_on_where_blocks_are_cut(settings: WindowSettings, sizes: list[int]):
    waveform = fakes.noise(4.3)
    expected = list(Windower(settings).windows(blocks(waveform, [])))
    found = list(Windower(settings).windows(blocks(waveform, sizes)))
    assert spans(found) == spans(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.fbank_TM, other.fbank_TM)


def test_windows_have_the_features_that_a_preparation_stores():
    waveform = fakes.noise(2.5) + 0.1
    first, second, third = Windower(SETTINGS).windows(blocks(waveform, []))
    samples = SETTINGS.window_samples
    assert samples == 99 * 160 + 400
    np.testing.assert_array_equal(first.fbank_TM, clip_fbank(waveform[:samples]))
    np.testing.assert_array_equal(second.fbank_TM, clip_fbank(waveform[16_000 : 16_000 + samples]))
    np.testing.assert_array_equal(third.fbank_TM, clip_fbank(waveform[-samples:]))
    assert spans([first, second, third]) == [(0.0, 1.0), (1.0, 2.0), (2.5 - samples / 16_000, 2.5 - 0.015)]


def test_a_recording_shorter_than_a_window_is_one_window_padded_as_in_evaluation():
    (window,) = Windower(SETTINGS).windows(blocks(fakes.noise(0.3), []))
    assert (window.start_s, window.end_s) == (0.0, 0.3)
    batch = padded([window], 100)
    assert batch.shape == (1, 100, 128)
    np.testing.assert_array_equal(batch[0, :28], clip_fbank(fakes.noise(0.3)))
    assert not batch[0, 28:].any()
    assert list(Windower(SETTINGS).windows(blocks(fakes.noise(0.02), []))) == []


def test_after_a_hole_windows_begin_anew_and_what_was_lost_is_kept():
    lost = Lost(1.2, 60.0, Reason.TRUNCATED, "58.80 s are damaged")
    before, after = Block(0.0, fakes.noise(1.2), 1.0, (lost,)), Block(60.0, fakes.noise(0.5, seed=1), 1.0)
    windower = Windower(SETTINGS)
    windows = list(windower.windows([before, after]))
    assert windower.lost == [lost]
    assert [window.start_s for window in windows] == pytest.approx([0.0, 1.2 - SETTINGS.window_samples / 16_000, 60.0])
    np.testing.assert_array_equal(windows[-1].fbank_TM, clip_fbank(fakes.noise(0.5, seed=1)))


@pytest.mark.parametrize("settings", [SETTINGS, HALF])
@pytest.mark.parametrize("duration_s", [0.7, 2.0, 3.3])
def test_each_moment_belongs_to_one_window(settings: WindowSettings, duration_s: float):
    windows = list(Windower(settings).windows(blocks(fakes.noise(duration_s), [9_000])))
    edges = [(window.own_start_s, window.own_end_s) for window in windows]
    assert edges[0][0] == 0
    assert edges[-1][1] == windows[-1].end_s
    for (_, end), (start, _) in itertools.pairwise(edges):
        assert start == pytest.approx(end, abs=1e-6)
    for window in windows:
        assert window.start_s - 1e-6 <= window.own_start_s < window.own_end_s <= window.end_s + 1e-6


def test_windows_of_a_prepared_clip_begin_with_what_evaluation_sees():
    fbank = np.arange(250 * 128, dtype=np.float16).reshape(250, 128)
    windows = fbank_windows(fbank, SETTINGS)
    assert [(w.start_s, w.end_s) for w in windows] == [(0.0, 1.0), (1.0, 2.0), (1.5, 2.5)]
    np.testing.assert_array_equal(windows[0].fbank_TM, fbank[:100])
    assert [(w.own_start_s, w.own_end_s) for w in windows] == [(0.0, 1.0), (1.0, 2.0), (2.0, 2.5)]


def test_lengths_are_checked_and_rounded_to_frames():
    assert WindowSettings.of(SMALL64, 400, 1.01, None).num_frames == 40
    settings = WindowSettings.of(SMALL64, 400, None, None)
    assert SMALL64.num_frames(settings.window_samples) == 400
    assert SMALL64.num_frames(settings.window_samples - 1) == 399
    with pytest.raises(ConfigError, match=r"^--window-s is 1.5; use 0.01 to 1, the model's input$"):
        WindowSettings.of(KALDI128, 100, 1.5, None)
    with pytest.raises(ConfigError, match=r"^--hop-s is 1; use 0.01 to 0.5, a window, so that none is missed$"):
        WindowSettings.of(KALDI128, 100, 0.5, 1.0)


def test_a_day_takes_no_more_memory_than_two_windows_and_a_block():
    windower = Windower(SETTINGS)
    longest = 0
    for _ in windower.windows(Block(0.0 if i == 0 else None, np.zeros(8_000, np.float32), 1.0) for i in range(400)):
        longest = max(longest, len(windower._samples))
    assert longest <= 2 * SETTINGS.window_samples + 8_000
    assert math.isclose(windower.settings.hop_s, 1.0)


def test_models_with_inputs_of_several_lengths_need_a_window_that_all_of_them_hear():
    members = [stub.member(100, has_frames=True), stub.member(200, has_frames=True)]
    with pytest.raises(ConfigError, match=r"stub takes 1 s and stub 2 s; give --window-s of at most 1, so that both"):
        settings_for(members, np.full(3, 0.5), window_s=None, hop_s=None)
    with pytest.raises(ConfigError, match=r"--window-s is 1\.5; use 0\.01 to 1, the model's input"):
        settings_for(members, np.full(3, 0.5), window_s=1.5, hop_s=None)
    assert settings_for(members, np.full(3, 0.5), window_s=1.0, hop_s=None).windows.num_frames == 100
    predict = Predictor(members, torch.device("cpu"), embeddings=False, frames=True)
    fbank = np.zeros((2, predict.input_frames, 128), np.float16)
    predicted = predict(fbank)
    assert predicted.frame_scores_NTC is not None
    alone = Predictor(members[:1], torch.device("cpu"), embeddings=False, frames=True)(fbank[:, :100])
    assert predicted.frame_scores_NTC.shape == alone.frame_scores_NTC.shape
