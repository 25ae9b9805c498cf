"""The command serve.py: Ray Serve answers as tag.py does, and SIGTERM ends it."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import numpy as np
import psutil
import pytest
import requests

from ast_core.errors import ConfigError
from jobs import serve
from pipeline.tag.events import EventSettings
from pipeline.tag.inputs import find_inputs
from pipeline.tag.predictor import labels_of, read_members
from pipeline.tag.work import settings_for, tag_here
from tests import fakes
from tests.ast_core import small
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small.save_linear_tagger(tmp_path_factory.mktemp("model"))


@contextmanager
def serving(checkpoint: str, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of a service in a process of its own, and the process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "jobs/serve.py", "--checkpoint", checkpoint, "--port", str(port), "--per-second", "0"]
    running = subprocess.Popen(
        [*command, *options], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert running.stdout is not None
        assert any("serving" in line for line in running.stdout), "it ended"
        yield f"http://127.0.0.1:{port}", running
    finally:
        running.terminate()
        running.wait()


@pytest.fixture(scope="module")
def server(checkpoint: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    with serving(checkpoint, "--num-cpus", "2", "--window-s", "0.5", "--max-mb", "1") as served:
        yield served


@pytest.mark.slow
def test_the_service_answers_as_tag_py_and_ends_with_sigterm(
    server: tuple[str, subprocess.Popen[str]], checkpoint: str, tmp_path: Path
):
    url, running = server
    members = read_members([checkpoint])
    names = labels_of(members).names
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
        found = [[{c["label"]: c["score"] for c in one["classes"]}[name] for name in names] for one in windows]
        np.testing.assert_allclose(found, tagged.scores_WC, atol=2e-3)
    refused = [(answer.status_code, answer.json()["error"]["reason"]) for answer in answers[4:]]
    assert refused == [(422, "not_audio"), (413, "too_large")]
    assert requests.get(f"{url}/health", timeout=60).json()["status"] == "ok"
    assert "What do you hear?" in requests.get(url, timeout=60).text
    assert requests.get(f"{url}/health", headers={"Host": "evil.example"}, timeout=60).status_code == 403
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 143


@pytest.mark.slow
def test_more_readers_start_while_requests_wait(checkpoint: str, tmp_path: Path):
    def num_readers() -> int:
        started = psutil.Process(running.pid).children(recursive=True)
        return sum("ServeReplica:ast-ray:Reader" in "".join(process.cmdline()) for process in started)

    def post(_: int) -> list[int]:
        statuses = []
        while not is_over.is_set():
            statuses.append(requests.post(f"{url}/tag", data=body, timeout=120).status_code)
        return statuses

    body, is_over = fakes.write_media(tmp_path / "r.flac", fakes.noise(20.0)).read_bytes(), Event()
    options = ["--num-cpus", "4", "--max-replicas", "2"]
    with serving(checkpoint, *options) as (url, running), ThreadPoolExecutor(12) as pool:
        assert num_readers() == 1
        posts = [pool.submit(post, i) for i in range(12)]
        try:
            while num_readers() < 2:
                assert running.poll() is None
                time.sleep(0.5)
        finally:
            is_over.set()
        assert {status for statuses in posts for status in statuses.result()} == {200}
        running.terminate()
        assert running.communicate(timeout=60)[0] == "stopped\n"


def test_options_that_are_not_allowed_are_refused():
    for given, said in (
        (["--per-second", "-1"], r"--per-second is -1; use 0 \(no limit\) to 1,000,000"),
        (["--port", "70000"], "--port is 70000; use more than 0 and at most 65535"),
        (["--max-mb", "0"], "--max-mb is 0.0; use more than 0 and at most 4096"),
        (["--allow-origin", "*"], "would let every page use the server; name the sites"),
        (
            ["--allow-origin", "https://a.org", "tags"],
            "--allow-origin is tags; .* without a path: https://tags.example.org",
        ),
        (["--allow-origin", "https://Tags.org:443/x"], "without a path: https://tags.org$"),
        (["--allow-origin", "http://[::1]:9000/"], r"without a path: http://\[::1\]:9000$"),
        (["--allow-origin", "https://tags.org:x"], "--allow-origin is https://tags.org:x; "),
        (["c2", "--browser-model", "m.onnx"], "--browser-model is one model, and the scores of several"),
        (["--browser-model", "m.onnx"], "onnxruntime-web, which has not been fetched; add --fetch-web-runtime"),
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


@pytest.mark.parametrize(("option", "is_said"), [([], True), (["--raw-scores"], False)])
def test_raw_scores_are_not_said_to_lack_a_calibration(
    checkpoint: str,
    option: list[str],
    is_said: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def stop(*_: object) -> None:
        raise ConfigError("before Ray starts")

    monkeypatch.setattr(serve, "_page_files", stop)
    monkeypatch.setattr(serve, "_check_port", lambda *_: None)
    with pytest.raises(ConfigError, match="before Ray starts"):
        serve.main(["--checkpoint", checkpoint, *option])
    assert ("has no calibration.json" in capsys.readouterr().out) is is_said
