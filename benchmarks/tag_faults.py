"""Fault campaign: kill tagging at seeded moments, run the same command again, and compare with serial code.

    python -m benchmarks.tag_faults [--recordings 2000] [--moments 3] [--seed 0] [--places folder bucket]

The recordings have six containers and lengths of a second to a minute; one in twenty is no audio, silent or cut off.
They are in a folder, or in a bucket of an S3 server on loopback that answers a share of all requests with 503, as are
the results. Each moment is a run of jobs/tag.py that gets a SIGKILL: a worker, the driver, all processes, or the raylet
of the second of two nodes. Then the same command runs until it ends with status 0. What the results must be is tagged
by one process without Ray: each recording once, with the same windows, scores and events to the bit, and the same
failures. The exit status is 1 if a recording is lost, doubled or different, or if a file is left over.
"""

import argparse
import io
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pyarrow.parquet as pq
import torch
from ray.cluster_utils import Cluster

from ast_core.batch import Norm
from ast_core.checkpoints import ModelConfig, save_model
from ast_core.labels import LabelVocabulary
from ast_core.models import create_model
from ast_core.recipe import Recipe
from benchmarks.faults import (
    CPUS,
    LONGEST_RUN_S,
    MOST_RUNS,
    ROOT,
    Job,
    Kind,
    Moment,
    Phase,
    moments_of,
    ray_workers,
    start_cluster,
)
from pipeline import storage
from tests import fakes
from tests.s3 import S3Server, serve

KINDS = (Kind.WORKER, Kind.DRIVER, Kind.MACHINE, Kind.NODE)
NUM_CLASSES = 40
WINDOW_S = 1.0
LOOK_S = 0.2
"""Time between two looks at the parts that are written."""


class Place(StrEnum):
    """Where the recordings and the results are."""

    FOLDER = "folder"
    BUCKET = "bucket"


# --- what is tagged ---


def write_recordings(folder: Path, number: int, seed: int) -> None:
    """Recordings of noise, each different."""
    folder.mkdir(parents=True)
    suffixes = list(fakes.CODECS)
    for i in range(number):
        rng = np.random.default_rng([seed, i])
        longest_s = (3.0, 12.0, 60.0)[(i % 20 == 1) + (i % 100 == 51)]
        path = folder / f"r{i:05d}.{suffixes[i % len(suffixes)]}"
        fault = i % 100
        if fault == 8:
            path.write_text("<html>no audio</html>")
        elif fault == 28:
            path.write_bytes(b"")
        elif fault == 48:
            fakes.write_media(path, np.zeros(fakes.RATE_HZ, np.float32))
        else:
            _write(path, float(rng.uniform(0.6, longest_s)), seed * 1_000_003 + i)
        if fault in (68, 88):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _write(path: Path, duration_s: float, seed: int) -> None:
    """Write noise. FFmpeg refuses to end an MP4 file at some lengths, which then is a little longer."""
    try:
        fakes.write_media(path, fakes.noise(duration_s, seed))
    except av.ArgumentError:
        _write(path, duration_s + 0.1, seed)


def write_model(folder: Path) -> Path:
    """A linear model with random weights, whose scores are around a half, so that there are events."""
    recipe = Recipe(
        model="linear", n_layers=1, hidden=32, label_dim=NUM_CLASSES, input_tdim=100, precision="fp32", timem=0
    )
    config = ModelConfig(
        recipe, Norm(-4.27, 4.57), LabelVocabulary.from_names([f"class {i}" for i in range(NUM_CLASSES)])
    )
    torch.manual_seed(0)
    save_model(folder, create_model(**recipe.model_args()).state_dict(), config)
    return folder


# --- results ---

Windows = tuple[tuple[float, float, bytes], ...]
Events = tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Results:
    """What a folder of tags has, by the file name of each recording."""

    windows: dict[str, Windows]
    """Start, end and stored scores of each window."""
    events: dict[str, Events]
    failures: Counter[tuple[Any, ...]]
    """Recording, reason, and the part that was lost."""
    num_parts: int
    strangers: list[str]
    """Files that belong to no finished run."""

    @property
    def doubled(self) -> int:
        """Recordings with a window or an event that is there twice, or that are both tagged and failed."""
        repeat = {name for name, rows in self.windows.items() if len({row[0] for row in rows}) < len(rows)}
        repeat |= {name for name, rows in self.events.items() if len(set(rows)) < len(rows)}
        whole = [name for name, _, start_s in self.failures.elements() if start_s is None]
        repeat |= {name for name, count in Counter([*whole, *self.windows]).items() if count > 1}
        return len(repeat)

    def names(self) -> set[str]:
        return {*self.windows, *(name for name, _, start_s in self.failures if start_s is None)}


def read_results(tags: str) -> Results:
    windows: dict[str, list[Any]] = {}
    events: dict[str, list[Any]] = {}
    parts = list(storage.list_files(storage.join(tags, "scores"), suffix=".parquet"))
    for uri in parts:
        for row in _rows(uri):
            scores = np.array(row["scores"], np.float16).tobytes()
            windows.setdefault(row["recording"].rpartition("/")[2], []).append((row["start_s"], row["end_s"], scores))
    for uri in storage.list_files(storage.join(tags, "events"), suffix=".parquet"):
        for row in _rows(uri):
            facts = tuple(value for key, value in row.items() if key != "recording")
            events.setdefault(row["recording"].rpartition("/")[2], []).append(facts)
    failures: Counter[tuple[Any, ...]] = Counter()
    for row in _rows(storage.join(tags, "failures.parquet")):
        failures[row["recording"].rpartition("/")[2], row["reason"], row["start_s"]] += 1
    folders = ("scores/", "events/")
    known = ("tags.json", "report.html", "failures.parquet")
    files = [uri.removeprefix(f"{tags}/") for uri in storage.list_files(tags, recursive=True)]
    return Results(
        {name: tuple(sorted(rows)) for name, rows in windows.items()},
        {name: tuple(sorted(rows)) for name, rows in events.items()},
        failures,
        len(parts),
        [name for name in files if name not in known and not (name.startswith(folders) and name.endswith(".parquet"))],
    )


def _rows(uri: str) -> list[dict[str, Any]]:
    return pq.read_table(io.BytesIO(storage.read_bytes(uri))).to_pylist()


@dataclass(frozen=True)
class Outcome:
    hit: str
    """What was killed; empty if the job had ended before."""
    runs: int
    recordings: int
    lost: int
    doubled: int
    wrong: int
    """Recordings whose windows, scores, events or failure differ from the serial code's."""
    left_over: list[str]

    @property
    def is_well(self) -> bool:
        return not (self.lost or self.doubled or self.wrong or self.left_over)


def compare(hit: str, runs: int, wanted: Results, found: Results) -> Outcome:
    tagged = {name: (rows, wanted.events.get(name)) for name, rows in wanted.windows.items()}
    wrong = {name for name, rows in found.windows.items() if tagged.get(name) != (rows, found.events.get(name))}
    wrong |= {name for name, *_ in (wanted.failures - found.failures) + (found.failures - wanted.failures)}
    lost = wanted.names() - found.names()
    return Outcome(hit, runs, len(found.names()), len(lost), found.doubled, len(wrong - lost), found.strangers)


# --- running and killing ---


@dataclass(frozen=True)
class Undisturbed:
    start_s: float
    """Until the first part is written."""
    end_s: float
    """From the last part to tags.json."""
    whole_s: float
    num_parts: int


@dataclass
class Campaign:
    folder: Path
    seed: int
    checkpoint: Path
    media: str
    tags_in: str
    """Folder for the results of all runs."""
    cluster: Cluster | None = None
    _outputs: int = 0
    _left: dict[int, psutil.Process] = field(default_factory=dict)

    def trial(self, moment: Moment, wanted: Results, undisturbed: Undisturbed) -> Outcome:
        """Kill once, run until a run ends with status 0, and compare."""
        output, on_cluster = self.new_output(), moment.kind == Kind.NODE
        job = self.start(output, on_cluster=on_cluster)
        hit = self._disturb(job, moment, undisturbed, output)
        status, runs = self.wait(job), 1
        while status:
            print(f"{moment}: run {runs} ended with {status}: {self.log()[-300:]}", file=sys.stderr, flush=True)
            if runs == MOST_RUNS:
                raise RuntimeError(f"{moment}: run {runs} ended with {status}; {self.log()}")
            status, runs = self.wait(self.start(output, on_cluster=on_cluster)), runs + 1
        self._end_what_is_left()
        if on_cluster and self.cluster:
            for node in list(self.cluster.worker_nodes):
                self.cluster.remove_node(node, allow_graceful=False)
            self.cluster.add_node(num_cpus=1)
        return compare(hit, runs, wanted, read_results(output))

    def undisturbed(self) -> tuple[str, Undisturbed]:
        output, began_s = self.new_output(), time.monotonic()
        job, parts, first_s, last_s = self.start(output), 0, 0.0, 0.0
        while job.process.poll() is None:
            if (found := num_parts(output)) > parts:
                parts, last_s = found, time.monotonic() - began_s
                first_s = first_s or last_s
            time.sleep(LOOK_S)
        whole_s = time.monotonic() - began_s
        if self.wait(job):
            raise RuntimeError(f"the undisturbed run failed; {self.log()}")
        return output, Undisturbed(first_s, whole_s - last_s, whole_s, num_parts(output))

    def serial(self) -> str:
        """Tag in one process without Ray."""
        output = self.new_output()
        if self.wait(self.start(output, "--num-workers", "0")):
            raise RuntimeError(f"the serial run failed; {self.log()}")
        return output

    def new_output(self) -> str:
        self._outputs += 1
        return storage.join(self.tags_in, f"tags-{self._outputs:03d}")

    def log(self) -> str:
        return (self.folder / "job.log").read_text()[-3000:]

    def start(self, output: str, *more: str, on_cluster: bool = False) -> Job:
        env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        env |= {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(self.folder / "ray")}
        argv = [sys.executable, "jobs/tag.py", "--checkpoint", str(self.checkpoint), "--input", self.media]
        argv += ["--output", output, "--window-s", f"{WINDOW_S:g}", *more]
        if not more:
            argv += ["--cpus-per-worker", "1"]
            argv += ["--address", self.cluster.address] if on_cluster and self.cluster else ["--num-cpus", str(CPUS)]
        with open(self.folder / "job.log", "ab") as log:
            process = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
        return Job(process, time.monotonic())

    def wait(self, job: Job) -> int:
        """The job's status. A job that hangs is killed."""
        while job.process.poll() is None:
            job.descendants()
            if job.elapsed_s() > 2 * LONGEST_RUN_S:
                job.process.kill()
            try:
                job.process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                continue
        self._left |= job.seen
        return job.process.wait()

    def _disturb(self, job: Job, moment: Moment, undisturbed: Undisturbed, output: str) -> str:
        """Wait for the moment and kill. Returns what was killed, or "" if the job ended before."""
        goal = moment.share * undisturbed.num_parts
        while job.process.poll() is None:
            if moment.phase == Phase.START and job.elapsed_s() >= moment.share * undisturbed.start_s:
                break
            if moment.phase != Phase.START:
                there = num_parts(output)
                if there >= (undisturbed.num_parts if moment.phase == Phase.END else int(goal)):
                    break
            time.sleep(LOOK_S)
        if moment.phase == Phase.END:
            time.sleep(moment.share * undisturbed.end_s)
        elif moment.phase == Phase.WORK:
            work_s = undisturbed.whole_s - undisturbed.start_s - undisturbed.end_s
            time.sleep((goal % 1) * work_s / undisturbed.num_parts)
        while job.process.poll() is None:
            if hit := self._kill(job, moment.kind):
                return hit
            time.sleep(0.01)
        return ""

    def _kill(self, job: Job, kind: Kind) -> str:
        if kind == Kind.NODE:
            assert self.cluster is not None
            (node,) = self.cluster.worker_nodes
            os.kill(node.all_processes["raylet"][0].process.pid, 9)
            return "raylet"
        descendants = job.descendants()
        if kind == Kind.WORKER:
            found = sorted(ray_workers(descendants), key=lambda pair: "TagChunks" not in pair[0])[:1]
            for name, process in found:
                process.kill()
                return name
            return ""
        job.process.kill()
        if kind == Kind.MACHINE:
            for each in descendants:
                if each.is_running():
                    each.kill()
        return str(kind)

    def _end_what_is_left(self) -> None:
        """End Ray's remaining processes, which would slow down the next run. Ray ends them after their driver."""
        _, alive = psutil.wait_procs(list(self._left.values()), timeout=3)
        for each in alive:
            each.kill()
        self._left = {}


def num_parts(output: str) -> int:
    return len(storage.list_files(storage.join(output, "scores"), suffix=".parquet"))


# --- the table ---


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recordings", type=int, default=2000)
    parser.add_argument("--moments", type=int, default=3, help="moments of each kind and place (default 3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", type=Kind, choices=KINDS, default=list(KINDS))
    parser.add_argument("--places", nargs="+", type=Place, choices=list(Place), default=list(Place))
    parser.add_argument("--refused", type=float, default=0.05, help="share of S3's requests that get a 503")
    args = parser.parse_args(argv)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        write_recordings(folder / "media", args.recordings, args.seed)
        write_model(folder / "model")
        (folder / "serial").mkdir()
        serial = Campaign(folder / "serial", args.seed, folder / "model", str(folder / "media"), str(folder / "serial"))
        wanted = read_results(serial.serial())
        print(
            f"{len(wanted.windows)} recordings with {sum(map(len, wanted.windows.values()))} windows, "
            f"{sum(map(len, wanted.events.values()))} events, {len(wanted.names()) - len(wanted.windows)} failed",
            flush=True,
        )
        print("\n| place | killed | moments | most runs | recordings | lost | doubled | wrong | left over |")
        print("|---|---|---|---|---|---|---|---|---|")
        for place in args.places:
            for what, of_kind in _of_place(place, folder, wanted, args):
                print(_row(place, what, of_kind), flush=True)
                outcomes += of_kind
    return int(not all(outcome.is_well for outcome in outcomes))


def _row(place: Place, what: str, outcomes: Sequence[Outcome]) -> str:
    hit = sum(bool(outcome.hit) for outcome in outcomes)
    cells: list[object] = [place, what, f"{hit} of {len(outcomes)}", max(o.runs for o in outcomes)]
    cells += [min(o.recordings for o in outcomes)]
    cells += [sum(getattr(o, name) for o in outcomes) for name in ("lost", "doubled", "wrong")]
    return f"| {' | '.join(map(str, [*cells, sum(len(o.left_over) for o in outcomes)]))} |"


def _of_place(
    place: Place, folder: Path, wanted: Results, args: argparse.Namespace
) -> Iterator[tuple[str, list[Outcome]]]:
    with ExitStack() as stack:
        (folder / place).mkdir()
        media, tags_in = str(folder / "media"), str(folder / place)
        if place == Place.BUCKET:
            server = stack.enter_context(serve())
            stack.callback(_set_environment, {name: os.environ.get(name) for name in server.env})
            _set_environment(server.env)
            media, tags_in = fakes.upload(folder / "media", server.uri("media")), server.uri("tags")
            stack.enter_context(_busy(server, args.refused))
        made = Campaign(folder / place, args.seed, folder / "model", media, tags_in)
        if Kind.NODE in args.kinds:
            made.cluster = start_cluster(folder / place / "cluster")
            stack.callback(made.cluster.shutdown)
        output, undisturbed = made.undisturbed()
        outcome = compare("nothing", 1, wanted, read_results(output))
        _say(f"{place}, undisturbed", outcome)
        times = f"undisturbed {undisturbed.whole_s:.0f} s, {undisturbed.num_parts} parts"
        print(f"{place}: {times}", file=sys.stderr, flush=True)
        yield "nothing", [outcome]
        for kind in args.kinds:
            rng = np.random.default_rng([args.seed, list(Place).index(place), KINDS.index(kind)])
            outcomes = []
            for moment in moments_of(kind, args.moments, rng):
                outcomes.append(made.trial(moment, wanted, undisturbed))
                _say(f"{place}, {moment}", outcomes[-1])
            yield str(kind), outcomes


@contextmanager
def _busy(server: S3Server, share: float) -> Iterator[None]:
    with server.busy(share=share) as counts:
        yield
    print(f"\nbucket: {counts['refused']:,} of {counts['requests']:,} requests got a 503", flush=True)


def _say(what: str, outcome: Outcome) -> None:
    text = f"killed {outcome.hit}" if outcome.hit else "ended before"
    harm = "all well" if outcome.is_well else str(outcome)
    print(f"{what}: {text}, {outcome.runs} runs, {harm}", file=sys.stderr, flush=True)


def _set_environment(values: dict[str, Any]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


if __name__ == "__main__":
    sys.exit(main())
