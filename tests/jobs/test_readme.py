"""The README's example of a data set of your own trains as printed, and its snippet gives the scores of the run."""

import shlex
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs import evaluate, prepare_audioset, train
from tests.readme_example import (
    ESC10,
    NUM_CLIPS,
    num_right,
    printed,
    printed_lines,
    type_command,
    write_sounds,
)

JOBS = {"jobs/prepare_audioset.py": prepare_audioset.main, "jobs/train.py": train.main}
EVALUATE = ["--checkpoint", "run", "--data", "mine", "--split", "train", "--bootstrap", "0", "--scores", "s.parquet"]


def test_case_1_the_five_lines_train_and_case_10_the_snippet_tags(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Runs in this process, with few epochs; the next test runs the lines as printed."""
    monkeypatch.chdir(tmp_path)
    write_sounds(tmp_path, recorded=ESC10.is_dir())
    shell, commands = printed_lines()
    assert len(shell) + len(commands) == 5
    fewer = ["--num-workers", "0", "--cpus-per-worker", "1", "--freqm", "0", "--timem", "0"]
    fewer += ["--epochs", "24", "--wa_start", "24", "--wa_end", "24", "--input_tdim", "256"]
    for command in commands:
        _, job, *argv = shlex.split(command)
        assert JOBS[job]([*argv, *(fewer if job == "jobs/train.py" else ())]) == 0
    assert "warm-up takes 1,000 steps, this run has 24; warmup_steps is now 2" in capsys.readouterr().out
    assert evaluate.main(EVALUATE) == 0
    assert num_right(tmp_path / "s.parquet", tmp_path / "mine") == NUM_CLIPS
    capsys.readouterr()
    exec(printed("python"), {})
    tagged = {name: float(score) for score, name in (line.split("  ") for line in capsys.readouterr().out.splitlines())}
    best = pq.read_table(tmp_path / "run" / "best" / "scores.parquet")
    assert len(best) == 1
    expected = best["scores"].combine_chunks().flatten().to_numpy().astype(float)
    np.testing.assert_allclose(list(tagged.values()), expected, atol=0.005)
    assert set(tagged) == {"cat", "dog", "outside"}


@pytest.mark.slow
def test_case_1_the_five_lines_as_printed(tmp_path: Path):
    write_sounds(tmp_path, recorded=ESC10.is_dir())
    for command in printed_lines()[1]:
        shown = type_command(command, tmp_path)
        # Of Ray's processes, only those that train have something to say.
        assert [line for line in shown.splitlines() if " pid=" in line and "(RayTrainWorker pid=" not in line] == []
    type_command("python jobs/evaluate.py", tmp_path, *EVALUATE)
    assert num_right(tmp_path / "s.parquet", tmp_path / "mine") == NUM_CLIPS
