"""metrics.jsonl, TensorBoard and MLflow have the same values, also after a run was interrupted."""

import json
import math
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ast_core.errors import UserError
from pipeline import storage
from pipeline.train import mlflow_log
from pipeline.train.metrics_log import RunLog
from pipeline.train.mlflow_log import check_mlflow
from tests.s3 import S3Server


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_unknown_values_are_null_in_records_and_absent_elsewhere(tmp_path: Path):
    log = RunLog(str(tmp_path), 0)
    log.step(epoch=1, step=20, values={"loss": 0.5, "mfu": None, "memory_gb": math.nan})
    log.epoch(epoch=1, step=25, values={"map": 0.25, "d_prime": math.inf})
    log.close()
    assert records(tmp_path) == [
        {"kind": "step", "epoch": 1, "step": 20, "loss": 0.5, "mfu": None, "memory_gb": None},
        {"kind": "epoch", "epoch": 1, "step": 25, "map": 0.25, "d_prime": None},
    ]
    assert set(EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()["scalars"]) == {"train/loss", "eval/map"}
    assert not (tmp_path / "mlflow.json").exists()


@pytest.mark.parametrize("damaged", ["{", '{"kind": "sTep", "epoch": 1, "step": 20}', '{"kind": "step"}', "7"])
def test_a_resumed_run_names_the_line_of_a_damaged_record(tmp_path: Path, damaged: str):
    log = RunLog(str(tmp_path), 0)
    log.step(epoch=1, step=20, values={"loss": 0.5})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(f"{damaged}\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is damaged; restore the file, or delete it"):
        RunLog(str(tmp_path), 20)


def test_uploaded_events_leave_no_temporary_files(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Files that a crash left are deleted when the run starts again; another run's files are kept."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run, other = s3.uri("runs", "a"), s3.uri("runs", "b")
    RunLog(run, 0)
    of_another = RunLog(other, 0)
    log = RunLog(run, 0)
    log.step(epoch=1, step=20, values={"loss": 0.5})
    log.close()
    assert len(storage.list_files(f"{run}/tensorboard")) == 1
    assert len(list(tmp_path.iterdir())) == 1
    of_another.close()
    assert not list(tmp_path.iterdir())


def test_without_mlflow_an_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match="pip install mlflow-skinny"):
        check_mlflow("http://127.0.0.1:1")
    with pytest.raises(UserError, match="pip install mlflow-skinny"):
        RunLog(str(tmp_path), 0, mlflow_uri="http://127.0.0.1:1")
    RunLog(str(tmp_path), 0).close()  # a run that does not log to MLflow does not need it


def test_a_relative_mlflow_store_is_refused():
    with pytest.raises(UserError, match="give its full path"):
        check_mlflow("mlruns")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store of the real MLflow on disk."""
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return (tmp_path / "store").as_uri()


def test_mlflow_has_the_records_values_and_a_resumed_run_continues_it(tmp_path: Path, store: str):
    from mlflow import MlflowClient

    check_mlflow(store)
    run = tmp_path / "runs" / "seven"
    log = RunLog(str(run), 0, store, {"lr": 1e-5, "wa_start": None})
    log.step(epoch=1, step=20, values={"loss": 0.5, "mfu": None})
    log.epoch(epoch=1, step=25, values={"map": 0.25, "d_prime": math.inf})
    log.flush()
    log.step(epoch=2, step=40, values={"loss": 0.4})
    assert log._mlflow is not None
    log._mlflow._sending.result()
    log._mlflow.send()
    log._mlflow._sending.result()  # the run is interrupted here: only the store has step 40

    resumed = RunLog(str(run), 25, store, {"lr": 1e-5, "wa_start": None})
    resumed.step(epoch=2, step=40, values={"loss": 0.4})
    resumed.step(epoch=2, step=50, values={"loss": 0.3})
    resumed.epoch(epoch=2, step=50, values={"map": 0.5})
    resumed.close()

    client = MlflowClient(store)
    (found,) = client.search_runs([client.get_experiment_by_name("ast-ray").experiment_id])
    assert found.info.run_id == json.loads((run / "mlflow.json").read_text())["run_id"]
    assert (found.info.run_name, found.info.status) == ("seven", "FINISHED")
    assert found.data.params == {"lr": "1e-05", "wa_start": "None"}
    expected = defaultdict(list)
    for record in records(run):
        group = {"step": "train", "epoch": "eval"}[record["kind"]]
        for name in record.keys() - {"kind", "epoch", "step"}:
            if record[name] is not None:
                expected[f"{group}/{name}"].append((record["step"], record[name]))
    assert set(found.data.metrics) == set(expected) == {"train/loss", "eval/map"}
    for name, points in expected.items():
        history = client.get_metric_history(found.info.run_id, name)
        assert [(metric.step, metric.value) for metric in history] == points


def test_a_failed_run_is_failed_in_mlflow(tmp_path: Path, store: str):
    from mlflow import MlflowClient

    RunLog(str(tmp_path / "run"), 0, store).close(failed=True)
    run_id = json.loads((tmp_path / "run" / "mlflow.json").read_text())["run_id"]
    assert MlflowClient(store).get_run(run_id).info.status == "FAILED"


def test_a_deleted_mlflow_run_is_replaced_by_a_new_one(tmp_path: Path, store: str):
    from mlflow import MlflowClient

    RunLog(str(tmp_path / "run"), 0, store).close()
    first = json.loads((tmp_path / "run" / "mlflow.json").read_text())["run_id"]
    MlflowClient(store).delete_run(first)
    RunLog(str(tmp_path / "run"), 0, store).close()
    assert json.loads((tmp_path / "run" / "mlflow.json").read_text())["run_id"] != first


def test_a_store_that_fails_during_a_run_gives_a_warning(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    log = RunLog(str(tmp_path / "run"), 0, store)

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    assert log._mlflow is not None
    monkeypatch.setattr(log._mlflow._client, "log_batch", refuse)
    monkeypatch.setattr(log._mlflow._client, "set_terminated", refuse)
    monkeypatch.setattr(mlflow_log, "SEND_EVERY_S", 0.0)
    log.step(epoch=1, step=20, values={"loss": 0.5})
    log.close()
    assert "MLflow did not take 1 values" in caplog.text
    assert records(tmp_path / "run")[0]["loss"] == 0.5


def losses_in_mlflow(store: str, run: Path) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    run_id = json.loads((run / "mlflow.json").read_text())["run_id"]
    return [(metric.step, metric.value) for metric in MlflowClient(store).get_metric_history(run_id, "train/loss")]


def test_values_that_an_interrupted_run_did_not_send_to_mlflow_are_sent_on_resume(tmp_path: Path, store: str):
    log = RunLog(str(tmp_path / "run"), 0, store)
    log.step(epoch=1, step=20, values={"loss": 0.5})
    log.flush()
    log._mlflow._sending.result()
    log.step(epoch=1, step=40, values={"loss": 0.4})  # the run is interrupted before the next sending
    resumed = RunLog(str(tmp_path / "run"), 40, store)
    resumed.step(epoch=1, step=60, values={"loss": 0.3})
    resumed.close()
    assert losses_in_mlflow(store, tmp_path / "run") == [(20, 0.5), (40, 0.4), (60, 0.3)]


def test_values_that_mlflow_refused_are_sent_again_in_order(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(mlflow_log, "BATCH_METRICS", 1)
    log = RunLog(str(tmp_path / "run"), 0, store)
    log_batch, calls = log._mlflow._client.log_batch, []

    def refuse_second(*args: object, **kwargs: object) -> None:
        calls.append(kwargs)
        if len(calls) == 2:
            raise ConnectionError("no route to host")
        log_batch(*args, **kwargs)

    monkeypatch.setattr(log._mlflow._client, "log_batch", refuse_second)
    for step in (20, 40, 60):
        log.step(epoch=1, step=step, values={"loss": 1 / step})
    log.flush()
    log._mlflow._sending.result()
    log.step(epoch=1, step=80, values={"loss": 1 / 80})
    log.close()
    assert "MLflow did not take 2 values" in caplog.text
    assert losses_in_mlflow(store, tmp_path / "run") == [(step, 1 / step) for step in (20, 40, 60, 80)]
