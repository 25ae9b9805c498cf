"""Compare six models on ESC-10 from scratch: prepares the data, trains each model on two folds, and writes one page.

    python -m benchmarks.compare_esc10 --esc10 DIR [--output FOLDER] [--seed 0] [--seeds 1] [--models talnet …]
    python -m benchmarks.compare_esc10 --tune

The features are small64: a clip has a fifth of the values of kaldi128, and trains about five times as fast. The recipes
are scaled to 400 clips. --tune trains on folds 4 and 5 and evaluates on fold 3, so that no clip of the folds that are
reported, 1 and 2, has a part in choosing a setting. A seed takes about 33 minutes of two CPUs; with --output, a second
command adds seeds to those that are trained.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
REPORT = ("--folds", "fold1", "fold2")
TUNE = ("--train-splits", "fold4", "fold5", "--eval-splits", "fold3")

COMMON: dict[str, Any] = {
    "features": "small64",
    "input_fdim": 64,
    "input_tdim": 200,
    "norm_stats": "data",
    "loss": "CE",
    "metrics": "acc",
    "sampling": "uniform",
    "freqm": 12,
    "timem": 40,
    "mixup": 0.5,
    "noise": True,
    "lr": 1e-3,
    "batch_size": 16,
    "epochs": 20,
    "lrscheduler_start": 14,
    "lrscheduler_step": 2,
    "lrscheduler_decay": 0.6,
    "wa_start": 16,
    "wa_end": 20,
    "compile": False,
}
FROM_SCRATCH = {"imagenet_pretrain": False}
MODELS: dict[str, dict[str, Any]] = {
    # A quarter of the published 1,024 dimensions: a sixteenth of the operations.
    "talnet": {"model": "talnet", "embedding_size": 256},
    "cnn-transformer": {"model": "cnn_transformer", "embedding_size": 256},
    "convnext-atto": {"model": "convnext", "model_size": "atto"} | FROM_SCRATCH,
    "linear": {"model": "linear", "lr": 3e-3},
    "efficientnet-b0": {"model": "efficientnet", "eff_b": 0, "att_head": 1} | FROM_SCRATCH,
    "ast-tiny": {"model": "ast", "model_size": "tiny224", "fstride": 16, "tstride": 16, "lr": 3e-4} | FROM_SCRATCH,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--esc10", type=Path, default=ROOT.parent / "shared" / "data" / "esc10", metavar="DIR")
    parser.add_argument("--output", type=Path, help="keep the data set and the runs here (default: a temporary folder)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each model and fold (default 1)")
    parser.add_argument("--tune", action="store_true", help="train on folds 4 and 5, and evaluate on fold 3")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), help="default: all")
    parser.add_argument("--num-workers", default="2", help="DDP ranks of one thread each (default 2)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = (args.output or Path(temporary)).absolute()
        comparison = out / ("tuning" if args.tune else "comparison")
        began_s = time.monotonic()
        data = ["--output", str(out / "data"), "--features", "small64"]
        run("prepare_audioset.py", "--esc50", str(args.esc10), *data)
        recipes = [write_recipe(out / "recipes" / f"{name}.yaml", MODELS[name]) for name in args.models]
        compare = ["--recipes", *recipes, "--data", str(out / "data"), *(TUNE if args.tune else REPORT)]
        compare += ["--seed", str(args.seed), "--seeds", str(args.seeds)]
        compare += ["--num-workers", args.num_workers, "--cpus-per-worker", "1", "--device", "cpu"]
        run("compare.py", *compare, "--output", str(comparison))
        print(table(json.loads((comparison / "comparison.json").read_text())))
        print(f"\n{time.monotonic() - began_s:.0f} s in all; page: {comparison / 'comparison.html'}")
    return 0


def write_recipe(path: Path, keys: Mapping[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(COMMON | keys, indent=1))  # JSON is YAML
    return str(path)


def run(job: str, *argv: str) -> None:
    subprocess.run([sys.executable, str(ROOT / "jobs" / job), *argv], check=True, stdout=sys.stderr)


def table(found: Mapping[str, Any]) -> str:
    """The accuracies and costs of a comparison over folds, as rows of RESULTS.md."""
    folds = found["data"]["folds"] or [None]
    heads = [
        "model",
        *(f"{fold or 'fold3'}, last 5" for fold in folds),
        "mean, last 5",
        "best epochs [95 %]",
        "averaged",
    ]
    heads += ["M parameters", "M multiply-adds", "clips/s in training, inference"]
    lines = [heads, ["---"] * len(heads)]
    for model in sorted(found["models"], key=lambda model: -model["last_epochs"]["accuracy"]):
        of_fold = {
            fold: [run["last_epochs"]["accuracy"] for run in model["runs"] if run["fold"] == fold] for fold in folds
        }
        of_seed: dict[int, list[float]] = {}
        for run in model["runs"]:
            of_seed.setdefault(run["seed"], []).append(run["last_epochs"]["accuracy"])
        means = [statistics.mean(values) for values in of_seed.values()]
        spread = f" ± {statistics.stdev(means):.3f} over {len(means)} seeds" if len(means) > 1 else ""
        low, high = model["accuracy_interval"]
        costs = model["costs"]
        lines.append(
            [
                model["name"],
                *(f"{sum(values) / len(values):.3f}" for values in of_fold.values()),
                f"{model['last_epochs']['accuracy']:.3f}{spread}",
                f"{model['accuracy']:.3f} [{low:.3f}, {high:.3f}]",
                f"{model['averaged']['accuracy']:.3f}",
                f"{costs['parameters'] / 1e6:.2f}",
                f"{costs['multiply_adds'] / 1e6:.0f}",
                f"{model['training']['clips_per_s']:.0f}, {costs['inference']['clips_per_s']:.0f}",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
