"""The jobs train, resume, evaluate and start from a model with convolutions, BatchNorm and a GRU."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ast_core.checkpoints import load_model
from jobs import evaluate, export
from jobs.train import main

KEYS = {"model": "talnet", "embedding_size": "128", "input_tdim": "48", "freqm": "16", "timem": "8", "lr": "1e-2"}
KEYS |= {"batch_size": "10", "epochs": "3", "wa_start": "2", "wa_end": "3", "warmup": "false", "norm_stats": "data"}
KEYS |= {"precision": "fp32"}


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "talnet.yaml"
    file.write_text("".join(f"{key}: {value}\n" for key, value in KEYS.items()))
    return file


def argv(recipe_file: Path, data: str, run: Path, num_workers: int, *more: str) -> list[str]:
    splits = ["--train-splits", "train", "--eval-splits", "eval", "--num-workers", str(num_workers)]
    return [
        "--recipe",
        str(recipe_file),
        "--data",
        data,
        *splits,
        "--output",
        str(run),
        "--log-every-steps",
        "1",
        *more,
    ]


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.fixture(scope="module")
def run(recipe_file: Path, tone_data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained in this process."""
    run = tmp_path_factory.mktemp("talnet") / "run"
    assert main(argv(recipe_file, tone_data, run, 0)) == 0
    return run


def test_the_stored_model_has_the_scores_of_the_run(local_ray: None, run: Path, tone_data: str, tmp_path: Path):
    figures = ["--data", tone_data, "--split", "eval", "--json", str(tmp_path / "figures.json")]
    assert evaluate.main(["--checkpoint", str(run), *figures]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["map"] > 0.4  # four classes; chance is 0.25
    assert json.loads((tmp_path / "figures.json").read_text())["map"] == pytest.approx(summary["map"], abs=1e-6)


def test_averaged_weights_have_averaged_running_statistics(run: Path):
    state = load_model(run / "averaged")[0].state_dict()
    first = load_model(run / "initial")[0].state_dict()
    assert not torch.equal(state["encoder.0.bn.running_var"], first["encoder.0.bn.running_var"])
    # 5 steps an epoch: the mean of 10 and 15 after epochs 2 and 3, as a whole number.
    assert state["encoder.0.bn.num_batches_tracked"].item() == 12


def test_a_run_starts_from_a_model_without_imagenet_weights(
    run: Path, recipe_file: Path, tone_data: str, tmp_path: Path
):
    started = tmp_path / "run"
    assert (
        main(argv(recipe_file, tone_data, started, 0, "--init-from", str(run), "--epochs", "2", "--wa_end", "2")) == 0
    )
    theirs, ours = load_model(run / "best")[0].state_dict(), load_model(started / "initial")[0].state_dict()
    assert [key for key, value in theirs.items() if not torch.equal(ours[key], value)] == []


def test_the_weights_are_exported_in_the_references_format(run: Path, tmp_path: Path):
    file = tmp_path / "talnet.pth"
    assert export.main(["--checkpoint", str(run), "--format", "original", "--output", str(file)]) == 0
    theirs, ours = torch.load(file, weights_only=True), load_model(run / "best")[0].state_dict()
    assert torch.equal(theirs["module.conv3.bn.running_mean"], ours["encoder.2.bn.running_mean"])
    assert torch.equal(theirs["module.conv.2.bn.running_mean"], ours["encoder.2.bn.running_mean"])


@pytest.mark.slow
def test_two_workers_resume_in_the_middle_of_an_epoch(
    local_ray: None, recipe_file: Path, tone_data: str, tmp_path: Path
):
    """The checkpoint has rank 0's running statistics, from which both ranks would have taken the next step too."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    workers = ["--cpus-per-worker", "1", "--checkpoint-every-s", "0"]
    assert main(argv(recipe_file, tone_data, whole, 2, *workers)) == 0
    shutil.copytree(whole, resumed)
    before, latest = sorted((resumed / "checkpoints").glob("epoch-*"))
    assert before.name.startswith("epoch-0002-step-000004")
    (latest / "state.pt").write_bytes(b"damaged")
    (resumed / "summary.json").unlink()
    assert main(argv(recipe_file, tone_data, resumed, 2, *workers)) == 0
    for kind in ("step", "epoch"):
        losses = [[record["loss"] for record in records(run, kind)] for run in (whole, resumed)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    best = [load_model(run / "averaged")[0].state_dict()["encoder.9.bn.running_mean"] for run in (whole, resumed)]
    torch.testing.assert_close(best[0], best[1])
