"""What weights of 8 bits cost: mAP, size and speed of small models that are really trained, by kind of model.

    python -m benchmarks.int8 [--models ast talnet …] [--train 900] [--epochs 6] [--output FOLDER]

The clips are those of `benchmarks.tag_events`: 2 s with one or two of the demo's 14 classes. The jobs prepare them,
train each model, and export it with `--quantize int8 --data --split`, which prints the mAP of both networks on clips
that the model has not seen. For comparison, ONNX Runtime's dynamic quantisation of all products and convolutions, which
is not what the export does. Speed is that of ONNX Runtime with one thread on batches of 8 windows of 2 s.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from onnxruntime.quantization import QuantType, quantize_dynamic

from ast_core.checkpoints.onnx import session
from benchmarks.tag_events import ROOT, run, write_clips
from pipeline.train import models
from pipeline.train.evaluation.onnx_scores import loss_in_map

COMMON = {
    "input_tdim": 200,
    "norm_stats": "data",
    "loss": "BCE",
    "metrics": "mAP",
    "sampling": "uniform",
    "freqm": 8,
    "timem": 0,
    "mixup": 0.0,
    "batch_size": 24,
    "lrscheduler_start": 4,
    "lrscheduler_step": 1,
    "lrscheduler_decay": 0.6,
    "compile": False,
}
MODELS = {
    "ast": {
        "model": "ast",
        "imagenet_pretrain": False,
        "model_size": "tiny224",
        "fstride": 16,
        "tstride": 16,
        "lr": 3e-4,
    },
    "talnet": {"model": "talnet", "embedding_size": 256, "lr": 1e-3},
    "cnn_transformer": {"model": "cnn_transformer", "embedding_size": 256, "lr": 4e-4},
    "mobilenetv2": {"model": "mobilenetv2", "imagenet_pretrain": False, "lr": 1e-3},
    "efficientnet": {"model": "efficientnet", "imagenet_pretrain": False, "eff_b": 0, "lr": 1e-3},
    "convnext": {"model": "convnext", "imagenet_pretrain": False, "model_size": "atto", "lr": 1e-3},
    "linear": {"model": "linear", "lr": 1e-3},
}
LINES = re.compile(
    r"has (?P<small>[\d.]+) MB instead of (?P<large>[\d.]+).*mAP (?P<after>[\d.]+), with float32 (?P<before>[\d.]+)",
    re.DOTALL,
)
BATCH, ROUNDS = 8, 5


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--train", type=int, default=900, help="clips (default 900)")
    parser.add_argument("--eval", type=int, default=300, help="clips (default 300)")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--output", type=Path, help="keep everything here (default: a temporary folder)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="ast-bench-") as temporary:
        out = (args.output or Path(temporary)).absolute()
        if not (out / "data" / "dataset.json").exists():
            write_clips(out, {"train": args.train, "eval": args.eval}, 0, None)
            run("prepare_audioset.py", "--manifest", str(out / "clips.csv"), "--output", str(out / "data"))
        print("| model | MB | int8, MB | mAP | int8 | difference | ms a window | int8 | all dynamic: mAP | ms |")
        print("|---|---|---|---|---|---|---|---|---|---|")
        for name in args.models:
            print(row(out, name, args.epochs), flush=True)
    return 0


def row(out: Path, name: str, epochs: int) -> str:
    """Train and export a model."""
    recipe, trained, data = out / f"{name}.yaml", out / name, str(out / "data")
    of_epochs = {"epochs": epochs, "wa_start": epochs, "wa_end": epochs}
    recipe.write_text(json.dumps(COMMON | MODELS[name] | of_epochs))  # JSON is YAML
    splits = ["--train-splits", "train", "--eval-splits", "eval"]
    run("train.py", "--recipe", str(recipe), "--data", data, *splits, "--output", str(trained), "--num-workers", "0")
    export = [
        sys.executable,
        str(ROOT / "jobs" / "export.py"),
        "--checkpoint",
        str(trained),
        "--format",
        "onnx",
        "--force",
    ]
    subprocess.run([*export, "--output", str(out / f"{name}.onnx")], check=True, stdout=sys.stderr)
    int8 = ["--quantize", "int8", "--data", data, "--split", "eval", "--output", str(out / f"{name}-int8.onnx")]
    printed = subprocess.run([*export, *int8], check=True, stdout=subprocess.PIPE, text=True).stdout
    found = LINES.search(printed)
    assert found is not None, printed
    before, after = float(found["before"]), float(found["after"])
    network, dynamic = out / f"{name}.onnx", out / f"{name}-dynamic.onnx"
    quantize_dynamic(
        network,
        dynamic,
        op_types_to_quantize=["MatMul", "Gemm", "Conv"],
        reduce_range=True,
        weight_type=QuantType.QUInt8,
    )
    uri = models.find(str(trained))
    of_dynamic = loss_in_map(uri, models.read(uri)[1], data, ["eval"], before=network, after=dynamic).map_after
    speeds = [f"{window_ms(file):.1f}" for file in (network, out / f"{name}-int8.onnx", dynamic)]
    return (
        f"| {name} | {found['large']} | {found['small']} | {before:.4f} | {after:.4f} | {after - before:+.4f} "
        f"| {speeds[0]} | {speeds[1]} | {of_dynamic:.4f} | {speeds[2]} |"
    )


def window_ms(network: Path) -> float:
    """The fastest of some rounds."""
    run_network = session(network, num_threads=1).run
    fbank = (0.5 * np.random.default_rng(0).standard_normal((BATCH, COMMON["input_tdim"], 128))).astype(np.float32)
    took_s = []
    for _ in range(ROUNDS + 1):
        began_s = time.perf_counter()
        run_network(["logits"], {"fbank": fbank})
        took_s.append(time.perf_counter() - began_s)
    return 1000 * min(took_s[1:]) / BATCH


if __name__ == "__main__":
    sys.exit(main())
