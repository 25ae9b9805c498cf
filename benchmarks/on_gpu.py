"""All that only a GPU can show, in one run of eight minutes: one table of figures, and the logs beside it.

    python -m benchmarks.on_gpu [--budget-s 480] [--output DIR] [--only TEXT …] [--list]

The steps, the most valuable one first; a step that no longer fits into the budget is left out and says so:

    tests       the tests that need a GPU: CUDA graphs equal plain steps, no step waits for the device
    job         jobs/train.py through Ray Train on the card, from shards: clips/s, data-wait share, MFU
    evaluate    jobs/evaluate.py and jobs/tag.py on the card: clips/s
    step        a step of base384 with the switches that matter, batches of 12 and 48, and the original's
    profile     kernel time of a compiled step of 48, by kind of kernel
    models      every model of the comparison in training and inference

Nothing is downloaded: weights are random and sounds are synthesised. On a machine without a GPU, --list prints the
steps, and `--device cpu --budget-s 3600` runs all but the tests at a small size, to see that the script works.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ast_core.labels import audioset_labels
from benchmarks.tag import small_ast
from tests import fakes

ROOT = Path(__file__).resolve().parents[1]
NUM_SOUNDS, CLIP_S = 16, 10.0
KINDS_OF_KERNELS = {
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "matrix products": ("gemm", "cutlass", "cublas", "nvjet", "xmma"),
    "optimiser": ("multi_tensor", "adam"),
    "between them (Triton)": ("triton",),
}


@dataclass(frozen=True)
class Place:
    folder: Path
    device: str

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def num_clips(self) -> tuple[int, int]:
        """Clips to train on and to evaluate on."""
        return (2000, 1000) if self.on_gpu else (16, 16)

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"


@dataclass(frozen=True)
class Step:
    name: str
    estimate_s: float
    run: Callable[[Place], list[str]]
    """Lines of the result, Markdown."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-s", type=float, default=480.0, help="seconds for all steps (default 480)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for logs and for report.md (default: new)")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="steps with one of these texts")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--list", action="store_true", help="print the steps and how long they take")
    args = parser.parse_args(argv)
    steps = [step for step in STEPS if any(text in step.name for text in args.only)]
    if args.list:
        print("\n".join(f"{step.name:9} about {step.estimate_s:.0f} s" for step in steps))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here; --list prints the steps, --device cpu tries them", file=sys.stderr)
        return 2
    folder = args.output or Path(tempfile.mkdtemp(prefix="ast-gpu-"))
    folder.mkdir(parents=True, exist_ok=True)
    place, began_s, failed = Place(folder, args.device), time.monotonic(), 0
    report = [f"# {torch.cuda.get_device_name() if place.on_gpu else 'CPU'}, torch {torch.__version__}"]
    for step in steps:
        passed_s = time.monotonic() - began_s
        if passed_s + step.estimate_s > args.budget_s:
            lines = [f"left out: it takes about {step.estimate_s:.0f} s, {args.budget_s - passed_s:.0f} s are left"]
        else:
            try:
                lines = step.run(place)
            except (RuntimeError, OSError, subprocess.SubprocessError) as err:
                failed += 1
                lines = [f"FAILED: {err}", f"its output is in {place.log(step.name)}"]
        report += ["", f"## {step.name}, after {time.monotonic() - began_s:.0f} s", "", *lines]
        (folder / "report.md").write_text("\n".join(report) + "\n")
        print("\n".join(report[-len(lines) - 3 :]), flush=True)
    print(f"\n{folder / 'report.md'}")
    return int(failed > 0)


def run(place: Place, name: str, *words: str) -> str:
    """Run Python in the project's root. Returns what it printed, which is also added to the step's log."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    with place.log(name).open("a") as log:
        log.write(f"$ python {' '.join(words)}\n{done.stdout}{done.stderr}\n")
    if done.returncode:
        raise RuntimeError(f"python {' '.join(words[:2])} … ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return done.stdout


def table_of(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("|") or "best" in line]


def tests(place: Place) -> list[str]:
    files = ["tests/ast_core/test_cuda_graphs.py", "tests/ast_core/test_transfer.py"]
    return [run(place, "tests", "-m", "pytest", "-q", *files).strip().splitlines()[-1]]


def prepared(place: Place) -> Path:
    """A prepared data set of noise of 10 s with AudioSet's classes, by the real stages after decoding."""
    data, (num_train, num_eval) = place.folder / "data", place.num_clips
    if not (data / "dataset.json").exists():
        labels, sounds = audioset_labels(), [fakes.noise(CLIP_S, seed=i) for i in range(NUM_SOUNDS)]
        splits = {"train": num_train, "eval": num_eval}
        made = {name: [(i % len(labels), sounds[i % NUM_SOUNDS]) for i in range(n)] for name, n in splits.items()}
        fakes.write_waveforms(str(data), labels, made, clips_a_shard=200)
    return data


def job(place: Place) -> list[str]:
    data, output = prepared(place), place.folder / "run"
    argv = ["--recipe", "audioset-full", "--data", str(data), "--train-splits", "train", "--eval-splits", "eval"]
    argv += ["--output", str(output), "--num-workers", "1", "--device", place.device, "--imagenet_pretrain", "false"]
    argv += ["--epochs", "3", "--wa_start", "1", "--wa_end", "3", "--log-every-steps", "10"]
    argv += ["--batch_size", "48"] if place.on_gpu else ["--batch_size", "4", "--precision", "fp32"]
    if not place.on_gpu:
        argv += ["--model_size", "tiny224", "--fstride", "16", "--tstride", "16"]
    run(place, "job", "jobs/train.py", *argv)
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    keys = ("epoch", "step", "loss", "clips_per_s", "data_wait_share", "mfu", "memory_gb")
    lines = [f"| {' | '.join(keys)} |", "|---" * len(keys) + "|"]
    for record in records:
        if record["kind"] == "step":
            cells = (record.get(key) for key in keys)
            lines.append(
                "| " + " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"
            )
    return lines


def evaluate(place: Place) -> list[str]:
    model, media, num_files = place.folder / "run" / "best", place.folder / "sounds", 256 if place.on_gpu else 8
    if not model.exists():
        model = Path(small_ast(place.folder / "model"))
    media.mkdir(exist_ok=True)
    for i in range(num_files):
        fakes.write_media(media / f"{i:04d}.flac", fakes.noise(CLIP_S, seed=i % NUM_SOUNDS))
    lines = ["| job | clips | seconds, start included |", "|---|---|---|"]
    began_s = time.monotonic()
    argv = ["--checkpoint", str(model), "--data", str(prepared(place)), "--split", "eval", "--bootstrap", "0"]
    run(place, "evaluate", "jobs/evaluate.py", *argv, "--device", place.device)
    lines.append(f"| evaluate | {place.num_clips[1]} | {time.monotonic() - began_s:.1f} |")
    began_s = time.monotonic()
    argv = ["--checkpoint", str(model), "--input", str(media), "--output", str(place.folder / "tags")]
    run(place, "evaluate", "jobs/tag.py", *argv, "--device", place.device)
    lines.append(f"| tag | {num_files} | {time.monotonic() - began_s:.1f} |")
    return lines


def step(place: Place) -> list[str]:
    words = ["--device", place.device, "--only", "original", "all on", "patchout"]
    words += ["--batch-sizes", "12", "48", "--steps", "10"] if place.on_gpu else ["--batch-sizes", "2", "--steps", "1"]
    return table_of(run(place, "step", "-m", "benchmarks.train_step", *words))


def profile(place: Place) -> list[str]:
    """Kernel time of compiled steps, by kind of kernel: where each millisecond is."""
    from benchmarks import train_step

    words = ["--device", place.device, "--batch-sizes", "48" if place.on_gpu else "2"]
    args, device = train_step.parse(words), torch.device(place.device)
    variant = next(each for each in train_step.VARIANTS["cuda"] if each.name.startswith("all on: "))
    if not place.on_gpu:
        variant = train_step.Variant("fp32, fused attention", train_step.FUSED)
    one = train_step.builder(variant, args, args.batch_sizes[0], device)()
    for _ in range(3):
        one()
    kinds = [torch.profiler.ProfilerActivity.CUDA if place.on_gpu else torch.profiler.ProfilerActivity.CPU]
    num_steps = 5 if place.on_gpu else 1
    with torch.profiler.profile(activities=kinds) as profiler:
        for _ in range(num_steps):
            one()
        train_step.now_s(device)
    spent_ms: Counter[str] = Counter()
    for event in profiler.key_averages():
        used_us = event.self_device_time_total if place.on_gpu else event.self_cpu_time_total
        name = event.key.lower()
        kind = next((kind for kind, parts in KINDS_OF_KERNELS.items() if any(part in name for part in parts)), "other")
        spent_ms[kind] += used_us / 1000 / num_steps
    total_ms = sum(spent_ms.values())
    rows = [f"| {kind} | {ms:.2f} | {ms / total_ms:.0%} |" for kind, ms in spent_ms.most_common()]
    place.log("profile").write_text(profiler.key_averages().table(row_limit=60))
    return ["| kind of kernel | ms a step | share |", "|---|---|---|", *rows, f"| all | {total_ms:.2f} | |"]


def models(place: Place) -> list[str]:
    words = ["--device", place.device, "--seconds", "1"]
    words += [] if place.on_gpu else ["--batch", "2", "--models", "linear", "--switches", "as it is"]
    return table_of(run(place, "models", "-m", "benchmarks.models", *words))


STEPS = (
    Step("tests", 60, tests),
    Step("job", 110, job),
    Step("evaluate", 60, evaluate),
    Step("step", 110, step),
    Step("profile", 40, profile),
    Step("models", 100, models),
)

if __name__ == "__main__":
    sys.exit(main())
