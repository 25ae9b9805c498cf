"""How much faster two machines of one core each are than one: preparation, and training by DDP over gloo.

    python -m benchmarks.machine_scaling [--clips 1200] [--repeats 2]

The machines are made of Linux namespaces (`tests/netcluster.py`), so this needs root; all processes of a machine are
pinned to one core. The first machine is also Ray's head and runs the driver. Jobs are submitted from a third machine;
inputs and outputs are in a shared folder. Rates are those of the work, without the start of the job: of a preparation
from the first shard to the last, of a training the median of its logged steps. This machine must do nothing else.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pyarrow.parquet as pq

from tests import fakes
from tests.netcluster import RayCluster, network, ray_cluster, unavailable

CLIP_S = 10.0
DISTINCT = 40
"""Different recordings. The others are links to them, since encoding takes longer than preparing."""
RECIPE = fakes.SMALL_RECIPE | {"norm_stats": "data", "input_tdim": "512", "batch_size": "24", "epochs": "1"}
RECIPE |= {"precision": "fp32", "wa_start": "1", "wa_end": "1"}
STEPS = 30


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
    run(cluster, name, *argv, *(word for key, value in RECIPE.items() for word in (f"--{key}", value)))
    records = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return statistics.median(record["clips_per_s"] for record in records if record["kind"] == "step")


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
        fakes.write_data(str(folder / "tones"), splits=(("train", STEPS * batch), ("eval", 8)))
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
    print("\n| | 1 machine, clips/s | 2 machines, clips/s | of one |\n|---|---|---|---|")
    for work in ("preparation", "training"):
        one, two = (statistics.median(rates[work, machines]) for machines in (1, 2))
        print(f"| {work} | {one:.1f} | {two:.1f} | {two / one:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
