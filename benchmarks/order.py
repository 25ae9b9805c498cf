"""Check that a list sorted by class trains like a shuffled one: pairs of a class in the training order, and ESC-10.

    python -m benchmarks.order [--esc10 DIR] [--seeds 3]

The first table has the share of pairs of samples with a common label, by their distance in an epoch. The order is that
of `pipeline.prepare.output.order`, chunks, row groups and `pipeline.train.data.sampling`; this needs no audio. `ideal`
is the share among all pairs of the list. `list's order` is that of shards in the order of the list. Rows of Parquet
archives stay in their order, because reading one row reads its row group: a table for sizes of row groups.

The second table has the time to read an archive's rows in three orders.

The third one trains ESC-10 from scratch, from a list sorted by class and from the same list shuffled.
"""

import argparse
import contextlib
import hashlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from jobs.prepare_audioset import main as prepare
from jobs.ray_session import ray_session
from jobs.train import main as train
from pipeline import dataset
from pipeline.prepare.audio.archive_members import read_member
from pipeline.prepare.output.order import in_work_order, shuffled
from pipeline.prepare.plan import MAX_CLIPS
from pipeline.prepare.sources.archives import row_member
from pipeline.train.data.sampling import epoch_order
from tests import fakes

DISTANCES = (1, 8, 24, 64)
NUM_CLIPS = 20_000
ROOT = Path(__file__).parents[1]
SETTINGS = [
    *("--model_size", "tiny224", "--imagenet_pretrain", "false", "--fstride", "16", "--tstride", "16"),
    *("--input_tdim", "96", "--freqm", "24", "--timem", "16", "--batch_size", "16", "--lr", "3e-4", "--epochs", "2"),
    *("--lrscheduler_start", "2", "--wa_start", "1", "--wa_end", "2", "--num-workers", "0"),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--esc10", type=Path, default=ROOT.parent / "shared" / "data" / "esc10", metavar="DIR")
    parser.add_argument("--seeds", type=int, default=3, help="number of trainings for each list; 0 is none")
    args = parser.parse_args()
    torch.set_num_threads(2)
    for name, labels in {"50 classes of 400 clips": esc_like(), "527 classes, several a clip": audioset_like()}.items():
        print_shares(name, labels)
    print_reading()
    if args.seeds:
        print_trainings(args.esc10, args.seeds)
    return 0


# --- pairs of one class


def esc_like() -> list[list[int]]:
    return [[i * 50 // NUM_CLIPS] for i in range(NUM_CLIPS)]


def audioset_like() -> list[list[int]]:
    """One to four labels per clip, as unevenly distributed as AudioSet's, sorted by the first label."""
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, 528) ** 0.9
    share /= share.sum()
    return sorted(sorted(set(rng.choice(527, rng.integers(1, 5), p=share).tolist())) for _ in range(NUM_CLIPS))


def print_shares(name: str, labels: list[list[int]]) -> None:
    clips = fakes.clips(*({"clip_id": f"{i:06}", "media": "x", "labels": c} for i, c in enumerate(labels)))
    permuted = clips.take(pa.array(np.random.default_rng(1).permutation(len(clips))))
    stored = {
        "list's order, sorted": clips,
        "list's order, shuffled": permuted,
        "files and tars, sorted": in_work_order(clips),
        "files and tars, shuffled": in_work_order(permuted),
    }
    with tempfile.TemporaryDirectory() as folder:
        for rows_a_group in (16, 100, 1000):
            stored[f"Parquet of {rows_a_group} rows a group, sorted"] = in_archive(clips, Path(folder), rows_a_group)
    ideal = share_in_common(clips, *np.random.default_rng(2).integers(len(clips), size=(2, 1_000_000)))
    print(f"\n{name}, {NUM_CLIPS} clips; ideal {ideal:.2%}\n")
    print(f"| stored as | {' | '.join(f'{distance} apart' for distance in DISTANCES)} |")
    print(f"|---|{'---|' * len(DISTANCES)}")
    for how, rows in stored.items():
        order = training_order(rows)
        shares = (share_in_common(rows, order[d:], order[:-d]) for d in DISTANCES)
        print(f"| {how} | {' | '.join(f'{share:.2%}' for share in shares)} |", flush=True)


def in_archive(clips: pa.Table, folder: Path, rows_a_group: int) -> pa.Table:
    """Write the clips as rows of a Parquet file, and return them in the order in which a preparation stores them."""
    uri = str(folder / f"{rows_a_group}.parquet")
    pq.write_table(pa.table({"audio": [b""] * len(clips)}), uri, row_group_size=rows_a_group)
    rows = clips.to_pylist()
    ordered = in_work_order(fakes.clips(*(row | {"media": uri, "member": row_member(i)} for i, row in enumerate(rows))))
    chunks = (ordered.slice(begin, MAX_CLIPS) for begin in range(0, len(ordered), MAX_CLIPS))
    return pa.concat_tables(map(shuffled, chunks))


def training_order(stored: pa.Table) -> np.ndarray:
    """Rows of `stored` in the order of an epoch, if shards are pieces of it."""
    place = np.arange(len(stored))
    shard, row = place // MAX_CLIPS, place % MAX_CLIPS
    group = shard * (MAX_CLIPS // dataset.ROW_GROUP_CLIPS) + row // dataset.ROW_GROUP_CLIPS
    in_index = np.argsort(stored["clip_id"].to_numpy(zero_copy_only=False))
    order = epoch_order(
        seed=0, epoch=1, num_clips=len(stored), weight=None, mixup=0.0, mixup_beta=10.0, row_group=group[in_index]
    )
    return in_index[order.clip]


def share_in_common(clips: pa.Table, one: np.ndarray, other: np.ndarray) -> float:
    labels = [frozenset(c) for c in clips["labels"].to_pylist()]
    return float(np.mean([not labels[i].isdisjoint(labels[j]) for i, j in zip(one, other, strict=True)]))


def print_reading(num_rows: int = 1000, rows_a_group: int = 100, row_bytes: int = 200_000) -> None:
    """Print the CPU time of reading an archive's rows in their own order, in ours, and in a random one."""
    rng = np.random.default_rng(0)
    print(f"\n{num_rows} rows of {row_bytes} bytes, {rows_a_group} a row group\n")
    print("| order | CPU ms a clip |\n|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        uri = str(Path(folder, "archive.parquet"))
        audio = pa.array([{"bytes": rng.bytes(row_bytes), "path": f"{i}.flac"} for i in range(num_rows)])
        pq.write_table(pa.table({"audio": audio}), uri, row_group_size=rows_a_group, compression="none")
        clips = fakes.clips(*({"clip_id": f"{i}", "media": uri, "member": row_member(i)} for i in range(num_rows)))
        orders = {"the archive's": clips, "ours": in_work_order(clips), "random": shuffled(clips)}
        read_all(clips)  # from now on, the file is cached in memory
        for name, rows in orders.items():
            print(f"| {name} | {read_all(rows) / num_rows:.2f} |")


def read_all(rows: pa.Table) -> float:
    """Read the rows. Returns CPU milliseconds."""
    began_s = time.process_time()
    for media, member in zip(rows["media"].to_pylist(), rows["member"].to_pylist(), strict=True):
        read_member(media, member)
    return (time.process_time() - began_s) * 1000


# --- ESC-10


def print_trainings(esc10: Path, seeds: int) -> None:
    lines = [
        f'"{file.absolute()}",{folder.name.partition(" - ")[2]},{"test" if file.name.startswith("1-") else "train"}'
        for folder in sorted(esc10.iterdir())
        if folder.is_dir()
        for file in sorted(folder.iterdir())
        if file.suffix in (".ogg", ".wav")
    ]
    permuted = np.random.default_rng(0).permutation(lines).tolist()
    with tempfile.TemporaryDirectory() as temporary, ray_session("local", 2):
        accuracies, files = {}, {}
        for name, rows in {"sorted by class": lines, "shuffled": permuted}.items():
            folder = Path(temporary, name.split()[0])
            folder.mkdir()
            (folder / "list.csv").write_text("\n".join(["path,labels,split", *rows]))
            quietly(prepare, ["--manifest", str(folder / "list.csv"), "--output", str(folder / "data")])
            shards = sorted((folder / "data").glob("*/shards/*.parquet"))
            files[name] = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in shards}
            accuracies[name] = [trained(folder, seed) for seed in range(seeds)]
    one, other = files.values()
    print(f"\nESC-10, {len(lines)} clips; shards of both lists equal to the byte: {one == other}\n")
    print(f"| list | {' | '.join(f'seed {seed}' for seed in range(seeds))} | mean |")
    print(f"|---|{'---|' * (seeds + 1)}")
    for name, values in accuracies.items():
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} | {np.mean(values):.3f} |")


def trained(folder: Path, seed: int) -> float:
    """Train, and return the accuracy on the evaluation fold after the last epoch."""
    run = folder / f"run{seed}"
    where = ["--data", str(folder / "data"), "--output", str(run), "--train-splits", "train", "--eval-splits", "test"]
    quietly(train, ["--recipe", "esc10", *where, *SETTINGS, "--seed", str(seed)])
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [float(record["accuracy"]) for record in records if record["kind"] == "epoch"][-1]


def quietly(job: object, argv: Sequence[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        assert callable(job)
        if job(list(argv)):
            raise RuntimeError(f"{argv} failed")


if __name__ == "__main__":
    sys.exit(main())
