"""Tagging on Ray: readers as tasks, and a worker that dies."""

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import ray
import torch

from ast_core.errors import UserError
from pipeline.tag.inputs import find_inputs
from pipeline.tag.on_ray import remote_pieces, run_chunks, workers_of_cluster
from pipeline.tag.plan import tag
from pipeline.tag.predictor import Member
from pipeline.tag.progress import Progress
from pipeline.tag.work import Workers, settings_for
from tests.tag import stub


class SlowTagger(stub.BandTagger):
    def outputs(self, fbank_BTM: torch.Tensor) -> Any:
        time.sleep(0.5)
        return super().outputs(fbank_BTM)


class TooLarge(stub.BandTagger):
    """Its weights do not fit into the memory of the GPU, or its activations do not."""

    def __init__(self, *, weights_fit: bool) -> None:
        super().__init__()
        self.weights_fit = weights_fit

    def to(self, *args: Any, **options: Any) -> Any:
        if not self.weights_fit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().to(*args, **options)

    def outputs(self, fbank_BTM: torch.Tensor) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")


def scores(output: Path) -> list[dict[str, Any]]:
    return sorted(pq.read_table(output / "scores").to_pylist(), key=lambda row: (row["recording"], row["start_s"]))


def run(folder: Path, output: Path, member: Member, workers: Workers) -> None:
    settings = settings_for([member], np.full(3, 0.5), window_s=None, hop_s=None)
    chunks = None if workers.number == 0 else run_chunks
    tag(find_inputs([str(folder)]), [member], settings, str(output), workers, run_chunks=chunks, say=lambda _: None)


def test_workers_fit_on_the_nodes_of_a_cluster(monkeypatch: pytest.MonkeyPatch):
    def workers(*nodes: dict[str, float], cpus: int = 4, gpus: float = 1.0) -> Workers:
        monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes])
        given = {"wanted": "auto", "is_local": False, "number": None, "readers": None, "batch_windows": 32}
        return workers_of_cluster(cpus=cpus, gpus=gpus, **given)

    for nodes, cpus, number in (
        (({"CPU": 16.0},), 4, 4),
        (({"CPU": 2.0}, {"CPU": 2.0}, {"CPU": 2.0}), 2, 3),  # no node has room for four
        (({"CPU": 0.0}, {"CPU": 6.0}, {"CPU": 2.0}), 4, 1),
        (({"memory": 1.0},), 1, 1),
    ):
        found = workers(*nodes)
        assert (found.device, found.cpus, found.number) == ("cpu", cpus, number)
    on_gpus = workers({"CPU": 8.0, "GPU": 2.0}, {"GPU": 1.0}, gpus=0.6)
    assert (on_gpus.device, on_gpus.number) == ("cuda", 3)  # two of them do not share a GPU
    assert workers({"GPU": 2.0}, gpus=0.5).number == 4


def test_a_lost_count_does_not_end_the_work():
    def lost() -> Any:
        raise ray.exceptions.RayActorError

    said: list[str] = []
    with Progress(3, said.append, lost):
        pass
    assert said == []


@pytest.mark.slow
def test_readers_on_other_cpus_give_the_same_results(local_ray: None, tmp_path: Path):
    folder = tmp_path / "in"
    stub.write_recordings(folder, 4)
    (folder / "bad.wav").write_text("not audio")
    run(folder, tmp_path / "here", stub.member(), Workers(number=0, num_readers=2))
    workers = Workers(number=1, cpus=0.1, num_readers=2, read=remote_pieces)
    run(folder, tmp_path / "there", stub.member(), workers)
    assert scores(tmp_path / "there") == scores(tmp_path / "here")
    (failure,) = pq.read_table(tmp_path / "there" / "failures.parquet").to_pylist()
    assert failure["reason"] == "not_audio"


@pytest.mark.slow
def test_after_the_death_of_a_worker_each_recording_is_there_once(local_ray: None, tmp_path: Path):
    folder = tmp_path / "in"
    stub.write_recordings(folder, 12)
    run(folder, tmp_path / "whole", stub.member(), Workers(number=0))
    slow = replace(stub.member(), model=SlowTagger().eval())
    killed: list[int] = []

    def kill() -> None:
        while not killed:
            time.sleep(0.2)
            if len(list((tmp_path / "out").glob("scores/*.parquet"))) < 1:
                continue
            for process in psutil.process_iter(["cmdline"]):
                if "TagChunks" in " ".join(process.info["cmdline"] or ()):
                    process.kill()
                    killed.append(process.pid)
                    return

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    run(folder, tmp_path / "out", slow, Workers(number=1, cpus=0.5))
    thread.join(1)
    assert killed
    assert scores(tmp_path / "out") == scores(tmp_path / "whole")


@pytest.mark.parametrize("weights_fit", [pytest.param(True, marks=pytest.mark.slow), False])
def test_too_little_memory_of_a_worker_is_a_line(local_ray: None, tmp_path: Path, weights_fit: bool):
    stub.write_recordings(tmp_path / "in", 1)
    member = replace(stub.member(), model=TooLarge(weights_fit=weights_fit).eval())
    needed = r"\d+ windows; lower --batch-windows, or" if weights_fit else "the model;"
    with pytest.raises(UserError, match=rf"^the GPU has too little memory for {needed} raise --gpus-per-worker, or "):
        run(tmp_path / "in", tmp_path / "out", member, Workers(number=1, cpus=0.1))
