"""If Ray cannot be joined or started, one line names the setting and the remedy."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import ray
from ray._private import services

from ast_core.errors import ConfigError, UserError
from jobs import ray_session as session
from jobs.ray_session import _join


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        yield server


def test_case_5_address_of_a_cluster_that_is_gone(listener: socket.socket, monkeypatch: pytest.MonkeyPatch):
    address = f"127.0.0.1:{listener.getsockname()[1]}"  # bound, but not listening
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError) as caught:
        _join(address)
    assert str(caught.value) == (
        f"{address} (RAY_ADDRESS) does not answer (Connection refused); start the cluster, or unset RAY_ADDRESS "
        "to start Ray on this machine"
    )
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(UserError, match="or leave out --address to start Ray on this machine"):
        _join(address)


def test_case_5_address_of_a_server_that_is_no_cluster(listener: socket.socket, monkeypatch: pytest.MonkeyPatch):
    """`ray.init` would wait forever."""
    listener.listen()
    monkeypatch.setattr(session, "ANSWER_S", 4.0)
    with pytest.raises(UserError, match="is no Ray cluster, or does not answer; start the cluster, or leave out"):
        _join(f"127.0.0.1:{listener.getsockname()[1]}")


@pytest.mark.parametrize(
    "address",
    ["http://127.0.0.1:8265", "ray://127.0.0.1:10001", "head", ":6379", "head:", "head:70000", "head:x", "a b:1"],
)
def test_case_6_malformed_address(address: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match="which is no cluster's address: use HOST:PORT") as caught:
        _join(address)
    assert ("dashboard" in str(caught.value)) == ("://" in address)


@pytest.mark.parametrize(
    ("running", "message"),
    [
        (set(), "--address is auto, and no Ray cluster runs on this machine; start one, or leave out"),
        ({"10.0.0.1:1", "10.0.0.1:2"}, "several Ray clusters run here; name one: 10.0.0.1:1, 10.0.0.1:2"),
    ],
)
def test_auto_requires_exactly_one_cluster(running: set[str], message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _: None)
    monkeypatch.setattr(services, "find_gcs_addresses", lambda: running)
    with pytest.raises(UserError, match=message):
        _join("auto")


def test_case_20_long_temporary_folder_is_refused_with_the_remedy(tmp_path: Path):
    folder = tmp_path / ("x" * 90)
    folder.mkdir()
    code = "from jobs.common import run_job; from jobs.ray_session import ray_session\n"
    code += "raise SystemExit(run_job(lambda _: ray_session('local').__enter__()))"
    job = subprocess.run(
        [sys.executable, "-c", code],
        env={key: value for key, value in os.environ.items() if key != "RAY_TMPDIR"} | {"TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert job.returncode == 2
    assert job.stderr.startswith("error: Ray does not start on this machine: ")
    assert job.stderr.endswith("set RAY_TMPDIR or TMPDIR to a shorter folder, such as /tmp\n")
    assert job.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("in_container", "allowed", "asked", "expected"), [(64, 8, None, 8), (2, 64, None, 2), (64, 8, 3, 3)]
)
def test_ray_gets_the_cpus_that_this_process_may_use(
    in_container: int, allowed: int, asked: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipeline.cluster.get_num_cpus", lambda **_: in_container)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(allowed)), raising=False)
    monkeypatch.setattr(session, "OF_OWN_RAY", {})
    monkeypatch.setattr(ray, "init", init := MagicMock())
    session._start(asked)
    assert init.call_args.kwargs["num_cpus"] == expected
