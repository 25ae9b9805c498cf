"""The whole training job: shards → Ray Train → checkpoints and figures, with one worker, with two, and after a kill."""

import csv
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from ast_core.batch import Norm
from ast_core.errors import ConfigError, DataError, UserError
from ast_core.metrics import tagging_metrics
from ast_core.recipe import Recipe
from ast_core.step import MIN_LOSS_SCALE
from jobs import evaluate
from jobs.recipe_option import recipe_names
from jobs.train import claim, main
from pipeline import dataset, storage
from pipeline.dataset import PreparedDataset
from pipeline.lease import LeaseLostError
from pipeline.train import async_validation as async_validation
from pipeline.train import checkpoints, fit, worker
from pipeline.train.checkpoints import upload_prefix
from pipeline.train.data.feed import layout
from pipeline.train.data_identity import check_unchanged, data_identity
from pipeline.train.evaluation.scores import read_scores
from pipeline.train.fit import _fit, choose_norm
from pipeline.train.worker import out_of_memory
from pipeline.train.worker_config import TrainJob
from tests import fakes
from tests.damage import record_again
from tests.fakes import LINEAR_RECIPE, SMALL_RECIPE

EPOCHS = 3
RUN = {
    "norm_stats": "data",
    "batch_size": "10",
    "epochs": str(EPOCHS),
    "wa_start": "2",
    "wa_end": "3",
    "precision": "fp32",
}


def argv(data: str, run: Path, *, num_workers: int, recipe: dict[str, str] = SMALL_RECIPE, **changes: str) -> list[str]:
    keys = [word for key, value in (recipe | RUN | changes).items() for word in (f"--{key}", value)]
    splits = ["--train-splits", "train", "--eval-splits", "eval"]
    return [
        *("--recipe", "audioset-full", "--data", data, *splits, "--output", str(run)),
        *("--num-workers", str(num_workers), "--cpus-per-worker", "1", "--log-every-steps", "1", *keys),
    ]


def linear(data: str, run: Path, **changes: str) -> list[str]:
    return argv(data, run, num_workers=0, recipe=LINEAR_RECIPE, **changes)


def records_of(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def epochs_of(run: Path) -> list[dict[str, Any]]:
    return records_of(run, "epoch")


@pytest.fixture(scope="module")
def two_workers(local_ray: None, tone_data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run with which others are compared."""
    run = tmp_path_factory.mktemp("runs") / "two"
    assert main(argv(tone_data, run, num_workers=2)) == 0
    return run


def test_run_writes_the_documented_files(two_workers: Path):
    summary = json.loads((two_workers / "summary.json").read_text())
    epochs = epochs_of(two_workers)
    assert [record["epoch"] for record in epochs] == [1, 2, 3]
    assert [record["step"] for record in epochs] == [5, 10, 15]
    best = max(epochs, key=lambda record: record["map"])
    assert (summary["best_epoch"], summary["map"]) == (best["epoch"], best["map"])
    assert summary["map"] > 0.6  # four well separated tones; chance is 0.25
    assert {"map", "mauc", "d_prime", "accuracy"} <= summary["averaged"].keys() & summary["running_ensemble"].keys()
    assert 0 <= summary["data_wait_share"] < 1
    config = json.loads((two_workers / "config.json").read_text())
    assert config["recipe"]["label_dim"] == 4
    rows = list(csv.DictReader((two_workers / "per_class.csv").open()))
    assert sum(int(row["eval_clips"]) for row in rows) == 21
    events = EventAccumulator(str(two_workers / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("eval/map")] == [5, 10, 15]
    kept = sorted((two_workers / "checkpoints").glob("epoch-*"))
    assert [path.name[: len("epoch-0002")] for path in kept] == ["epoch-0002", "epoch-0003"]
    assert not (two_workers / "stopped.json").exists()
    page = (two_workers / "report.html").read_text()
    assert f"{summary['map']:.4f}" in page
    assert "tone 3" in page
    scores = read_scores(str(two_workers))
    assert tagging_metrics(scores.scores.astype(np.float32), scores.targets()).map == pytest.approx(
        best["map"],
        abs=0.02,  # float16 scores have ties
    )


def test_evaluating_the_saved_model_gives_the_figures_of_the_run(two_workers: Path, tone_data: str, tmp_path: Path):
    summary = json.loads((two_workers / "summary.json").read_text())
    for name, expected in {"best": summary, "averaged": summary["averaged"]}.items():
        figures = tmp_path / f"{name}.json"
        checkpoint = ["--checkpoint", str(two_workers / name), "--data", tone_data, "--split", "eval"]
        assert evaluate.main([*checkpoint, "--json", str(figures)]) == 0
        assert json.loads(figures.read_text())["map"] == pytest.approx(expected["map"], abs=1e-6)


def test_initial_model_is_kept_and_scores_far_lower(two_workers: Path, tone_data: str, tmp_path: Path):
    initial = ["--checkpoint", str(two_workers / "initial"), "--data", tone_data, "--split", "eval"]
    assert evaluate.main([*initial, "--json", str(tmp_path / "figures.json")]) == 0
    summary = json.loads((two_workers / "summary.json").read_text())
    assert json.loads((tmp_path / "figures.json").read_text())["map"] < summary["map"] - 0.1


def test_several_checkpoints_are_an_ensemble(
    two_workers: Path, tone_data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Case 11: its scores as a table. Case 22: no column for training clips, which are unknown."""
    checkpoints, figures = [str(two_workers), str(two_workers / "averaged")], tmp_path / "figures.json"
    command = ["--checkpoint", *checkpoints, "--data", tone_data, "--split", "eval", "--per-class"]
    assert evaluate.main([*command, "--scores", str(tmp_path / "scores.csv"), "--json", str(figures)]) == 0
    assert "on 21 clips of eval" in (printed := capsys.readouterr().out)
    assert "tone 3" in printed
    assert re.search(r"AUC +eval\n", printed)
    header, *rows = csv.reader((tmp_path / "scores.csv").open(newline=""))
    assert header == ["clip_id", *(f"tone {i}" for i in range(4))]
    kept = read_scores(str(two_workers))
    assert [row[0] for row in rows] == kept.clip_id.to_pylist()
    table = np.array([row[1:] for row in rows], np.float32)
    assert tagging_metrics(table, kept.targets()).map == pytest.approx(json.loads(figures.read_text())["map"], abs=1e-6)


@pytest.mark.slow
def test_one_worker_with_async_validation_equals_two_without(
    two_workers: Path, local_ray: None, tone_data: str, tmp_path: Path
):
    run = tmp_path / "run"
    assert main([*argv(tone_data, run, num_workers=1), "--async-validation"]) == 0
    assert [record["epoch"] for record in epochs_of(run)] == [1, 2, 3]
    for one, two in zip(epochs_of(run), epochs_of(two_workers), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)  # after 15 steps with float32 sums in another order
        for key in ("map", "running_ensemble_map"):
            assert one[key] == pytest.approx(two[key], abs=0.02)
    ours, theirs = (json.loads((path / "summary.json").read_text()) for path in (run, two_workers))
    assert ours["best_epoch"] == theirs["best_epoch"]
    assert ours["averaged"]["map"] == pytest.approx(theirs["averaged"]["map"], abs=0.02)
    assert (run / "best" / "model.safetensors").exists()


@pytest.mark.slow
def test_async_validation_stops_at_a_damaged_shard_and_resumes_once_fixed(
    two_workers: Path, tone_data: str, tmp_path: Path
):
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(tone_data, data)
    shard = next((data / "eval" / "shards").glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:5000])
    command = [*argv(str(data), run, num_workers=1), "--async-validation"]
    with pytest.raises(UserError, match=r"^the shard .*\.parquet is damaged"):
        main(command)
    assert not (run / "summary.json").exists()
    shutil.copytree(tone_data, data, dirs_exist_ok=True)
    assert main(command) == 0
    assert [record["epoch"] for record in epochs_of(run)] == [1, 2, 3]
    for one, two in zip(epochs_of(run), epochs_of(two_workers), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)
        assert one["running_ensemble_map"] == pytest.approx(two["running_ensemble_map"], abs=0.02)
    assert not list((run / "evaluation").glob("*.pt"))


@pytest.mark.slow
def test_run_resumes_while_an_async_validation_is_pending(two_workers: Path, tone_data: str, tmp_path: Path):
    """The resuming command evaluates between the epochs. Ray by itself would wait forever for the validation."""
    run = tmp_path / "run"
    shutil.copytree(two_workers, run)
    (run / "summary.json").unlink()
    listed = run / "checkpoints" / "checkpoint_manager_snapshot.json"
    snapshot = json.loads(listed.read_text())
    snapshot["pending_training_results"] = snapshot["checkpoint_results"][-1:]
    snapshot["pending_validation_specs"] = [True]
    listed.write_text(json.dumps(snapshot))
    assert main(argv(tone_data, run, num_workers=2)) == 0


@pytest.fixture
def validated_asynchronously(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process use asynchronous validation, at once. The last checkpoint is kept, as Ray does."""
    monkeypatch.setattr(fit, "TrainJob", lambda **settings: TrainJob(**settings | {"async_validation": True}))

    def checkpoint(run: worker.Run, validation: Any = False) -> None:
        assert run.log is not None
        run.log.flush()
        made, kept = checkpoints.make(run.job.run, run._state()), Path(run.job.run, "checkpoints")
        shutil.rmtree(kept, ignore_errors=True)
        shutil.move(made.path, kept / f"epoch-{run.progress.epochs_done:04d}-step-000000-a")
        with suppress(Exception):  # Ray continues after an error of a validation
            async_validation.validate_checkpoint(
                ray.train.Checkpoint(*kept.iterdir()), asdict(run.job), **validation.fn_kwargs
            )

    monkeypatch.setattr(worker.Run, "_checkpoint", checkpoint)


def fail(monkeypatch: pytest.MonkeyPatch, calls: Sequence[int], error: Exception) -> None:
    """Make the evaluations with the given numbers, from 1, fail."""
    evaluate, seen = worker.evaluate, []

    def failing(*args: Any, **kwargs: Any) -> np.ndarray | None:
        seen.append(args)
        if len(seen) in calls:
            raise error
        return evaluate(*args, **kwargs)

    for module in (worker, async_validation):
        monkeypatch.setattr(module, "evaluate", failing)


def figures_of(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "step"} for record in epochs_of(run)]


def test_user_error_in_async_validation_ends_the_run_which_resumes(
    validated_asynchronously: None, tone_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert main(linear(tone_data, whole)) == 0
    fail(monkeypatch, [1], DataError("a shard is damaged"))
    with pytest.raises(UserError, match=r"^a shard is damaged$"):
        main(linear(tone_data, run))
    assert max(record["step"] for record in records_of(run, "step")) < 10  # before the third epoch
    assert main(linear(tone_data, run)) == 0
    assert figures_of(run) == figures_of(whole)
    assert not list((run / "evaluation").glob("*.pt"))


def test_failed_async_validation_is_repeated(
    validated_asynchronously: None, tone_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The next validation or the end of the run repeats it. Its weights are kept, though Ray deletes the checkpoint."""
    run = tmp_path / "run"
    fail(monkeypatch, [1, 4], RuntimeError("CUDA is out of sorts"))  # epoch 1, then 1, 2 and 3
    assert main(linear(tone_data, run)) == 0
    assert [record["epoch"] for record in epochs_of(run)] == [1, 2, 3]
    assert None not in [record["loss"] for record in epochs_of(run)]
    assert not list((run / "evaluation").glob("*.pt"))


def test_epoch_that_can_no_longer_be_evaluated_is_left_out_with_a_warning(
    validated_asynchronously: None,
    tone_data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    run = tmp_path / "run"
    monkeypatch.setattr(async_validation, "defer", Mock())
    fail(monkeypatch, [2], RuntimeError("killed"))
    assert main(linear(tone_data, run)) == 0
    assert [record["epoch"] for record in epochs_of(run)] == [1, 3]
    assert caplog.text.count("epoch 2 was not evaluated, and its weights are gone") == 1
    assert json.loads((run / "summary.json").read_text())["running_ensemble"]["map"] > 0


def test_epoch_with_interrupted_evaluation_is_evaluated_when_resumed(
    validated_asynchronously: None, tone_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its checkpoint is used, even if the resuming command evaluates on the ranks."""
    run = tmp_path / "run"
    monkeypatch.setattr(async_validation, "defer", Mock())
    fail(monkeypatch, [3], RuntimeError("killed"))
    monkeypatch.setattr(worker.Run, "_evaluate_missing", Mock(side_effect=DataError("killed")))
    with pytest.raises(UserError, match=r"^killed$"):
        main(linear(tone_data, run))
    monkeypatch.undo()
    assert main(linear(tone_data, run)) == 0
    assert [record["epoch"] for record in epochs_of(run)] == [1, 2, 3]
    assert None not in [record["loss"] for record in epochs_of(run)]


def test_async_validation_uses_no_gpu_if_the_run_uses_none(
    validated_asynchronously: None, tone_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The machine has a GPU, and Ray does not hide it from tasks."""
    validate_checkpoint, evaluate = async_validation.validate_checkpoint, worker.evaluate
    devices: list[torch.device] = []

    def recorded(*args: Any, device: torch.device, **kwargs: Any) -> np.ndarray | None:
        devices.append(device)
        return evaluate(*args, device=device, **kwargs)

    def on_a_gpu_machine(*args: Any, **kwargs: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.nn.Module, "to", lambda self, _: self)
            validate_checkpoint(*args, **kwargs)

    for module in (worker, async_validation):
        monkeypatch.setattr(module, "evaluate", recorded)
    monkeypatch.setattr(async_validation, "validate_checkpoint", on_a_gpu_machine)
    one_epoch = linear(tone_data, tmp_path / "run", epochs="1", wa_start="1", wa_end="1")
    assert main([*one_epoch, "--device", "cpu"]) == 0
    assert devices == [torch.device("cpu")] * 2  # the averaged weights are evaluated on the ranks


def test_finished_run_has_the_record_of_its_last_epoch(
    validated_asynchronously: None, tone_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tmp_path / "run"
    monkeypatch.setattr(worker, "write_summary", lambda run, _: seen.extend(epochs_of(Path(run))))
    seen: list[dict[str, Any]] = []
    with pytest.raises(DataError, match=r"there is no file .*summary\.json"):
        main(linear(tone_data, run, epochs="1", wa_start="1", wa_end="1"))
    assert [record["epoch"] for record in seen] == [1]


def test_run_in_this_process_equals_one_worker_without_checkpoints(
    two_workers: Path,
    tone_data: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    run = tmp_path / "run"
    with caplog.at_level(logging.INFO, logger="pipeline"):
        assert main(argv(tone_data, run, num_workers=0)) == 0
    assert "epoch 3/3" in caplog.text
    for ours, theirs in zip(epochs_of(run), epochs_of(two_workers), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert (run / "best" / "model.safetensors").exists()
    assert not (run / "checkpoints").exists()
    shutil.copytree(two_workers, tmp_path / "begun")
    (tmp_path / "begun" / "summary.json").unlink()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left_over = Path(tempfile.mkdtemp(prefix=upload_prefix(str(tmp_path / "begun"))))
    of_another = Path(tempfile.mkdtemp(prefix=upload_prefix(str(run))))
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="pipeline"):
        assert main(argv(tone_data, tmp_path / "begun", num_workers=0)) == 0
    assert "resuming after epoch 3" in caplog.text  # from the checkpoint of the workers
    assert of_another.exists()
    assert not left_over.exists()
    assert len(list((tmp_path / "begun" / "checkpoints").glob("epoch-*/state.pt"))) == 2
    with pytest.raises(ConfigError, match="--async-validation needs workers"):
        main([*argv(tone_data, tmp_path / "other", num_workers=0), "--async-validation"])


def test_reports_of_short_epochs_are_left_out(tone_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(worker, "REPORT_SHARE", 1e-9)
    monkeypatch.setattr(worker, "write_run_report", written := Mock())
    assert main(linear(tone_data, tmp_path / "run", epochs="2", wa_start="1", wa_end="2")) == 0
    written.assert_called_once()  # after the first epoch
    assert (tmp_path / "run" / "report.html").exists()  # by the driver, at the end


def test_summary_describes_the_best_model_on_disk(tone_data: str, tmp_path: Path):
    """The epoch was interrupted after its evaluation, and was worse when it was trained again."""
    command = linear(tone_data, run := tmp_path / "run", epochs="1", wa_start="1", wa_end="1")
    assert main(command) == 0
    (run / "summary.json").unlink()
    best = storage.read_checked_json(file := run / "best" / "epoch.json")
    storage.write_checked_json(file, best | {"headline": best["headline"] + 1e-6, "map": best["map"] + 1e-6})
    assert main(command) == 0
    assert json.loads((run / "summary.json").read_text())["map"] == best["map"] + 1e-6


def test_run_in_this_process_leaves_no_temporary_files(tone_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (temporary := tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    assert main([*linear(tone_data, tmp_path / "run"), "--checkpoint-every-s", "0"]) == 0
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
def test_case_23_killed_and_moved_run_resumes_at_the_next_step_on_other_workers(
    two_workers: Path, tone_data: str, tmp_path: Path
):
    """It resumes even if the kill truncated Ray's list of checkpoints.

    Case 33: TensorBoard has each step once. Case 35: a proxy of the environment is not used for this machine.
    """
    run, data = tmp_path / "run", Path(shutil.copytree(tone_data, tmp_path / "data"))
    script = str(Path(__file__).parents[2] / "jobs" / "train.py")
    every_step = ["--checkpoint-every-s", "0"]
    command = [sys.executable, script, *argv(str(data), run, num_workers=2), *every_step, "--num-cpus", "2"]
    env = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    env["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.1"  # default 2 s; each check registers one checkpoint
    env |= dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as driver:
        deadline_s = time.monotonic() + 120
        registered = run / "checkpoints" / "checkpoint_manager_snapshot.json"
        while not (registered.exists() and re.search("epoch-0001-step-00000[1-4]", registered.read_text())):
            assert driver.poll() is None, driver.stdout.read().decode()
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        for process in [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]:
            process.kill()  # without their driver, workers would continue for a while
    assert not (run / "summary.json").exists()
    assert (run / "report.html").exists()  # after the first epoch
    registered.write_text(registered.read_text()[:100])
    before = (run / "metrics.jsonl").read_text().splitlines()
    run, data = run.rename(tmp_path / "moved run"), data.rename(tmp_path / "moved data")
    assert main(argv(str(data), run, num_workers=1)) == 0
    in_tensorboard = EventAccumulator(str(run / "tensorboard")).Reload().Scalars("train/loss")
    assert [event.step for event in in_tensorboard] == list(range(1, 16))
    steps, undisturbed = records_of(run, "step"), records_of(two_workers, "step")
    assert [record["step"] for record in steps] == list(range(1, 16))
    # Records contain rates, so equal lines were not computed again.
    after = (run / "metrics.jsonl").read_text().splitlines()
    assert len(before) >= 5 + 1 + 1  # those of the first epoch and some of the second
    assert before[:7] == after[:7]
    for record in steps:
        assert record["loss"] == pytest.approx(undisturbed[record["step"] - 1]["loss"], rel=1e-3)
    for resumed, whole in zip(epochs_of(run), epochs_of(two_workers), strict=True):
        assert resumed["loss"] == pytest.approx(whole["loss"], rel=1e-3)
        for key in ("map", "running_ensemble_map"):
            assert resumed[key] == pytest.approx(whole[key], abs=0.02)
    ours, theirs = (json.loads((path / "summary.json").read_text()) for path in (run, two_workers))
    assert ours["averaged"]["map"] == pytest.approx(theirs["averaged"]["map"], abs=0.02)
    assert len(list((run / "checkpoints").glob("epoch-*/state.pt"))) == 2  # leftovers of the kill are removed


@pytest.mark.slow
def test_damaged_latest_checkpoint_is_skipped_for_the_previous_one(two_workers: Path, tone_data: str, tmp_path: Path):
    """The run resumes from the older checkpoint and ends with the same result."""
    run = tmp_path / "run"
    shutil.copytree(two_workers, run)
    *_, latest = sorted((run / "checkpoints").glob("epoch-*"))
    with (latest / "state.pt").open("r+b") as file:
        file.seek(5000)
        file.write(b"\0" * 100)
    (run / "summary.json").unlink()
    assert main(argv(tone_data, run, num_workers=2)) == 0
    for resumed, whole in zip(epochs_of(run), epochs_of(two_workers), strict=True):
        assert resumed["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    assert len([path for path in (run / "checkpoints").glob("epoch-0003-*") if path != latest]) == 1, (
        "not trained again"
    )


@pytest.mark.slow
def test_nonfinite_loss_ends_the_run_at_once_and_names_its_clips(local_ray: None, tone_data: str, tmp_path: Path):
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"the loss of epoch 1, step \d is not finite; its clips are in .*.json"):
        main(argv(tone_data, run, num_workers=2, lr="1e30"))
    record = json.loads((run / "nonfinite.json").read_text())
    assert len(record["clip_id"]) == len(record["mixed_with"]) == 10 or record["step"] == 5
    assert all(clip_id.startswith("train_") for clip_id in record["clip_id"])
    assert not (run / "summary.json").exists()


def test_nonfinite_weight_ends_the_run_before_it_is_evaluated_or_saved(
    tone_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """After the last step of an epoch, no later loss shows it."""
    run, train_step, losses = tmp_path / "run", worker.train_step, []

    def breaking(model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        losses.append(train_step(model, *args, **kwargs))
        if len(losses) == 5:
            next(model.parameters()).data.view(-1)[-1] = math.nan
        return losses[-1]

    monkeypatch.setattr(worker, "train_step", breaking)
    monkeypatch.setattr(worker.Run, "_checkpoint", save := Mock())
    with pytest.raises(UserError, match=r"^a weight after epoch 1, step 5 is not finite; its clips are in .*\.json"):
        main(linear(tone_data, run))
    record = json.loads((run / "nonfinite.json").read_text())
    assert (record["step"], len(record["clip_id"])) == (5, 8)
    assert not (run / "evaluation").exists()
    save.assert_not_called()
    assert [record["step"] for record in records_of(run, "step")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_damaged_shard_ends_the_run_after_one_attempt(local_ray: None, tone_data: str, tmp_path: Path):
    shutil.copytree(tone_data, tmp_path / "data")
    for shard in (tmp_path / "data" / "train" / "shards").glob("*.parquet"):
        shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(
        UserError, match=r"^the shard .*\.parquet is damaged \(.*\); restore it, or prepare the data again$"
    ):
        main(argv(str(tmp_path / "data"), tmp_path / "run", num_workers=1))
    assert (tmp_path / "run" / "stopped.json").exists()


@pytest.mark.parametrize(
    "failure",
    [
        WorkerGroupError(
            "a long traceback", {1: RuntimeError("a peer is gone"), 0: OSError(28, "No space left on device")}
        ),
        ControllerError(OSError(28, "No space left on device")),
    ],
)
def test_full_disk_ends_training_with_one_line_that_names_it(failure: TrainingFailedError):
    trainer = Mock(fit=Mock(side_effect=failure))
    with pytest.raises(UserError, match=r"^training failed, its checkpoints are complete: No space left on device: "):
        _fit(trainer, "s3://bucket/run")


@pytest.mark.parametrize(
    ("death", "line"),
    [
        (
            OutOfMemoryError("Task was killed"),
            "Ray ended it because its machine was nearly out of memory: ",
        ),
        (
            ActorDiedError(),
            "The actor died unexpectedly before finishing this task. If its machine ",
        ),
    ],
)
def test_a_worker_that_dies_ends_training_with_one_line(death: RayError, line: str):
    failures = {0: WorkerHealthCheckFailedError("a health check failed", death)}
    trainer = Mock(fit=Mock(side_effect=WorkerGroupError("a long traceback", failures)))
    with pytest.raises(UserError, match=r"^training failed: a worker died\. ") as caught:
        _fit(trainer, "s3://bucket/run")
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            "the GPU has too little memory for this model",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 12"), "the machine has too little memory for this "),
        (RuntimeError("shapes do not match"), None),
    ],
)
def test_too_little_memory_is_a_line_and_other_errors_are_not(error: RuntimeError, line: str | None):
    found = out_of_memory(error)
    assert found is None if line is None else found is not None and found.startswith(line)


def test_training_ends_after_patience_epochs_without_improvement(tone_data: str, tmp_path: Path, capsys):
    """The learning rate is so small that nothing changes, so the first epoch stays the best."""
    run = tmp_path / "run"
    assert main(linear(tone_data, run, lr="1e-30", epochs="5", patience="2", wa_start="2", wa_end="5")) == 0
    assert [record["epoch"] for record in epochs_of(run)] == [1, 2, 3]
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["best_epoch"], summary["epochs"]) == (1, 3)
    line = "the run ended after epoch 3, so the averaged weights are those of 2 epochs in place of 4"
    assert line in capsys.readouterr().out


def test_evaluation_split_of_one_clip_has_undefined_metrics(tmp_path: Path, capsys):
    fakes.write_data(str(tmp_path / "data"), splits=[("train", 12), ("eval", 1)])
    small = linear(str(tmp_path / "data"), tmp_path / "run", epochs="1", wa_start="1", wa_end="1")
    assert main(small) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["mauc"] is None
    assert "AUC –" in capsys.readouterr().out


def test_run_resumes_with_other_execution_keys_and_no_other_change(
    tone_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, one_epoch = tmp_path / "run", {"epochs": "1", "wa_start": "1", "wa_end": "1"}
    assert main(linear(tone_data, run, **one_epoch)) == 0
    (run / "summary.json").unlink()
    used, train_step = [], worker.train_step

    def recorded(*args: Any, recipe: Recipe, **kwargs: Any) -> torch.Tensor:
        used.append((recipe.micro_batch_size, recipe.activation_checkpointing, recipe.attention))
        return train_step(*args, recipe=recipe, **kwargs)

    monkeypatch.setattr(worker, "train_step", recorded)
    others = {"micro_batch_size": "3", "activation_checkpointing": "true", "attention": "plain"}
    assert main(linear(tone_data, run, **one_epoch, **others)) == 0
    assert set(used) == {(3, True, "plain")}
    claim(linear(tone_data, run, **one_epoch, compile="true"))
    with pytest.raises(ConfigError, match=r"holds another run \(recipe\.lr was 0\.0003, is 0\.001\)"):
        claim(linear(tone_data, run, **one_epoch, **others, lr="1e-3"))


def test_data_prepared_again_into_other_shards_are_refused(two_workers: Path, tone_data: str, tmp_path: Path):
    shutil.copytree(tone_data, tmp_path / "data")
    moved = PreparedDataset.open(str(tmp_path / "data"))
    assert layout(moved.clips(["train"])) == layout(PreparedDataset.open(tone_data).clips(["train"]))
    index = pq.read_table(tmp_path / "data" / "train" / "index.parquet")
    swapped = index.set_column(index.column_names.index("shard"), "shard", index["shard"][::-1])
    dataset.write_table(dataset.index_file(str(tmp_path / "data"), "train"), swapped)
    record_again(str(tmp_path / "data"))
    with pytest.raises(ConfigError, match=r"holds another run \(train_layout was"):
        main(argv(str(tmp_path / "data"), two_workers, num_workers=2))


def test_data_prepared_again_while_a_run_trains_end_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Ranks open the data set again when they restart, and asynchronous validation does so at each epoch."""
    data = str(tmp_path / "data")
    fakes.write_data(data, splits=[("train", 12), ("eval", 12)])
    jobs: list[TrainJob] = []

    def prepare_again(**settings: Any) -> TrainJob:
        shutil.rmtree(data)
        fakes.write_data(data, splits=[("train", 12), ("eval", 13)])
        jobs.append(TrainJob(**settings))
        return jobs[0]

    monkeypatch.setattr(fit, "TrainJob", prepare_again)
    refusal = r"data was prepared again while this run trains on it, and its clips are others now; train with another"
    with pytest.raises(DataError, match=refusal):
        main(linear(data, tmp_path / "run"))
    with pytest.raises(DataError, match=refusal):
        async_validation._evaluate_up_to(jobs[0], 1, 1.0, {})


def test_hashes_that_a_preparation_adds_to_old_data_do_not_end_a_run(tone_data: str):
    data = PreparedDataset.open(tone_data)
    splits = {"train": ["train"], "eval": ["eval"]}
    clips = {what: data.clips(of) for what, of in splits.items()}
    without = {what: replace(of, fbank_hash=None) for what, of in clips.items()}  # as in schema version 2
    check_unchanged(data_identity(data, splits, without), data, splits, clips)
    with pytest.raises(DataError, match="was prepared again while this run trains on it"):
        check_unchanged(
            data_identity(data, splits, clips), data, splits, {"train": clips["eval"], "eval": clips["eval"]}
        )


def test_other_recipe_in_the_folder_of_a_run_is_refused(two_workers: Path, tone_data: str):
    with pytest.raises(ConfigError, match=r"holds another run \(recipe\.lr was 0\.0003, is 0\.001\)"):
        main(argv(tone_data, two_workers, num_workers=2, lr="1e-3"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"learning_rate": "1"}, ConfigError, "no recipe key 'learning_rate'"),
        ({"fstrid": "10"}, ConfigError, "did you mean fstride"),
        ({"epochs": "many"}, ConfigError, "epochs is 'many'; use a whole number"),
        ({"lr": "-1"}, ConfigError, "lr is -1; use more than 0"),
        ({"label_dim": "527"}, ConfigError, "label_dim is 527; .* has 4 classes"),
        ({"input_fdim": "64", "freqm": "8"}, ConfigError, "input_fdim is 64, and .* has 128 mel bins"),
        ({"audioset_pretrain": "true", "model_size": "base384"}, ConfigError, "set imagenet_pretrain true"),
        ({"audioset_weights": "/nowhere.pth"}, ConfigError, "audioset_weights is set but audioset_pretrain is false"),
        ({"imagenet_weights": "/nowhere.pth"}, ConfigError, "imagenet_weights is set but imagenet_pretrain is false"),
        (
            {"imagenet_pretrain": "true", "imagenet_weights": "/nowhere.pth"},
            DataError,
            "there is no weight file /nowhere.pth",
        ),
    ],
)
def test_invalid_recipe_is_refused_before_a_worker_starts(
    tone_data: str, tmp_path: Path, changes: dict[str, str], error: type, message: str
):
    with pytest.raises(error, match=message):
        main(argv(tone_data, tmp_path / "run", num_workers=1, **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "eval"])
def test_part_2_case_30_ce_refuses_clips_of_several_labels(tone_data: str, tmp_path: Path, split: str):
    data = str(tmp_path / "data")
    shutil.copytree(tone_data, data)
    file = dataset.index_file(data, split)
    index = pq.read_table(file)
    labels = pa.array([[0, 1], *index["labels"].to_pylist()[1:]], dataset.LABELS)
    dataset.write_table(file, index.set_column(index.column_names.index("labels"), "labels", labels))
    record_again(data)
    refusal = "^loss CE takes exactly one label a clip; this data has clips with several: use loss BCE$"
    with pytest.raises(ConfigError, match=refusal):
        main(argv(data, tmp_path / "run", num_workers=1, loss="CE"))
    assert not (tmp_path / "run").exists()
    assert claim(argv(data, tmp_path / "run", num_workers=1, loss="BCE")).recipe.loss == "BCE"


def test_norm_is_that_of_the_recipe_unless_that_of_the_data_is_requested(tone_data: str, capsys):
    dataset = PreparedDataset.open(tone_data)
    assert choose_norm(Recipe(), dataset, ["train"]) == Norm(-4.2677393, 4.5689974)
    assert choose_norm(Recipe(audioset_pretrain=True), dataset, ["train"]) == Norm(-4.2677393, 4.5689974)
    assert not capsys.readouterr().out
    own = choose_norm(Recipe(audioset_pretrain=True, norm_stats="data"), dataset, ["train"])
    assert own == Norm(*dataset.norm(["train"]))
    assert "the AudioSet weights expect the recipe's mean and std" in capsys.readouterr().out


def test_missing_data_are_refused_before_a_worker_starts(tone_data: str, tmp_path: Path):
    arguments = argv(tone_data, tmp_path / "run", num_workers=1)
    arguments[arguments.index("train")] = "nothing"
    with pytest.raises(DataError, match="no split 'nothing'; it has train, eval"):
        main(arguments)
    with pytest.raises(DataError, match="no finished data set"):
        main(argv(str(tmp_path), tmp_path / "run", num_workers=1))


def test_shipped_recipes_are_found_by_name_and_listed_in_the_refusal(tone_data: str, tmp_path: Path):
    audioset = ["audioset-balanced", "audioset-full", "audioset-full-fast"]
    comparison = [name for name in recipe_names() if name.startswith(("compare-", "psla-"))]
    demo = ["demo", "demo-linear", "demo-talnet"]
    assert recipe_names() == sorted(
        [*audioset, *comparison, *demo, "esc10", "esc50", "fsd50k", "small", "speechcommands"]
    )
    arguments = argv(tone_data, tmp_path / "run", num_workers=1)
    arguments[1] = "audioset"
    with pytest.raises(ConfigError, match="no recipe 'audioset'; use audioset-balanced, "):
        main(arguments)


def test_async_validation_with_a_variable_number_of_workers_is_refused(tone_data: str, tmp_path: Path):
    """It would wait forever for its resources."""
    with pytest.raises(ConfigError, match="--async-validation needs a fixed --num-workers"):
        claim([*argv(tone_data, tmp_path / "run", num_workers=1), "--num-workers", "1:2", "--async-validation"])
    assert not (tmp_path / "run").exists()


def test_lack_of_resources_for_async_validation_is_announced(
    local_ray: None,
    tone_data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1")
    options = ["--async-validation", "--address", "auto", "--longest-wait-s", "1"]
    with pytest.raises(UserError, match=r"^training waited"):
        main([*argv(tone_data, tmp_path / "run", num_workers=3), *options])
    printed = capsys.readouterr().out
    assert "3 workers and asynchronous validation take 1 CPU each, the cluster has room for 2 now" in printed


def test_more_workers_than_the_machine_has_cpus_are_refused(local_ray: None, tone_data: str, tmp_path: Path):
    wanted = int(ray.cluster_resources()["CPU"]) + 1
    with pytest.raises(ConfigError, match=rf"{wanted} workers take {wanted} CPUs .*, this machine has 2"):
        main([*argv(tone_data, tmp_path / "run", num_workers=wanted), "--address", "local"])


@pytest.mark.parametrize("num_workers", ["3", "3:4"])
def test_a_training_that_the_cluster_has_no_room_for_ends_after_the_longest_wait(
    num_workers: str,
    local_ray: None,
    tone_data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1")  # how often Ray Train looks
    options = ["--num-workers", num_workers, "--address", "auto", "--longest-wait-s", "2"]
    has = r"3 workers take 1 CPU each, the cluster has room for 2\. Start Ray on more machines, or lower --num-workers"
    with pytest.raises(UserError, match=rf"^training waited \d+ s for its workers: {has}"):
        main([*argv(tone_data, tmp_path / "run", num_workers=3), *options])
    printed = capfd.readouterr().err
    assert "WorkerGroupStartupTimeoutError" not in printed
    assert "UserError" not in printed


def test_device_cpu_in_this_process_trains_on_the_cpu_of_a_machine_with_a_gpu(
    tone_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    gpu, devices, train_step = Mock(return_value=torch.device("cuda:0")), set(), worker.train_step
    for module in (worker, ray.train.torch):
        monkeypatch.setattr(module, "get_device", gpu)

    def recorded(model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        devices.update(parameter.device for parameter in model.parameters())
        return train_step(model, *args, **kwargs)

    monkeypatch.setattr(worker, "train_step", recorded)
    one_epoch = linear(tone_data, tmp_path / "run", epochs="1", wa_start="1", wa_end="1")
    assert main([*one_epoch, "--device", "cpu"]) == 0
    assert devices == {torch.device("cpu")}


def test_validation_is_repeated_after_an_error_of_storage_only(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """By default Ray repeats it after no error, and no longer keeps the checkpoint of the epoch."""
    monkeypatch.setattr(fit, "asdict", lambda _: {})
    options = fit._validation(Mock(threads=1), use_gpu=False).ray_remote_kwargs

    def attempts(error: Exception) -> int:
        """How often a task starts that raises `error` at its first attempt."""
        (counted := tmp_path / type(error).__name__).write_text("")

        def task() -> None:
            with counted.open("a") as file:
                file.write("x")
            if counted.read_text() == "x":
                raise error

        with suppress(RayError):
            ray.get(ray.remote(task).options(**options).remote())
        return len(counted.read_text())

    errors = (ConnectionError("reset"), checkpoints.DamagedStateError("cut off"), DataError("a damaged shard"))
    assert [attempts(error) for error in errors] == [2, 2, 1]


@pytest.mark.slow
def test_two_ranks_evaluate_an_epoch_that_has_no_record(two_workers: Path, tone_data: str, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(two_workers, run)
    (run / "summary.json").unlink()
    (run / "evaluation" / "epoch-0003.json").unlink()
    assert main(argv(tone_data, run, num_workers=2)) == 0
    record = Path("evaluation", "epoch-0003.json")
    assert (run / record).read_text() == (two_workers / record).read_text()


@pytest.fixture
def lose_lock(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Another job takes the run over when this is called."""
    lost = Mock()

    def check(_: TrainJob) -> None:
        if lost.called:
            raise LeaseLostError("another job has taken over")

    monkeypatch.setattr(TrainJob, "check_lock", check)
    return lost


def test_averaged_weights_are_not_written_into_a_run_that_another_job_took_over(
    lose_lock: Mock, tone_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tmp_path / "run"
    monkeypatch.setattr(worker.Run, "_checkpoint", lose_lock)
    with pytest.raises(LeaseLostError):
        main(linear(tone_data, run, epochs="1", wa_start="1", wa_end="1"))
    assert (run / "best").exists()
    assert not (run / "averaged").exists()


def test_missing_epoch_is_not_recorded_in_a_run_that_another_job_took_over(
    validated_asynchronously: None,
    lose_lock: Mock,
    tone_data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    run = tmp_path / "run"
    fail(monkeypatch, [1], RuntimeError("killed"))
    monkeypatch.setattr(ray.train, "get_all_reported_checkpoints", lose_lock)  # at the end of training
    with pytest.raises(LeaseLostError):
        main(linear(tone_data, run, epochs="1", wa_start="1", wa_end="1"))
    lose_lock.assert_called_once()
    assert not (run / "evaluation" / "epoch-0001.json").exists()


def test_fp16_gradients_that_always_overflow_end_the_run(
    tone_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The loss stays finite. The scale is that after some such steps."""
    run, scale = tmp_path / "run", MIN_LOSS_SCALE
    monkeypatch.setattr(worker, "make_scaler", lambda *_: torch.amp.GradScaler("cpu", init_scale=scale))
    one_epoch = {"epochs": "1", "wa_start": "1", "wa_end": "1"}
    assert main(linear(tone_data, run, **one_epoch)) == 0
    assert {record["loss_scale"] for record in records_of(run, "step")} == {scale}
    scale /= 2
    with pytest.raises(UserError, match=r"^fp16 gradients overflow at every step: use precision bf16 or fp32, with "):
        main(linear(tone_data, tmp_path / "other", **one_epoch))


@pytest.mark.parametrize("own", [None, (1, 0), (2, 0)])
def test_ranks_that_read_different_checkpoints_end_with_an_error(
    own: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
):
    """On one rank a download was cut off, so that it takes an earlier checkpoint, or none. Ray restarts all of them."""

    def with_another_rank(values: torch.Tensor, operation: object) -> None:
        assert operation == torch.distributed.ReduceOp.MAX
        values.copy_(torch.maximum(values, torch.tensor([1, 3, -1, -3])))

    monkeypatch.setattr(torch.distributed, "all_reduce", with_another_rank)
    state = None if own is None else {"progress": {"epochs_done": own[0], "steps_done": own[1]}}
    monkeypatch.setattr(checkpoints, "known", lambda _: [Mock()])
    monkeypatch.setattr(checkpoints, "load_latest", lambda _: state)
    run = object.__new__(worker.Run)
    run.job, run.world_size, run.device = Mock(), 2, torch.device("cpu")
    with pytest.raises(ConnectionError, match=r"^some ranks could not read the checkpoint that others have read$"):
        run._resume()
    run._check_same_checkpoint({"progress": {"epochs_done": 1, "steps_done": 3}})
