"""One Ray for all tests of a process, on its own folder and ports, and data that is made once."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

from tests import fakes
from tests.s3 import S3Server, serve

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two threads that wait for each other in every small operation take minutes where the machine is busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """An S3 server that this process and those that it starts find by their environment."""
    with serve() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.env.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="session")
def local_ray(s3: S3Server) -> Iterator[None]:
    """Ray on this machine. Its sockets want a short path, which pytest's own folders may not have."""
    with tempfile.TemporaryDirectory(prefix="ast-ray-") as folder:
        ray.init(address="local", num_cpus=2, _temp_dir=folder, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(scope="session")
def tone_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A prepared data set whose classes a small model learns in seconds: `fakes.write_data`."""
    folder = tmp_path_factory.mktemp("tones") / "data"
    fakes.write_data(str(folder))
    return str(folder)
