"""Jobs on a cluster of two machines with their own networks and disks, submitted from a third one."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline import dataset, storage
from pipeline.dataset import PreparedDataset
from tests import fakes, netcluster
from tests.netcluster import RayCluster
from tests.s3 import S3Server, serve

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(netcluster.unavailable() is not None, reason=str(netcluster.unavailable())),
    pytest.mark.timeout(900),
]

STOP_S = 20.0
"""Longest time from `ray job stop` to the end of the job. Ray itself waits 3 s before it kills a job."""

RECIPE = fakes.LINEAR_RECIPE | {"norm_stats": "data", "batch_size": "8", "wa_start": "1", "wa_end": "1"}


@dataclass(frozen=True)
class Site:
    cluster: RayCluster
    s3: S3Server
    """By its address on this machine."""
    media: Path
    """A folder that all machines see."""

    def make_list(self, name: str, num_clips: int) -> str:
        """A manifest of tones of half a second, one in four for evaluation."""
        rows = ["path,labels,split"]
        for i in range(num_clips):
            path = self.media / f"{i:04}.wav"
            if not path.exists():
                fakes.write_media(path, fakes.tone(300.0 * 2 ** (i % 4), 0.5) + fakes.noise(0.5, seed=i))
            rows.append(f"{path.name},tone {i % 4},{'eval' if i // 4 % 4 == 3 else 'train'}")
        (self.media / name).write_text("\n".join(rows) + "\n")
        return str(self.media / name)

    def run(self, submission_id: str, *command: str) -> str:
        """Submit a job and wait for it. Returns what `ray job submit` printed."""
        submitting = self.cluster.submit(submission_id, "python", *command)
        printed, _ = submitting.communicate(timeout=600)
        assert submitting.returncode == 0, printed
        return printed

    def prepare(self, listed: str, output: str) -> list[str]:
        return ["jobs/prepare_audioset.py", "--manifest", listed, "--output", output]

    def train(self, data: str, run: str, *, epochs: int) -> list[str]:
        argv = ["jobs/train.py", "--recipe", "audioset-full", "--data", data, "--output", run]
        argv += ["--train-splits", "train", "--eval-splits", "eval", "--num-workers", "2", "--cpus-per-worker", "1"]
        argv += ["--log-every-steps", "1", "--checkpoint-every-s", "1"]
        return [
            *argv,
            *(word for key, value in (RECIPE | {"epochs": str(epochs)}).items() for word in (f"--{key}", value)),
        ]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    media = tmp_path_factory.mktemp("media")
    with netcluster.network(shared=[media]) as net:
        bucket = net.add("bucket")
        listening = bucket.inside.on_network(lambda: socket.create_server(("0.0.0.0", 0)))
        with serve(listening) as s3, pytest.MonkeyPatch.context() as patch:
            for name, value in s3.env.items():
                patch.setenv(name, value)
            env = s3.env | {"AWS_ENDPOINT_URL": f"http://{bucket.address}:{listening.getsockname()[1]}"}
            with netcluster.ray_cluster(net, 2, env=env) as cluster:
                yield Site(cluster, s3, media)


def clips(data: str) -> list[str]:
    opened = PreparedDataset.open(data)
    return sorted(clip for split in opened.splits for clip in opened.index(split)["clip_id"].to_pylist())


def test_both_jobs_on_two_machines_with_output_on_s3(site: Site):
    data, run = site.s3.uri("smoke", "data"), site.s3.uri("smoke", "run")
    listed = site.make_list("smoke.csv", 32)
    site.run("prepare", *site.prepare(listed, data))
    assert clips(data) == [f"{i:04}" for i in range(32)]
    printed = site.run("train", *site.train(data, run, epochs=2))
    summary = storage.read_json(storage.join(run, "summary.json"))
    assert summary["world_size"] == 2
    assert f"mAP {summary['map']:.4f}" in printed
    assert f"ip={site.cluster.nodes()[1]}" in printed  # one of the ranks was on the other machine


def test_a_model_is_evaluated_and_tags_on_two_machines(site: Site):
    data, run = site.s3.uri("used", "data"), site.s3.uri("used", "run")
    fakes.write_data(data)
    site.run("fit", *site.train(data, run, epochs=1))
    site.make_list("used.csv", 8)
    site.run("evaluate", "jobs/evaluate.py", "--checkpoint", f"{run}/best", "--data", data, "--split", "eval")
    tags = site.s3.uri("used", "tags")
    site.run("tag", "jobs/tag.py", "--checkpoint", f"{run}/best", "--input", str(site.media), "--output", tags)
    assert storage.read_json(storage.join(tags, "tags.json"))


def stored_clips(data: str) -> list[str]:
    """The clips in all shards, as often as they are there."""
    shards = [uri for uri in storage.list_files(data, suffix=".parquet", recursive=True) if "/shards/" in uri]
    return sorted(clip for shard in shards for clip in dataset.read_table(shard)["clip_id"].to_pylist())


def logged_steps(run: str) -> list[int]:
    lines = storage.read_bytes(storage.join(run, "metrics.jsonl")).splitlines()
    return [record["step"] for record in map(json.loads, lines) if record["kind"] == "step"]


def stop_midway(site: Site, submission_id: str, command: list[str], is_midway: Callable[[], bool]) -> None:
    """Submit a job, kill the terminal's process while the job works, and stop the job when it is midway."""
    cluster = site.cluster
    terminal = cluster.submit(submission_id, "python", *command)
    cluster.wait_for_status(submission_id, "RUNNING")
    terminal.kill()
    terminal.communicate()
    while not is_midway():
        assert cluster.job(submission_id)["status"] == "RUNNING"
        time.sleep(0.1)
    began_s = time.monotonic()
    cluster.stop(submission_id)
    assert time.monotonic() - began_s < STOP_S
    assert cluster.job(submission_id)["status"] == "STOPPED"


def test_preparation_outlives_its_terminal_and_resumes_after_a_stop(site: Site):
    data = site.s3.uri("stopped", "data")
    command = site.prepare(site.make_list("stopped.csv", 1500), data)
    stop_midway(site, "prepare-1", command, lambda: len(stored_clips(data)) > 0)
    before = stored_clips(data)
    site.run("prepare-2", *command)
    assert stored_clips(data) == clips(data) == [f"{i:04}" for i in range(1500)]
    assert 0 < len(before) < 1500


def test_training_outlives_its_terminal_and_resumes_after_a_stop(site: Site):
    data, run = site.s3.uri("stopped", "tones"), site.s3.uri("stopped", "run")
    fakes.write_data(data)
    command, first = site.train(data, run, epochs=24), storage.join(run, "checkpoints")
    stop_midway(site, "train-1", command, lambda: len(storage.list_files(first, suffix="state.pt", recursive=True)) > 1)
    site.run("train-2", *command)
    assert logged_steps(run) == list(range(1, 24 * 6 + 1))
