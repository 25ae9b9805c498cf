"""Confusions equal their definition, computed clip by clip."""

import numpy as np
import pytest

from pipeline.train.evaluation import analysis


def made(num_clips: int = 60, num_classes: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    scores = rng.random((num_clips, num_classes)).astype(np.float16)
    scores[0, :3] = 0, 0.5, 1  # edges
    return scores, (rng.random((num_clips, num_classes)) < 0.3).astype(np.float32)


def test_confusions_match_their_definition_worst_first():
    scores, targets = made()
    expected = []
    for true in range(6):
        for other in range(6):
            clips = [i for i in range(60) if targets[i, true] and not targets[i, other]]
            if len(clips) < 12:
                continue
            ours, theirs = (np.array([float(scores[i, c]) for i in clips]) for c in (other, true))
            expected.append((true, other, len(clips), ours.mean(), theirs.mean(), (ours > theirs).mean()))
    expected.sort(key=lambda pair: -pair[3])
    assert 8 < len(expected) < 30  # some pairs are too small
    found = analysis.confusions(scores, targets, num=8, min_clips=12)
    assert [(one.true, one.taken_for, one.clips) for one in found] == [pair[:3] for pair in expected[:8]]
    for one, pair in zip(found, expected, strict=False):
        assert (one.mean_score, one.mean_true_score, one.share_above) == pytest.approx(pair[3:], abs=1e-6)
    assert len(analysis.confusions(scores, targets, num=100, min_clips=12)) == len(expected)


def test_too_few_clips_give_no_confusions():
    scores, targets = made(num_clips=4)
    assert analysis.confusions(scores, targets, min_clips=5) == []
