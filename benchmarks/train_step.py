"""A training step with each optimisation on and off, beside the plain step of the original's design.

python -m benchmarks.train_step [--device cpu|cuda] [--model base384] [--frames 1024] [--batch-sizes 12 48] [--steps 5]
    [--threads 1]

Needs neither Ray nor a network: weights are drawn, clips are noise. On a CPU the configurations take turns, step by
step, so that other work on the machine meets them alike. Throughput is that of the fastest step after one to warm up,
by CPU time where one thread computes, else by the clock on the wall.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn

from ast_core import ASTModel
from ast_core.augment import draw, draw_patchout
from ast_core.flops import peak_flops, training_flops
from ast_core.model import MODEL_SIZES, patch_grid
from ast_core.recipe import Recipe
from ast_core.step import Batch, Norm, make_optimizer, make_scaler, set_execution, train_step

NUM_MEL_BINS, NUM_CLASSES, STRIDE, LABELS_PER_CLIP = 128, 527, 10, 2
PATCHOUT = {"patchout_f": 4, "patchout_t": 40}
"""PaSST's, at 1,024 frames."""
ORIGINAL = "the original's design"
Step = Callable[[], object]


@dataclass(frozen=True)
class Variant:
    name: str
    recipe: dict[str, Any] = field(default_factory=dict)
    """Keys that differ from the plain fp32 step."""

    @property
    def is_ours_and_whole(self) -> bool:
        return self.name != ORIGINAL and "patchout_f" not in self.recipe


FUSED, COMPILED = {"attention": "fused"}, {"attention": "fused", "compile": True}
BF16 = {"precision": "bf16"}
CUDA_VARIANTS = (
    Variant(ORIGINAL, {"precision": "fp16"}),
    Variant("fp32"),
    Variant("bf16", BF16),
    Variant("bf16, fused attention", BF16 | FUSED),
    Variant("bf16, fused, compiled", BF16 | COMPILED),
    Variant("bf16, fused, compiled, checkpointed", BF16 | COMPILED | {"activation_checkpointing": True}),
    Variant("bf16, fused, patchout", BF16 | FUSED | PATCHOUT),
    Variant("bf16, fused, compiled, patchout", BF16 | COMPILED | PATCHOUT),
    Variant("fp16 with a scaler, fused, compiled", {"precision": "fp16"} | COMPILED),
)
CPU_VARIANTS = (
    Variant(ORIGINAL),
    Variant("fp32"),
    Variant("fp32, fused attention", FUSED),
    Variant("fp32, fused, parts of 2", FUSED | {"micro_batch_size": 2}),
    Variant("fp32, fused, compiled", COMPILED),
    Variant("fp32, fused, compiled, parts of 2", COMPILED | {"micro_batch_size": 2}),
    Variant("fp32, fused, checkpointed", FUSED | {"activation_checkpointing": True}),
    Variant("fp32, fused, compiled, patchout", COMPILED | PATCHOUT),
    Variant("bf16", BF16),
    Variant("bf16, compiled", BF16 | {"compile": True}),
)


def main(argv: list[str]) -> int:
    args = parse(argv)
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    # Each variant is a run of its own: that another had other shapes must not make it compile for shapes that change.
    torch._dynamo.config.automatic_dynamic_shapes = False
    variants = CUDA_VARIANTS if device.type == "cuda" else CPU_VARIANTS
    print(f"{describe(device)}; {args.model}, {args.frames} frames, torch {torch.__version__}\n")
    if device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        print("bf16 is left out: this CPU has no instructions for it (on AVX2 a step took seven times as long).\n")
        variants = tuple(variant for variant in variants if variant.recipe.get("precision") != "bf16")
    print("| | batch | clips/s | of the original's | MFU | peak memory, GiB |\n|---|---|---|---|---|---|")
    for batch_size in args.batch_sizes:
        took_s, peaks_gib = measure(variants, args, batch_size, device)
        for variant in variants:
            print(row(variant, batch_size, took_s, peaks_gib, args, device))
        if ORIGINAL in took_s:
            best = min((v.name for v in variants if v.is_ours_and_whole and v.name in took_s), key=took_s.__getitem__)
            ratio = took_s[ORIGINAL] / took_s[best]
            print(f"\nbatch {batch_size}: best without patchout is {best!r}, {ratio:.2f} times the original's\n")
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--model", choices=list(MODEL_SIZES), help="base384 on a GPU, tiny224 on a CPU")
    parser.add_argument("--frames", type=int, default=1024)
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="12 to 192 on a GPU, 12 on a CPU")
    parser.add_argument("--steps", type=int, help="10 on a GPU, 5 on a CPU, after one to warm up")
    parser.add_argument("--threads", type=int, help="of a CPU; by default PyTorch's")
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = args.device == "cuda"
    args.model = args.model or ("base384" if on_gpu else "tiny224")
    args.batch_sizes = args.batch_sizes or ([12, 48, 96, 192] if on_gpu else [12])
    args.steps = args.steps or (10 if on_gpu else 5)
    return args


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} thread(s)"


def measure(
    variants: tuple[Variant, ...], args: argparse.Namespace, batch_size: int, device: torch.device
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of the fastest step by variant, and on a GPU the peak of memory; a variant that does not fit lacks."""
    build = {variant.name: builder(variant, args, batch_size, device) for variant in variants}
    if device.type == "cpu":
        return fastest_s({name: make() for name, make in build.items()}, args.steps, device), {}
    took_s, peaks_gib = {}, {}
    for name, make in build.items():
        torch.cuda.reset_peak_memory_stats(device)
        try:
            took_s |= fastest_s({name: make()}, args.steps, device)
            peaks_gib[name] = torch.cuda.max_memory_allocated(device) / 2**30
        except torch.cuda.OutOfMemoryError:
            pass
        gc.collect()
        torch.cuda.empty_cache()
    return took_s, peaks_gib


def fastest_s(steps: dict[str, Step], repeats: int, device: torch.device) -> dict[str, float]:
    fastest = dict.fromkeys(steps, float("inf"))
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    for repeat in range(1 + repeats):
        for name, step in steps.items():
            began_s = clock()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            took_s = clock() - began_s
            if repeat:
                fastest[name] = min(fastest[name], took_s)
            else:
                print(f"{name}: {took_s:.1f} s to warm up", file=sys.stderr, flush=True)
    return fastest


def row(
    variant: Variant,
    batch_size: int,
    took_s: dict[str, float],
    peaks_gib: dict[str, float],
    args: argparse.Namespace,
    device: torch.device,
) -> str:
    name = variant.name
    if name not in took_s:
        return f"| {name} | {batch_size} | out of memory | | | |"
    rate, peak = batch_size / took_s[name], peak_flops(device)
    recipe = recipe_of(variant, args, batch_size)
    with torch.device("meta"):
        flops = training_flops(ASTModel(**recipe.model_args(), imagenet_pretrain=False), recipe)
    mfu = "–" if peak is None or recipe.precision == "fp32" else f"{rate * flops / peak:.0%}"
    memory = f"{peaks_gib[name]:.1f}" if name in peaks_gib else "–"
    ratio = f"{took_s[ORIGINAL] / took_s[name]:.2f}" if ORIGINAL in took_s else "–"
    return f"| {name} | {batch_size} | {rate:.2f} | {ratio} | {mfu} | {memory} |"


def recipe_of(variant: Variant, args: argparse.Namespace, batch_size: int) -> Recipe:
    shape = {"model_size": args.model, "input_tdim": args.frames, "label_dim": NUM_CLASSES, "batch_size": batch_size}
    plain = {"precision": "fp32", "attention": "plain", "timem": min(192, args.frames), "imagenet_pretrain": False}
    return Recipe(**shape | plain | variant.recipe)


def builder(variant: Variant, args: argparse.Namespace, batch_size: int, device: torch.device) -> Callable[[], Step]:
    recipe = recipe_of(variant, args, batch_size)
    if variant.name == ORIGINAL:
        return lambda: original_step(recipe, device)
    return lambda: our_step(recipe, device)


def our_step(recipe: Recipe, device: torch.device) -> Step:
    torch.manual_seed(0)
    model = ASTModel(**recipe.model_args(), imagenet_pretrain=False)
    set_execution(model, device, recipe)
    model.to(device).train()
    optimizer, scaler = make_optimizer(model, recipe), make_scaler(recipe, device)
    clips, targets = data(recipe, device)
    num_clips, num_frames = clips.shape[:2]
    ones = torch.ones(num_clips, device=device)
    batch = Batch(clips, (ones * num_frames).long(), targets, ones)
    shape = {"num_frames": num_frames, "num_mel_bins": NUM_MEL_BINS}
    drawn = draw((0,), num_clips, **shape, freqm=recipe.freqm, timem=recipe.timem, noise=False)
    dropped = {"num_rows": recipe.patchout_f, "num_columns": recipe.patchout_t}
    patchout = draw_patchout((0,), model.v.patch_embed.grid_size, **dropped)
    norm = Norm(recipe.dataset_mean, recipe.dataset_std)
    args = {"recipe": recipe, "norm": norm, "lr": recipe.lr, "num_clips_global": num_clips}
    return lambda: train_step(model, optimizer, batch, drawn, **args, patchout=patchout, scaler=scaler)


def original_step(recipe: Recipe, device: torch.device) -> Step:
    """As `YuanGongND/ast` trains: plain attention and Adam; on a GPU fp16 autocast with a scaler, on a CPU fp32."""
    torch.manual_seed(0)
    network = timm.create_model(MODEL_SIZES[recipe.model_size][0], num_classes=0)
    for block in network.blocks:
        block.attn.fused_attn = False
    dim, (rows, columns) = network.embed_dim, patch_grid(NUM_MEL_BINS, recipe.input_tdim, STRIDE, STRIDE)
    network.patch_embed.img_size = None
    network.patch_embed.proj = nn.Conv2d(1, dim, 16, stride=STRIDE)
    network.pos_embed = nn.Parameter(torch.randn(1, 2 + rows * columns, dim) * 0.02)
    model = nn.Sequential(network, nn.LayerNorm(dim), nn.Linear(dim, NUM_CLASSES)).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), recipe.lr, weight_decay=5e-7, betas=(0.95, 0.999))
    on_gpu = device.type == "cuda"
    scaler = torch.amp.GradScaler(device.type, enabled=on_gpu)
    clips, targets = data(recipe, device)

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.float16, enabled=on_gpu):
            loss = F.binary_cross_entropy_with_logits(model(clips.transpose(1, 2).unsqueeze(1)), targets)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def data(recipe: Recipe, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise `[B, T, M]`, and labels `[B, C]`."""
    clips = torch.randn(recipe.batch_size, recipe.input_tdim, NUM_MEL_BINS)
    targets = torch.zeros(recipe.batch_size, NUM_CLASSES)
    targets[:, :LABELS_PER_CLIP] = 1
    return clips.to(device), targets.to(device)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
