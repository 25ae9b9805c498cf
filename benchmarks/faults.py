"""A fault campaign: the preparation job killed at seeded moments and run again, beside a run that nobody disturbed.

    python -m benchmarks.faults [--moments 20] [--seed 0] [--clips 480] [--kinds worker node …]

Each moment is a run of jobs/prepare_audioset.py over short media files made here, from a folder or from a media host on
loopback, with a SIGKILL in it; then the same command runs until it ends well. Only the command line and the data set's
files are used. How often a clip was worked on is seen by how often the kernel saw its media file opened, or the media
host was asked for it. Exit status 1 if a clip is lost, doubled, different or worked on more often than the bound says,
or if a file is left over.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import inotify_simple
import numpy as np
import psutil
import pyarrow.parquet as pq
from ray.cluster_utils import Cluster

from ast_core.labels import audioset_labels
from jobs.demo.media_server import FolderHandler, serving
from pipeline import dataset
from pipeline.dataset import PreparedDataset
from pipeline.prepare.clip import Reason
from tests import fakes

ROOT = Path(__file__).parents[1]
CPUS = 2
CLIP_S = 1.0
FAILED_BESIDE = 8
"""A task's clips that fail are in no shard: up to so many beside the largest one."""

MOST_RUNS = 6
LONGEST_RUN_S = 300.0
FETCHED_SHARE = 0.25
"""Of the clips, where they are fetched: a fetch takes half a second."""


class Kind(StrEnum):
    """Who is killed."""

    WORKER = "worker"
    """A worker process of Ray, at a task where one is."""
    NODE = "node"
    """The raylet of a second node, and with it that node's workers."""
    DRIVER = "driver"
    """The job's process alone; the next run starts at once, while what it leaves behind may still be at work."""
    MACHINE = "machine"
    """All processes of the job."""
    FETCHER = "fetcher"
    """A download worker of Ray, which fetches or waits for its chunk to be prepared."""
    CHILD = "child"
    """A process of its own in which a worker fetches or decodes one clip."""


class Setting(StrEnum):
    """Where the media are and the job runs."""

    FOLDER = "folder"
    CLUSTER = "folder, two nodes"
    HOST = "media host"


SETTINGS = {Kind.NODE: Setting.CLUSTER, Kind.FETCHER: Setting.HOST, Kind.CHILD: Setting.HOST}
"""Of kinds that are not killed in FOLDER."""


class Phase(StrEnum):
    """When. The shares of moments are in `PHASES`."""

    START = "start-up"
    """Until the first media file is opened; the moment is a share of that time."""
    WORK = "work"
    """The moment is a share of the media files opened."""
    END = "publishing"
    """From the last shard on; the moment is a share of the time until dataset.json is there."""


PHASES = (Phase.WORK, Phase.END, Phase.WORK, Phase.START, Phase.WORK, Phase.END)
"""Moments take these in turns."""


@dataclass(frozen=True)
class Moment:
    kind: Kind
    phase: Phase
    share: float

    def __str__(self) -> str:
        return f"{self.kind} at {self.share:.0%} of {self.phase}"


def moments_of(kind: Kind, count: int, rng: np.random.Generator) -> list[Moment]:
    """Spread over each phase: one moment drawn in each of as many equal parts as the phase has moments."""
    phases = [PHASES[i % len(PHASES)] for i in range(count)]
    moments = []
    for phase in Phase:
        of_phase = phases.count(phase)
        moments += [Moment(kind, phase, float((i + rng.random()) / of_phase)) for i in range(of_phase)]
    return moments


# --- what is prepared ---


@dataclass(frozen=True)
class World:
    """Two segment lists and media files of a second, some of which are of no use.

    Some clips stand in both lists; they are refused in the second.
    """

    lists: tuple[Path, Path]
    media: Path

    def command(self, output: Path, *, address: str | None = None, host: str | None = None) -> list[str]:
        argv = [sys.executable, "jobs/prepare_audioset.py", "--segments", *map(str, self.lists)]
        argv += ["--media-url", f"{host}/{{video_id}}"] if host else ["--audio-dir", str(self.media)]
        argv += ["--address", address] if address else ["--num-cpus", str(CPUS)]
        return [*argv, "--output", str(output)]


def make_world(folder: Path, num_clips: int, seed: int) -> World:
    rng = np.random.default_rng(seed)
    mids = audioset_labels().mids
    media = folder / "media"
    media.mkdir(parents=True)
    lists = (folder / "train_segments.csv", folder / "eval_segments.csv")
    rows: dict[Path, list[str]] = {path: [] for path in lists}
    for i in range(num_clips):
        video_id, labels = f"video{i:06d}", ",".join(rng.choice(mids, size=2, replace=False))
        line = f'{video_id}, 0.000, {CLIP_S:.3f}, "{labels}"'
        suffix = ("ogg", "flac")[i % 2]
        path = media / f"{video_id}.{suffix}"
        fault = i % 60
        if fault == 8:
            path.write_text("<html>Sign in to confirm you're not a bot</html>")
        elif fault == 17:
            fakes.write_media(path, np.zeros(round(CLIP_S * fakes.RATE_HZ), np.float32))
        elif fault == 27:
            fakes.write_media(path, fakes.noise(0.3 * CLIP_S, seed=i))  # the list says more
        elif fault == 37:
            pass  # no file
        elif fault == 47:
            line = f'{video_id}, 1.000, 0.000, "{labels}"'
        else:
            fakes.write_media(path, fakes.noise(CLIP_S, seed=seed * 1_000_003 + i))
        rows[lists[i % 5 == 0]].append(line)
        if i % 50 == 10:
            rows[lists[0]].append(line)  # in both splits, for 10 is a multiple of 5
        if i % 60 == 57:
            rows[lists[i % 5 == 0]].append(line)  # twice in one
    for path, lines in rows.items():
        path.write_text("# YTID, start_seconds, end_seconds, positive_labels\n" + "\n".join(lines) + "\n")
    return World(lists, media)


class Opens:
    """How often each media file was opened, as the kernel tells."""

    def __init__(self, folder: Path) -> None:
        self.count: Counter[str] = Counter()
        self._inotify = inotify_simple.INotify()
        self._inotify.add_watch(folder, inotify_simple.flags.OPEN)
        self._ended = threading.Event()
        self._overflow = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while not self._ended.is_set():
            for event in self._inotify.read(timeout=20):
                self._overflow |= bool(event.mask & inotify_simple.flags.Q_OVERFLOW)
                if event.name and not event.mask & inotify_simple.flags.ISDIR:
                    self.count[event.name] += 1

    def close(self) -> Counter[str]:
        time.sleep(0.1)  # what was opened last is told yet
        self._ended.set()
        self._thread.join()
        self._inotify.close()
        if self._overflow:
            raise RuntimeError("the kernel dropped events; take fewer clips")
        return self.count


class Fetches:
    """How often yt-dlp asked the media host for each recording."""

    def __init__(self, asked: Counter[str]) -> None:
        asked.clear()
        self.count = asked

    def close(self) -> Counter[str]:
        return Counter(self.count)


class CountingHandler(FolderHandler):
    asked: Counter[str]

    def answer(self, *, with_body: bool) -> None:
        # FFmpeg, which asks for the same recording then, a varying number of times, is known by this header.
        if "Icy-MetaData" not in self.headers:
            self.asked[self.path.removeprefix("/")] += 1
        super().answer(with_body=with_body)


# --- what came out ---


@dataclass(frozen=True)
class Content:
    """A data set, by `SPLIT/clip_id`."""

    clips: dict[str, tuple[Any, ...]]
    """Labels, frames, the stored hash and the hash of the stored bytes."""
    failures: Counter[tuple[str, str]]
    """Clip and reason."""
    doubled_in_index: int
    doubled_in_shards: int
    strangers: list[str]
    """Files that no index names."""
    facts: dict[str, Any]
    largest_shard: int

    def named(self) -> set[str]:
        return self.clips.keys() | {clip for clip, _ in self.failures}

    @property
    def retried(self) -> set[str]:
        """Names of clips that every run tries again."""
        return {clip.partition("/")[2] for clip, reason in self.failures if Reason(reason).retry}


def read_content(output: Path) -> Content:
    opened = PreparedDataset.open(str(output))
    known = {dataset.dataset_json(str(output)), dataset.labels_csv(str(output))}
    clips, facts = {}, {}
    failures: Counter[tuple[str, str]] = Counter()
    in_shards: Counter[str] = Counter()
    in_index: Counter[str] = Counter()
    largest = 0
    for split in opened.splits:
        info = opened.info["splits"][split]
        facts[split] = (info["clips"], info["frames"], info["fingerprint"], info["failures"])
        shards = {}
        for path in sorted(Path(dataset.shards_dir(str(output), split)).glob("*.parquet")):
            rows = pq.ParquetFile(path).read(["clip_id", "labels", "num_frames", "fbank_hash", "fbank"])
            in_shards.update(f"{split}/{clip_id}" for clip_id in rows["clip_id"].to_pylist())
            shards[path.name] = rows
            largest = max(largest, len(rows))
        index = opened.index(split).to_pylist()
        in_index.update(f"{split}/{row['clip_id']}" for row in index)
        for row in index:
            stored = shards[row["shard"]].slice(row["row"], 1)
            fbank = stored["fbank"].combine_chunks().flatten().flatten().to_numpy()
            (said,) = stored.drop_columns(["fbank"]).to_pylist()
            name = f"{split}/{said['clip_id']}"
            frames_agree = row["num_frames"] == said["num_frames"] == len(fbank) // dataset.FEATURES["num_mel_bins"]
            if row["clip_id"] != said["clip_id"] or row["labels"] != said["labels"] or not frames_agree:
                name += " (the index says otherwise)"
            digest = hashlib.blake2b(fbank.tobytes(), digest_size=8).hexdigest()
            clips[name] = (said["labels"], said["num_frames"], said["fbank_hash"], digest)
        for row in dataset.read_table(dataset.failures_file(str(output), split)).to_pylist():
            failures[f"{split}/{row['clip_id']}", row["reason"]] += 1
        known |= {dataset.index_file(str(output), split), dataset.failures_file(str(output), split)}
        known |= {f"{dataset.shards_dir(str(output), split)}/{row['shard']}" for row in index}
    # The report and the few clips that it plays are made anew at will, and are no part of the data.
    files = [path for path in output.rglob("*") if path.is_file() and "report" not in path.relative_to(output).parts[0]]
    return Content(
        clips=clips,
        failures=failures,
        doubled_in_index=sum(n - 1 for n in in_index.values()),
        doubled_in_shards=sum(n - 1 for n in in_shards.values()),
        strangers=sorted(str(path.relative_to(output)) for path in files if str(path) not in known),
        facts=facts,
        largest_shard=largest,
    )


@dataclass(frozen=True)
class Outcome:
    moment: Moment
    hit: str
    """Who was killed; empty where the job had ended before."""
    runs: int
    lost: int
    doubled_in_index: int
    doubled_in_shards: int
    orphans: list[str]
    differing: int
    twice: int
    """Clips worked on again, beyond those that failed and are tried again by every run."""
    bound: int

    @property
    def harm(self) -> str:
        """What must not be, in words; empty if all is well."""
        counts = {
            "lost": self.lost,
            "doubled in the index": self.doubled_in_index,
            "doubled in shards": self.doubled_in_shards,
            "left over": len(self.orphans),
            "differing": self.differing,
            f"done twice, more than {self.bound}": self.twice if self.twice > self.bound else 0,
        }
        return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


def compare(
    moment: Moment, hit: str, runs: int, calm: "Calm", content: Content, opens: Counter[str], bound: int
) -> Outcome:
    wanted = calm.content
    common = wanted.clips.keys() & content.clips.keys()
    differing = sum(wanted.clips[clip] != content.clips[clip] for clip in common)
    differing += len(content.named() - wanted.named())
    differing += sum(((wanted.failures - content.failures) + (content.failures - wanted.failures)).values())
    differing += sum(wanted.facts[split] != content.facts.get(split) for split in wanted.facts)
    again = {
        name: -(-(count - calm.opens[name]) // max(calm.opens[name], 1))
        for name, count in opens.items()
        if f"{Path(name).stem}_0.000" not in wanted.retried
    }
    return Outcome(
        moment=moment,
        hit=hit,
        runs=runs,
        lost=len((wanted.named() - content.named()) | (wanted.clips.keys() - content.clips.keys())),
        doubled_in_index=content.doubled_in_index,
        doubled_in_shards=content.doubled_in_shards,
        orphans=content.strangers,
        differing=differing,
        twice=sum(max(count, 0) for count in again.values()),
        bound=bound,
    )


# --- running and killing ---


@dataclass(frozen=True)
class Calm:
    """The run that nobody disturbed, and how long its phases took."""

    content: Content
    opens: Counter[str]
    num_shards: int
    start_s: float
    end_s: float
    whole_s: float


@dataclass
class Job:
    """The command in a process of its own."""

    process: subprocess.Popen[bytes]
    began_s: float
    seen: dict[int, psutil.Process] = field(default_factory=dict)

    def descendants(self) -> list[psutil.Process]:
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        self.seen |= {each.pid: each for each in found}
        return found

    def elapsed_s(self) -> float:
        return time.monotonic() - self.began_s


@dataclass
class Campaign:
    """Worlds, their calm runs, and a cluster of two nodes or a media host where a moment wants one."""

    folder: Path
    num_clips: int
    seed: int

    def __post_init__(self) -> None:
        self.ray_folder = self.folder / "ray"
        self.cluster: Cluster | None = None
        self._host: str | None = None
        self._asked: Counter[str] = Counter()
        self._worlds: dict[bool, World] = {}
        self._calm: dict[Setting, Calm] = {}
        self._outputs = 0
        self._left: dict[int, psutil.Process] = {}
        self._open = ExitStack()

    def close(self) -> None:
        self._end_what_is_left()
        self._open.close()

    def world(self, setting: Setting) -> World:
        is_fetched = setting == Setting.HOST
        if is_fetched not in self._worlds:
            num_clips = round(self.num_clips * FETCHED_SHARE) if is_fetched else self.num_clips
            folder = self.folder / ("fetched" if is_fetched else "read")
            self._worlds[is_fetched] = make_world(folder, num_clips, self.seed)
        return self._worlds[is_fetched]

    def trial(self, moment: Moment) -> Outcome:
        """One kill, runs until one ends well, and the comparison."""
        setting = SETTINGS.get(moment.kind, Setting.FOLDER)
        calm = self.calm(setting)
        output = self._new_output()
        opens = self._count_work(setting)
        try:
            job = self._start(output, setting)
            hit = self._disturb(job, moment, calm, output, opens)
            status = self._wait(job)
            runs = 1
            while status:
                if runs == MOST_RUNS:
                    raise RuntimeError(f"{moment}: run {runs} ended with {status}; see {self.folder}/job.log")
                status = self._wait(self._start(output, setting))
                runs += 1
        finally:
            counted = opens.close()
            self._end_what_is_left()
            if setting == Setting.CLUSTER and self.cluster:
                self._replace_second_node(self.cluster)
        # A node takes with it the clips under way and what its last task has said but the driver not heard yet.
        at_work = 1 if moment.kind in (Kind.WORKER, Kind.FETCHER) else CPUS
        bound = 1 if moment.kind == Kind.CHILD else at_work * (calm.content.largest_shard + FAILED_BESIDE)
        if not hit:
            bound = 0
        return compare(moment, hit, runs, calm, read_content(output), counted, bound)

    def calm(self, setting: Setting) -> Calm:
        if setting not in self._calm:
            self._calm[setting] = self._run_calm(setting)
        return self._calm[setting]

    def _run_calm(self, setting: Setting) -> Calm:
        world = self.world(setting)
        if setting == Setting.CLUSTER:
            self.cluster = start_cluster(self.ray_folder / "cluster")
            self._open.callback(self.cluster.shutdown)
        if setting == Setting.HOST:
            handler = type("Handler", (CountingHandler,), {"folder": world.media, "asked": self._asked})
            self._host = self._open.enter_context(serving(handler))
        output = self._new_output()
        opens = self._count_work(setting)
        try:
            job = self._start(output, setting)
            while not opens.count and job.process.poll() is None:
                time.sleep(0.002)
            start_s = job.elapsed_s()
            if self._wait(job):
                raise RuntimeError(f"the undisturbed run failed: {(self.folder / 'job.log').read_text()[-2000:]}")
            whole_s = job.elapsed_s()
        finally:
            counted = opens.close()
        last_shard = max(path.stat().st_mtime for path in output.glob("*/shards/*.parquet"))
        num_shards = len(list(output.glob("*/shards/*.parquet")))
        end_s = (output / "dataset.json").stat().st_mtime - last_shard
        return Calm(read_content(output), counted, num_shards, start_s, end_s, whole_s)

    def _count_work(self, setting: Setting) -> Opens | Fetches:
        return Fetches(self._asked) if setting == Setting.HOST else Opens(self.world(setting).media)

    def _new_output(self) -> Path:
        self._outputs += 1
        return self.folder / f"data-{self._outputs:03d}"

    def _start(self, output: Path, setting: Setting) -> Job:
        env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        env |= {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(self.ray_folder)}
        argv = self.world(setting).command(
            output,
            address=self.cluster.address if setting == Setting.CLUSTER and self.cluster else None,
            host=self._host if setting == Setting.HOST else None,
        )
        with open(self.folder / "job.log", "ab") as log:
            process = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
        return Job(process, time.monotonic())

    def _wait(self, job: Job) -> int:
        """The job's status. One that hangs is ended, as its user would."""
        while job.process.poll() is None:
            job.descendants()
            if job.elapsed_s() > LONGEST_RUN_S:
                job.process.kill()
            try:
                job.process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                continue
        self._left |= job.seen
        return job.process.wait()

    def _disturb(self, job: Job, moment: Moment, calm: Calm, output: Path, opens: Opens | Fetches) -> str:
        """Wait for the moment and kill; who it was, or nothing where the job was quicker."""
        while job.process.poll() is None and not _has_come(moment, job, calm, output, opens):
            time.sleep(0.002)
        if moment.phase == Phase.END:
            time.sleep(moment.share * calm.end_s)
        while job.process.poll() is None:
            hit = self._kill(job, moment)
            if hit:
                return hit
            time.sleep(0.005)
        return ""

    def _kill(self, job: Job, moment: Moment) -> str:
        if moment.kind == Kind.NODE:
            assert self.cluster is not None
            (node,) = self.cluster.worker_nodes
            os.kill(node.all_processes["raylet"][0].process.pid, 9)
            return "raylet"
        descendants = job.descendants()
        if moment.kind in (Kind.WORKER, Kind.FETCHER, Kind.CHILD):
            if moment.kind == Kind.WORKER:
                # One that decodes, where there is one: of the others little is lost.
                found = sorted(ray_workers(descendants), key=lambda pair: "Stages" not in pair[0])[:1]
            elif moment.kind == Kind.FETCHER:
                found = [pair for pair in ray_workers(descendants) if "FetchAndPrepare" in pair[0]]
            else:
                found = list(isolated_children(descendants))
            if not found:
                return ""
            name, process = found[int(moment.share * len(found))]
            try:
                process.kill()
            except psutil.NoSuchProcess:
                return ""
            return name
        job.process.kill()
        if moment.kind == Kind.MACHINE:
            for each in descendants:
                try:
                    each.kill()
                except psutil.NoSuchProcess:
                    continue
        return moment.kind.value

    def _end_what_is_left(self) -> None:
        """Ray ends its processes after their driver; those that are slow to do so would take the next run's time."""
        _, alive = psutil.wait_procs(list(self._left.values()), timeout=3)
        for each in alive:
            each.kill()
        self._left = {}

    def _replace_second_node(self, cluster: Cluster) -> None:
        for node in list(cluster.worker_nodes):
            cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=1)


def start_cluster(folder: Path, num_nodes: int = 2) -> Cluster:
    """Nodes of one CPU on this machine."""
    # A dead node is noticed after 1.5 s instead of 15, which is all that the wait would be.
    noticing = {"health_check_period_ms": 500, "health_check_failure_threshold": 3}
    node: dict[str, Any] = {"num_cpus": 1, "temp_dir": str(folder)}
    cluster = Cluster(head_node_args=node | {"_system_config": noticing}, initialize_head=True)
    for _ in range(num_nodes - 1):
        cluster.add_node(num_cpus=1)
    return cluster


def _has_come(moment: Moment, job: Job, calm: Calm, output: Path, opens: Opens | Fetches) -> bool:
    if moment.phase == Phase.START:
        return job.elapsed_s() >= moment.share * calm.start_s
    if moment.phase == Phase.WORK:
        return len(opens.count) >= moment.share * len(calm.opens)
    return len(list(output.glob("*/shards/*.parquet"))) >= calm.num_shards


def ray_workers(descendants: Sequence[psutil.Process]) -> Iterator[tuple[str, psutil.Process]]:
    """Ray's workers and what they are at; not the raylet's own agents, nor what a worker has started."""
    for each in descendants:
        try:
            name, parent = (each.cmdline() or [""])[0], each.parent()
            is_worker = name.startswith("ray::") and not name.split()[0].endswith("Agent")
            if is_worker and parent is not None and parent.name() == "raylet":
                yield name, each
        except psutil.NoSuchProcess:
            continue


def isolated_children(descendants: Sequence[psutil.Process]) -> Iterator[tuple[str, psutil.Process]]:
    """Processes of `pipeline.prepare.sandbox` and what they are for."""
    for each in descendants:
        try:
            command = each.cmdline()
        except psutil.NoSuchProcess:
            continue
        if "pipeline.prepare.sandbox" in command:
            yield command[command.index("pipeline.prepare.sandbox") + 1], each


@contextmanager
def campaign(*, num_clips: int, seed: int) -> Iterator[Campaign]:
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True))
        made = Campaign(Path(folder), num_clips, seed)
        stack.callback(made.close)
        yield made


# --- the table ---


def row_of(kind: Kind, outcomes: Sequence[Outcome]) -> str:
    hit = [outcome for outcome in outcomes if outcome.hit]
    sums = [sum(getattr(o, name) for o in outcomes) for name in ("lost", "doubled_in_index", "doubled_in_shards")]
    cells: list[object] = [kind.value, f"{len(hit)} of {len(outcomes)}", max(o.runs for o in outcomes), *sums]
    cells += [sum(len(o.orphans) for o in outcomes), sum(o.differing for o in outcomes)]
    cells += [f"{max(o.twice for o in outcomes)} ({max(o.bound for o in outcomes)})"]
    return f"| {' | '.join(map(str, cells))} |"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20, help="of each kind (default 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clips", type=int, default=480)
    parser.add_argument("--kinds", nargs="+", type=Kind, choices=list(Kind), default=list(Kind))
    args = parser.parse_args(argv)
    outcomes: dict[Kind, list[Outcome]] = {}
    with campaign(num_clips=args.clips, seed=args.seed) as made:
        for kind in args.kinds:
            rng = np.random.default_rng([args.seed, list(Kind).index(kind)])
            outcomes[kind] = []
            for moment in moments_of(kind, args.moments, rng):
                outcome = made.trial(moment)
                outcomes[kind].append(outcome)
                said = f"killed {outcome.hit}" if outcome.hit else "ended before"
                said += f", {outcome.runs} runs, {outcome.twice} clips done twice"
                print(f"{moment}: {said}. {outcome.harm or 'all well'} {' '.join(outcome.orphans)}", file=sys.stderr)
        calms = {setting: made.calm(setting) for setting in {SETTINGS.get(kind, Setting.FOLDER) for kind in args.kinds}}
    for setting, calm in calms.items():
        content = calm.content
        print(
            f"{setting}: {len(content.clips)} clips and {content.failures.total()} failures "
            f"in {calm.num_shards} shards, seed {args.seed}; undisturbed {calm.whole_s:.0f} s, "
            f"publishing {calm.end_s:.1f} s of them"
        )
    print(
        "\n| killed | moments | most runs | lost | doubled in index | doubled in shards | left over | differing |",
        end="",
    )
    print(" done twice, most (bound) |\n|---|---|---|---|---|---|---|---|---|")
    for kind, of_kind in outcomes.items():
        print(row_of(kind, of_kind))
    return int(any(outcome.harm for of_kind in outcomes.values() for outcome in of_kind))


if __name__ == "__main__":
    sys.exit(main())
