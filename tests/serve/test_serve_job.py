"""The command serve.py: Ray Serve answers as tag.py does, and SIGTERM ends it."""

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import requests
import torch

from ast_core.checkpoints import ModelConfig, save_model
from ast_core.errors import ConfigError
from ast_core.labels import LabelVocabulary
from ast_core.models import create_model
from ast_core.recipe import Recipe
from jobs import serve
from pipeline.tag.events import EventSettings
from pipeline.tag.inputs import find_inputs
from pipeline.tag.predictor import read_members
from pipeline.tag.work import settings_for, tag_here
from tests import fakes
from tests.ast_core import small
from tests.conftest import ROOT

LABELS = LabelVocabulary.from_names(["a", "b", "c"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    recipe = Recipe(model="linear", hidden=64, n_layers=1, input_tdim=100, label_dim=3, timem=0, freqm=0)
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, create_model(**recipe.model_args()).state_dict(), ModelConfig(recipe, small.NORM, LABELS))
    return str(folder)


@pytest.fixture(scope="module")
def server(checkpoint: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "jobs/serve.py", "--checkpoint", checkpoint, "--port", str(port), "--num-cpus", "2"]
    command += ["--window-s", "0.5", "--per-second", "0", "--max-mb", "1"]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert running.stdout is not None
        assert any("serving" in line for line in running.stdout), "it ended"
        yield f"http://127.0.0.1:{port}", running
    finally:
        running.kill()
        running.wait()


@pytest.mark.slow
def test_the_service_answers_as_tag_py_and_ends_with_sigterm(
    server: tuple[str, subprocess.Popen[str]], checkpoint: str, tmp_path: Path
):
    url, running = server
    members = read_members([checkpoint])
    settings = settings_for(members, np.full(3, 0.5), window_s=0.5, hop_s=None, events=EventSettings())
    paths = [
        fakes.write_media(
            tmp_path / f"r{i}.{suffix}", fakes.noise(2.0 + i, seed=i) + fakes.tone(400.0 * (i + 1), 2.0 + i)
        )
        for i, suffix in enumerate(("wav", "ogg", "mp3", "flac"))
    ]
    expected = [tagged for _, tagged in tag_here(find_inputs([str(path) for path in paths]), members, settings, "cpu")]
    with ThreadPoolExecutor(8) as pool:
        bodies = [*(path.read_bytes() for path in paths), b"not audio", b"x" * ((1 << 20) + 1)]
        answers = list(pool.map(lambda body: requests.post(f"{url}/tag?windows=1", data=body, timeout=60), bodies))
    for answer, tagged in zip(answers, expected, strict=False):
        windows = answer.json()["windows"]
        assert [one["start_s"] for one in windows] == pytest.approx(tagged.start_s, abs=1e-3)
        found = [[{c["label"]: c["score"] for c in one["classes"]}[name] for name in LABELS.names] for one in windows]
        np.testing.assert_allclose(found, tagged.scores_WC, atol=2e-3)
    refused = [(answer.status_code, answer.json()["error"]["reason"]) for answer in answers[4:]]
    assert refused == [(422, "not_audio"), (413, "too_large")]
    assert requests.get(f"{url}/health", timeout=60).json()["status"] == "ok"
    assert "What do you hear?" in requests.get(url, timeout=60).text
    assert requests.get(f"{url}/health", headers={"Host": "evil.example"}, timeout=60).status_code == 403
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 143


def test_options_that_are_not_allowed_are_refused():
    for given, said in (
        (["--per-second", "-1"], r"--per-second is -1; use 0 \(no limit\) to 1,000,000"),
        (["--port", "70000"], "--port is 70000; use more than 0 and at most 65535"),
        (["--max-mb", "0"], "--max-mb is 0.0; use more than 0 and at most 4096"),
    ):
        with pytest.raises(ConfigError, match=said):
            serve.main(["--checkpoint", "c", *given])


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"^cannot listen on 127.0.0.1, port {port}: .*; give another --port"):
            serve.main(["--checkpoint", "c", "--port", str(port)])


def test_a_server_for_this_machine_has_its_names():
    assert set(serve.own_names("127.0.0.1")) == {"127.0.0.1", "localhost", "::1"}
    assert serve.own_names("0.0.0.0") == ()
    assert serve.own_names("192.168.1.5") == ()
