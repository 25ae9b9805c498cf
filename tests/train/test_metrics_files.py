"""metrics.jsonl and TensorBoard can be read while training runs, and uploads grow linearly with the records."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ast_core.errors import DataError
from pipeline import storage
from pipeline.train import metrics_log
from pipeline.train.metrics_files import MetricsFile, has_records, read_records
from pipeline.train.metrics_log import RunLog
from tests.s3 import S3Server

VALUES = {"loss": 0.5, "lr": 1e-5, "clips_per_s": 12.5, "data_wait_share": 0.01, "memory_gb": 1.5}


def record(step: int, kind: str = "step") -> dict[str, Any]:
    return {"kind": kind, "epoch": 1, "step": step}


def steps_of(run: str | Path) -> list[int]:
    return [one["step"] for one in read_records(str(run))]


def test_c22_a_local_run_can_be_read_while_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics_log, "LOCAL_FLUSH_S", 0)
    log = RunLog(str(tmp_path), 0)
    for step in (20, 40):
        log.step(epoch=1, step=step, values=VALUES)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["step"] == step
    log._board.flush()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [20, 40]
    log.close()


def test_a_resumed_run_drops_later_records_and_an_incomplete_line(tmp_path: Path):
    first = MetricsFile(str(tmp_path), 0)
    for step in (20, 40, 60):
        first.add(record(step))
    first.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "step", "ep')
    assert steps_of(tmp_path) == [20, 40, 60]
    resumed = MetricsFile(str(tmp_path), 40)
    assert steps_of(tmp_path) == [20, 40]
    resumed.add(record(60))
    resumed.close()
    assert steps_of(tmp_path) == [20, 40, 60]


def test_a_damaged_line_is_named(tmp_path: Path):
    good = json.dumps(record(1))
    (tmp_path / "metrics.jsonl").write_text(f'{good}\n{{"kind\n{good}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl: line 2 is damaged; restore the file"):
        read_records(str(tmp_path))


def test_a_run_on_object_storage_can_be_read_after_each_flush_and_resumed(s3: S3Server):
    run = s3.uri("metrics", "run")
    assert not has_records(run)
    file = MetricsFile(run, 0)
    for step in range(1, 8):
        file.add(record(step))
        file.flush()
        assert steps_of(run) == list(range(1, step + 1))
    assert storage.list_files(f"{run}/metrics")
    resumed = MetricsFile(run, 5)  # after a crash, from a checkpoint at step 5
    assert steps_of(run) == [1, 2, 3, 4, 5]
    for step in (6, 7, 8):
        resumed.add(record(step, "epoch"))
        resumed.flush()
    resumed.close()
    assert steps_of(run) == list(range(1, 9))
    assert not storage.list_files(f"{run}/metrics")
    assert len(storage.read_bytes(f"{run}/metrics.jsonl").splitlines()) == 8


def test_a_part_left_by_a_crash_adds_nothing(s3: S3Server):
    run = s3.uri("metrics", "killed")
    lines = [json.dumps(record(step)) for step in (1, 2, 3)]
    storage.write_bytes(f"{run}/metrics.jsonl", "".join(f"{line}\n" for line in lines).encode())
    storage.write_bytes(f"{run}/metrics/000000001.jsonl", f"{lines[1]}\n".encode())
    assert steps_of(run) == [1, 2, 3]


def test_c22_uploaded_bytes_grow_linearly_with_the_records(s3: S3Server, monkeypatch: pytest.MonkeyPatch):
    """Of ten flushes of equally many records, the second five upload about as many bytes as the first five."""
    sent: list[int] = []

    def counted(write: Any) -> Any:
        def put(uri: str, data: bytes) -> None:
            sent.append(len(data))
            write(uri, data)

        return put

    monkeypatch.setattr(storage, "write_bytes", counted(storage.write_bytes))
    run = s3.uri("metrics", "linear")
    log, by_flush, weight = RunLog(run, 0), [], 0
    events = 0
    for flush in range(10):
        for i in range(50):
            log.step(epoch=1, step=50 * flush + i, values=VALUES)
        sent.clear()
        log.flush()
        uploaded = sizes(f"{run}/tensorboard")
        by_flush.append(sum(sent) + sum(uploaded.values()) - events)
        assert len(uploaded) == flush + 1  # each file once
        events = sum(uploaded.values())
    weight = len(storage.read_bytes(f"{run}/metrics.jsonl")) / len(read_whole(run))
    log.close()
    assert sum(by_flush) < 500 * weight * 4 + events
    assert len(read_records(run)) == 500


def sizes(folder: str) -> Mapping[str, int]:
    return {file: len(storage.read_bytes(file)) for file in storage.list_files(folder)}


def read_whole(run: str) -> list[bytes]:
    return storage.read_bytes(f"{run}/metrics.jsonl").splitlines()


def test_records_are_uploaded_between_checkpoints_and_an_outage_is_a_warning(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(metrics_log, "REMOTE_FLUSH_S", -1.0)
    run = s3.uri("metrics", "often")
    log = RunLog(run, 0)
    log.step(epoch=1, step=20, values=VALUES)
    assert steps_of(run) == [20]
    with monkeypatch.context() as away:
        away.setattr(MetricsFile, "flush", Outage())
        log.step(epoch=1, step=40, values=VALUES)
    assert "the records of the last minutes could not be written yet: away" in caplog.text
    log.step(epoch=1, step=60, values=VALUES)
    assert steps_of(run) == [20, 40, 60]
    log.close()


class Outage:
    def __call__(self, *_: object) -> None:
        raise OSError("away")
