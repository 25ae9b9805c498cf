"""All that only a GPU can show, in one run of eight minutes: one table of figures, and the logs beside it.

    python -m benchmarks.on_gpu [--budget-s 480] [--output DIR] [--only TEXT …] [--list]

The steps, the most valuable one first; a step that no longer fits into the budget is left out and says so:

    job         jobs/train.py through Ray Train on the card, from shards: clips/s, data-wait share, MFU
    profile     kernel time of a compiled step of 48, by kind of kernel and by kernel, beside the time on the clock
    graphs      losses of base384 as CUDA graphs and without, step by step
    step        a step of base384 with the switches that matter, batches of 12 and 48, and the original's
    evaluate    clips/s of inference by batch; jobs/evaluate.py and jobs/tag.py on the card
    tests       the tests that need a GPU: CUDA graphs equal plain steps, no step waits for the device
    float8      losses and clips/s of base384 in float8 and with FlashAttention 4, beside bf16's
    models      every model of the comparison in training and inference

A step that is not done when the budget is over is stopped, and its report has what it printed until then. A step whose
packages are missing fails, and the others go on: only `job` and the second half of `evaluate` need Ray, PyAV and
FFmpeg's program, and `tests` pytest. Nothing is downloaded: weights are random and sounds are synthesised. --output
gets report.md and a log of each step. With the default budget `models` runs if the others take less than estimated.
`float8` has never run on a card; it says FAILED where torchao or flash-attn-4 is missing. On a machine without a GPU,
--list prints the steps, and `--device cpu --budget-s 3600` runs all but the tests at a small size, to see that the
script works.
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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from ast_core.execution import for_device
from ast_core.labels import audioset_labels

ROOT = Path(__file__).resolve().parents[1]
NUM_SOUNDS, CLIP_S = 16, 10.0
KINDS_OF_KERNELS = {
    # Inductor names its kernels after all operations in them, so it comes first.
    "between them (Triton)": ("triton",),
    "attention": ("flash", "fmha", "sdpa", "attention"),
    "matrix products": ("gemm", "cutlass", "cublas", "nvjet", "xmma"),
    "optimiser": ("multi_tensor", "adam"),
    "copies": ("memcpy", "memset"),
}
KERNELS_SHOWN = 25


class StoppedError(RuntimeError):
    """The budget was over before a command ended."""

    def __init__(self, message: str, printed: str) -> None:
        super().__init__(message)
        self.printed = printed


@dataclass(frozen=True)
class Place:
    folder: Path
    """For the report and the logs."""
    work: Path
    """For data, models and runs."""
    device: str
    ends_s: float
    """When the budget is over, by `time.monotonic`."""

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
    with tempfile.TemporaryDirectory(prefix="ast-gpu-work-") as work:
        return run_steps(steps, Place(folder, Path(work), args.device, time.monotonic() + args.budget_s))


def run_steps(steps: Sequence[Step], place: Place) -> int:
    began_s, failed = time.monotonic(), 0
    report = [f"# {torch.cuda.get_device_name() if place.on_gpu else 'CPU'}, torch {torch.__version__}"]
    for step in steps:
        left_s = place.ends_s - time.monotonic()
        if step.estimate_s > left_s:
            lines = [f"left out: it takes about {step.estimate_s:.0f} s, {left_s:.0f} s are left"]
        else:
            try:
                lines = step.run(place)
            except StoppedError as err:
                failed += 1
                lines = [*table_of(err.printed), "", f"STOPPED: {err}"]
            except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as err:
                failed += 1
                lines = [f"FAILED: {err}", f"its output is in {place.log(step.name)}"]
        report += ["", f"## {step.name}, after {time.monotonic() - began_s:.0f} s", "", *lines]
        (place.folder / "report.md").write_text("\n".join(report) + "\n")
        print("\n".join(report[-len(lines) - 3 :]), flush=True)
    print(f"\n{place.folder / 'report.md'}")
    return int(failed > 0)


def run(place: Place, name: str, *words: str) -> str:
    """Run Python in the project's root until the budget is over. Returns what it printed; the step's log has it too.

    Raises:
        StoppedError: the budget was over first.
        RuntimeError: it failed.
    """
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    began_s, log = time.monotonic(), place.log(name)
    with log.open("ab") as file, tempfile.TemporaryFile() as printed:
        file.write(f"$ python {' '.join(words)}\n".encode())
        file.flush()
        # Files in place of pipes: what a program has printed until it is stopped is kept, also what its children print.
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=env, stdout=printed, stderr=file)
        try:
            status = process.wait(max(1.0, place.ends_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(15)
            process.kill()
            process.wait()
            status = None
        printed.seek(0)
        text = printed.read().decode(errors="replace")
        file.write(f"{text}\n".encode())
    if status is None:
        raise StoppedError(f"the budget was over after {time.monotonic() - began_s:.0f} s of {words[:2]}", text)
    if status:
        raise RuntimeError(f"python {' '.join(words[:2])} … ended with {status}: {log.read_text()[-400:].strip()}")
    return text


def table_of(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("|") or "best" in line]


def tests(place: Place) -> list[str]:
    files = ["tests/ast_core/test_cuda_graphs.py", "tests/ast_core/test_transfer.py"]
    return run(place, "tests", "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *files).strip().splitlines()[-5:]


def prepared(place: Place) -> Path:
    """A prepared data set of noise of 10 s with AudioSet's classes, by the real stages after decoding."""
    from tests import fakes

    data, (num_train, num_eval) = place.work / "data", place.num_clips
    if not (data / "dataset.json").exists():
        labels, sounds = audioset_labels(), [fakes.noise(CLIP_S, seed=i) for i in range(NUM_SOUNDS)]
        splits = {"train": num_train, "eval": num_eval}
        made = {name: [(i % len(labels), sounds[i % NUM_SOUNDS]) for i in range(n)] for name, n in splits.items()}
        fakes.write_waveforms(str(data), labels, made, clips_a_shard=200)
    return data


def job(place: Place) -> list[str]:
    data, output = prepared(place), place.work / "run"
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
    from benchmarks.models import inference_step, recipe_of
    from benchmarks.train_step import at_a_stretch_s, free_memory, parse

    device = torch.device(place.device)
    lines = ["| inference, batch of | clips/s |", "|---|---|"]
    for batch_clips in (8, 32, 64, 128, 256) if place.on_gpu else (2,):
        step = inference_step(for_device(recipe_of("ast", batch_clips), device, trains=False), device, "as it is")
        args = parse(["--device", place.device, "--steps", "20" if place.on_gpu else "1"])
        lines.append(f"| {batch_clips} | {batch_clips / at_a_stretch_s(step, args, device):.1f} |")
        del step
        free_memory()
    place.log("evaluate").write_text("\n".join(lines) + "\n")
    return [*lines, "", *evaluation_jobs(place)]


def evaluation_jobs(place: Place) -> list[str]:
    try:
        from benchmarks.tag import small_ast
        from tests import fakes
    except ImportError as err:
        return [f"jobs/evaluate.py and jobs/tag.py are left out: {err}"]

    model, media, num_files = place.work / "run" / "best", place.work / "sounds", 256 if place.on_gpu else 8
    if not model.exists():
        model = Path(small_ast(place.work / "model"))
    media.mkdir(exist_ok=True)
    for i in range(num_files):
        fakes.write_media(media / f"{i:04d}.flac", fakes.noise(CLIP_S, seed=i % NUM_SOUNDS))
    lines = ["| job | clips | seconds, start included |", "|---|---|---|"]
    began_s = time.monotonic()
    argv = ["--checkpoint", str(model), "--data", str(prepared(place)), "--split", "eval", "--bootstrap", "0"]
    run(place, "evaluate", "jobs/evaluate.py", *argv, "--device", place.device)
    lines.append(f"| evaluate | {place.num_clips[1]} | {time.monotonic() - began_s:.1f} |")
    began_s = time.monotonic()
    argv = ["--checkpoint", str(model), "--input", str(media), "--output", str(place.work / "tags")]
    run(place, "evaluate", "jobs/tag.py", *argv, "--device", place.device)
    lines.append(f"| tag | {num_files} | {time.monotonic() - began_s:.1f} |")
    return lines


def step(place: Place) -> list[str]:
    only = ["original", "all on: ", "all on, as CUDA graphs", "all on, patchout"]
    words = ["--device", place.device, "--only", *(only if place.on_gpu else ["original", "fp32, fused attention"])]
    words += ["--batch-sizes", "48", "12", "--steps", "10"] if place.on_gpu else ["--batch-sizes", "2", "--steps", "1"]
    return table_of(run(place, "step", "-m", "benchmarks.train_step", *words))


def graphs(place: Place) -> list[str]:
    """Losses with the same weights, batch and draws; rounding differs where kernels add in another order."""
    from benchmarks import train_step

    device, num_steps = torch.device(place.device), 50 if place.on_gpu else 2
    args = train_step.parse(["--device", place.device])
    lines = [
        "| 50 steps on a batch of 12 | first loss | last loss | largest relative difference |",
        "|---|---|---|---|",
    ]
    plain: list[float] = []
    for name, keys in (("eager", {"compile": False}), ("compiled", {}), ("as CUDA graphs", train_step.GRAPHS)):
        variant = train_step.Variant(name, (train_step.ALL_ON if place.on_gpu else train_step.FUSED) | keys)
        one = train_step.builder(variant, args, 12 if place.on_gpu else 2, device)()
        losses = [float(one()) for _ in range(num_steps)]  # type: ignore[arg-type]  # our step returns the loss
        plain = plain or losses
        difference = max(abs(own - other) / other for own, other in zip(losses, plain, strict=True))
        lines.append(f"| {name} | {losses[0]:.5f} | {losses[-1]:.5f} | {difference:.1e} |")
        del one
        train_step.free_memory()
    return lines


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
    num_steps = 10 if place.on_gpu else 1
    began_s = train_step.now_s(device)
    for _ in range(num_steps):
        one()
    clock_ms = (train_step.now_s(device) - began_s) * 1000 / num_steps
    with torch.profiler.profile(activities=kinds) as profiler:
        for _ in range(num_steps):
            one()
        train_step.now_s(device)
    spent_ms: Counter[str] = Counter()
    by_kernel: dict[str, tuple[float, int]] = {}
    for event in profiler.key_averages():
        if event.is_user_annotation:  # contains kernels that are counted by themselves
            continue
        used_ms = (event.self_device_time_total if place.on_gpu else event.self_cpu_time_total) / 1000 / num_steps
        name = event.key.lower()
        kind = next((kind for kind, parts in KINDS_OF_KERNELS.items() if any(part in name for part in parts)), "other")
        spent_ms[kind] += used_ms
        by_kernel[event.key] = used_ms, event.count // num_steps
    total_ms = sum(spent_ms.values())
    lines = ["| kind of kernel | ms a step | share |", "|---|---|---|"]
    lines += [f"| {kind} | {ms:.2f} | {ms / total_ms:.0%} |" for kind, ms in spent_ms.most_common()]
    lines += [f"| all | {total_ms:.2f} | |", f"| on the clock, without the profiler | {clock_ms:.2f} | |", ""]
    lines += ["| kernel | ms a step | calls a step |", "|---|---|---|"]
    for name, (used_ms, calls) in sorted(by_kernel.items(), key=lambda each: -each[1][0])[:KERNELS_SHOWN]:
        lines.append(f"| {name[:90].replace('|', '/')} | {used_ms:.2f} | {calls} |")
    place.log("profile").write_text(profiler.key_averages().table(row_limit=100))
    return lines


def float8(place: Place) -> list[str]:
    size = ["--model", "base384", "--frames", "1024", "--batch-size", "12", "--steps", "50"]
    size = size if place.on_gpu else ["--batch-size", "2", "--steps", "2"]
    return run(place, "float8", "-m", "benchmarks.float8", "--device", place.device, *size).strip().splitlines()


def models(place: Place) -> list[str]:
    words = ["--device", place.device, "--seconds", "1"]
    # Compiling each of them would take the rest of the budget.
    words += ["--switches", "as it is", "channels last"] if place.on_gpu else ["--switches", "as it is"]
    words += [] if place.on_gpu else ["--batch", "2", "--models", "linear"]
    return table_of(run(place, "models", "-m", "benchmarks.models", *words))


STEPS = (
    Step("job", 100, job),
    Step("profile", 45, profile),
    Step("graphs", 60, graphs),
    Step("step", 120, step),
    Step("evaluate", 60, evaluate),
    Step("tests", 40, tests),
    Step("float8", 50, float8),
    Step("models", 45, models),
)

if __name__ == "__main__":
    sys.exit(main())
