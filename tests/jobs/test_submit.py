"""The two commands of the README on a real cluster: `ray start --head` with a token, and `ray job submit`."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import psutil
import pytest
import requests

from jobs.demo.sounds_dataset import build_dataset
from pipeline.dataset import PreparedDataset
from tests import fakes
from tests.ast_core import small
from tests.conftest import SHARED, OwnFolders
from tests.fakes import LINEAR_RECIPE
from tests.ports import free_ports

ROOT = Path(__file__).parents[2]
ESC10 = SHARED / "data" / "esc10"
RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True)
class Cluster:
    env: dict[str, str]

    def submit(self, *command: str, options: Sequence[str] = ()) -> str:
        """Run `ray job submit --working-dir . -- python …` in the project's root. Returns what it printed."""
        return self.job("submit", *options, "--working-dir", ".", "--", "python", *command)

    def job(self, *words: str) -> str:
        """Run `ray job …`. Returns what it printed."""
        for _ in range(12):
            done = subprocess.run(
                [RAY, "job", *words],
                cwd=ROOT,
                env=self.env,
                capture_output=True,
                text=True,
                timeout=600,
                check=False,
            )
            # The head node waits 10 s for its agent, which takes longer to start on a busy machine.
            if "No available agent to submit job" not in done.stderr:
                break
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def answers(url: str) -> bool:
    try:
        urlopen(url, timeout=10).close()
    except HTTPError:
        return True  # it asks for the token
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def cluster(own_folders: OwnFolders) -> Iterator[Cluster]:
    """A head node with its own ports, folder and home, where its token is. It is ended by its process group."""
    with tempfile.TemporaryDirectory(prefix="head", dir=own_folders.root, ignore_cleanup_errors=True) as folder:
        port, client, dashboard = free_ports(3)
        env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        env |= {"HOME": folder, "PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "RAY_AUTH_MODE": "token"}
        subprocess.run([RAY, "get-auth-token", "--generate"], env=env, capture_output=True, check=True)
        start = [RAY, "start", "--head", "--block", "--num-cpus=2", f"--port={port}", f"--temp-dir={folder}/ray"]
        start += [f"--ray-client-server-port={client}", f"--dashboard-port={dashboard}", "--node-ip-address=127.0.0.1"]
        start += ["--dashboard-agent-listen-port=0", "--disable-usage-stats"]
        with open(Path(folder) / "head.log", "wb") as log:
            head = subprocess.Popen(start, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            client_env = env | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
            while not answers(f"http://127.0.0.1:{dashboard}/api/jobs/"):
                assert head.poll() is None, (Path(folder) / "head.log").read_text()
                time.sleep(0.2)
            yield Cluster(client_env)
        finally:
            # A head node takes half a minute to end by itself.
            started = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
            for process in started:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            head.kill()
            head.wait()


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments for a source: real field recordings if they exist, else the demo's sounds."""
    if ESC10.exists():
        return ["--esc50", str(ESC10), "--limit", "10"]
    made = build_dataset(tmp_path_factory.mktemp("sounds"), num_train=40, num_eval=16, seed=1)
    return ["--segments", str(made.train_list), str(made.eval_list), "--audio-dir", str(made.media_dir)]


@pytest.mark.timeout(1200)
@pytest.mark.slow  # `make test-machines` submits both jobs to two machines
def test_both_jobs_run_as_the_readme_submits_them(cluster: Cluster, sounds: list[str], tmp_path: Path):
    data, run = str(tmp_path / "data"), str(tmp_path / "run")
    printed = cluster.submit("jobs/prepare_audioset.py", *sounds, "--output", data)
    opened = PreparedDataset.open(data)
    assert all(split in printed for split in opened.splits)
    train, evaluation = ("fold2", "fold1") if "fold1" in opened.splits else ("train", "eval")
    small = [word for key, value in LINEAR_RECIPE.items() for word in (f"--{key}", value)]
    small += ["--epochs", "1", "--batch_size", "4", "--loss", "BCE"]
    splits = ["--train-splits", train, "--eval-splits", evaluation]
    printed = cluster.submit(
        *("jobs/train.py", "--recipe", "esc10", "--data", data, *splits, "--output", run, "--num-workers", "1", *small)
    )
    summary = json.loads(Path(run, "summary.json").read_text())
    assert summary["world_size"] == 1  # other tests train on two
    assert f"mAP {summary['map']:.4f}" in printed
    assert Path(run, "best", "model.safetensors").stat().st_size > 10_000


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_a_submitted_service_answers_until_the_job_is_stopped(cluster: Cluster, tmp_path: Path):
    checkpoint, (port,) = small.save_linear_tagger(tmp_path / "model"), free_ports(1)
    cluster.submit(
        *("jobs/serve.py", "--checkpoint", checkpoint, "--port", str(port)),
        options=["--no-wait", "--submission-id", "service"],
    )
    url = f"http://127.0.0.1:{port}"
    while not answers(f"{url}/health"):
        assert "FAILED" not in cluster.job("status", "service"), cluster.job("logs", "service")
        time.sleep(0.5)
    sound = fakes.write_media(tmp_path / "r.ogg", fakes.noise(2.0)).read_bytes()
    answer = requests.post(f"{url}/tag", data=sound, timeout=60)
    assert answer.status_code == 200
    assert {one["label"] for one in answer.json()["classes"]} == {"a", "b", "c"}
    cluster.job("stop", "service")
    assert "Job 'service' was stopped" in cluster.job("status", "service")
    while answers(f"{url}/health"):
        time.sleep(0.2)
