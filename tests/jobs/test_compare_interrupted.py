"""A comparison on object storage, and one that is killed: what the next command trains, and what it keeps."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs.compare import main
from pipeline import storage
from pipeline.compare import measure
from tests import fakes
from tests.jobs.killed import compare_until_killed
from tests.processes import in_new_process
from tests.s3 import S3Server

KEYS = fakes.LINEAR_RECIPE | {"norm_stats": "data", "epochs": "2", "wa_start": "1", "wa_end": "2", "batch_size": "10"}
STEPS_OF_A_RUN = 2 * 5
"""Two epochs of 48 clips in batches of 10."""


@pytest.fixture(scope="module", autouse=True)
def short_measurements() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "MEASURED_S", 0.01)
        yield


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("recipe") / "linear.yaml"
    file.write_text("".join(f"{key}: {value}\n" for key, value in KEYS.items()))
    return str(file)


def argv(recipe: str, data: str, output: object, *more: str) -> list[str]:
    splits = ["--train-splits", "train", "--eval-splits", "eval"]
    workers = [] if "--num-workers" in more else ["--num-workers", "0"]
    vary = ["--vary", "lr=1e-3,3e-3"]
    return ["--recipes", recipe, "--data", data, "--output", str(output), *splits, *vary, *workers, *more]


def figures(output: str) -> dict[str, Any]:
    """comparison.json without places, dates and measurements."""
    found: dict[str, Any] = storage.read_json(storage.join(output, "comparison.json"))
    for model in found["models"]:
        del model["costs"], model["training"]
        for run in model["runs"]:
            run["uri"] = run["uri"].removeprefix(output)
    return {key: found[key] for key in ("metric", "models", "pairs", "failed")}


def summaries(output: str) -> dict[str, Any]:
    """The summary of each run by its place. A run that is trained again has other times."""
    files = [uri for uri in storage.list_files(output, suffix=".json", recursive=True) if uri.endswith("summary.json")]
    return {uri.rpartition("/out/")[2]: storage.read_json(uri) for uri in files}


@pytest.mark.slow
def test_variants_and_seeds_on_object_storage_are_trained_once(
    s3: S3Server, recipe: str, tone_data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data, output = fakes.upload(Path(tone_data), s3.uri("compared", "data")), s3.uri("compared", "out")
    assert main(argv(recipe, data, output, "--epochs", "1", "--wa_end", "1")) == 0
    first = summaries(output)
    assert list(first) == [f"linear-lr-{lr}/seed-0/summary.json" for lr in ("1e-3", "3e-3")]
    capsys.readouterr()
    again = argv(recipe, data, output, "--epochs", "1", "--wa_end", "1", "--seeds", "2")
    again[again.index("lr=1e-3,3e-3")] = "lr=3e-3"
    assert main(again) == 0
    printed = capsys.readouterr().out
    assert "2 runs, 1 of them finished" in printed
    assert f"page: {output}/comparison.html" in printed
    second = summaries(output)
    assert len(second) == 3
    assert second.items() >= first.items()
    (model,) = storage.read_json(f"{output}/comparison.json")["models"]
    assert [run["seed"] for run in model["runs"]] == [0, 1]
    assert [run["uri"] for run in model["runs"]] == [f"{output}/linear-lr-3e-3/seed-{seed}" for seed in (0, 1)]
    assert "over seeds" in storage.read_text(f"{output}/comparison.html")


@pytest.mark.slow
def test_a_killed_comparison_keeps_its_finished_runs_and_ends_with_the_same_figures(
    recipe: str, tone_data: str, tmp_path: Path
):
    killed, whole = tmp_path / "killed" / "out", tmp_path / "whole" / "out"
    with pytest.raises(RuntimeError, match="the process ended with status -9"):
        in_new_process(compare_until_killed, STEPS_OF_A_RUN + 8, argv(recipe, tone_data, killed))
    before = summaries(str(killed))
    assert list(before) == ["linear-lr-1e-3/seed-0/summary.json"]
    assert not (killed / "comparison.json").exists()
    assert main(argv(recipe, tone_data, killed)) == 0
    assert summaries(str(killed)).items() > before.items()
    assert main(argv(recipe, tone_data, whole)) == 0
    assert figures(str(killed)) == figures(str(whole))


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_run_on_workers_costs_no_finished_step(
    local_ray: None, recipe: str, tone_data: str, tmp_path: Path
):
    """The run that was being trained resumes from its checkpoint."""
    killed, whole = tmp_path / "killed" / "out", tmp_path / "whole" / "out"
    workers = ["--num-workers", "1", "--cpus-per-worker", "1", "--checkpoint-every-s", "0", "--log-every-steps", "1"]
    script = str(Path(__file__).parents[2] / "jobs" / "compare.py")
    command = [sys.executable, script, *argv(recipe, tone_data, killed, *workers), "--num-cpus", "2"]
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    env["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.1"  # default 2 s; each check registers one checkpoint
    second = killed / "linear-lr-3e-3" / "seed-0"
    registered = second / "checkpoints" / "checkpoint_manager_snapshot.json"
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as driver:
        deadline_s = time.monotonic() + 240
        while not (registered.exists() and re.search("epoch-000[01]-step-00000[1-4]", registered.read_text())):
            assert driver.poll() is None, driver.stdout.read().decode()
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        for process in [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]:
            process.kill()  # without their driver, workers would continue for a while
    before, logged = summaries(str(killed)), (second / "metrics.jsonl").read_text().splitlines()
    assert list(before) == ["linear-lr-1e-3/seed-0/summary.json"]
    assert main(argv(recipe, tone_data, killed, *workers)) == 0
    assert summaries(str(killed)).items() > before.items()
    kept = (second / "metrics.jsonl").read_text().splitlines()
    assert kept[0] == logged[0]  # with its rate, so it was not trained again
    assert main(argv(recipe, tone_data, whole, *workers)) == 0
    losses = [
        [json.loads(line)["loss"] for line in (output / "linear-lr-3e-3/seed-0/metrics.jsonl").read_text().splitlines()]
        for output in (killed, whole)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
