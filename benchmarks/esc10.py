"""Train ESC-10 from scratch: accuracy on two folds and duration, compared with the reference implementation.

    python -m benchmarks.esc10 --esc10 DIR [--output FOLDER] [--seed 0]

The reference implementation, one process on one core: 0.57 on fold 1 and 0.50 on fold 2 (mean of the last five epochs,
± 0.055), in 889 and 856 s. Each fold is one call of jobs/train.py in a separate process, including its start.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
ORIGINAL = {"fold1": (0.57, 889.0), "fold2": (0.50, 856.0)}
SETTINGS = [
    *("--model_size", "tiny224", "--imagenet_pretrain", "false", "--fstride", "16", "--tstride", "16"),
    *("--batch_size", "16", "--lr", "1e-4", "--epochs", "20", "--lrscheduler_start", "10"),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--esc10", type=Path, default=ROOT.parent / "shared" / "data" / "esc10", metavar="DIR")
    parser.add_argument("--output", type=Path, help="keep the data set and the runs here (default: a temporary folder)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = args.output or Path(temporary)
        prepare_s = run("prepare_audioset.py", "--esc50", str(args.esc10), "--output", str(out / "data"))
        print(f"prepared in {prepare_s:.0f} s; seed {args.seed}\n")
        print("fold   accuracy  original  best epoch      s  original s  ratio")
        means = []
        for fold, (original_accuracy, original_s) in ORIGINAL.items():
            train_s = train(fold, out, args.seed)
            accuracies = epoch_accuracies(out / fold)
            means.append(sum(accuracies[-5:]) / 5)
            print(
                f"{fold}     {means[-1]:.3f}      {original_accuracy:.2f}       {max(accuracies):.3f}"
                f"    {train_s:5.0f}       {original_s:5.0f}   {train_s / original_s:.2f}",
                flush=True,
            )
        print(f"mean      {sum(means) / len(means):.3f}")
    return 0


def train(fold: str, out: Path, seed: int) -> float:
    others = [f"fold{i}" for i in range(1, 6) if f"fold{i}" != fold]
    splits = ["--train-splits", *others, "--eval-splits", fold]
    where = ["--data", str(out / "data"), "--output", str(out / fold), "--num-workers", "2", "--device", "cpu"]
    return run("train.py", "--recipe", "esc10", *where, *splits, *SETTINGS, "--seed", str(seed))


def run(job: str, *argv: str) -> float:
    """Run a job in a separate process. Returns its seconds."""
    began_s = time.monotonic()
    subprocess.run([sys.executable, str(ROOT / "jobs" / job), *argv], check=True, stdout=sys.stderr)
    return time.monotonic() - began_s


def epoch_accuracies(run_folder: Path) -> list[float]:
    records = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    return [record["accuracy"] for record in records if record["kind"] == "epoch"]


if __name__ == "__main__":
    sys.exit(main())
