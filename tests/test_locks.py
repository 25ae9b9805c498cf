"""Only one job at a time writes to an output, on one machine and in one cluster."""

import errno
import fcntl
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest
import ray

from ast_core.errors import DataError
from pipeline.locks import exclusive

HOLD = """
import sys
from pipeline.locks import exclusive
with exclusive("prepare", sys.argv[1]):
    print("held", flush=True)
    input()
"""


def test_a_local_output_is_locked_until_its_job_ends_or_crashes(tmp_path: Path):
    output = str(tmp_path / "data")
    for ending in (subprocess.Popen.kill, lambda holder: holder.communicate("\n")):
        with subprocess.Popen(
            [sys.executable, "-c", HOLD, output], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(DataError, match="another job is preparing"), exclusive("prepare", output):
                pass
            ending(holder)
            holder.wait()
        with exclusive("prepare", output):
            pass
    assert not list((tmp_path / "data").iterdir())


def test_the_lock_is_on_a_file_which_network_file_systems_share(tmp_path: Path):
    file = tmp_path / "_lock" / "lock"
    with exclusive("prepare", str(tmp_path)), file.open("rb+") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    file.parent.mkdir()
    file.touch()  # as a killed job leaves it
    with file.open("rb+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another job is preparing"), exclusive("prepare", str(tmp_path)):
            pass
    with exclusive("prepare", str(tmp_path)):
        pass


def test_one_of_many_that_come_and_go_at_once_has_the_lock(tmp_path: Path):
    """Each one that ends removes the file which another one may be opening."""
    inside: list[int] = []

    def come_and_go(number: int) -> int:
        had = 0
        while had < 50:
            try:
                with exclusive("prepare", str(tmp_path)):
                    inside.append(number)
                    time.sleep(0.001)  # lets another thread in
                    assert inside == [number]
                    inside.remove(number)
                    had += 1
            except DataError as err:
                if "another job is preparing" not in str(err):
                    raise
        return had

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(come_and_go, range(4))) == [50] * 4
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    with exclusive("prepare", str(tmp_path)):
        pass
    assert "this file system has no locks, so other jobs are not kept from it" in capsys.readouterr().out


def test_an_output_that_is_a_file_is_refused(tmp_path: Path):
    (tmp_path / "data").write_text("")
    with (
        pytest.raises(DataError, match="data is a file or below one; give a folder"),
        exclusive("prepare", str(tmp_path / "data")),
    ):
        pass


def test_a_remote_output_is_locked_against_other_jobs_of_the_cluster(local_ray: None):
    with exclusive("prepare", "s3://bucket/data"):
        for spelling in ("s3://bucket/data", "s3://bucket/data/", "s3://bucket/data?region=eu-west-1"):
            with (
                pytest.raises(DataError, match="another job is preparing s3://bucket/data"),
                exclusive("prepare", spelling),
            ):
                pass
        with exclusive("prepare", "s3://bucket/other"), exclusive("train", "s3://bucket/data"):
            pass
    with exclusive("prepare", "s3://bucket/data"):
        pass


def test_a_folder_is_locked_in_the_cluster_too_unless_this_process_has_started_ray(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def named() -> list[str]:
        return [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]

    name = f"prepare local:{tmp_path}"
    with exclusive("prepare", str(tmp_path)):
        assert name not in named()
    monkeypatch.setattr(ray._private.worker._global_node, "head", False)  # as in a process that has joined Ray
    with exclusive("prepare", str(tmp_path)):
        assert name in named()
