"""Fixtures: one Ray for all tests of a process, folders that only this process uses, and shared data."""

import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
import torch

from jobs.ray_session import OF_OWN_RAY
from tests import fakes
from tests.s3 import S3Server, serve

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
LONGEST_TEMPORARY_FOLDER = 6
"""Number of characters. With a longer path, the socket paths of a Ray that a job starts in a test are too long."""


@dataclass(frozen=True)
class OwnFolders:
    """Folders that only this process and the processes that it starts use."""

    root: Path

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def temporary(self) -> Path:
        return self.root / "t"

    @property
    def ray_cwd(self) -> Path:
        """The working folder of Ray's workers."""
        return self.root / "cwd"


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnFolders]:
    """Give this process its own home and temporary folder, so that other programs cannot affect a test.

    The path is short, because Ray's sockets are below it and a socket's path has at most 107 bytes. A proxy or a Ray
    cluster in the user's environment is not used: all servers of the tests are on loopback.
    """
    tmp_path_factory.getbasetemp()  # before TMPDIR changes, so that pytest keeps those of its last three runs
    parent = tempfile.gettempdir()
    with (
        tempfile.TemporaryDirectory(
            prefix="ast", dir=parent if len(parent) <= LONGEST_TEMPORARY_FOLDER else "/tmp", ignore_cleanup_errors=True
        ) as root,
        pytest.MonkeyPatch.context() as patch,
    ):
        folders = OwnFolders(Path(root))
        for folder in (folders.home, folders.temporary, folders.ray_cwd):
            folder.mkdir()
        for name in os.environ:
            if name.startswith(("RAY_", "XDG_")) or name.lower().endswith("_proxy"):
                patch.delenv(name)
        patch.setenv("HOME", str(folders.home))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folders.root / "inductor"))
        # Otherwise Python makes another folder for its servers' sockets, and removes it only at a regular exit.
        patch.setitem(multiprocessing.current_process()._config, "tempdir", str(folders.temporary))  # type: ignore[attr-defined]
        patch.setenv("TMPDIR", str(folders.temporary))
        patch.setattr(tempfile, "tempdir", str(folders.temporary))
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
        yield folders


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one PyTorch thread: two that wait for each other at each small operation take minutes on a busy machine.

    `torch.set_num_threads` does nothing, so that a job in this process cannot change this.
    """
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "set_num_threads", lambda _: None)
        yield


@pytest.fixture(scope="session")
def s3(own_folders: OwnFolders) -> Iterator[S3Server]:
    """An S3 server that this process and its children find through environment variables."""
    with serve() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.env.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="session")
def local_ray(s3: S3Server, own_folders: OwnFolders) -> Iterator[None]:
    """Ray on this machine, with workers in their own working folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(own_folders.ray_cwd)
        for name, value in OF_OWN_RAY.items():  # as `ray_session` does
            patch.setenv(name, value)
        temp_dir = str(own_folders.root / "ray")
        ray.init(
            address="local",
            num_cpus=2,
            num_gpus=0,  # tests of two workers run on CPUs, whatever the machine has
            include_dashboard=False,  # it would be half of Ray's processes
            _temp_dir=temp_dir,
            log_to_driver=False,
            # By default Ray ends idle workers after a second, and starting one takes seconds of CPU time.
            _system_config={"num_workers_soft_limit": 5, "idle_worker_killing_time_threshold_ms": 600_000},
        )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tone_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A prepared data set that a small model learns in seconds (`fakes.write_data`)."""
    folder = tmp_path_factory.mktemp("tones") / "data"
    fakes.write_data(str(folder))
    return str(folder)
