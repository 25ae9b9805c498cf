"""What FFmpeg's program gives is what we give. `benchmarks.decode_campaign` reads thousands of such files."""

import numpy as np
import pytest

from tests.prepare.differential import ENCODINGS, Maker, verdict

NUM_FILES = 210


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    return Maker(tmp_path_factory.mktemp("differential"))


def test_seeded_files_are_read_as_ffmpegs_program_reads_them(maker: Maker):
    assert 3 * len(ENCODINGS) <= NUM_FILES  # each encoding with three odd things
    outcomes = {}
    with np.errstate(all="ignore"):  # correlations with silence
        for number in range(20_000, 20_000 + NUM_FILES):
            made = maker.make(number)
            outcomes[made.name] = verdict(made)
            made.path.unlink()
    assert [f"{name}: {outcome}" for name, outcome in outcomes.items() if outcome.startswith("UNEXPLAINED")] == []
    assert sum(outcome == "equal" for outcome in outcomes.values()) > 0.6 * NUM_FILES
