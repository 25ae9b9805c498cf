"""`tag` gives a waveform the scores that preparation, feed and evaluation give its clip."""

import numpy as np
import pytest
import torch

from ast_core.batch import Batch
from ast_core.checkpoints import ModelConfig
from ast_core.labels import LabelVocabulary
from ast_core.step import predict
from ast_core.tagging import model_input_of, tag
from pipeline.prepare.audio.features import clip_fbank
from tests import fakes
from tests.ast_core import small


def config() -> ModelConfig:
    names = [f"class {i}" for i in range(small.NUM_CLASSES)]
    return ModelConfig(small.recipe(input_tdim=small.NUM_FRAMES), small.NORM, LabelVocabulary.from_names(names))


@pytest.mark.parametrize("duration_s", [0.03, 0.3, 0.66, 2.0])
def test_case_10_a_waveform_gets_the_scores_of_its_prepared_clip(duration_s: float):
    """Durations are below, at and above the model's 64 frames. The waveform has an offset, which is subtracted."""
    waveform = fakes.tone(440.0, duration_s) + fakes.noise(duration_s) + 0.05
    stored = torch.from_numpy(clip_fbank(np.clip(waveform, -1, 1)))
    fbank = torch.zeros(1, small.NUM_FRAMES, small.NUM_MEL_BINS, dtype=torch.float16)
    num_frames = min(len(stored), small.NUM_FRAMES)
    fbank[0, :num_frames] = stored[:num_frames]
    batch = Batch(fbank, torch.tensor([num_frames]), torch.zeros(1, small.NUM_CLASSES), torch.ones(1))
    model = small.model().eval()
    expected = predict(model, batch, recipe=config().recipe, norm=small.NORM)[0]
    torch.testing.assert_close(tag(model, config(), waveform), expected, rtol=0, atol=1e-3)  # float16 on disk
    assert model_input_of(torch.from_numpy(waveform), config()).shape == (1, small.NUM_FRAMES, small.NUM_MEL_BINS)


def test_a_waveform_with_two_channels_or_no_frame_is_refused():
    with pytest.raises(ValueError, match=r"^the waveform has shape \(2, 16000\); give one channel"):
        tag(small.model(), config(), np.zeros((2, 16000), np.float32))
    with pytest.raises(ValueError, match=r"^waveform has 399 samples; one frame takes 400"):
        tag(small.model(), config(), np.zeros(399, np.float32))


@pytest.mark.parametrize(
    ("waveform", "said"),
    [
        (np.zeros(16000, np.int16), "the samples are torch.int16; give floats in"),
        (np.full(16000, 32768.0), "the samples are not all numbers in about .*: up to 32,768"),
        (np.full(16000, np.nan, np.float32), "the samples are not all numbers"),
    ],
)
def test_integers_and_samples_that_are_no_numbers_are_refused(waveform: np.ndarray, said: str):
    with pytest.raises(ValueError, match=f"^{said}"):
        tag(small.model(), config(), waveform)
