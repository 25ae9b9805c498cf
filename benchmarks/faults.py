"""Fault campaign: kill the preparation job at seeded moments, run it again, and compare with an undisturbed run.

    python -m benchmarks.faults [--moments 20] [--seed 0] [--clips 480] [--kinds worker node …]

Each moment is a run of jobs/prepare_audioset.py on short generated media files, from a folder or from a media host on
loopback, that gets a SIGKILL. Then the same command runs until it ends with status 0. The benchmark uses only the
command line and the data set's files. It counts how often a clip was processed by how often its media file was opened,
according to the kernel, or requested from the media host. The exit status is 1 if a clip is lost, doubled, different
or processed more often than the bound allows, or if a file is left over.
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

from ast_core.features import KALDI128
from ast_core.labels import audioset_labels
from jobs.demo.media_server import FolderHandler, serving
from pipeline import dataset
from pipeline.dataset import PreparedDataset
from pipeline.prepare.clip import Reason
from tests import fakes

ROOT = Path(__file__).parents[1]
CPUS = 2
CLIP_S = 1.0
MAX_FAILED_PER_TASK = 8
"""Failed clips of a task, which are in no shard: at most this many in addition to those of the largest shard."""

MOST_RUNS = 6
LONGEST_RUN_S = 300.0
FETCHED_SHARE = 0.25
"""Share of the clips that the fetching setting has, because a fetch takes half a second."""


class Kind(StrEnum):
    """The process that is killed."""

    WORKER = "worker"
    """A worker process of Ray, if possible one that runs a task."""
    NODE = "node"
    """The raylet of a second node, and with it the node's workers."""
    DRIVER = "driver"
    """Only the job's process. The next run starts at once, while the remaining processes may still work."""
    MACHINE = "machine"
    """All processes of the job."""
    FETCHER = "fetcher"
    """A download worker of Ray, which fetches or waits for its chunk to be prepared."""
    CHILD = "child"
    """A sandbox in which a worker fetches or decodes one clip."""


class Setting(StrEnum):
    """The place of the media and of the job."""

    FOLDER = "folder"
    CLUSTER = "folder, two nodes"
    HOST = "media host"


SETTINGS = {Kind.NODE: Setting.CLUSTER, Kind.FETCHER: Setting.HOST, Kind.CHILD: Setting.HOST}
"""The setting of the kinds that are not killed in FOLDER."""


class Phase(StrEnum):
    """The phase of the job in which the kill happens. `PHASES` has the shares of the moments."""

    START = "start-up"
    """Until the first media file is opened. The moment is a share of that time."""
    WORK = "work"
    """The moment is a share of the media files opened."""
    END = "publishing"
    """From the last shard on. The moment is a share of the time until dataset.json exists."""


PHASES = (Phase.WORK, Phase.END, Phase.WORK, Phase.START, Phase.WORK, Phase.END)
"""The moments use these in turns."""


@dataclass(frozen=True)
class Moment:
    kind: Kind
    phase: Phase
    share: float

    def __str__(self) -> str:
        return f"{self.kind} at {self.share:.0%} of {self.phase}"


def moments_of(kind: Kind, count: int, rng: np.random.Generator) -> list[Moment]:
    """Moments spread over each phase: the phase is divided into equal parts, and one moment is drawn in each."""
    phases = [PHASES[i % len(PHASES)] for i in range(count)]
    moments = []
    for phase in Phase:
        of_phase = phases.count(phase)
        moments += [Moment(kind, phase, float((i + rng.random()) / of_phase)) for i in range(of_phase)]
    return moments


# --- what is prepared ---


@dataclass(frozen=True)
class Inputs:
    """Two segment lists, and media files of one second, some of which are unusable.

    Some clips are in both lists; the second list's rows are refused.
    """

    lists: tuple[Path, Path]
    media: Path

    def command(self, output: Path, *, address: str | None = None, host: str | None = None) -> list[str]:
        argv = [sys.executable, "jobs/prepare_audioset.py", "--segments", *map(str, self.lists)]
        argv += ["--media-url", f"{host}/{{video_id}}"] if host else ["--audio-dir", str(self.media)]
        argv += ["--address", address] if address else ["--num-cpus", str(CPUS)]
        return [*argv, "--output", str(output)]


def make_inputs(folder: Path, num_clips: int, seed: int) -> Inputs:
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
            fakes.write_media(path, fakes.noise(0.3 * CLIP_S, seed=i))  # shorter than in the list
        elif fault == 37:
            pass  # no file
        elif fault == 47:
            line = f'{video_id}, 1.000, 0.000, "{labels}"'
        else:
            fakes.write_media(path, fakes.noise(CLIP_S, seed=seed * 1_000_003 + i))
        rows[lists[i % 5 == 0]].append(line)
        if i % 50 == 10:
            rows[lists[0]].append(line)  # in both splits, since 10 is a multiple of 5
        if i % 60 == 57:
            rows[lists[i % 5 == 0]].append(line)  # twice in one list
    for path, lines in rows.items():
        path.write_text("# YTID, start_seconds, end_seconds, positive_labels\n" + "\n".join(lines) + "\n")
    return Inputs(lists, media)


class Opens:
    """Counts how often each media file was opened, according to the kernel."""

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
        time.sleep(0.1)  # the last events arrive
        self._ended.set()
        self._thread.join()
        self._inotify.close()
        if self._overflow:
            raise RuntimeError("the kernel dropped events; take fewer clips")
        return self.count


class Fetches:
    """Counts how often yt-dlp requested each recording from the media host."""

    def __init__(self, asked: Counter[str]) -> None:
        asked.clear()
        self.count = asked

    def close(self) -> Counter[str]:
        return Counter(self.count)


class CountingHandler(FolderHandler):
    asked: Counter[str]

    def answer(self, *, with_body: bool) -> None:
        # FFmpeg sends this header. It requests the same recording later, a varying number of times.
        if "Icy-MetaData" not in self.headers:
            self.asked[self.path.removeprefix("/")] += 1
        super().answer(with_body=with_body)


# --- results ---


@dataclass(frozen=True)
class Content:
    """The content of a data set, by `SPLIT/clip_id`."""

    clips: dict[str, tuple[Any, ...]]
    """Labels, number of frames, the stored hash, and the hash of the stored bytes."""
    failures: Counter[tuple[str, str]]
    """Counts by clip and reason."""
    doubled_in_index: int
    doubled_in_shards: int
    strangers: list[str]
    """Files that are in no index."""
    facts: dict[str, Any]
    largest_shard: int

    def named(self) -> set[str]:
        return self.clips.keys() | {clip for clip, _ in self.failures}

    @property
    def retried(self) -> set[str]:
        """Names of the clips that every run tries again."""
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
            (in_shard,) = stored.drop_columns(["fbank"]).to_pylist()
            name = f"{split}/{in_shard['clip_id']}"
            frames_agree = row["num_frames"] == in_shard["num_frames"] == len(fbank) // KALDI128.num_mel_bins
            if row["clip_id"] != in_shard["clip_id"] or row["labels"] != in_shard["labels"] or not frames_agree:
                name += " (the index says otherwise)"
            digest = hashlib.blake2b(fbank.tobytes(), digest_size=8).hexdigest()
            clips[name] = (in_shard["labels"], in_shard["num_frames"], in_shard["fbank_hash"], digest)
        for row in dataset.read_table(dataset.failures_file(str(output), split)).to_pylist():
            failures[f"{split}/{row['clip_id']}", row["reason"]] += 1
        known |= {dataset.index_file(str(output), split), dataset.failures_file(str(output), split)}
        known |= {f"{dataset.shards_dir(str(output), split)}/{row['shard']}" for row in index}
    # The report and its audio examples may be written again at any time and are no part of the data.
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
    """The killed process; empty if the job had ended before."""
    runs: int
    lost: int
    doubled_in_index: int
    doubled_in_shards: int
    orphans: list[str]
    differing: int
    twice: int
    """Clips that were processed again, except failed ones that every run tries again."""
    bound: int

    @property
    def harm(self) -> str:
        """The faults in words; empty if there are none."""
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
    moment: Moment,
    hit: str,
    runs: int,
    undisturbed: "UndisturbedRun",
    content: Content,
    opens: Counter[str],
    bound: int,
) -> Outcome:
    wanted = undisturbed.content
    common = wanted.clips.keys() & content.clips.keys()
    differing = sum(wanted.clips[clip] != content.clips[clip] for clip in common)
    differing += len(content.named() - wanted.named())
    differing += sum(((wanted.failures - content.failures) + (content.failures - wanted.failures)).values())
    differing += sum(wanted.facts[split] != content.facts.get(split) for split in wanted.facts)
    again = {
        name: -(-(count - undisturbed.opens[name]) // max(undisturbed.opens[name], 1))
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
class UndisturbedRun:
    """The undisturbed run, and the duration of its phases."""

    content: Content
    opens: Counter[str]
    num_shards: int
    start_s: float
    end_s: float
    whole_s: float


@dataclass
class Job:
    """The command in a separate process."""

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
    """Inputs, their undisturbed runs, and a cluster of two nodes or a media host if a moment needs one."""

    folder: Path
    num_clips: int
    seed: int

    def __post_init__(self) -> None:
        self.ray_folder = self.folder / "ray"
        self.cluster: Cluster | None = None
        self._host: str | None = None
        self._asked: Counter[str] = Counter()
        self._inputs: dict[bool, Inputs] = {}
        self._undisturbed: dict[Setting, UndisturbedRun] = {}
        self._outputs = 0
        self._left: dict[int, psutil.Process] = {}
        self._open = ExitStack()

    def close(self) -> None:
        self._end_what_is_left()
        self._open.close()

    def inputs(self, setting: Setting) -> Inputs:
        is_fetched = setting == Setting.HOST
        if is_fetched not in self._inputs:
            num_clips = round(self.num_clips * FETCHED_SHARE) if is_fetched else self.num_clips
            folder = self.folder / ("fetched" if is_fetched else "read")
            self._inputs[is_fetched] = make_inputs(folder, num_clips, self.seed)
        return self._inputs[is_fetched]

    def trial(self, moment: Moment) -> Outcome:
        """Kill once, run until a run ends with status 0, and compare."""
        setting = SETTINGS.get(moment.kind, Setting.FOLDER)
        undisturbed = self.undisturbed(setting)
        output = self._new_output()
        opens = self._count_work(setting)
        try:
            job = self._start(output, setting)
            hit = self._disturb(job, moment, undisturbed, output, opens)
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
        # With a node, the clips in progress are lost, and results that have not reached the driver yet.
        at_work = 1 if moment.kind in (Kind.WORKER, Kind.FETCHER) else CPUS
        bound = 1 if moment.kind == Kind.CHILD else at_work * (undisturbed.content.largest_shard + MAX_FAILED_PER_TASK)
        if not hit:
            bound = 0
        return compare(moment, hit, runs, undisturbed, read_content(output), counted, bound)

    def undisturbed(self, setting: Setting) -> UndisturbedRun:
        if setting not in self._undisturbed:
            self._undisturbed[setting] = self._run_undisturbed(setting)
        return self._undisturbed[setting]

    def _run_undisturbed(self, setting: Setting) -> UndisturbedRun:
        inputs = self.inputs(setting)
        if setting == Setting.CLUSTER:
            self.cluster = start_cluster(self.ray_folder / "cluster")
            self._open.callback(self.cluster.shutdown)
        if setting == Setting.HOST:
            handler = type("Handler", (CountingHandler,), {"folder": inputs.media, "asked": self._asked})
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
        return UndisturbedRun(read_content(output), counted, num_shards, start_s, end_s, whole_s)

    def _count_work(self, setting: Setting) -> Opens | Fetches:
        return Fetches(self._asked) if setting == Setting.HOST else Opens(self.inputs(setting).media)

    def _new_output(self) -> Path:
        self._outputs += 1
        return self.folder / f"data-{self._outputs:03d}"

    def _start(self, output: Path, setting: Setting) -> Job:
        env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        env |= {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(self.ray_folder)}
        argv = self.inputs(setting).command(
            output,
            address=self.cluster.address if setting == Setting.CLUSTER and self.cluster else None,
            host=self._host if setting == Setting.HOST else None,
        )
        with open(self.folder / "job.log", "ab") as log:
            process = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
        return Job(process, time.monotonic())

    def _wait(self, job: Job) -> int:
        """The job's status. A job that hangs is killed."""
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

    def _disturb(
        self, job: Job, moment: Moment, undisturbed: UndisturbedRun, output: Path, opens: Opens | Fetches
    ) -> str:
        """Wait for the moment and kill. Returns what was killed, or "" if the job ended before."""
        while job.process.poll() is None and not _has_come(moment, job, undisturbed, output, opens):
            time.sleep(0.002)
        if moment.phase == Phase.END:
            time.sleep(moment.share * undisturbed.end_s)
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
                # Prefer one that decodes, since killing the others loses little.
                found = sorted(ray_workers(descendants), key=lambda pair: "Stages" not in pair[0])[:1]
            elif moment.kind == Kind.FETCHER:
                found = [pair for pair in ray_workers(descendants) if "FetchAndPrepare" in pair[0]]
            else:
                found = list(sandboxes(descendants))
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
        """End Ray's remaining processes, which would slow down the next run. Ray ends them after their driver."""
        _, alive = psutil.wait_procs(list(self._left.values()), timeout=3)
        for each in alive:
            each.kill()
        self._left = {}

    def _replace_second_node(self, cluster: Cluster) -> None:
        for node in list(cluster.worker_nodes):
            cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=1)


def start_cluster(folder: Path, num_nodes: int = 2) -> Cluster:
    """Start nodes of one CPU each on this machine."""
    Path(tempfile.gettempdir(), "ray").mkdir(exist_ok=True)  # Ray writes the cluster's address there
    # Ray then notices a dead node after 1.5 s instead of 15 s.
    noticing = {"health_check_period_ms": 500, "health_check_failure_threshold": 3}
    node: dict[str, Any] = {"num_cpus": 1, "temp_dir": str(folder)}
    cluster = Cluster(head_node_args=node | {"_system_config": noticing}, initialize_head=True)
    for _ in range(num_nodes - 1):
        cluster.add_node(num_cpus=1)
    return cluster


def _has_come(moment: Moment, job: Job, undisturbed: UndisturbedRun, output: Path, opens: Opens | Fetches) -> bool:
    if moment.phase == Phase.START:
        return job.elapsed_s() >= moment.share * undisturbed.start_s
    if moment.phase == Phase.WORK:
        return len(opens.count) >= moment.share * len(undisturbed.opens)
    return len(list(output.glob("*/shards/*.parquet"))) >= undisturbed.num_shards


def ray_workers(descendants: Sequence[psutil.Process]) -> Iterator[tuple[str, psutil.Process]]:
    """Ray's workers and what they do, without the raylet's agents and the processes that workers start."""
    for each in descendants:
        try:
            name, parent = (each.cmdline() or [""])[0], each.parent()
            is_worker = name.startswith("ray::") and not name.split()[0].endswith("Agent")
            if is_worker and parent is not None and parent.name() == "raylet":
                yield name, each
        except psutil.NoSuchProcess:
            continue


def sandboxes(descendants: Sequence[psutil.Process]) -> Iterator[tuple[str, psutil.Process]]:
    """Processes of `pipeline.prepare.sandbox` and their purpose."""
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
    parser.add_argument("--moments", type=int, default=20, help="moments of each kind (default 20)")
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
                text = f"killed {outcome.hit}" if outcome.hit else "ended before"
                text += f", {outcome.runs} runs, {outcome.twice} clips done twice"
                print(f"{moment}: {text}. {outcome.harm or 'all well'} {' '.join(outcome.orphans)}", file=sys.stderr)
        undisturbed_runs = {
            setting: made.undisturbed(setting)
            for setting in {SETTINGS.get(kind, Setting.FOLDER) for kind in args.kinds}
        }
    for setting, undisturbed in undisturbed_runs.items():
        content = undisturbed.content
        print(
            f"{setting}: {len(content.clips)} clips and {content.failures.total()} failures "
            f"in {undisturbed.num_shards} shards, seed {args.seed}; undisturbed {undisturbed.whole_s:.0f} s, "
            f"publishing {undisturbed.end_s:.1f} s of them"
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
