"""Faults between machines: disturb each job on a cluster of three machines, run it to its end, and compare.

    python -m benchmarks.machine_faults [--kinds cut-5s …] [--jobs prepare train tag] [--seeds 0 1 2] [--trials FILE]

The machines are made of Linux namespaces (`tests/netcluster.py`), so this needs root. Each has one CPU for Ray, its
own address, processes and disk; one is Ray's head. A fourth has the bucket (moto), a fifth submits. The job is
submitted (`ray job submit`), with recordings in a shared folder and outputs in the bucket, and disturbed at a seeded
moment of its work. If it does not end with success, the fault is put right and the same command is submitted again,
until it does. Then its output is compared with that of an undisturbed job: clips, recordings or steps that are lost,
doubled or wrong are counted, and losses may differ by 1e-6. With --trials, each trial is a line of FILE, with its date
and commit, and a campaign that is started again does only what is missing. The exit status is 1 if anything is lost,
doubled or wrong, if a job did not end by itself, or if its last line is not an error that says what to do.

`clock` needs Debian's libfaketime (--faketime FILE), and `head-replaced` its redis-server (--redis FILE); without them
they are left out. --env sets variables of all nodes, to try Ray's settings.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import tag_faults
from pipeline import dataset, storage
from pipeline.dataset import PreparedDataset
from tests import fakes
from tests.netcluster import Machine, Network, RayCluster, network, unavailable
from tests.s3 import S3Server, serve

MACHINES = 3
FAKETIME = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1"
REDIS = "/usr/bin/redis-server"
MOST_RUNS, LONGEST_RUN_S = 4, 900.0
LONGEST_WAIT_S = 120.0
"""How long a training waits for room for its workers, before Ray is started again on the machines that were lost."""
SAME = 1e-6
"""Largest relative difference of a loss."""
HEAD_AWAY_S = 10.0
LOOK_S = 0.5
SUBMISSIONS, CLUSTERS = 6, 4
CLIPS, RECORDINGS, EPOCHS = 600, 90, 30
DELAY_S, LOSS = 0.1, 0.05
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class Job(StrEnum):
    PREPARE = "prepare"
    TRAIN = "train"
    TAG = "tag"


WORKERS = {Job.PREPARE: "ray::MapBatches", Job.TRAIN: "ray::RayTrainWorker", Job.TAG: "TagChunks"}
"""Part of the titles of Ray's processes that do a job's work."""


class Kind(StrEnum):
    """What happens. Unless it says otherwise, it happens to a machine that is neither Ray's head nor the driver's."""

    CUT_5S = "cut-5s"
    CUT_60S = "cut-60s"
    CUT = "cut"
    """The link is cut for good."""
    LOSSY = "lossy"
    """100 ms delay each way and 5 % of the packets lost, until the job ends."""
    FROZEN_60S = "frozen-60s"
    """The machine is paused with all its processes, as a virtual machine, and resumed."""
    KILLED = "killed"
    HEAD_KILLED = "head-killed"
    """The head, with the driver. The same command is submitted to a new cluster."""
    HEAD_REPLACED = "head-replaced"
    """The head is killed, and one with the same address starts after 10 s. Ray's state is in Redis (fault tolerance of
    the GCS), and the driver is not on the head."""
    HEAD_CUT_60S = "head-cut-60s"
    S3_CUT_120S = "s3-cut-120s"
    """The bucket's machine answers nobody."""
    S3_LOSSY = "s3-lossy"
    """As `lossy`, on the link of the bucket's machine."""
    JOINS = "joins"
    """The job begins on two machines, and a third one joins."""
    CLOCK = "clock"
    """The machine's clock is ten minutes ahead from its start on."""
    DRIVER_KILLED = "driver-killed"
    """The driver is on a machine that is not the head, and this machine is killed."""
    DISK_FULL = "disk-full"


@dataclass
class Run:
    """One submission, up to the end of the job."""

    status: str
    seconds: float
    """From the fault to the end, or from the submission on for a run after the fault."""
    last_line: str


@dataclass
class Trial:
    kind: str
    job: str
    seed: int
    hit: str = ""
    """What was disturbed; empty if the job had ended before."""
    runs: list[Run] = field(default_factory=list)
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    largest_difference: float = 0.0
    """Largest relative difference of a training loss."""
    remarks: list[str] = field(default_factory=list)

    @property
    def is_well(self) -> bool:
        return not (self.lost or self.doubled or self.wrong or self.remarks) and self.runs[-1].status == "SUCCEEDED"


# --- the jobs and their outputs ---


@dataclass
class Work:
    """Inputs that every machine sees, and the bucket for the outputs."""

    media: Path
    bucket: str

    def make(self) -> None:
        rows = ["path,labels,split"]
        clips = self.media / "clips"
        clips.mkdir()
        for i in range(CLIPS):
            waveform = fakes.tone(300.0 * 2 ** (i % 4), 0.5) + fakes.noise(0.5, seed=i)
            rows.append(f"{fakes.write_media(clips / f'{i:04}.flac', waveform).name},tone {i % 4},train")
        (clips / "list.csv").write_text("\n".join(rows) + "\n")
        tag_faults.write_recordings(self.media / "recordings", RECORDINGS, seed=0)
        tag_faults.write_model(self.media / "model")
        fakes.write_data(f"{self.bucket}/tones")

    def command(self, job: Job, output: str) -> list[str]:
        if job == Job.PREPARE:
            argv = ["jobs/prepare_audioset.py", "--manifest", str(self.media / "clips" / "list.csv")]
        elif job == Job.TAG:
            argv = ["jobs/tag.py", "--checkpoint", str(self.media / "model"), "--input", str(self.media / "recordings")]
            argv += ["--window-s", "1", "--cpus-per-worker", "1"]
        else:
            argv = ["jobs/train.py", "--recipe", "audioset-full", "--data", f"{self.bucket}/tones"]
            argv += ["--train-splits", "train", "--eval-splits", "eval", "--num-workers", "2", "--device", "cpu"]
            argv += ["--cpus-per-worker", "1", "--log-every-steps", "1", "--checkpoint-every-s", "1"]
            argv += ["--longest-wait-s", f"{LONGEST_WAIT_S:.0f}"]
            keys = fakes.LINEAR_RECIPE | {"norm_stats": "data", "batch_size": "8", "precision": "fp32"}
            keys |= {"epochs": str(EPOCHS), "wa_start": "2", "wa_end": "3"}
            argv += [word for key, value in keys.items() for word in (f"--{key}", value)]
        return ["python", *argv, "--output", output]

    def done(self, job: Job, output: str) -> float:
        """Roughly which share of a job is done, by what is in the bucket."""
        if job == Job.PREPARE:
            return len(_shards(output)) / (CLIPS / 50)
        if job == Job.TAG:
            return tag_faults.num_parts(output) / 12
        saved = storage.list_files(storage.join(output, "checkpoints"), suffix="state.pt", recursive=True)
        return max((int(uri.split("/epoch-")[1][:4]) for uri in saved if "/epoch-" in uri), default=0) / EPOCHS


def _shards(data: str) -> list[str]:
    return [uri for uri in storage.list_files(data, suffix=".parquet", recursive=True) if "/shards/" in uri]


def read(job: Job, output: str) -> Any:
    """The output of a job, in a form that two jobs' outputs can be compared in."""
    if job == Job.TAG:
        return tag_faults.read_results(output)
    if job == Job.TRAIN:
        lines = storage.read_bytes(storage.join(output, "metrics.jsonl")).splitlines()
        return [(each["step"], each["loss"]) for each in map(json.loads, lines) if each["kind"] == "step"]
    opened, columns = PreparedDataset.open(output), ["clip_id", "labels", "num_frames", "fbank_hash"]
    rows = [row for uri in _shards(output) for row in dataset.read_table(uri).select(columns).to_pylist()]
    stored = [(row["clip_id"], tuple(row["labels"]), row["num_frames"], row["fbank_hash"]) for row in rows]
    return stored, [clip for split in opened.splits for clip in opened.index(split)["clip_id"].to_pylist()]


def compare(trial: Trial, wanted: Any, found: Any) -> None:
    """Count in a trial what is lost, doubled or wrong."""
    if trial.job == Job.TAG:
        outcome = tag_faults.compare(trial.hit, len(trial.runs), wanted, found)
        trial.lost, trial.doubled, trial.wrong = outcome.lost, outcome.doubled, outcome.wrong + len(outcome.left_over)
    elif trial.job == Job.TRAIN:
        steps, losses = Counter(step for step, _ in found), dict(found)
        trial.lost = sum(step not in losses for step, _ in wanted)
        trial.doubled = sum(count - 1 for count in steps.values())
        differences = [abs(losses[step] - loss) / loss for step, loss in wanted if step in losses]
        trial.largest_difference = max(differences, default=0.0)
        trial.wrong = sum(difference > SAME for difference in differences)
    else:
        (wanted_rows, wanted_index), (rows, index) = wanted, found
        trial.lost = len(set(wanted_index) - set(index))
        trial.doubled = len(index) - len(set(index)) + len(rows) - len({row[0] for row in rows})
        trial.wrong = len(set(rows) - set(wanted_rows)) + len(set(index) - set(wanted_index))


# --- the machines ---


class Site:
    """The bucket, the desk, and a Ray cluster that is repaired after a fault."""

    def __init__(self, net: Network, faketime: str, redis: str, settings: Mapping[str, str]) -> None:
        self.net, self.faketime, self.redis, self.settings = net, faketime, redis, settings
        self.bucket, self.desk = net.add("bucket"), net.add("desk")
        self.listening = self.bucket.inside.on_network(lambda: socket.create_server(("0.0.0.0", 0)))
        self.cluster: RayCluster | None = None
        self.workers: list[Machine] = []
        self._has_redis = False
        self._submissions = self._machines = 0

    def connect(self, s3: S3Server) -> None:
        """Use a server that also listens on the bucket's machine."""
        endpoint = f"http://{self.bucket.address}:{self.listening.getsockname()[1]}"
        self.env = s3.env | {"AWS_ENDPOINT_URL": endpoint} | dict(self.settings)

    @property
    def head(self) -> Machine:
        assert self.cluster is not None
        return self.cluster.head

    def make_whole(
        self, num_workers: int = MACHINES - 1, *, wrong_clock: bool = False, with_redis: bool = False
    ) -> RayCluster:
        """Put all links in order, and replace the machines that are lost."""
        for _ in range(CLUSTERS):
            try:
                return self._repair(num_workers, wrong_clock, with_redis)
            except RuntimeError as err:  # a node was declared dead late, or did not start
                print(f"the cluster is replaced: {err}", file=sys.stderr, flush=True)
                self.head.kill()
        raise RuntimeError("no cluster starts")

    def _repair(self, num_workers: int, wrong_clock: bool, with_redis: bool) -> RayCluster:
        self.bucket.join()
        if self.cluster is None or with_redis != self._has_redis or not self._answers():
            for machine in [*self.workers, *([self.cluster.head] if self.cluster else [])]:
                machine.kill()
            self.workers = []
            self._has_redis, env = with_redis, self.env | (self._start_redis() if with_redis else {})
            self.cluster = RayCluster(self._new_machine(), self.desk, env, self.net.folder)
            self.cluster.start_head(num_cpus=1)
        self.head.join()
        alive = self.cluster.nodes()
        for machine in list(self.workers):
            is_usual = machine.is_on and not wrong_clock and not machine.shift
            if machine.address not in alive or not is_usual or len(self.workers) > num_workers:
                machine.kill()
                self.workers.remove(machine)
        while len(self.workers) < num_workers:
            self.add_worker(wrong_clock=wrong_clock and not self.workers)
        for machine in self.workers:
            machine.join()
        self.cluster.wait_for_nodes(1 + num_workers)
        return self.cluster

    def replace_head(self) -> None:
        """Start a head with the address of the one that was killed."""
        assert self.cluster is not None
        self.cluster.head = self._new_machine(in_place_of=self.cluster.head)
        self.cluster.start_head(num_cpus=1)

    def _start_redis(self) -> dict[str, str]:
        """Start Redis on the bucket's machine, if it does not run yet. Returns the variables with which Ray uses it."""
        libraries = {"LD_LIBRARY_PATH": str(Path(self.redis).parents[1] / "lib" / "x86_64-linux-gnu")}
        self.bucket.start(self.redis, "--bind", "0.0.0.0", "--protected-mode", "no", "--save", "", env=libraries)
        namespace = f"cluster{self._machines}"
        return {"RAY_REDIS_ADDRESS": f"{self.bucket.address}:6379", "RAY_external_storage_namespace": namespace}

    def add_worker(self, *, wrong_clock: bool = False) -> Machine:
        assert self.cluster is not None
        ahead = ["env", f"LD_PRELOAD={self.faketime}", "FAKETIME=+600", "FAKETIME_DONT_FAKE_MONOTONIC=1"]
        machine = self._new_machine(ahead if wrong_clock else ())
        # `driver` is where a driver can be put by a submission.
        self.cluster.start_worker(machine, num_cpus=1, driver=1)
        self.workers.append(machine)
        return machine

    def _answers(self) -> bool:
        with suppress(OSError, HTTPException, RuntimeError, KeyError):
            return bool(self.cluster and self.cluster.nodes())
        return False

    def _new_machine(self, shift: Sequence[str] = (), in_place_of: Machine | None = None) -> Machine:
        self._machines += 1
        return self.net.add(f"node{self._machines}", shift=shift, in_place_of=in_place_of)

    def new_name(self) -> str:
        self._submissions += 1
        return f"job-{self._submissions}"


@dataclass
class Submitted:
    """A job on a cluster, as the desk sees it."""

    cluster: RayCluster
    job: Job
    name: str
    began_s: float = field(default_factory=time.monotonic)
    last_line: str = ""

    def status(self) -> str:
        """Empty while the head does not answer."""
        with suppress(OSError, HTTPException, ValueError):
            found = self.cluster.job(self.name)
            with suppress(OSError, HTTPException, ValueError):  # the driver's machine has them, and may be gone
                printed = self.cluster.desk.get_json(self.cluster.dashboard, f"/api/jobs/{self.name}/logs")["logs"]
                self.last_line = next((line for line in reversed(printed.splitlines()) if line.strip()), "")
            if found["status"] == "FAILED" and not self.last_line.startswith("error:"):
                self.last_line += f" [{found['message'].strip().splitlines()[-1]}]"
            return str(found["status"])
        return ""


def submit(
    site: Site, cluster: RayCluster, job: Job, command: Sequence[str], *, away_from_head: bool = False
) -> Submitted:
    name = site.new_name()
    options = ["--no-wait", *(["--entrypoint-resources", '{"driver": 1}'] if away_from_head else [])]
    for _ in range(SUBMISSIONS):
        submitting = cluster.submit(name, *command, options=options)
        printed, _ = submitting.communicate(timeout=LONGEST_RUN_S)
        if not submitting.returncode:
            return Submitted(cluster, job, name)
        if "No available agent" not in printed:  # a new head's agent takes its time
            break
    raise RuntimeError(printed)


# --- the faults ---


@contextmanager
def fault(site: Site, kind: Kind, victim: Machine, seed: int) -> Iterator[Callable[[float], bool]]:
    """Cause a fault. Yields a function of the seconds passed, which repairs it when due and returns whether it did."""
    after_s: tuple[float, Callable[[], None]] | None = None
    if kind in (Kind.CUT_5S, Kind.CUT_60S, Kind.HEAD_CUT_60S, Kind.S3_CUT_120S):
        victim.cut()
        after_s = float(kind.rpartition("-")[2][:-1]), victim.join
    elif kind == Kind.CUT:
        victim.cut()
    elif kind in (Kind.LOSSY, Kind.S3_LOSSY):
        victim.slow_down(delay_s=DELAY_S, loss=LOSS, seed=seed)
    elif kind == Kind.FROZEN_60S:
        victim.freeze()
        after_s = 60.0, victim.thaw
    elif kind in (Kind.KILLED, Kind.HEAD_KILLED, Kind.HEAD_REPLACED, Kind.DRIVER_KILLED):
        victim.kill()
        after_s = (HEAD_AWAY_S, site.replace_head) if kind == Kind.HEAD_REPLACED else None
    elif kind == Kind.JOINS:
        site.add_worker()
    elif kind == Kind.DISK_FULL:
        victim.fill_disk()

    def put_right(passed_s: float) -> bool:
        nonlocal after_s
        if after_s is not None and passed_s >= after_s[0]:
            after_s[1]()
            after_s = None
        return after_s is None

    try:
        yield put_right
    finally:
        put_right(float("inf"))
        if kind == Kind.DISK_FULL:
            victim.make_room()
        if kind in (Kind.LOSSY, Kind.S3_LOSSY):
            victim.join()


def run_undisturbed(site: Site, work: Work, job: Job, output: str) -> tuple[float, Any]:
    """The seconds of an undisturbed job, and its output."""
    submitted = submit(site, site.make_whole(), job, work.command(job, output))
    while (status := submitted.status()) not in ENDED:
        time.sleep(LOOK_S)
    if status != "SUCCEEDED":
        raise RuntimeError(f"the undisturbed {job}: {status} {submitted.last_line}")
    return time.monotonic() - submitted.began_s, read(job, output)


def run_trial(site: Site, work: Work, kind: Kind, job: Job, seed: int, output: str, wanted: Any) -> Trial:
    rng = np.random.default_rng([seed, list(Kind).index(kind), list(Job).index(job)])
    share = float(rng.uniform(0.1, 0.6))
    trial, command = Trial(kind, job, seed), work.command(job, output)
    with_redis = kind == Kind.HEAD_REPLACED
    cluster = site.make_whole(
        MACHINES - 1 - (kind == Kind.JOINS), wrong_clock=kind == Kind.CLOCK, with_redis=with_redis
    )
    submitted = submit(site, cluster, job, command, away_from_head=kind in (Kind.DRIVER_KILLED, Kind.HEAD_REPLACED))
    while work.done(job, output) < share and (status := submitted.status()) not in ENDED:
        time.sleep(LOOK_S)
    status = submitted.status()
    if status in ENDED:
        trial.remarks.append(f"ended before the fault: {status} {submitted.last_line}")
    victim = _victim(site, kind, submitted, rng)
    trial.hit, hit_s = victim.name, time.monotonic()
    with fault(site, kind, victim, seed) as put_right:
        # A job whose head is killed has ended with it.
        while kind != Kind.HEAD_KILLED and (status := submitted.status()) not in ENDED:
            put_right(time.monotonic() - hit_s)
            if time.monotonic() - hit_s > LONGEST_RUN_S:
                trial.remarks.append(f"no end within {LONGEST_RUN_S:.0f} s")
                break
            time.sleep(LOOK_S)
        trial.runs.append(Run(status, time.monotonic() - hit_s, submitted.last_line))
    while trial.runs[-1].status != "SUCCEEDED" and len(trial.runs) < MOST_RUNS:
        killed = kind == Kind.DRIVER_KILLED
        if trial.runs[-1].status == "FAILED" and not killed and not trial.runs[-1].last_line.startswith("error: "):
            trial.remarks.append("the last line is no error")
        cluster = site.make_whole(with_redis=with_redis)
        submitted = submit(site, cluster, job, command)
        while (status := submitted.status()) not in ENDED and time.monotonic() - submitted.began_s < LONGEST_RUN_S:
            time.sleep(LOOK_S)
        trial.runs.append(Run(status, time.monotonic() - submitted.began_s, submitted.last_line))
    if trial.runs[-1].status == "SUCCEEDED":
        compare(trial, wanted, read(job, output))
    return trial


def _victim(site: Site, kind: Kind, submitted: Submitted, rng: np.random.Generator) -> Machine:
    if kind in (Kind.HEAD_KILLED, Kind.HEAD_REPLACED, Kind.HEAD_CUT_60S):
        return site.head
    if kind in (Kind.S3_CUT_120S, Kind.S3_LOSSY):
        return site.bucket
    if kind == Kind.DRIVER_KILLED:
        address = submitted.cluster.job(submitted.name)["driver_agent_http_address"]
        return next(machine for machine in site.workers if f"//{machine.address}:" in address)
    # A training leaves one of the machines idle.
    at_work = [machine for machine in site.workers if machine.runs(WORKERS[submitted.job])] or site.workers
    return at_work[int(rng.integers(len(at_work)))]


# --- the table ---


def table(trials: Sequence[dict[str, Any]]) -> str:
    """A row for each kind, over all seeds."""
    columns = ["fault", "trials", "first run ends after, most s", "its one line", "most runs"]
    columns += ["lost", "doubled", "wrong", "losses differ by"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for kind in Kind:
        of_kind = [trial for trial in trials if trial["kind"] == kind]
        if not of_kind:
            continue
        by_job = {job: [each for each in of_kind if each["job"] == job] for job in Job}
        firsts = {job: [each["runs"][0] for each in of_job] for job, of_job in by_job.items() if of_job}
        seconds = ", ".join(f"{job} {max(run['seconds'] for run in runs):.0f}" for job, runs in firsts.items())
        ends = {run["last_line"] for runs in firsts.values() for run in runs if run["status"] == "FAILED"}
        cells = [kind, ", ".join(f"{job} × {len(runs)}" for job, runs in firsts.items()), seconds]
        cells += ["; ".join(sorted(ends)).replace("|", "/") or "–", max(len(each["runs"]) for each in of_kind)]
        cells += [sum(each[name] for each in of_kind) for name in ("lost", "doubled", "wrong")]
        of_train = [each["largest_difference"] for each in by_job[Job.TRAIN]]
        lines.append(f"| {' | '.join(map(str, cells))} | {f'{max(of_train):.0e}' if of_train else '–'} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", type=Kind, choices=list(Kind), default=list(Kind))
    parser.add_argument("--jobs", nargs="+", type=Job, choices=list(Job), default=list(Job))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--trials", type=Path, metavar="FILE", help="JSON lines of the trials that are done")
    parser.add_argument(
        "--faketime", default=FAKETIME, metavar="FILE", help=f"library that shifts a clock (default {FAKETIME})"
    )
    parser.add_argument("--redis", default=REDIS, metavar="FILE", help=f"Redis's server (default {REDIS})")
    parser.add_argument("--env", nargs="+", default=[], metavar="NAME=VALUE", help="variables of all nodes")
    parser.add_argument("--table", action="store_true", help="only print the table of --trials")
    args = parser.parse_args(argv)
    if reason := unavailable():
        parser.error(reason)
    kept: Path | None = args.trials
    trials = [json.loads(line) for line in kept.read_text().splitlines()] if kept and kept.exists() else []
    done = {(trial["kind"], trial["job"], trial["seed"]) for trial in trials}
    # A kind disturbs another job with each seed: a third of the trials has every kind with every seed and job.
    turns = [(turn, s, kind) for turn in range(len(args.jobs)) for s in args.seeds for kind in args.kinds]
    due = [(kind, args.jobs[(turn + s + list(Kind).index(kind)) % len(args.jobs)], s) for turn, s, kind in turns]
    due = [each for each in due if each not in done and not args.table]
    for kind, needed in {Kind.CLOCK: args.faketime, Kind.HEAD_REPLACED: args.redis}.items():
        if not Path(needed).exists() and any(each == kind for each, *_ in due):
            print(f"no {needed}: {kind} is left out", flush=True)
            due = [each for each in due if each[0] != kind]
    if due:
        settings = dict(pair.split("=", 1) for pair in args.env)
        of_now = {"date": time.strftime("%Y-%m-%d"), "commit": _commit()}
        for trial in campaign(due, args.faketime, args.redis, settings):
            trials.append(asdict(trial) | {"is_well": trial.is_well} | of_now)
            if kept:
                kept.parent.mkdir(parents=True, exist_ok=True)
                with kept.open("a") as file:
                    file.write(json.dumps(trials[-1]) + "\n")
    print(f"\n{table(trials)}")
    return int(not all(trial["is_well"] for trial in trials))


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def campaign(
    due: Sequence[tuple[Kind, Job, int]], faketime: str, redis: str, settings: Mapping[str, str]
) -> Iterator[Trial]:
    with ExitStack() as stack:
        media = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="media-")))
        net = stack.enter_context(network(shared=[media, Path(faketime).parent, Path(redis).parents[1]]))
        site = Site(net, faketime, redis, settings)
        s3 = stack.enter_context(serve(site.listening))
        site.connect(s3)
        os.environ.update(s3.env)
        work = Work(media, s3.uri("campaign"))
        work.make()
        say = partial(print, flush=True)
        wanted: dict[Job, Any] = {}
        for job in {job: None for _, job, _ in due}:
            seconds, wanted[job] = run_undisturbed(site, work, job, s3.uri("campaign", f"undisturbed-{job}"))
            say(f"undisturbed {job}: {seconds:.0f} s")
        for number, (kind, job, seed) in enumerate(due, start=1):
            output = s3.uri("campaign", f"{kind}-{job}-{seed}")
            trial = run_trial(site, work, kind, job, seed, output, wanted[job])
            runs = "; ".join(
                f"{run.status or 'no answer'} after {run.seconds:.0f} s: {run.last_line}" for run in trial.runs
            )
            counts = f"lost {trial.lost} doubled {trial.doubled} wrong {trial.wrong}"
            say(f"{number}/{len(due)} {kind} {job} seed {seed}, {trial.hit}: {counts} {trial.remarks or ''} {runs}")
            yield trial


if __name__ == "__main__":
    sys.exit(main())
