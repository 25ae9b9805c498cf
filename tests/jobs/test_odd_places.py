"""A run gives the same figures in any folder and with its data in any folder, and does not change its data."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from jobs.train import main
from tests.jobs.test_train import linear, records_of

ODD = "d\u00e4 ta #1 %20 ?&=;"


def test_cases_24_31_and_32_same_seed_gives_the_same_run_in_any_folder(
    tone_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("HOME")
    data = Path(shutil.copytree(tone_data, tmp_path / ODD))
    before = {path: path.stat().st_mtime_ns for path in [data, *data.rglob("*")]}
    runs = [tmp_path / "run", tmp_path / f"{ODD} run"]
    for run, of in zip(runs, (tone_data, str(data)), strict=True):
        assert main(linear(of, run, epochs="2", wa_start="1", wa_end="2")) == 0
    assert {path: path.stat().st_mtime_ns for path in [data, *data.rglob("*")]} == before
    for folder in ("best", "averaged"):
        one, other = (hashlib.sha256((run / folder / "model.safetensors").read_bytes()).digest() for run in runs)
        assert one == other
    losses = [[record["loss"] for record in records_of(run, "step")] for run in runs]
    assert losses[0] == losses[1]
    one, other = (json.loads((run / "summary.json").read_text()) for run in runs)
    assert (one["map"], one["averaged"]["map"]) == (other["map"], other["averaged"]["map"])
