"""A model of all of AudioSet, and of tagging 100 million windows, on 1 to 1,000 machines.

    python -m benchmarks.scale_model

Unit costs are measured here, with the project's own functions, Ray on this machine and an S3 server on loopback that
counts requests. CPU times are of this machine's cores. What cannot be measured here is assumed: the time of a request
to S3 and its limits (those that AWS publishes for a prefix), the windows a second of a GPU, and the machines' sizes.

Each row of the tables is a number of machines. Work that all machines share takes less time with more of them; what one
process does alone takes as long as before. A wall is the first number of machines at which a limit is passed, or at
which more than half of the time is spent alone.
"""

import argparse
import multiprocessing
import os
import pickle
import re
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from ast_core.features import KALDI128
from ast_core.labels import audioset_labels
from benchmarks.driver_memory import _manifest
from pipeline import dataset, parquet, storage
from pipeline.prepare.audio.decode import decode_media
from pipeline.prepare.audio.features import features
from pipeline.prepare.clip import FAILURES, WAVEFORM, ragged
from pipeline.prepare.output.publish import publish, start_output
from pipeline.prepare.output.shards import scan_shards, write_rows
from pipeline.prepare.output.work_list import read_chunks, write_chunks
from pipeline.prepare.plan import MAX_CLIPS, MAX_FETCHED_CLIPS, SHARDS_AT_ONCE
from pipeline.prepare.sources import read_manifest
from pipeline.ray_datasets import rows_of, silence_ray
from pipeline.tag import output as tags
from pipeline.tag.inputs import RECORDINGS, REFUSED, Inputs
from pipeline.tag.pieces import chunks_of
from pipeline.tag.work import MAX_CHUNK, PART_WINDOWS
from pipeline.text_table import text_table
from tests import fakes
from tests.s3 import S3Server, serve

NUM_MACHINES = (1, 10, 100, 1000)
CPUS, GPUS = 32, 4
"""CPUs of a machine that prepares, and of one that tags."""

CLIPS, WINDOWS, WINDOWS_OF_RECORDING = 2_084_320, 100_000_000, 360
"""AudioSet's segments; windows of 10 s; a recording of an hour."""

GPU_WINDOWS_PER_S = 450
REQUEST_S, PUTS_PER_S, GETS_PER_S = 0.03, 3500, 5500
HEAD_BYTES = 16e9
"""Memory of the head's machine, where the drivers run."""

AT_ONCE = pa.io_thread_count()
"""Requests that a process makes at once when it reads columns: as many as Arrow has threads for it."""

LIST_PAGE = 1000


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What was measured. Times are CPU seconds of one core."""

    clip_s: float
    """Decode, features and the shard of a clip of 10 s."""
    driver_bytes: float
    bytes_per_clip: float
    task_s: float
    """A task of Ray Data, in the driver's process."""
    list_s_per_clip: float
    """Writing the work list."""
    requests_per_chunk: float
    """Reading a chunk of the work list and writing its shard."""
    scan_s: float
    """Reading the small columns of a shard."""
    requests_per_scan: float
    publish_s_per_clip: float
    """Index, failures and weights."""
    index_s_per_clip: float
    """Reading the index, by each rank of a training."""
    bytes_per_recording: float
    """A driver's list of recordings and chunks."""
    bytes_per_window: float
    """The end of a tagging, in the driver."""
    end_s_per_window: float
    requests_per_part: float


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="measure little, for a test of this program")
    args = parser.parse_args(argv)
    costs = measured(3 if args.small else 1)
    print(text_table(("unit cost", "measured"), [(name, f"{value:.3g}") for name, value in vars(costs).items()], "lr"))
    for clips_per_shard, name in ((MAX_CLIPS, "from files"), (MAX_FETCHED_CLIPS, "fetched")):
        for in_tasks, readers in ((False, "one process"), (True, "tasks")):
            shards = -(-CLIPS // clips_per_shard)
            print(f"\npreparation of {CLIPS:,} clips {name}; {shards:,} shards, which {readers} read back at the end")
            show([preparation(costs, n, clips_per_shard, scans_in_tasks=in_tasks) for n in NUM_MACHINES])
    print(f"\ntagging of {WINDOWS:,} windows of {WINDOWS // WINDOWS_OF_RECORDING:,} recordings")
    show([tagging(costs, machines) for machines in NUM_MACHINES])
    return 0


@dataclass(frozen=True)
class Row:
    machines: int
    shared_s: float
    """All machines work."""
    alone_s: float
    """The driver works, or its last task and the tasks that this one waits for."""
    files_per_s: float
    """Shards or parts, which are as many PUT requests. A shard is a task."""
    most_tasks_per_s: float
    gets_alone: float
    lists: float
    driver_bytes: float

    def walls(self) -> list[str]:
        whole_s = self.alone_s + self.shared_s
        limits = {
            f"alone {self.alone_s / whole_s:.0%} of {whole_s:,.0f} s": self.alone_s > self.shared_s,
            f"driver starts {self.most_tasks_per_s:,.0f} tasks/s": self.files_per_s > self.most_tasks_per_s,
            f"S3 takes {PUTS_PER_S:,} PUT/s": self.files_per_s > PUTS_PER_S,
            f"driver has {HEAD_BYTES / 1e9:.0f} GB": self.driver_bytes > HEAD_BYTES,
        }
        return [wall for wall, is_there in limits.items() if is_there]


def show(rows: Sequence[Row]) -> None:
    header = ("machines", "shared s", "alone s", "tasks and PUT/s", "GETs alone", "LISTs", "driver MB", "walls")
    table = [
        (
            *(f"{row.machines:,}", f"{row.shared_s:,.0f}", f"{row.alone_s:,.0f}", f"{row.files_per_s:,.1f}"),
            *(f"{row.gets_alone:,.0f}", f"{row.lists:,.0f}", f"{row.driver_bytes / 1e6:,.0f}"),
            "; ".join(row.walls()) or "none",
        )
        for row in rows
    ]
    print(text_table(header, table, "rrrrrrrl"))


def preparation(costs: Costs, machines: int, clips_per_shard: int, *, scans_in_tasks: bool) -> Row:
    """All clips, without the fetching, whose rate the hosts decide."""
    chunks = -(-CLIPS // clips_per_shard)
    cores = min(machines * CPUS, chunks)  # a chunk is one task
    chunk_s = clips_per_shard * costs.clip_s + costs.requests_per_chunk * REQUEST_S
    shared_s = chunks / cores * chunk_s
    gets, lists = chunks * costs.requests_per_scan, 4 * -(-chunks // LIST_PAGE)
    scanners = min(machines * CPUS, -(-chunks // SHARDS_AT_ONCE)) if scans_in_tasks else 1
    scan_s = max(
        chunks * max(costs.scan_s, costs.requests_per_scan * REQUEST_S / AT_ONCE) / scanners, gets / GETS_PER_S
    )
    alone_s = CLIPS * (costs.list_s_per_clip + costs.publish_s_per_clip) + lists * REQUEST_S + scan_s
    driver = costs.driver_bytes + CLIPS * costs.bytes_per_clip
    return Row(machines, shared_s, alone_s, chunks / shared_s, 1 / costs.task_s, gets, lists, driver)


def tagging(costs: Costs, machines: int) -> Row:
    recordings, parts = WINDOWS / WINDOWS_OF_RECORDING, WINDOWS / PART_WINDOWS
    workers = machines * GPUS
    chunks = max(recordings / MAX_CHUNK, min(recordings, 4 * workers))
    shared_s = WINDOWS / GPU_WINDOWS_PER_S / min(workers, chunks)
    gets, lists = 3 * parts * costs.requests_per_part, 6 * parts / LIST_PAGE  # names, times, and events
    alone_s = max(WINDOWS * costs.end_s_per_window, gets * REQUEST_S / AT_ONCE) + lists * REQUEST_S
    driver = costs.driver_bytes + recordings * costs.bytes_per_recording + WINDOWS * costs.bytes_per_window
    return Row(machines, shared_s, alone_s, 2 * parts / shared_s, 1 / costs.task_s, gets, lists, driver)


def measured(less: int) -> Costs:
    """Measure all unit costs, each with a number of things that is divided by `less`."""
    with tempfile.TemporaryDirectory(prefix="ast-bench-") as folder, serve() as s3:
        os.environ |= s3.env
        storage.resolve(s3.uri("x"))[0].create_dir(s3.bucket)
        clips = _clips(10_000 // less)
        write_s, _ = _cpu_s(lambda: write_chunks(f"{folder}/todo", clips, MAX_CLIPS))
        requests_per_chunk = _requests_per_chunk(s3, clips)
        scan_s, requests_per_scan = _scan(s3, folder, 12 // less)
        part_requests = _requests_per_part(s3, folder)
        publish_s, index_s = _publish(f"{folder}/data", clips)
        few, many = 50_000 // less, 250_000 // less
        little, much = (_in_new_process(_list_clips, folder, n) for n in (few, many))
        bytes_per_clip = (much - little) / (many - few)
        per_recording = partial(_in_new_process, _list_recordings)
        few, many = 250_000 // less, 1_000_000 // less
        (_, small), (end_s, large) = (_in_new_process(_end_tagging, folder, n) for n in (few, many))
        return Costs(
            clip_s=_clip_s(Path(folder), 6 // less),
            driver_bytes=little - few * bytes_per_clip,
            bytes_per_clip=bytes_per_clip,
            task_s=_task_s(100 // less, 500 // less),
            list_s_per_clip=write_s / len(clips),
            requests_per_chunk=requests_per_chunk,
            scan_s=scan_s,
            requests_per_scan=requests_per_scan,
            publish_s_per_clip=publish_s / len(clips),
            index_s_per_clip=index_s / len(clips),
            bytes_per_recording=(per_recording(20_000) - per_recording(5000)) / 15_000,
            bytes_per_window=max(0.0, large - small) / (many - few),
            end_s_per_window=end_s / many,
            requests_per_part=part_requests,
        )


def _cpu_s(call: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of this process, which other work on the machine changes less than its time."""
    begin = time.process_time()
    result = call()
    return time.process_time() - begin, result


def _clips(number: int) -> pa.Table:
    rng = np.random.default_rng(0)
    return fakes.clips(
        *(
            {
                "clip_id": f"{i:011d}_{i % 600}.000",
                "video_id": f"{i:011d}",
                "media": f"https://host/{i:011d}",
                "end_s": 10.0,
                "labels": rng.integers(527, size=3).tolist(),
            }
            for i in range(number)
        )
    )


def _clip_s(folder: Path, number: int) -> float:
    media = fakes.write_media(folder / "clip.flac", fakes.tone(440.0, 10.0) + fakes.noise(10.0))
    rows = _clips(number)

    def prepare() -> None:
        waveforms = [decode_media(str(media), None, 0.0, None)[0] for _ in range(number)]
        stored = fakes.stored_clips(rows)
        with_waveform = stored.append_column("waveform", ragged(waveforms, WAVEFORM))
        fbank = features(with_waveform, KALDI128)["fbank"]
        field = dataset.shard_schema(KALDI128).field("fbank")
        write_rows(f"{folder}/shards", stored.append_column(field, fbank), KALDI128)

    prepare()  # tables of filters are made once
    return _cpu_s(prepare)[0] / number


def _requests_per_chunk(s3: S3Server, clips: pa.Table) -> float:
    chunks = write_chunks(s3.uri("todo"), clips.slice(0, MAX_CLIPS * 8), MAX_CLIPS)
    with s3.busy() as counts:
        for chunk in chunks:
            read_chunks(pa.Table.from_pylist([dict(chunk)]))
        write_rows(dataset.shards_dir(s3.uri("one"), "train"), fakes.noise_shard(_clips(MAX_CLIPS), 100), KALDI128)
    return (counts["requests"] - 1) / len(chunks) + 1


def _scan(s3: S3Server, folder: str, number: int) -> tuple[float, float]:
    """CPU seconds on a local disk and requests to S3 for the small columns of a shard."""
    shard = fakes.noise_shard(_clips(MAX_CLIPS), 998)  # as far apart in the file as in a real one
    write_rows(dataset.shards_dir(s3.uri("scanned"), "train"), shard, KALDI128)
    with s3.busy() as counts:
        scan_shards(s3.uri("scanned"), "train")
    local = dataset.shards_dir(f"{folder}/scanned", "train")
    write_rows(local, shard, KALDI128)
    (written,) = storage.list_files(local)
    for i in range(number - 1):
        os.link(written, f"{local}/{i}.parquet")
    return _cpu_s(lambda: scan_shards(f"{folder}/scanned", "train"))[0] / number, counts["requests"] - 1  # the LIST


def _publish(output: str, clips: pa.Table) -> tuple[float, float]:
    labels = audioset_labels()
    start_output(output, labels)
    stored = fakes.stored_clips(clips)
    empty = pa.array([[]] * len(clips), dataset.fbank_type(128))
    shard = stored.append_column(dataset.shard_schema(KALDI128).field("fbank"), empty)
    write_rows(dataset.shards_dir(output, "train"), shard, KALDI128)
    known = {"train": scan_shards(output, "train")}
    refused = {"train": FAILURES.empty_table()}
    publish_s, _ = _cpu_s(lambda: publish(output, labels, refused, known=known))
    index_s, _ = _cpu_s(lambda: dataset.PreparedDataset.open(output).clips(["train"]))
    return publish_s, index_s


def _list_clips(folder: str, number: int) -> int:
    """Peak memory of a process that reads a list and writes the work list, as a preparation's driver does."""
    clips = read_manifest(str(_manifest(Path(folder), number)), vocabulary=audioset_labels()).clips
    write_chunks(f"{folder}/todo{number}", clips, MAX_CLIPS)
    return _peak_bytes()


def _nothing(rows: pa.Table) -> pa.Table:
    return rows


def _task_s(few: int, many: int) -> float:
    """CPU seconds of the driver for a task of Ray Data, by the difference of two numbers of tasks."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    try:
        silence_ray()

        def run(number: int) -> None:
            data = ray.data.from_items([{"chunk": i} for i in range(number)], override_num_blocks=number)
            data = data.map_batches(_nothing, batch_format="pyarrow", batch_size=1, num_cpus=0.95)
            assert sum(1 for _ in rows_of(data)) == number

        run(10)  # the workers start
        return (_cpu_s(lambda: run(many))[0] - _cpu_s(lambda: run(few))[0]) / (many - few)
    finally:
        ray.shutdown()


def _in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def _peak_bytes() -> int:
    """The peak of this program's memory. `ru_maxrss` would begin with that of the process which started it."""
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024


def _list_recordings(number: int) -> int:
    columns = {
        "recording": [f"station-{i % 97:03d}/2026-01-01/recording-{i:08d}" for i in range(number)],
        "media": [f"s3://bucket/station-{i % 97:03d}/2026-01-01/recording-{i:08d}.flac" for i in range(number)],
        "start_s": [0.0] * number,
        "is_own": [True] * number,
    }
    table = pa.table({f.name: pa.array(columns.get(f.name, [None] * number), f.type) for f in RECORDINGS}, RECORDINGS)
    tracemalloc.start()
    chunks = list(chunks_of(Inputs(table, REFUSED.empty_table()), lambda _: False, most=MAX_CHUNK, own_hosts=()))
    pickled = [pickle.dumps(chunk) for chunk in chunks]  # as `on_ray.run_chunks` makes them
    assert len(pickled) == len(chunks)
    return table.nbytes + tracemalloc.get_traced_memory()[1]


def _write_parts(output: str, windows: int) -> None:
    """Parts of scores as a tagging with `--top 1` writes them, and none of events."""
    for number in range(-(-windows // PART_WINDOWS)):
        first = number * PART_WINDOWS
        names = [
            f"station-{i // WINDOWS_OF_RECORDING % 97:03d}/2026-01-01/recording-{i // WINDOWS_OF_RECORDING:08d}"
            for i in range(first, min(first + PART_WINDOWS, windows))
        ]
        starts = np.arange(len(names)) * 10.0
        scores = pa.table({"recording": names, "start_s": starts, "end_s": starts + 10, "score": starts})
        storage.write_file(
            storage.join(output, "scores", f"part-{number:06d}.parquet"),
            partial(pq.write_table, scores, compression="zstd", **parquet.CHECKSUMS),
        )


def _requests_per_part(s3: S3Server, folder: str) -> float:
    _write_parts(s3.uri("tags"), 4 * PART_WINDOWS)
    with s3.busy() as counts:
        tags._recordings(s3.uri("tags"))
    return (counts["requests"] - 1) / 4


def _end_tagging(folder: str, windows: int) -> tuple[float, int]:
    """CPU seconds and memory of the end of a tagging."""
    output = f"{folder}/tags{windows}"
    _write_parts(output, windows)
    before = _peak_bytes()
    end_s, summary = _cpu_s(lambda: tags.finish(output, REFUSED.empty_table(), []))
    assert summary.counts()["windows"] == windows
    return end_s, _peak_bytes() - before


if __name__ == "__main__":
    sys.exit(main())
