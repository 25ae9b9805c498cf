"""The notebooks in examples/ run from start to end, and their stored outputs are small and of no particular machine."""

import re
import runpy
from pathlib import Path

import nbformat
import pytest

from tests.conftest import ROOT

EXECUTE = runpy.run_path(str(ROOT / "examples" / "execute.py"))
NOTEBOOKS = EXECUTE["notebooks"]()


@pytest.mark.parametrize(
    "file",
    [pytest.param(file, marks=[pytest.mark.slow] if file.stem == "own_data" else []) for file in NOTEBOOKS],
    ids=lambda file: file.stem,
)
def test_the_notebook_runs_and_its_model_learns(file: Path, tmp_path: Path):
    printed = EXECUTE["text_of"](EXECUTE["execute"](file, tmp_path))
    map_of_runs = [float(value) for value in re.findall(r"mAP\s+([0-9.]+)", printed)]
    assert max(map_of_runs) > 0.7  # an untrained model has 0.4
    assert re.search(r"0\.\d+\s+rain|'rain': [01]\.\d", printed)  # the scores of a tagged recording


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_stored_outputs_are_complete_small_and_without_paths(file: Path):
    assert file.stat().st_size < 150_000
    notebook = nbformat.read(file, as_version=4)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    printed = EXECUTE["text_of"](notebook)
    assert "rain" in printed
    assert not re.search(r"(^|[\s'\"])/\w", printed), "run python examples/execute.py"
