"""A few hundred mutated lists of each kind, by `tests.list_fuzz`. `benchmarks.list_fuzz` reads thousands."""

from pathlib import Path

import pytest

from tests.list_fuzz import KINDS, trial

MUTATIONS = 40


@pytest.mark.parametrize("kind", KINDS)
def test_a_mutated_list_is_read_like_by_another_reader_or_refused(kind: str, tmp_path: Path):
    trials = [trial(kind, seed, tmp_path / kind) for seed in range(MUTATIONS)]
    assert [(t.seed, t.mutations, t.fault) for t in trials if t.fault] == []
    num_accepted = sum(t.accepted for t in trials)
    assert MUTATIONS // 4 < num_accepted < MUTATIONS  # both results occur
    assert any(t.num_refused for t in trials) or kind in ("labels", "Speech Commands")
