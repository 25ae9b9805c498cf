"""Sample weights equal those of the reference implementation."""

import numpy as np
import pyarrow as pa
import pytest

from ast_core.labels import audioset_labels
from pipeline.prepare.sources import read_segments
from pipeline.prepare.sources.locate import youtube
from pipeline.weights import sample_weights
from tests.conftest import SHARED


def test_weight_is_the_sum_over_labels_of_1000_over_their_count():
    expected = [1000 / 2.01, 1000 / 2.01 + 1000 / 1.01, 0.0]
    np.testing.assert_allclose(sample_weights([[0], [0, 2], []], 3), expected)
    np.testing.assert_allclose(sample_weights(pa.array([[0], [0, 2], []], pa.list_(pa.int16())), 3), expected)


def test_label_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="there are 2 classes"):
        sample_weights([[0], [2]], 2)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the official lists and reference figures in ../shared")
def test_the_balanced_lists_weights_are_the_originals():
    uri = str(SHARED / "data" / "audioset" / "balanced_train_segments.csv")
    clips = read_segments(uri, locate=youtube, vocabulary=audioset_labels(), split=None).clips
    expected = np.load(SHARED / "fixtures" / "balanced_train_weights.npz")["weight"]
    np.testing.assert_allclose(sample_weights(clips["labels"].combine_chunks(), 527), expected, rtol=1e-12)
