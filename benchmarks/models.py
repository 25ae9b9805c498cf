"""Measure every model of the comparison: clips per second in training and in inference, as it is and with switches.

    python -m benchmarks.models [--models ast talnet …] [--device cpu|cuda] [--batch 8] [--seconds 3]

The models are those of the recipes: their sizes, frames and mel bins, with random weights and a batch of noise. The
switches are `channels last`, the memory format that convolutions on most devices prefer, `compiled`, Inductor, and
for the AST plain attention with all clips at once, as it was computed in bf16 on CPUs until 2026-12-01. All
variants of a model take turns, step by step, so that other work on the machine affects all of them alike; ratios are to
the model as it is. Only training is compiled. A variant that does not run says why. It needs neither Ray nor a network.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ast_core.augment.augmentation import draw_augmentations
from ast_core.batch import Batch, Norm
from ast_core.execution import for_device, set_execution
from ast_core.models import create_model
from ast_core.models.tagger import Tagger
from ast_core.recipe import Recipe
from ast_core.step import make_optimizer, make_scaler, predict, train_step
from benchmarks.train_step import now_s
from jobs.recipe_option import read_recipe

NO_IMAGENET: dict[str, Any] = {"imagenet_pretrain": False}
MODELS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "ast": ("compare-ast", NO_IMAGENET),
    "talnet": ("compare-talnet", {}),
    "cnn_transformer": ("compare-cnn-transformer", {}),
    "efficientnet": ("psla-efficientnet", NO_IMAGENET),
    "resnet50": ("compare-resnet50", NO_IMAGENET),
    "mobilenetv2": (None, {"input_tdim": 1024, **NO_IMAGENET}),
    "convnext": (None, {"input_tdim": 1024, "model_size": "tiny", **NO_IMAGENET}),
    "linear": (None, {"input_tdim": 1024}),
    "fnet": (None, {"input_tdim": 1024}),
}
"""The recipe of each model and keys that differ from it, or the keys where the comparison has no run script."""
PLAIN = "plain attention, all clips at once"
SWITCHES = ("as it is", "channels last", "compiled", PLAIN)
MIN_STEPS = 2
Step = Callable[[], object]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--batch", type=int, help="clips of a batch: 64 on a GPU, 8 on a CPU")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each variant is measured (default 3)")
    parser.add_argument("--switches", nargs="+", choices=SWITCHES, default=SWITCHES)
    args = parser.parse_args(argv)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(found if args.device == "auto" else args.device)
    batch_clips = args.batch or (64 if device.type == "cuda" else 8)
    print(f"{device}, {torch.get_num_threads()} threads, batches of {batch_clips}\n")
    print("| model | M parameters | work | " + " | ".join(f"{each}, clips/s (ratio)" for each in args.switches) + " |")
    print("|---" * (3 + len(args.switches)) + "|")
    for name in args.models:
        given = recipe_of(name, batch_clips)
        recipe = for_device(given, device)
        size = sum(parameter.numel() for parameter in create_model(**recipe.model_args()).parameters()) / 1e6
        for work, make in (("training", training_step), ("inference", inference_step)):
            recipe = for_device(given, device, trains=work == "training")
            steps, cells = dict[str, Step](), dict[str, str]()
            for switch in args.switches:
                # The compiled parts are for training only.
                if (switch == "compiled" and work == "inference") or (switch == PLAIN and name != "ast"):
                    cells[switch] = "–"
                    continue
                try:
                    step = make(recipe, device, switch)
                    step()  # compiles
                    steps[switch] = step
                except (RuntimeError, ValueError) as err:
                    cells[switch] = f"{type(err).__name__}: {' '.join(str(err).split())[:60]}"
            took_s = in_turns_s(steps, device, args.seconds)
            first = took_s.get(args.switches[0])
            for switch, each_s in took_s.items():
                ratio = f" ({first / each_s:.2f})" if first is not None and switch != args.switches[0] else ""
                cells[switch] = f"{batch_clips / each_s:.1f}{ratio}"
            row = " | ".join(cells[switch] for switch in args.switches)
            print(f"| {name} | {size:.1f} | {work}, {recipe.precision} | {row} |", flush=True)
            torch.compiler.reset()
    return 0


def recipe_of(name: str, batch_clips: int) -> Recipe:
    recipe, keys = MODELS[name]
    keys = keys | {"batch_size": batch_clips, "compile": False, "label_dim": 527}
    if recipe is None:
        return Recipe(model=name, **keys)
    return read_recipe(recipe, [word for key, value in keys.items() for word in (f"--{key}", str(value))])


def model_of(recipe: Recipe, device: torch.device, switch: str) -> tuple[Tagger, Recipe]:
    torch.manual_seed(0)
    recipe = replace(recipe, compile=switch == "compiled")
    if switch == PLAIN:
        recipe = replace(recipe, attention="plain", micro_batch_size=None)
    model = create_model(**recipe.model_args())
    in_effect = set_execution(model, device, recipe)
    if in_effect["compile"] != recipe.compile:
        raise ValueError("not compiled: there is nothing to compile, or it fails here")
    memory_format = torch.channels_last if switch == "channels last" else torch.preserve_format
    return model.to(device, memory_format=memory_format), recipe  # type: ignore[call-overload]


def batch_of(model: Tagger, recipe: Recipe, device: torch.device) -> Batch:
    num_frames, num_mel_bins = model.input_shape
    targets_BC = torch.zeros(recipe.batch_size, model.label_dim)
    targets_BC[:, :2] = 1
    return Batch(
        fbank_BTM=torch.randn(recipe.batch_size, num_frames, num_mel_bins),
        num_frames_B=torch.full((recipe.batch_size,), num_frames),
        target_BC=targets_BC,
        weight_B=torch.ones(recipe.batch_size),
    ).to(device)


def training_step(recipe: Recipe, device: torch.device, switch: str) -> Step:
    model, recipe = model_of(recipe, device, switch)
    model.train()
    optimizer, scaler = make_optimizer(model, recipe), make_scaler(recipe, device)
    batch, norm = batch_of(model, recipe, device), Norm(0.0, 0.5)
    drawn = draw_augmentations(recipe, (0,), recipe.batch_size)
    return lambda: train_step(
        *(model, optimizer, batch, drawn),
        recipe=recipe,
        norm=norm,
        lr=recipe.lr,
        num_clips_global=recipe.batch_size,
        scaler=scaler,
    )


def inference_step(recipe: Recipe, device: torch.device, switch: str) -> Step:
    model, recipe = model_of(recipe, device, switch)
    model.eval()
    batch = batch_of(model, recipe, device)

    def step() -> None:
        with torch.no_grad():
            predict(model, batch, recipe=recipe, norm=Norm(0.0, 0.5))

    return step


def in_turns_s(steps: dict[str, Step], device: torch.device, seconds: float) -> dict[str, float]:
    """Median seconds of a step of each variant, taken in turns."""
    took: dict[str, list[float]] = {name: [] for name in steps}
    at_a_stretch = 10 if device.type == "cuda" else 1  # a GPU that is waited for after each step runs dry
    began_s = time.perf_counter()
    while steps and (
        len(next(iter(took.values()))) < MIN_STEPS or time.perf_counter() - began_s < seconds * len(steps)
    ):
        for name, step in steps.items():
            before_s = now_s(device)
            for _ in range(at_a_stretch):
                step()
            took[name].append((now_s(device) - before_s) / at_a_stretch)
    return {name: statistics.median(each) for name, each in took.items()}


if __name__ == "__main__":
    sys.exit(main())
