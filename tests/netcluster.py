"""A cluster of machines inside this one: each machine is a set of Linux namespaces, and a bridge joins them.

A machine has an address, a host name that resolves to loopback as on Debian, its own processes, and a small disk of its
own at /tmp. Its link can be cut, slowed or made to lose packets; it can be frozen, killed, or added late. Everything
else of the file system is shared, such as the Python environment. The machines reach nothing outside the bridge.

Nothing of this machine's own network changes, and nothing is left behind, however this process ends: namespaces have no
names, and their first process ends with the pipe to it.
"""

import ctypes
import fcntl
import heapq
import http.client
import json
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import psutil

T = TypeVar("T")

ROOT = Path(__file__).parents[1]
RAY = str(Path(sys.executable).with_name("ray"))
NEW_NAMESPACES = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc"]
CLONE_FS = 0x200
DASHBOARD_PORT, GCS_PORT = 8265, 6379
DISK_MB, SHARED_MEMORY_MB, OBJECT_STORE_BYTES = 1024, 512, 200_000_000
READY_S = 240.0

_libc = ctypes.CDLL(None, use_errno=True)


def enter_namespaces(pid: int, *which: str) -> None:
    """Move this thread into namespaces of a process: `net`, `uts`, `mnt`."""
    if "mnt" in which:
        _libc.unshare(CLONE_FS)  # otherwise it shares its working folder with other threads, which the kernel refuses
    for name in which:
        with open(f"/proc/{pid}/ns/{name}") as namespace:
            if _libc.setns(namespace.fileno(), 0):
                raise OSError(ctypes.get_errno(), f"no entry into namespace {name} of {pid}")


@cache
def unavailable() -> str | None:
    """Why there can be no machines here; None if there can."""
    if os.geteuid() != 0:
        return "namespaces with a bridge need root"
    lacking = [program for program in ("ip", "unshare", "nsenter") if shutil.which(program) is None]
    if lacking:
        return f"no program {lacking[0]}"
    try_bridge = (
        "ip link add name b type bridge && ip link add name v type veth peer name w && mount -t tmpfs tmpfs /mnt"
    )
    tried = subprocess.run([*NEW_NAMESPACES, "sh", "-c", try_bridge], capture_output=True, text=True, check=False)
    return f"no namespaces, bridges or mounts here: {tried.stderr.strip()}" if tried.returncode else None


@dataclass
class Namespaces:
    """Namespaces that exist as long as their first process, which ends with the pipe to it."""

    process: subprocess.Popen[str]
    pid: int
    """Number of the first process on this machine."""

    @classmethod
    def make(cls, set_up: str) -> "Namespaces":
        """Make namespaces, and run a shell script in them."""
        # The first process inherits the processes whose parents have ended. If it ignores SIGCHLD, the kernel removes
        # them when they end.
        script = f"set -e\nip link set lo up\n{set_up}\ntrap '' CHLD\necho ready\nexec cat"
        process = subprocess.Popen(
            [*NEW_NAMESPACES, "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"no namespaces: status {process.wait()}")
        (first,) = psutil.Process(process.pid).children()
        return cls(process, first.pid)

    def enter(self, *which: str) -> list[str]:
        """A command's first words, with which it runs in these namespaces, for example `--net`; by default in all."""
        return ["nsenter", "--target", str(self.pid), *(which or ("--net", "--mount", "--uts", "--pid"))]

    def sh(self, script: str) -> None:
        subprocess.run([*self.enter("--net"), "sh", "-ec", script], check=True)

    def on_network(self, function: Callable[[], T]) -> T:
        """Call a function in a thread of this process that is on this network. Sockets that it makes stay there."""

        def call() -> T:
            enter_namespaces(self.pid, "net")
            return function()

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(call).result()

    def processes(self) -> list[psutil.Process]:
        """The processes except the first one."""

        def namespace(pid: int) -> str:
            with suppress(OSError):
                return os.readlink(f"/proc/{pid}/ns/pid")
            return ""

        own = namespace(self.pid)
        return [psutil.Process(pid) for pid in psutil.pids() if pid != self.pid and own and namespace(pid) == own]

    def end(self) -> None:
        """Kill all processes; then the namespaces are gone."""
        self.process.communicate()  # it ends with its input, and the kernel kills the others


@dataclass
class Machine:
    name: str
    address: str
    inside: Namespaces
    switch: Namespaces
    folder: Path
    """A folder outside the machine, for its logs."""
    core: int | None = None
    """The only core that its processes use; None if they may use all."""
    shift: Sequence[str] = ()
    """Words before each command, for example those that shift the clock."""
    _frozen: list[psutil.Process] = field(default_factory=list)
    _relay: "Relay | None" = None

    def start(self, *argv: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a command in the machine, with its output in a log."""
        pinned = [] if self.core is None else ["taskset", "--cpu-list", str(self.core)]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [*pinned, *self.inside.enter(), "--wdns=/tmp", *self.shift, *argv],
                env=environment() | {"HOME": "/tmp/home", "TMPDIR": "/tmp"} | dict(env or {}),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def path(self, inside: str) -> Path:
        """The path by which this process sees a file of the machine."""
        return Path(f"/proc/{self.inside.pid}/root{inside}")

    def get_json(self, address: str, path: str, timeout_s: float = 10.0) -> Any:
        """The JSON that a server on the network answers to this machine. Raises OSError or HTTPException."""

        def get() -> Any:
            with closing(http.client.HTTPConnection(address, timeout=timeout_s)) as connection:
                connection.request("GET", path)
                answer = connection.getresponse()
                if answer.status != 200:
                    raise OSError(f"{path}: {answer.status}")
                return json.load(answer)

        return self.inside.on_network(get)

    # --- what can happen to it ---

    def cut(self) -> None:
        """Packets to and from it are lost from now on. The machine does not see that its link is cut."""
        self._end_relay()
        self.switch.sh(f"ip link set dev {self.name} nomaster")

    def join(self) -> None:
        """Put its link in order again."""
        self._end_relay()
        self.switch.sh(f"ip link set dev {self.name} master bridge")

    def slow_down(self, *, delay_s: float, loss: float, seed: int = 0) -> None:
        """Delay each packet to and from it, and lose a share of them."""
        self.cut()
        self.inside.on_network(lambda: checksums_by_sender("eth0"))
        self._relay = self.switch.on_network(lambda: Relay(self.name, "bridge", delay_s, loss, Random(seed)))

    def freeze(self) -> None:
        """Stop all its processes, and its network, as when a virtual machine is paused."""
        self.cut()
        while awake := [each for each in self.inside.processes() if _suspend(each)]:
            self._frozen += awake

    def thaw(self) -> None:
        # nsenter stops itself when the process that it waits for is stopped.
        outside = [parent for each in self._frozen if each.is_running() and (parent := each.parent()) is not None]
        for each in [*self._frozen, *(parent for parent in outside if parent.name() == "nsenter")]:
            with suppress(psutil.NoSuchProcess):
                each.resume()
        self._frozen = []
        self.join()

    def runs(self, title: str) -> bool:
        """Whether a process of the machine has this in its title, as Ray's workers have what they do."""
        for process in self.inside.processes():
            with suppress(psutil.Error):  # it has ended
                if title in " ".join(process.cmdline()):
                    return True
        return False

    @property
    def is_on(self) -> bool:
        return self.inside.process.poll() is None

    def kill(self) -> None:
        """Switch it off: all its processes end at once, and its disk is gone."""
        self._end_relay()
        self.inside.end()

    def fill_disk(self, leave_bytes: int = 0) -> None:
        disk = self.path("/tmp")
        with (disk / "filler").open("ab", buffering=0) as file, suppress(OSError):
            while (left := shutil.disk_usage(disk).free - leave_bytes) > 0:
                file.write(bytes(min(left, 1 << 20)))

    def make_room(self) -> None:
        (self.path("/tmp") / "filler").unlink()

    def _end_relay(self) -> None:
        if self._relay is not None:
            self._relay.end()
            self._relay = None


def _suspend(process: psutil.Process) -> bool:
    """Stop a process. False if it was stopped before or has ended."""
    with suppress(psutil.NoSuchProcess):
        if process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
            process.suspend()
            return True
    return False


class Network:
    """Machines on a bridge, made by `network`."""

    def __init__(self, folder: Path, shared: Sequence[Path], disk_mb: int) -> None:
        self.folder, self.shared, self.disk_mb = folder, shared, disk_mb
        self.machines: list[Machine] = []
        self.switch = Namespaces.make("ip link add name bridge type bridge\nip link set dev bridge up")

    def add(
        self, name: str, *, core: int | None = None, shift: Sequence[str] = (), in_place_of: Machine | None = None
    ) -> Machine:
        """Add a machine. Its name has at most 15 characters, as an interface of the switch has this name.

        Args:
            in_place_of: a machine that was killed, whose address it gets.
        """
        number = len(self.machines) + 1 if in_place_of is None else int(in_place_of.address.rpartition(".")[2])
        address = f"10.77.0.{number}"
        hosts, new_tmp = self.folder / f"{name}.hosts", self.folder / f"{name}.tmp"
        hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
        new_tmp.mkdir(exist_ok=True)
        seen = [path for path in (ROOT, Path(sys.prefix), *self.shared) if path.is_relative_to("/tmp")]
        seen_at = [new_tmp / path.relative_to("/tmp") for path in seen]
        inside = Namespaces.make(
            "\n".join(
                [
                    f"hostname {name}",
                    f"mount --bind {hosts} /etc/hosts",
                    f"mount -t tmpfs -o size={SHARED_MEMORY_MB}m tmpfs /dev/shm",
                    f"mount -t tmpfs -o size={self.disk_mb}m,mode=1777 tmpfs {new_tmp}",
                    f"mkdir {new_tmp}/home",
                    *(f"mkdir -p {at} && mount --bind {path} {at}" for path, at in zip(seen, seen_at, strict=True)),
                    f"mount --move {new_tmp} /tmp",
                ]
            )
        )
        machine = Machine(name, address, inside, self.switch, self.folder, core, shift)
        self.machines.append(machine)
        self.switch.sh(
            f"ip link add name {name} type veth peer name eth0 netns {inside.pid}\nip link set dev {name} up"
        )
        # The hardware address goes with the address, so that others find a machine that takes the place of another.
        inside.sh(f"ip link set dev eth0 address 02:00:0a:4d:00:{number:02x}\nip addr add {address}/24 dev eth0")
        inside.sh("ip link set dev eth0 up")
        machine.join()
        return machine

    def end(self) -> None:
        for machine in self.machines:
            machine.kill()
        self.switch.end()


@contextmanager
def network(*, shared: Sequence[Path] = (), disk_mb: int = DISK_MB) -> Iterator[Network]:
    """A network without machines yet.

    Args:
        shared: folders below /tmp of this machine that all machines see.
        disk_mb: size of the disk of each machine, which is its /tmp.
    """
    with tempfile.TemporaryDirectory(prefix="net") as folder:
        made = Network(Path(folder), shared, disk_mb)
        try:
            yield made
        finally:
            made.end()


def environment() -> dict[str, str]:
    """This process's environment without Ray's settings and proxies."""
    usual = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("RAY_", "XDG_")) and not key.lower().endswith("_proxy") and key != "PYTHONPATH"
    }
    return usual | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


# --- a link that delays and loses packets ---


def checksums_by_sender(interface: str) -> None:
    """Let the kernel compute checksums and cut packets before an interface: a relay sends packets on as they are."""
    set_flags = {"tx checksum": 0x17, "tcp segmentation": 0x1F, "segmentation": 0x24}
    with socket.socket() as asked:
        for command in set_flags.values():
            value = ctypes.create_string_buffer(struct.pack("II", command, 0))
            request = struct.pack("16sP16x", interface.encode(), ctypes.addressof(value))
            fcntl.ioctl(asked, 0x8946, request)  # SIOCETHTOOL


class Relay:
    """A thread that carries packets between an interface and a bridge. The kernel's netem is not everywhere."""

    def __init__(self, interface: str, bridge: str, delay_s: float, loss: float, draw: Random) -> None:
        self.delay_s, self.loss, self.draw = delay_s, loss, draw
        self.counts = {"carried": 0, "lost": 0}
        self.packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))  # all protocols
        self.packets.bind((interface, 0))
        self.tap = os.open("/dev/net/tun", os.O_RDWR)
        tap_without_header = struct.pack("16sH22x", b"slow%d", 0x0002 | 0x1000)
        name = fcntl.ioctl(self.tap, 0x400454CA, tap_without_header)[:16].rstrip(b"\0").decode()  # TUNSETIFF
        subprocess.run(["ip", "link", "set", name, "master", bridge, "up"], check=True)
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._carry, daemon=True)
        self.thread.start()

    def end(self) -> None:
        self.ended.set()
        self.thread.join()
        self.packets.close()
        os.close(self.tap)  # the bridge loses it

    def _carry(self) -> None:
        waiting: list[tuple[float, int, Callable[[bytes], int], bytes]] = []
        while not self.ended.is_set():
            wait_s = max(0.0, waiting[0][0] - time.monotonic()) if waiting else 0.1
            for ready in select.select([self.packets, self.tap], [], [], min(wait_s, 0.1))[0]:
                if ready is self.packets:
                    packet, sender = self.packets.recvfrom(65536)
                    if sender[2] == socket.PACKET_OUTGOING:  # type: ignore[attr-defined]  # Linux only
                        continue
                    send = self._to_bridge
                else:
                    packet, send = os.read(self.tap, 65536), self.packets.send
                if self.draw.random() < self.loss:
                    self.counts["lost"] += 1
                else:
                    self.counts["carried"] += 1
                    heapq.heappush(waiting, (time.monotonic() + self.delay_s, self.counts["carried"], send, packet))
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, send, packet = heapq.heappop(waiting)
                with suppress(OSError):  # the machine has ended
                    send(packet)

    def _to_bridge(self, packet: bytes) -> int:
        return os.write(self.tap, packet)


# --- Ray on it ---


@dataclass
class RayCluster:
    """A Ray cluster on machines, and a machine outside it, from which jobs are submitted."""

    head: Machine
    desk: Machine
    env: Mapping[str, str]
    """Variables that each node has."""
    folder: Path
    _starts: dict[str, tuple[Machine, list[str], subprocess.Popen[bytes]]] = field(default_factory=dict)
    """The `ray start` of each machine that has one."""

    def start_head(self, num_cpus: int = 1, **resources: float) -> None:
        """Start the head, and wait for it."""
        argv = [*self._start(self.head, num_cpus, resources), "--head", f"--port={GCS_PORT}"]
        argv += [f"--dashboard-host={self.head.address}", f"--dashboard-port={DASHBOARD_PORT}"]
        self._run(self.head, argv)
        self._wait("the dashboard", lambda: self.desk.get_json(self.dashboard, "/api/jobs/") is not None)

    def start_worker(self, machine: Machine, num_cpus: int = 1, **resources: float) -> None:
        """Start a node. `wait_for_nodes` waits for it."""
        argv = [*self._start(machine, num_cpus, resources), f"--address={self.head.address}:{GCS_PORT}"]
        self._run(machine, argv)

    def _run(self, machine: Machine, argv: list[str]) -> None:
        env = {"RAY_agent_register_timeout_ms": str(round(1000 * READY_S)), **self.env}
        self._starts[machine.name] = machine, argv, machine.start(*argv, env=env)

    def _start_again(self) -> None:
        """Start Ray again where it has ended: on a busy machine its processes wait too briefly for each other."""
        for machine, argv, process in list(self._starts.values()):
            if machine.is_on and process.poll() is not None:
                self._run(machine, argv)

    def _start(self, machine: Machine, num_cpus: int, resources: Mapping[str, float]) -> list[str]:
        argv = [RAY, "start", "--block", f"--num-cpus={num_cpus}", f"--resources={json.dumps(dict(resources))}"]
        argv += [f"--node-ip-address={machine.address}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
        return [*argv, "--disable-usage-stats"]

    @property
    def dashboard(self) -> str:
        return f"{self.head.address}:{DASHBOARD_PORT}"

    def nodes(self) -> list[str]:
        """Addresses of the nodes that are alive."""
        summary = self.desk.get_json(self.dashboard, "/nodes?view=summary")["data"]["summary"]
        return [node["ip"] for node in summary if node["raylet"]["state"] == "ALIVE"]

    def wait_for_nodes(self, count: int) -> None:
        self._wait(f"{count} nodes", lambda: len(self.nodes()) == count)

    def _wait(self, what: str, is_there: Callable[[], bool], limit_s: float = READY_S) -> None:
        deadline_s = time.monotonic() + limit_s
        while time.monotonic() < deadline_s:
            with suppress(OSError, http.client.HTTPException, KeyError, ValueError):
                if is_there():
                    return
            self._start_again()
            time.sleep(0.2)
        raise RuntimeError(f"no {what} after {limit_s:.0f} s: {self.head.log.read_text()[-2000:]}")

    def submit(self, submission_id: str, *command: str, options: Sequence[str] = ()) -> subprocess.Popen[str]:
        """Start `ray job submit --working-dir . -- COMMAND` at the desk, which prints the job's output."""
        argv = [RAY, "job", "submit", "--working-dir", ".", "--submission-id", submission_id, *options, "--", *command]
        return self._at_desk(*argv)

    def stop(self, submission_id: str) -> None:
        """`ray job stop`, which returns when the job has ended."""
        stopping = self._at_desk(RAY, "job", "stop", submission_id)
        output, _ = stopping.communicate(timeout=READY_S)
        if stopping.returncode:
            raise RuntimeError(output)

    def _at_desk(self, *argv: str) -> subprocess.Popen[str]:
        env = environment() | {"RAY_API_SERVER_ADDRESS": f"http://{self.dashboard}", "HOME": str(self.folder)}
        return subprocess.Popen(
            [*self.desk.inside.enter("--net"), *argv],
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def job(self, submission_id: str) -> dict[str, Any]:
        """What the dashboard knows about a job: `status`, `message`, `driver_node_id` and others."""
        return self.desk.get_json(self.dashboard, f"/api/jobs/{submission_id}")

    def wait_for_status(self, submission_id: str, *statuses: str, limit_s: float = READY_S) -> dict[str, Any]:
        self._wait(
            f"{' or '.join(statuses)} of {submission_id}",
            lambda: self.job(submission_id)["status"] in statuses,
            limit_s,
        )
        return self.job(submission_id)


@contextmanager
def ray_cluster(
    net: Network, num_machines: int, *, env: Mapping[str, str] | None = None, cores: Sequence[int | None] = ()
) -> Iterator[RayCluster]:
    """A Ray cluster of a head and workers with one CPU each, and a desk outside it."""
    desk = net.add("desk")
    machines = [net.add(f"node{i}", core=cores[i] if cores else None) for i in range(num_machines)]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=net.folder)))
        cluster = RayCluster(machines[0], desk, env or {}, folder)
        cluster.start_head()
        for machine in machines[1:]:
            cluster.start_worker(machine)
        cluster.wait_for_nodes(num_machines)
        yield cluster
