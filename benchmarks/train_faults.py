"""Fault campaign of training: disturb a run at a seeded step in eleven ways, and compare with an undisturbed run.

    python -m benchmarks.train_faults [--seed 0]
        [--kinds worker driver node notice elastic disk corrupt list grow far async]

Two workers train a tiny model on a tiny generated data set, with a checkpoint at every step (except for `notice` and
`far`). The benchmark only uses the command line, the run's files, and what a cloud does to nodes. It reads from the
workers' logs which steps were trained. The kind `disk` mounts a tmpfs, so only root runs it by default. The exit status
is 1 if a run does not end as expected, does not have each step exactly once in its records, has other losses or another
mAP, or resumed from an older checkpoint than the last good one.
"""

import argparse
import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import numpy as np
import psutil
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # of C++
from ray.core.generated import autoscaler_pb2

from benchmarks.faults import ROOT, Job, ray_workers, start_cluster
from jobs.common import EXIT_USER_ERROR
from pipeline.train.checkpoints import RAY_SNAPSHOT
from tests import fakes

WORKERS, EPOCHS, STEPS, BATCH_SIZE = 2, 3, 6, 10
"""Steps per epoch."""
RECIPE = fakes.SMALL_RECIPE | {
    "norm_stats": "data",
    "batch_size": str(BATCH_SIZE),
    "epochs": str(EPOCHS),
    "wa_start": "2",
    "wa_end": "3",
    "precision": "fp32",
}

SAME_LOSS, SAME_MAP = 1e-6, 1e-6
"""Largest allowed difference of a loss (relative) and of an mAP, with the same number of workers."""
NEAR_LOSS, NEAR_MAP = 1e-3, 0.02
"""Largest allowed differences with another number of workers, which adds float32 in another order."""

POLL_S = 0.1
"""By default, Ray Train's controller registers one checkpoint every 2 s and looks for a notice every 5 s. The tiny run
would end before."""
NOTICE_S = 60
"""Announced time between the notice and the end of the node. The node ends as soon as the checkpoint is registered."""
RESERVED_AFTER_S = 25
"""Ray looks every 20 s for CPUs of a new node, which Ray Train can then use. The tiny run would end before, so its
worker is paused."""
LONGEST_RUN_S = 240.0
RESUMED = r"resuming after epoch (\d+)(?:, step (\d+) of the next)?, on (\d+) worker"
"""The line that a worker logs."""
DISK_MB = 1024


class Kind(StrEnum):
    """The disturbance of a run."""

    WORKER = "worker"
    """SIGKILL to one training worker. The command continues by itself."""
    DRIVER = "driver"
    """SIGKILL to the driver and all its processes. The same command runs again."""
    NODE = "node"
    """The node of one worker is replaced. The command continues by itself."""
    NOTICE = "notice"
    """As `node`, after a notice of preemption. The run saves within an epoch only after the notice."""
    ELASTIC = "elastic"
    """The node of one worker is lost. With --num-workers 1:2 the command continues with one worker."""
    DISK = "disk"
    """The run's disk is full until the command ends. Then there is room, and the same command runs again."""
    CORRUPT = "corrupt"
    """As `driver`, and the latest checkpoint is partly overwritten before the same command runs again."""
    LIST = "list"
    """As `driver`, and Ray's list of checkpoints is truncated before the same command runs again."""
    GROW = "grow"
    """A second node is added. With --num-workers 1:2 the command continues with two workers."""
    FAR = "far"
    """As `worker`, in a run that saves only at the ends of epochs."""
    ASYNC = "async"
    """SIGKILL to the evaluation of an epoch, in a run with --async-validation. Ray starts it again."""


SAVE_AT_EPOCHS = {Kind.NOTICE, Kind.FAR}
"""Kinds that save only at the ends of epochs. The others save at every step."""


@dataclass(frozen=True)
class Moment:
    """The step of the disturbance: as soon as its checkpoint is registered or, if none is saved, it is logged.

    For `async` it is the end of an epoch, as soon as its evaluation runs; for the other kinds never such a step.
    """

    step: int
    """Step of the run, from 1."""
    drawn: int
    """Index of the worker, in the order of process ids."""

    def __str__(self) -> str:
        return f"epoch {1 + self.step // STEPS}, step {self.step % STEPS}"


def moment_of(kind: Kind, seed: int) -> Moment:
    rng = np.random.default_rng([seed, list(Kind).index(kind)])
    if kind == Kind.ASYNC:
        return Moment(STEPS * int(rng.integers(1, EPOCHS)), 0)
    # `corrupt` and `far` need an earlier checkpoint. The last steps may end before a signal arrives.
    first = STEPS + 1 if kind == Kind.FAR else 2
    steps = [step for step in range(first, EPOCHS * STEPS - 3) if step % STEPS]
    return Moment(int(rng.choice(steps)), int(rng.integers(WORKERS)))


# --- the files of a run ---


@dataclass(frozen=True)
class Run:
    """The folder of a run."""

    path: Path

    def checkpoints(self) -> list[tuple[int, str]]:
        """The registered checkpoints as steps done and folder, oldest first. Empty while Ray writes the list."""
        try:
            known = json.loads((self.path / "checkpoints" / RAY_SNAPSHOT).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return []
        results = known["checkpoint_results"]
        done = [each["metrics"]["epochs_done"] * STEPS + each["metrics"]["steps_done"] for each in results]
        return list(zip(done, [each["checkpoint_dir_name"] for each in results], strict=True))

    def strangers(self) -> list[str]:
        """Folders of unregistered checkpoints."""
        known = {name for _, name in self.checkpoints()}
        return sorted(path.name for path in (self.path / "checkpoints").glob("epoch-*") if path.name not in known)

    def lines(self) -> list[str]:
        """The lines of metrics.jsonl."""
        try:
            return (self.path / "metrics.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []

    def losses(self) -> list[tuple[int, float]]:
        """Step and loss of each record."""
        records = map(json.loads, self.lines())
        return [(record["step"], record["loss"]) for record in records if record["kind"] == "step"]

    def maps(self) -> list[float]:
        """The mAP of the best epoch, of the averaged weights and of the running ensemble."""
        summary = json.loads((self.path / "summary.json").read_text())
        return [figures["map"] for figures in (summary, summary["averaged"], summary["running_ensemble"])]


@dataclass(frozen=True)
class WorkerLogs:
    """The workers' logs, from Ray's files, which are complete even if the driver was killed."""

    trained: Counter[int]
    """How often each step was trained."""
    resumed: list[int]
    """Steps done at each resume, unordered."""
    workers: list[int]
    """Number of workers after each resume."""

    @property
    def twice(self) -> int:
        return sum(count - 1 for count in self.trained.values())


def read_logs(ray_folder: Path) -> WorkerLogs:
    trained: Counter[int] = Counter()
    resumed, workers = [], []
    for path in {path.resolve() for path in ray_folder.rglob("worker-*")}:
        text = path.read_text(errors="replace")
        trained.update((int(e) - 1) * STEPS + int(s) for e, s in re.findall(rf"epoch (\d+)  step (\d+)/{STEPS} ", text))
        for epochs, step, on in re.findall(RESUMED, text):
            resumed.append(int(epochs) * STEPS + int(step or 0))
            workers.append(int(on))
    return WorkerLogs(trained, resumed, workers)


# --- running and disturbing ---


@dataclass
class Trial:
    """One disturbed run, up to its end."""

    kind: Kind
    moment: Moment
    run: Run
    hit: str = ""
    """What was disturbed; empty if the run had ended before."""
    statuses: list[int] = field(default_factory=list)
    """Exit status of each command."""
    before: list[str] = field(default_factory=list)
    """Lines of metrics.jsonl when last read before resuming."""
    last_good: int = 0
    """Steps done in the newest whole checkpoint that was registered at that time."""
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


@dataclass
class Campaign:
    folder: Path
    seed: int

    def __post_init__(self) -> None:
        self.data = self.folder / "data"
        fakes.write_data(str(self.data), splits=(("train", STEPS * BATCH_SIZE), ("eval", 21)))
        (self.folder / "tmp").mkdir()
        self._left: dict[int, psutil.Process] = {}

    def undisturbed(self) -> tuple[Run, float]:
        """Train the undisturbed run. Returns it and its seconds."""
        run = Run(self.folder / "undisturbed" / "run")
        job = self._start(run)
        if self._wait(job):
            raise RuntimeError(f"the undisturbed run failed: {self._log(run).read_text()[-3000:]}")
        seconds = job.elapsed_s()
        self._end_what_is_left()
        return run, seconds

    def trial(self, kind: Kind) -> tuple[Trial, WorkerLogs]:
        trial = Trial(kind, moment_of(kind, self.seed), Run(self.folder / kind / "run"))
        ray_folder, began_s = self._ray_folder(trial.run), time.monotonic()
        try:
            if kind in (Kind.NODE, Kind.NOTICE, Kind.ELASTIC):
                self._lose_node(trial)
            elif kind == Kind.GROW:
                self._gain_node(trial)
            elif kind == Kind.DISK:
                self._fill_disk(trial)
            else:
                self._kill(trial)
        finally:
            self._end_what_is_left()
        trial.seconds = time.monotonic() - began_s
        return trial, read_logs(ray_folder)

    def _kill(self, trial: Trial) -> None:
        is_async = trial.kind == Kind.ASYNC
        job = self._start(trial.run, saves=trial.kind not in SAVE_AT_EPOCHS, validates_async=is_async)
        if self._await_moment(job, trial):
            descendants = job.descendants()
            if is_async:
                _await_evaluation(job).kill()
                trial.hit = "an evaluation"
            elif trial.kind in (Kind.WORKER, Kind.FAR):
                victim = sorted(_training_workers(descendants), key=lambda each: each.pid)[trial.moment.drawn]
                trial.hit = "a training worker"
                victim.kill()
            else:
                trial.hit = f"{1 + len(descendants)} processes"
                job.process.kill()
                for each in descendants:
                    _kill_if_there(each)
        self._record(trial)
        trial.statuses.append(self._wait(job))
        if trial.kind in (Kind.WORKER, Kind.FAR, Kind.ASYNC):
            return
        self._end_what_is_left()
        self._record(trial)
        if trial.kind == Kind.CORRUPT:
            *_, (trial.last_good, _), (_, latest) = trial.run.checkpoints()
            with (trial.run.path / "checkpoints" / latest / "state.pt").open("r+b") as file:
                file.seek(file.seek(0, os.SEEK_END) // 2)
                file.write(b"\0" * 4096)
            trial.hit += f", then {latest}"
        if trial.kind == Kind.LIST:
            listed = trial.run.path / "checkpoints" / RAY_SNAPSHOT
            listed.write_bytes(listed.read_bytes()[: listed.stat().st_size // 2])
            trial.hit += ", then the list"
        trial.statuses.append(self._wait(self._start(trial.run)))

    def _lose_node(self, trial: Trial) -> None:
        cluster = start_cluster(self._ray_folder(trial.run))
        try:
            num_workers = f"1:{WORKERS}" if trial.kind == Kind.ELASTIC else str(WORKERS)
            job = self._start(trial.run, num_workers, cluster.address, saves=trial.kind not in SAVE_AT_EPOCHS)
            (node,) = cluster.worker_nodes
            is_due = self._await_moment(job, trial)
            if is_due and trial.kind == Kind.NOTICE:
                is_due = self._give_notice(job, trial, cluster.address, node.node_id)
            if is_due:
                cluster.remove_node(node, allow_graceful=False)
                trial.hit = "a node"
                self._record(trial)
                if trial.kind != Kind.ELASTIC:
                    cluster.add_node(num_cpus=1)
            trial.statuses.append(self._wait(job))
        finally:
            cluster.shutdown()

    def _gain_node(self, trial: Trial) -> None:
        cluster = start_cluster(self._ray_folder(trial.run), num_nodes=1)
        try:
            job = self._start(trial.run, f"1:{WORKERS}", cluster.address)
            if self._await_moment(job, trial):
                trial.hit = "a new node"
                (worker,) = _training_workers(psutil.Process().children(recursive=True))
                worker.suspend()
                self._record(trial)
                cluster.add_node(num_cpus=1)
                time.sleep(RESERVED_AFTER_S)
                worker.resume()
            trial.statuses.append(self._wait(job))
        finally:
            cluster.shutdown()

    def _give_notice(self, job: Job, trial: Trial, address: str, node_id: str) -> bool:
        """Drain the node. Returns False if the run then saved no checkpoint within an epoch."""
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")  # type: ignore[attr-defined]
        deadline_ms = round((time.time() + NOTICE_S) * 1000)
        is_accepted, why_not = GcsClient(address=address).drain_node(node_id, reason, "a spot market", deadline_ms)
        if not is_accepted:
            raise RuntimeError(f"Ray refuses to drain the node: {why_not}")
        while job.process.poll() is None and job.elapsed_s() < LONGEST_RUN_S:
            if any(steps % STEPS for steps, _ in trial.run.checkpoints()):
                return True
            time.sleep(0.005)
        return False

    def _fill_disk(self, trial: Trial) -> None:
        with _small_disk(trial.run.path.parent):
            job = self._start(trial.run)
            filler = trial.run.path.parent / "filler"
            if self._await_moment(job, trial):
                trial.hit = "the disk"
                trial.statuses.append(self._wait(job, lambda: _fill(filler), every_s=0.02))
                self._record(trial)
                last_line = self._log(trial.run).read_text().rstrip().splitlines()[-1]
                print(f"{trial.kind}: {last_line}", file=sys.stderr)
                if not (last_line.startswith("error: ") and os.strerror(errno.ENOSPC) in last_line):
                    trial.faults.append("the error's last line does not say so")
                filler.unlink()
                job = self._start(trial.run)
            trial.statuses.append(self._wait(job))
            outlives_disk = self.folder / "disk-run"
            shutil.copytree(trial.run.path, outlives_disk)
        trial.run = Run(outlives_disk)

    def _await_moment(self, job: Job, trial: Trial) -> bool:
        """Wait for the moment. Returns False if the job ended before."""
        by_logs = trial.kind in SAVE_AT_EPOCHS
        while job.process.poll() is None and job.elapsed_s() < LONGEST_RUN_S:
            if by_logs:
                done = max(read_logs(self._ray_folder(trial.run)).trained, default=0)
            else:
                done = max((steps for steps, _ in trial.run.checkpoints()), default=0)
            if done >= trial.moment.step:
                return True
            time.sleep(0.05 if by_logs else 0.005)
        return False

    def _record(self, trial: Trial) -> None:
        known = trial.run.checkpoints()
        trial.before, trial.last_good = trial.run.lines(), known[-1][0] if known else 0

    def _start(
        self,
        run: Run,
        num_workers: str = str(WORKERS),
        address: str | None = None,
        *,
        saves: bool = True,
        validates_async: bool = False,
    ) -> Job:
        """Start the command. If `saves`, it saves a checkpoint at every step."""
        argv = [sys.executable, "jobs/train.py", "--recipe", "audioset-full", "--data", str(self.data)]
        argv += ["--train-splits", "train", "--eval-splits", "eval", "--output", str(run.path)]
        argv += [word for key, value in RECIPE.items() for word in (f"--{key}", value)]
        argv += ["--num-workers", num_workers, "--cpus-per-worker", "1", "--device", "cpu"]
        argv += ["--resize-every-s", "1", "--log-every-steps", "1", "--checkpoint-every-s", "0" if saves else "3600"]
        argv += ["--async-validation"] if validates_async else []
        argv += ["--address", address] if address else ["--num-cpus", str(WORKERS + validates_async)]
        env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        env |= {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(self._ray_folder(run)), "TMPDIR": str(self.folder / "tmp")}
        env |= {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": str(POLL_S), "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": str(POLL_S)}
        with self._log(run).open("ab") as log:
            process = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
        return Job(process, time.monotonic())

    def _wait(self, job: Job, meanwhile: Callable[[], None] = lambda: None, every_s: float = 0.5) -> int:
        """The job's status. A job that hangs is killed."""
        looked_s = float("-inf")
        while job.process.poll() is None:
            meanwhile()
            if job.elapsed_s() - looked_s >= 0.5:
                job.descendants()
                looked_s = job.elapsed_s()
            if job.elapsed_s() > LONGEST_RUN_S:
                job.process.kill()
            with suppress(subprocess.TimeoutExpired):
                job.process.wait(timeout=every_s)
        self._left |= job.seen
        return job.process.wait()

    def _end_what_is_left(self) -> None:
        """End Ray's remaining processes, which would slow down the next run. Ray ends them after their driver."""
        _, alive = psutil.wait_procs(list(self._left.values()), timeout=3)
        for each in alive:
            _kill_if_there(each)
        self._left = {}

    def _log(self, run: Run) -> Path:
        return self.folder / f"{run.path.parent.name}.log"

    def _ray_folder(self, run: Run) -> Path:
        return self.folder / f"ray-{run.path.parent.name}"


def _training_workers(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    return [each for name, each in ray_workers(processes) if "TrainWorker" in name]


def _await_evaluation(job: Job) -> psutil.Process:
    while job.process.poll() is None and job.elapsed_s() < LONGEST_RUN_S:
        for name, each in ray_workers(job.descendants()):
            if "run_validation_fn" in name:
                return each
    raise RuntimeError("no evaluation came")


def _kill_if_there(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()


@contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def _fill(filler: Path) -> None:
    """Fill the disk, to the last page."""
    with filler.open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while file.write(b"\0" * size) == size:
                    pass
            except OSError as err:
                if err.errno != errno.ENOSPC:
                    raise


# --- the table ---


@dataclass(frozen=True)
class Outcome:
    trial: Trial
    largest_loss: float
    """Largest relative difference of a loss."""
    largest_map: float
    twice: int
    faults: list[str]
    """The faults in words."""


def outcome_of(trial: Trial, undisturbed: Run, logs: WorkerLogs) -> Outcome:
    faults = list(trial.faults)
    again = {Kind.DRIVER: [-9, 0], Kind.CORRUPT: [-9, 0], Kind.LIST: [-9, 0], Kind.DISK: [EXIT_USER_ERROR, 0]}
    expected = again.get(trial.kind, [0])
    if not trial.hit:
        faults.append("ended before the moment")
    if trial.statuses != expected:
        faults.append(f"exit statuses {trial.statuses} instead of {expected}")
    wanted, losses = undisturbed.losses(), trial.run.losses()
    if [step for step, _ in losses] != [step for step, _ in wanted]:
        faults.append("the records have not each step once")
    if trial.kind == Kind.ASYNC:
        if logs.resumed:
            faults.append(f"the workers began again, from {logs.resumed}")
    elif not logs.resumed or min(logs.resumed) < trial.last_good:
        faults.append(f"went on from {logs.resumed}, the last good checkpoint was {trial.last_good}")
    expected_workers = {Kind.ELASTIC: 1}.get(trial.kind, WORKERS)
    if not set(logs.workers) <= {expected_workers}:
        faults.append(f"went on with {logs.workers} workers instead of {expected_workers}")
    if trial.kind == Kind.CORRUPT and max(logs.resumed, default=0) != trial.last_good:
        faults.append("went on from the corrupt checkpoint")
    kept = [line for line in trial.before if json.loads(line)["step"] <= min(logs.resumed, default=math.inf)]
    if trial.run.lines()[: len(kept)] != kept:
        faults.append("records that were kept have changed")
    pairs = zip(losses, wanted, strict=False)
    loss = max((abs(ours / theirs - 1) for (_, ours), (_, theirs) in pairs), default=float("nan"))
    mean_ap = float("nan")
    if trial.statuses[-1] == 0:
        mean_ap = max(abs(ours - theirs) for ours, theirs in zip(trial.run.maps(), undisturbed.maps(), strict=True))
    most_loss, most_map = (NEAR_LOSS, NEAR_MAP) if trial.kind in (Kind.ELASTIC, Kind.GROW) else (SAME_LOSS, SAME_MAP)
    if not loss <= most_loss:
        faults.append(f"losses differ by more than {most_loss:g}")
    if not mean_ap <= most_map:
        faults.append(f"mAP differs by more than {most_map:g}")
    return Outcome(trial, loss, mean_ap, logs.twice, faults)


def row_of(outcome: Outcome) -> str:
    trial = outcome.trial
    ended = "; ".join(outcome.faults) or ("yes, run again" if len(trial.statuses) > 1 else "yes, by itself")
    cells: list[object] = [trial.kind.value, trial.moment, ended, f"{outcome.largest_loss:.1g}"]
    cells += [f"{outcome.largest_map:.1g}", outcome.twice, f"{trial.seconds:.0f}"]
    return f"| {' | '.join(map(str, cells))} |"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    usual = [kind for kind in Kind if kind != Kind.DISK or os.geteuid() == 0]
    parser.add_argument("--kinds", nargs="+", type=Kind, choices=list(Kind), default=usual)
    args = parser.parse_args(argv)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder:
        campaign = Campaign(Path(folder), args.seed)
        undisturbed, undisturbed_s = campaign.undisturbed()
        for kind in args.kinds:
            trial, logs = campaign.trial(kind)
            outcome = outcome_of(trial, undisturbed, logs)
            outcomes.append(outcome)
            print(
                f"{kind} at {trial.moment}: hit {trial.hit or 'nothing'}; went on from {logs.resumed}; "
                f"left over {trial.run.strangers()}. {'; '.join(outcome.faults) or 'all well'}",
                file=sys.stderr,
            )
    print(f"{EPOCHS} epochs of {STEPS} steps, {WORKERS} workers, seed {args.seed}; undisturbed {undisturbed_s:.0f} s\n")
    print("| disturbed | at | ended well | largest difference of a loss | of an mAP | steps done twice | seconds |")
    print("|---|---|---|---|---|---|---|")
    for outcome in outcomes:
        print(row_of(outcome))
    return int(any(outcome.faults for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
