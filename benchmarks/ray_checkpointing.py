"""Ray Data's own checkpointing under a pipeline of our shape: where each clip is written once, and where not.

    python -m benchmarks.ray_checkpointing [--done-ids 200000 2000000]

A list of clips in two splits → a stage → a stage → Parquet files by split, with `CheckpointConfig` and no code of ours
around it. Each row of the table is a run of its own, killed where the row says so, and run again until it ends well.
"""

import argparse
import functools
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import ray
from moto.server import DomainDispatcherApplication, create_backend_app
from ray.data.checkpoint import CheckpointConfig
from werkzeug.serving import make_server

CLIPS_A_SPLIT, CLIPS_A_FILE = 200, 20
STAGE_S, WRITE_S = 0.004, 0.03  # a clip's work, and a wait between the announcement of a file and its writing
FAILS = 10  # one clip in this many
BUCKET = "checkpoints"


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """One way of setting the pipeline up; it runs in a process of its own."""

    folder: str
    id_column: str = "key"
    """`key` is SPLIT/clip_id, `clip_id` is unique within a split only."""
    source: str = "read_parquet"
    sink: str = "write"
    """write; two sinks (files of all clips, then a ledger of the failed ones); iterate (no sink at the end)."""
    keep: bool = True
    """Whether the record of what is done outlives a run that ended well."""
    drop_failed: bool = False
    """Whether failed clips are taken out before they are written."""
    s3_port: int = 0
    """Where the record lies: 0 for the folder, else a server on loopback."""

    @property
    def data(self) -> Path:
        return Path(self.folder) / "data"

    @property
    def record(self) -> str:
        return BUCKET + "/record" if self.s3_port else f"{self.folder}/record"


# --- the pipeline, in the process that may be killed ---


@dataclass(frozen=True)
class Decode:
    log: str

    def __call__(self, rows: pa.Table) -> pa.Table:
        time.sleep(STAGE_S * len(rows))
        with open(self.log, "ab", buffering=0) as log:  # one write a batch, which appends whole
            log.write("".join(f"{key}\n" for key in rows["key"].to_pylist()).encode())
        failed = [int(key[-5:]) % FAILS == 0 for key in rows["key"].to_pylist()]
        return rows.append_column("status", pa.array(["failed" if f else "ok" for f in failed]))


def features(rows: pa.Table) -> pa.Table:
    values = [np.full(256, int(key[-5:]), np.float32) for key in rows["key"].to_pylist()]
    return rows.append_column("values", pa.array(values, pa.list_(pa.float32())))


def run_pipeline(made: Pipeline) -> None:
    ray.init(address="local", num_cpus=2, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    filesystem = s3(made.s3_port) if made.s3_port else None
    context.checkpoint_config = CheckpointConfig(
        id_column=made.id_column,
        checkpoint_path=made.record,
        delete_checkpoint_on_success=not made.keep,
        override_filesystem=filesystem or pafs.LocalFileSystem(),
    )
    began_s = time.monotonic()
    files = sorted(map(str, Path(made.folder, "list").iterdir()))
    if made.source == "read_parquet":
        data = ray.data.read_parquet(files, override_num_blocks=len(files))
    else:
        data = ray.data.from_arrow([pq.read_table(file) for file in files])
    data = data.repartition(target_num_rows_per_block=CLIPS_A_FILE)  # else one task reads and writes them all
    data = data.map_batches(Decode(f"{made.folder}/work.log"), batch_size=8, batch_format="pyarrow")
    data = data.map_batches(features, batch_size=8, batch_format="pyarrow")
    if made.drop_failed:
        data = data.filter(lambda row: row["status"] == "ok")
    if made.sink == "iterate":
        for _ in data.iter_rows():
            pass
    else:
        wait = functools.partial(_wait, os.getpid())
        data.write_parquet(str(made.data), partition_cols=["split"], arrow_parquet_args_fn=wait)
        if made.sink == "two sinks":
            data.filter(lambda row: row["status"] == "failed").write_parquet(f"{made.folder}/ledger")
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"s": time.monotonic() - began_s, "driver_mib": peak_mib}))


def _wait(driver: int) -> dict[str, Any]:
    """Writing to an object store takes a while; the driver calls this too, and need not wait."""
    if os.getpid() != driver:
        time.sleep(WRITE_S)
    return {}


def s3(port: int) -> pafs.S3FileSystem:
    return pafs.S3FileSystem(
        access_key="none",
        secret_key="none",
        region="us-east-1",
        scheme="http",
        endpoint_override=f"127.0.0.1:{port}",
        allow_bucket_creation=True,
    )


# --- the harness ---


@dataclass(frozen=True)
class Found:
    lost: int
    doubled: int
    left_over: int
    """Files that are no whole Parquet file, and announcements of files that are not written."""
    worked_on: int
    """Clips that the stages saw, over all runs."""

    def __str__(self) -> str:
        return f"{self.lost} lost, {self.doubled} doubled, {self.left_over} left over, {self.worked_on} worked on"


Kill = Callable[[subprocess.Popen[bytes]], None]


@contextmanager
def pipeline(**settings: Any) -> Iterator[Pipeline]:
    with tempfile.TemporaryDirectory(prefix="ray-checkpointing-") as folder:
        made = Pipeline(folder=folder, **settings)
        write_list(made, first=0, num_clips=CLIPS_A_SPLIT)
        yield made


def write_list(made: Pipeline, *, first: int, num_clips: int) -> None:
    """Files of CLIPS_A_FILE rows, of two splits whose ids are the same."""
    Path(made.folder, "list").mkdir(exist_ok=True)
    for split in ("train", "eval"):
        for begin in range(first, first + num_clips, CLIPS_A_FILE):
            clip_ids = [f"clip_{i:05d}" for i in range(begin, min(begin + CLIPS_A_FILE, first + num_clips))]
            rows = {"clip_id": clip_ids, "split": [split] * len(clip_ids), "key": [f"{split}/{i}" for i in clip_ids]}
            pq.write_table(pa.table(rows), Path(made.folder, "list", f"{split}-{begin:07d}.parquet"))


def start(made: Pipeline) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "benchmarks.ray_checkpointing", "--run", json.dumps(asdict(made))]
    with open(Path(made.folder, "stderr.log"), "ab") as log:
        return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log)


def run(made: Pipeline, kill: Kill | None = None) -> tuple[int, str]:
    """One run, with `kill` in it; returns its status and what it printed. No process of it is left."""
    process = start(made)
    tree = [psutil.Process(process.pid)]
    watch = threading.Thread(target=_watch, args=(process, tree))
    watch.start()
    if kill:
        kill(process)
    said = process.communicate()[0].decode()
    watch.join()
    _, alive = psutil.wait_procs(tree[1:], timeout=1)
    for each in alive:
        each.kill()
    return process.returncode, said


def _watch(process: subprocess.Popen[bytes], tree: list[psutil.Process]) -> None:
    """Gather the processes that a run starts, so that none outlives it."""
    while process.poll() is None:
        try:
            tree += [child for child in tree[0].children(recursive=True) if child not in tree]
        except psutil.NoSuchProcess:
            return
        time.sleep(0.2)


def run_to_the_end(made: Pipeline) -> str:
    for _ in range(5):
        status, said = run(made)
        if status == 0:
            return said
    raise RuntimeError(f"five runs failed: {Path(made.folder, 'stderr.log').read_text()[-2000:]}")


def look(made: Pipeline, *, num_clips: int = CLIPS_A_SPLIT, dropped: bool = False) -> Found:
    keys: Counter[str] = Counter()
    broken = 0
    for file in made.data.rglob("*"):
        if file.is_file():
            try:
                keys.update(pq.ParquetFile(file).read(columns=["key"])["key"].to_pylist())
            except pa.ArrowInvalid:
                broken += 1
    if not made.s3_port:
        broken += len(list(Path(made.record).glob("*.pending.parquet")))
    wanted = {f"{split}/clip_{i:05d}" for split in ("train", "eval") for i in range(num_clips)}
    wanted -= {key for key in wanted if dropped and int(key[-5:]) % FAILS == 0}
    lost, doubled = len(wanted - keys.keys()), sum(n - 1 for n in keys.values())
    return Found(lost, doubled, broken, len(worked_on(made)))


def worked_on(made: Pipeline) -> list[str]:
    log = Path(made.folder, "work.log")
    return log.read_text().split() if log.exists() else []


def kill_at(made: Pipeline, share: float, *, machine: bool) -> Kill:
    """The driver alone, or all processes at once; when this share of the clips was worked on.

    A share below 0: when the first file is announced and not yet written.
    """

    def kill(process: subprocess.Popen[bytes]) -> None:
        def is_time() -> bool:
            if share < 0:
                return any(Path(made.record).glob("*.pending.parquet"))
            return len(worked_on(made)) >= share * 2 * CLIPS_A_SPLIT

        wait_until(is_time, process)
        kill_all(process) if machine else process.kill()

    return kill


def kill_all(process: subprocess.Popen[bytes]) -> None:
    for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        each.kill()


def kill_worker_at(made: Pipeline, share: float) -> Kill:
    def kill(process: subprocess.Popen[bytes]) -> None:
        wait_until(lambda: len(worked_on(made)) >= share * 2 * CLIPS_A_SPLIT, process)
        for child in psutil.Process(process.pid).children(recursive=True):
            if child.cmdline()[:1] and child.cmdline()[0].startswith("ray::MapBatches"):
                child.kill()
                return

    return kill


def wait_until(true: Callable[[], bool], process: subprocess.Popen[bytes], limit_s: float = 60) -> None:
    end_s = time.monotonic() + limit_s
    while not true() and process.poll() is None and time.monotonic() < end_s:
        time.sleep(0.002)


# --- the questions ---


def driver_killed() -> Iterator[tuple[str, str]]:
    for machine, share in (
        (False, -1),
        (False, 0.5),
        (True, -1),
        (True, 0.05),
        (True, 0.35),
        (True, 0.65),
        (True, 0.95),
    ):
        with pipeline() as made:
            run(made, kill_at(made, share, machine=machine))
            between = look(made)
            run_to_the_end(made)
            what = "all processes" if machine else "driver"
            at = "a file is announced" if share < 0 else f"{share:.0%} of the clips"
            found = f"between the runs {between.left_over} files of no use; then {look(made)}"
            yield f"{what} killed at {at}, run again", found


def worker_killed() -> Iterator[tuple[str, str]]:
    for share in (0.2, 0.6):
        with pipeline() as made:
            status, _ = run(made, kill_worker_at(made, share))
            if status:
                run_to_the_end(made)
            yield f"a worker killed at {share:.0%}", f"{look(made)}; the run {'failed' if status else 'went on'}"


def failed_rows() -> Iterator[tuple[str, str]]:
    for drop in (False, True):
        with pipeline(drop_failed=drop) as made:
            run_to_the_end(made)
            before = len(worked_on(made))
            run_to_the_end(made)
            where = "are taken out before the sink" if drop else "are written with the rest"
            yield f"failed clips {where}; run again", f"{len(worked_on(made)) - before} clips worked on again"


def ids_of_a_split() -> Iterator[tuple[str, str]]:
    with pipeline(id_column="clip_id") as made:
        run(made, kill_at(made, 0.6, machine=True))
        run_to_the_end(made)
        yield "ids unique within a split only; killed at 60%, run again", str(look(made))


def two_sinks() -> Iterator[tuple[str, str]]:
    with pipeline(sink="two sinks") as made:
        run_to_the_end(made)
        ledger = list(Path(made.folder, "ledger").rglob("*.parquet"))
        rows = sum(pq.ParquetFile(file).metadata.num_rows for file in ledger)
        wanted = 2 * CLIPS_A_SPLIT // FAILS
        yield "a second sink, for failures, undisturbed", f"{look(made)}; {rows} of {wanted} failures in the ledger"


def list_grows() -> Iterator[tuple[str, str]]:
    for keep in (True, False):
        with pipeline(keep=keep) as made:
            run_to_the_end(made)
            before = len(worked_on(made))
            write_list(made, first=CLIPS_A_SPLIT, num_clips=20)
            run_to_the_end(made)
            how = "the record kept" if keep else "the record deleted on success (the default)"
            found = look(made, num_clips=CLIPS_A_SPLIT + 20)
            yield f"40 clips added, {how}", f"{len(worked_on(made)) - before} worked on; {found}"


def other_ends() -> Iterator[tuple[str, str]]:
    with pipeline(sink="iterate") as made:
        run(made, kill_at(made, 0.6, machine=True))
        before = len(worked_on(made))
        run_to_the_end(made)
        again = len(worked_on(made)) - before
        recorded = len(list(Path(made.record).glob("*"))) if Path(made.record).exists() else 0
        yield "iterated, no sink; killed at 60%, run again", f"{again} worked on again, {recorded} files of record"
    with pipeline(source="from_arrow") as made:
        run(made, kill_at(made, 0.6, machine=True))
        run_to_the_end(made)
        warned = "doesn't support checkpointing" in Path(made.folder, "stderr.log").read_text().replace("\n", " ")
        yield "`from_arrow` as source; killed at 60%, run again", f"{look(made)}; {'a' if warned else 'no'} warning"


def record_on_s3() -> Iterator[tuple[str, str]]:
    """S3 knows no rename: pyarrow copies and deletes. Killed between the two, a file is announced and recorded."""
    server = Server()
    try:
        s3(server.port).create_dir(BUCKET)
        with pipeline(s3_port=server.port) as made:

            def kill(process: subprocess.Popen[bytes]) -> None:
                server.hold.set()
                wait_until(server.held.is_set, process)
                kill_all(process)
                server.hold.clear()
                server.let_go.set()

            run(made, kill)
            run_to_the_end(made)
            yield "record on S3, machine killed between copy and delete of a commit, run again", str(look(made))
    finally:
        server.close()


class Server:
    """S3 on loopback, which can hold the request that ends a commit and never carry it out."""

    def __init__(self) -> None:
        self.hold, self.held, self.let_go = threading.Event(), threading.Event(), threading.Event()
        self.app = DomainDispatcherApplication(create_backend_app)
        self.server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.port: int = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Any:
        ends_commit = environ["REQUEST_METHOD"] == "DELETE" and environ["PATH_INFO"].endswith(".pending.parquet")
        if self.hold.is_set() and ends_commit:
            self.held.set()
            self.let_go.wait(60)
            start_response("503 Service Unavailable", [])
            return []
        return self.app(environ, start_response)

    def close(self) -> None:
        self.server.shutdown()


def cost_of_a_record(num_done: int) -> Iterator[tuple[str, str]]:
    """A list that is done but for 40 clips; the record has a file for each 128, as shards have."""
    with pipeline() as made:
        for file in Path(made.folder, "list").iterdir():
            file.unlink()
        Path(made.record).mkdir()
        keys = [f"train/{i:011d}_{i % 600}.000" for i in range(num_done)]
        for begin in range(0, num_done, 128):
            pq.write_table(pa.table({"key": keys[begin : begin + 128]}), Path(made.record, f"{begin:07d}.parquet"))
        rows = {"clip_id": keys, "split": ["train"] * num_done, "key": keys}
        pq.write_table(pa.table(rows), Path(made.folder, "list", "done.parquet"))
        write_list(made, first=0, num_clips=20)
        peak = Peak()
        process = start(made)
        peak.watch(process)
        lines = process.communicate()[0].decode().splitlines()
        if process.returncode:
            raise RuntimeError(f"it failed: {Path(made.folder, 'stderr.log').read_text()[-2000:]}")
        said = json.loads(next(line for line in lines if line.startswith("{")))
        todo = len(worked_on(made))
        yield (
            f"{num_done:,} ids done, 40 to do",
            f"{said['s']:.0f} s after Ray's start, driver {said['driver_mib']:.0f} MiB, largest worker "
            f"{peak.worker_mib:.0f} MiB of its own ({peak.worker}), {peak.workers} workers at most; {todo} worked on",
        )


class Peak:
    """The largest private memory of a worker, sampled."""

    def __init__(self) -> None:
        self.worker_mib, self.worker, self.workers = 0.0, "", 0

    def watch(self, process: subprocess.Popen[bytes]) -> None:
        driver = psutil.Process(process.pid)
        while process.poll() is None:
            workers = 0
            for child in driver.children(recursive=True):
                try:
                    name, memory = child.cmdline()[0], child.memory_info()
                except (psutil.NoSuchProcess, psutil.ZombieProcess, IndexError):
                    continue
                workers += name.startswith("ray::")
                mib = (memory.rss - memory.shared) / 2**20
                if name.startswith("ray::") and mib > self.worker_mib:
                    self.worker_mib, self.worker = mib, name.split("(")[0]
            self.workers = max(self.workers, workers)
            time.sleep(0.5)


QUESTIONS: tuple[Callable[[], Iterator[tuple[str, str]]], ...] = (
    driver_killed,
    worker_killed,
    failed_rows,
    ids_of_a_split,
    two_sinks,
    list_grows,
    other_ends,
    record_on_s3,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--done-ids", type=int, nargs="*", default=[200_000], metavar="N")
    parser.add_argument("--only", nargs="*", default=[q.__name__ for q in QUESTIONS], metavar="QUESTION")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run_pipeline(Pipeline(**json.loads(args.run)))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    questions = [question for question in QUESTIONS if question.__name__ in args.only]
    questions += [functools.partial(cost_of_a_record, number) for number in args.done_ids]
    print(f"{2 * CLIPS_A_SPLIT} clips in two splits, ray {ray.__version__}\n\n| | found |\n|---|---|")
    for question in questions:
        for asked, found in question():
            print(f"| {asked} | {found} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
