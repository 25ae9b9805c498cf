"""How much faster two machines of one core each are than one: preparation, and training by DDP over gloo.

    python -m benchmarks.machine_scaling [--clips 1200] [--repeats 2]

The machines are made of Linux namespaces (`tests/netcluster.py`), so this needs root; all processes of a machine are
pinned to one core. The first machine is also Ray's head and runs the driver. Jobs are submitted from a third machine;
inputs and outputs are in a shared folder. Rates are those of the work, without the start of the job: of a preparation
from the first shard to the last, of a training the median of its logged steps. This machine must do nothing else.

Two cores share memory and caches, and may be two threads of one. So the same work is first measured without Ray, in one
process pinned to a core and in two that have nothing to do with each other: "the cores allow".
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pyarrow.parquet as pq
import torch

from ast_core.features import KALDI128, log_mel
from benchmarks.models import training_step
from jobs.recipe_option import read_recipe
from pipeline.prepare.audio.decode import decode_section
from tests import fakes
from tests.netcluster import RayCluster, network, ray_cluster, unavailable

CLIP_S = 10.0
DISTINCT = 40
"""Different recordings. The others are links to them, since encoding takes longer than preparing."""
RECIPE = fakes.SMALL_RECIPE | {"norm_stats": "data", "input_tdim": "512", "batch_size": "24", "epochs": "1"}
RECIPE |= {"precision": "fp32", "wa_start": "1", "wa_end": "1"}
NUM_CLASSES = 4
STEPS = 30
ALONE_S = 20.0


def make_media(folder: Path, num_clips: int) -> Path:
    folder.mkdir()
    rows = ["path,labels,split"]
    for i in range(num_clips):
        path = folder / f"{i:05}.webm"
        if i < DISTINCT:
            fakes.write_media(path, fakes.noise(CLIP_S, seed=i))
        else:
            os.link(folder / f"{i % DISTINCT:05}.webm", path)
        rows.append(f"{path.name},noise {i % 4},train")
    (folder / "list.csv").write_text("\n".join(rows) + "\n")
    return folder / "list.csv"


def run(cluster: RayCluster, name: str, *command: str) -> None:
    submitted = cluster.submit(name, "python", *command)
    printed, _ = submitted.communicate(timeout=900)
    if submitted.returncode:
        raise RuntimeError(printed)


def preparation_rate(cluster: RayCluster, name: str, listed: Path, output: Path) -> float:
    """Clips per second after the first shard."""
    run(cluster, name, "jobs/prepare_audioset.py", "--manifest", str(listed), "--output", str(output))
    shards = sorted(output.glob("*/shards/*.parquet"), key=lambda path: path.stat().st_mtime_ns)
    clips = [pq.ParquetFile(path).metadata.num_rows for path in shards]
    return sum(clips[1:]) / (shards[-1].stat().st_mtime - shards[0].stat().st_mtime)


def training_rate(cluster: RayCluster, name: str, data: Path, output: Path, num_workers: int) -> float:
    """Clips per second of the median step."""
    argv = ["jobs/train.py", "--recipe", "audioset-full", "--data", str(data), "--output", str(output)]
    argv += ["--train-splits", "train", "--eval-splits", "eval", "--num-workers", str(num_workers), "--device", "cpu"]
    argv += ["--cpus-per-worker", "1", "--log-every-steps", "1"]
    run(cluster, name, *argv, *words(RECIPE))
    records = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return statistics.median(record["clips_per_s"] for record in records if record["kind"] == "step")


def words(recipe: dict[str, str]) -> list[str]:
    return [word for key, value in recipe.items() for word in (f"--{key}", value)]


def preparing(media: Path) -> Callable[[], int]:
    """A function that decodes a recording and computes its features. Returns the number of clips."""
    paths = itertools.cycle(sorted(map(str, media.glob("*.webm"))))

    def one() -> int:
        log_mel(torch.from_numpy(decode_section(next(paths), 0.0, None)), KALDI128)
        return 1

    return one


def training(media: Path) -> Callable[[], int]:
    """A function that takes a step on random clips."""
    recipe = replace(read_recipe("audioset-full", words(RECIPE)), label_dim=NUM_CLASSES)
    step = training_step(recipe, torch.device("cpu"), "as it is")

    def one() -> int:
        step()
        return recipe.batch_size

    return one


def rate_alone(
    core: int, make: Callable[[Path], Callable[[], int]], media: Path, together: Barrier, rates: "Queue[float]"
) -> None:
    """Put the clips per second of one process on one core into `rates`."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    work = make(media)
    work()  # what happens only once
    together.wait()
    began_s, clips = time.perf_counter(), 0
    while (passed_s := time.perf_counter() - began_s) < ALONE_S:
        clips += work()
    rates.put(clips / passed_s)


def rate_without_ray(make: Callable[[Path], Callable[[], int]], media: Path, num_cores: int) -> float:
    """Clips per second of as many processes as cores, together."""
    context = multiprocessing.get_context("spawn")
    together, rates = context.Barrier(num_cores), context.Queue()
    processes = [
        context.Process(target=rate_alone, args=(core, make, media, together, rates)) for core in range(num_cores)
    ]
    for process in processes:
        process.start()
    total = sum(rates.get(timeout=300) for _ in processes)
    for process in processes:
        process.join()
    return total


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=1200)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args(argv)
    if reason := unavailable():
        parser.error(reason)
    rates: dict[tuple[str, int], list[float]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="scaling-")))
        listed = make_media(folder / "media", args.clips)
        batch = int(RECIPE["batch_size"])
        fakes.write_data(str(folder / "tones"), num_classes=NUM_CLASSES, splits=(("train", STEPS * batch), ("eval", 8)))
        allowed = {}
        for name, make in (("preparation", preparing), ("training", training)):
            alone, both = (rate_without_ray(make, folder / "media", num_cores) for num_cores in (1, 2))
            allowed[name] = both / alone
            print(f"{name} without Ray: {alone:.1f} clips/s on one core, {both:.1f} on two", flush=True)
        net = stack.enter_context(network(shared=[folder]))
        cluster = stack.enter_context(ray_cluster(net, 1, cores=[0]))
        for machines in (1, 2):
            if machines == 2:
                cluster.start_worker(net.add("node1", core=1))
                cluster.wait_for_nodes(2)
            for repeat in range(args.repeats):
                name = f"{machines}-{repeat}"
                prepared = preparation_rate(cluster, f"prepare-{name}", listed, folder / f"data-{name}")
                trained = training_rate(cluster, f"train-{name}", folder / "tones", folder / f"run-{name}", machines)
                rates.setdefault(("preparation", machines), []).append(prepared)
                rates.setdefault(("training", machines), []).append(trained)
                print(f"{machines} machines: {prepared:.1f} clips/s prepared, {trained:.1f} trained", flush=True)
    print("\n| | 1 machine, clips/s | 2 machines, clips/s | of one | the cores allow | share of that |")
    print("|---" * 6 + "|")
    for work in ("preparation", "training"):
        one, two = (statistics.median(rates[work, machines]) for machines in (1, 2))
        gain = two / one
        print(f"| {work} | {one:.1f} | {two:.1f} | {gain:.2f} | {allowed[work]:.2f} | {gain / allowed[work]:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
