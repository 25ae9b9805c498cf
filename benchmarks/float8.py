"""Compare the losses and rates of training in bf16, in float8 and with FlashAttention 4, on the same batches.

    python -m benchmarks.float8 [--device cpu|cuda] [--model tiny224] [--frames 128] [--batch-size 12] [--steps 100]
        [--threads 1]

All begin with the same weights and see the same batches in the same order: noise in which each of ten classes raises a
band of mel bins, two classes a clip. Twenty batches take turns, so each clip is seen several times. A row has the mean
loss of the ten steps up to it. On a GPU the blocks are compiled; what the GPU or the packages do not allow is a row
with FAILED. On a CPU float8 is emulated: its losses count, its rate does not, and float32 takes the place of
FlashAttention 4. Needs neither Ray nor a network. The GPU's part has never run on a card.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ast_core.augment.augmentation import draw_augmentations
from ast_core.batch import Batch
from ast_core.errors import ConfigError
from ast_core.execution import check_device
from ast_core.features import KALDI128
from ast_core.models.shapes import MODEL_SIZES
from ast_core.recipe import Recipe
from benchmarks.train_step import ALL_ON, BF16, FA4, FLOAT8, Variant, describe, free_memory, now_s, our_step, recipe_of

NUM_BATCHES, NUM_CLASSES, LABELS_PER_CLIP = 20, 10, 2
STEPS_A_ROW = 10
RAISED = 2.0
"""By how many standard deviations a class raises its band. With half of it the loss hardly falls in 100 steps."""
COMMON: dict[str, Any] = {"label_dim": NUM_CLASSES, "lr": 1e-4, "mixup": 0, "freqm": 0, "timem": 0}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "cuda": {"bf16": ALL_ON, "float8": ALL_ON | FLOAT8, "fa4": ALL_ON | FA4},
    "cpu": {"bf16": BF16, "float8": BF16 | FLOAT8, "fp32": {"attention": "fused"}},
}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.float8", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=list(MODEL_SIZES), default="tiny224")
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, help="CPU threads; by default PyTorch's number")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device, losses = torch.device(args.device), dict[str, Tensor]()
    print(f"{describe(device)}; {args.model}, {args.frames} frames, torch {torch.__version__}\n")
    print("| | clips/s after the first ten steps |\n|---|---|")
    for name, keys in VARIANTS[device.type].items():
        variant = Variant(name, COMMON | keys)
        recipe = recipe_of(variant, args, args.batch_size)
        try:
            check_device(recipe, device)
            losses[name], rate = trained(variant, recipe, args.steps, device)
            print(f"| {name} | {rate:.1f} |", flush=True)
        except (ConfigError, ImportError, RuntimeError) as err:  # a kernel that the card refuses: the next may run
            print(f"| {name} | FAILED: {' '.join(str(err).split())[:250]} |", flush=True)
        free_memory()
    if "bf16" in losses:
        print_curves(losses)
    return 0


def trained(variant: Variant, recipe: Recipe, num_steps: int, device: torch.device) -> tuple[Tensor, float]:
    """The loss of each step, and the clips per second."""
    step, batches = our_step(variant, recipe, device), [batch.to(device) for batch in made_batches(recipe)]
    drawn, losses, began_s = draw_augmentations(recipe, (0,), recipe.batch_size), list[Tensor](), now_s(device)
    for i in range(num_steps):
        if i == STEPS_A_ROW:  # compiled by now
            began_s = now_s(device)
        losses.append(step(batches[i % NUM_BATCHES], drawn, num_clips_global=recipe.batch_size))
    num_timed = num_steps - STEPS_A_ROW if num_steps > STEPS_A_ROW else num_steps
    return torch.stack(losses).cpu(), num_timed * recipe.batch_size / (now_s(device) - began_s)


def made_batches(recipe: Recipe) -> list[Batch]:
    """Always the same `NUM_BATCHES` batches."""
    generator = torch.Generator().manual_seed(0)
    shape = (recipe.batch_size, recipe.input_tdim, KALDI128.num_mel_bins)
    width = KALDI128.num_mel_bins // NUM_CLASSES
    batches = []
    for _ in range(NUM_BATCHES):
        clips, targets = torch.randn(shape, generator=generator), torch.zeros(recipe.batch_size, NUM_CLASSES)
        for clip, target in zip(clips, targets, strict=True):
            for label in torch.randperm(NUM_CLASSES, generator=generator)[:LABELS_PER_CLIP].tolist():
                target[label] = 1
                clip[:, label * width : (label + 1) * width] += RAISED
        log_mel = (clips * recipe.dataset_std + recipe.dataset_mean).half()
        frames = torch.full((recipe.batch_size,), recipe.input_tdim)
        batches.append(Batch(log_mel, frames, targets, torch.ones(recipe.batch_size), None))
    return batches


def print_curves(losses: dict[str, Tensor]) -> None:
    names, reference = list(losses), losses["bf16"]
    others = [name for name in names if name != "bf16"]
    header = ["step", *(f"loss, {name}" for name in names), *(f"{name} from bf16" for name in others)]
    print(f"\n| {' | '.join(header)} |\n{'|---' * len(header)}|")
    steps = [1, *range(STEPS_A_ROW, len(reference) + 1, STEPS_A_ROW)]
    for last in steps:
        mean = {name: float(curve[max(0, last - STEPS_A_ROW) : last].mean()) for name, curve in losses.items()}
        cells = [f"{mean[name]:.4f}" for name in names]
        cells += [f"{mean[name] / mean['bf16'] - 1:+.2%}" for name in others]
        print(f"| {last} | {' | '.join(cells)} |")
    for name in others:
        largest = float((losses[name] / reference - 1).abs().max())
        print(f"\n{name}: the loss of a single step differs from bf16's by {largest:.2%} at most")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
