"""A Ray cluster that grows and shrinks: Ray's fake provider starts its nodes as processes on this machine.

Ray's autoscaler (v2) and everything that asks it for nodes are the real ones. Resources of nodes are only declared.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import psutil
from ray._raylet import GcsClient
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray.exceptions import RpcError
from ray.util.state import list_tasks

from tests.ports import free_ports

ROOT = Path(__file__).parents[1]
RAY = str(Path(sys.executable).with_name("ray"))
STORE_BYTES = 100_000_000
"""Size of a node's object store. Ray would take 30 % of this machine's memory for each."""

IDLE_MINUTES = 0.1
EMPTY_LISTS = (
    *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter"),
)
EMPTY_MAPPINGS = ("auth", "docker", "file_mounts")
"""Keys that Ray requires, and for which it has no default with a provider of type external."""


@dataclass(frozen=True)
class Job:
    process: subprocess.Popen[bytes]
    output: TextIO

    def printed(self) -> str:
        self.output.seek(0)
        return self.output.read()


@dataclass
class ScaledCluster:
    address: str
    dashboard: str
    env: dict[str, str]
    head: subprocess.Popen[bytes]
    log: Path
    types: dict[str, str] = field(default_factory=dict)
    """Type of each node that has been seen, by its id."""

    def nodes(self) -> dict[str, int]:
        """How many nodes of each type are alive, without the head. It waits for a head that does not answer yet."""
        while True:
            assert self.head.poll() is None, self.log.read_text()
            with suppress(RpcError):
                return self._nodes()

    def _nodes(self) -> dict[str, int]:
        found: Counter[str] = Counter()
        for node in GcsClient(address=self.address).get_all_node_info(timeout=60).values():
            if node.node_type_name:  # the head has none
                self.types[node.node_id.hex()] = node.node_type_name
                found[node.node_type_name] += node.state == GcsNodeInfo.ALIVE
        return {kind: number for kind, number in found.items() if number}

    def wait_for(self, is_so: Callable[[dict[str, int]], bool], job: "Job | None" = None) -> None:
        """Wait until the nodes are as wanted. It fails if the job that asks for them ends before."""
        while not is_so(self.nodes()):
            assert job is None or job.process.poll() is None, job.printed()
            time.sleep(0.5)

    @contextmanager
    def started(self, *command: str) -> Iterator["Job"]:
        """`python COMMAND` in the project's root, which is ended with the block."""
        with tempfile.TemporaryFile("w+") as output:  # a pipe that nobody reads would stop it
            streams = {"stdout": output, "stderr": subprocess.STDOUT}
            process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=self.env, **streams)
            try:
                yield Job(process, output)
            finally:
                process.kill()
                process.wait()

    def run(self, *command: str) -> str:
        """Run `python COMMAND` to its end and watch the nodes meanwhile. Returns what it printed."""
        with self.started(*command) as job:
            self.wait_for(lambda nodes: job.process.poll() is not None)
            assert job.process.returncode == 0, job.printed()
            return job.printed()

    def types_of_tasks(self) -> dict[str, set[str]]:
        """The types of the nodes on which tasks ran, by the task's name."""
        self.nodes()
        ran: dict[str, set[str]] = {}
        for task in list_tasks(address=self.dashboard, limit=10_000, detail=True):
            if task.node_id in self.types:
                ran.setdefault(task.name, set()).add(self.types[task.node_id])
        return ran


@contextmanager
def scaled_cluster(folder: Path, node_types: Mapping[str, Mapping[str, Any]]) -> Iterator[ScaledCluster]:
    """A head without work, and the nodes that its autoscaler starts.

    Args:
        folder: for Ray's files; its path must be short.
        node_types: as `available_node_types` of a cluster.yaml, without the head.
    """
    port, client, dashboard = free_ports(3)
    address = f"127.0.0.1:{port}"
    head = {"resources": {"CPU": 0, "GPU": 0}, "node_config": {}, "max_workers": 0}
    workers = {
        name: {**kind, "node_config": {}, "resources": {**kind["resources"], "object_store_memory": STORE_BYTES}}
        for name, kind in node_types.items()
    }
    config = {
        "cluster_name": "scaled",
        "max_workers": sum(kind["max_workers"] for kind in node_types.values()),
        "idle_timeout_minutes": IDLE_MINUTES,
        "provider": {
            "type": "external",  # the defaults of type fake_multinode are not in Ray's wheel
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "launch_multiple": True,
            "disable_node_updaters": True,  # nothing is installed on the nodes
            "disable_launch_config_check": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": address,
        },
        **{key: [] for key in EMPTY_LISTS},
        **{key: {} for key in EMPTY_MAPPINGS},
        "file_mounts_sync_continuously": False,
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "available_node_types": {FAKE_HEAD_NODE_TYPE: head, **workers},
    }
    scaling = folder / "scaling.json"
    scaling.write_text(json.dumps(config))
    AutoscalingConfig(config, skip_content_hash=True)  # refuses what would end the head a minute later
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "disabled"
    }
    of_head = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    command = [RAY, "start", "--head", "--block", "--num-cpus=0", "--num-gpus=0", f"--port={port}"]
    command += [f"--temp-dir={folder}/ray", f"--autoscaling-config={scaling}", "--node-ip-address=127.0.0.1"]
    command += [f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", "--disable-usage-stats"]
    command += ["--dashboard-agent-listen-port=0", f"--object-store-memory={STORE_BYTES}"]
    log = folder / "head.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=env | of_head, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    cluster = ScaledCluster(address, f"http://127.0.0.1:{dashboard}", env, process, log)
    try:
        cluster.nodes()
        yield cluster
    finally:
        _end(process)


def _end(head: subprocess.Popen[bytes]) -> None:
    started = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
    for process in started:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    head.kill()
    head.wait()
