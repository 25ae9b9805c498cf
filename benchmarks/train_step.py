"""Measure a training step with each optimisation on and off, compared with the reference step; or feed and step.

    python -m benchmarks.train_step [--device cpu|cuda] [--model base384] [--frames 1024] [--batch-sizes 12 48]
        [--steps N] [--threads 1] [--only TEXT …] [--fed [--data DIR]]

Needs neither Ray nor a network: weights are random and clips are noise. On a GPU the throughput is that of all steps
after some warm-up steps, and the GPU is synchronised once, after the last step. On a CPU it is that of the median step;
the configurations take turns, step by step, so that other work on the machine affects all of them; one thread is
measured by CPU time, several by wall time.

--fed joins the feed and the step as in training: shards on disk, weighted sampling, mixup, reading ahead. It prints the
data-wait share, and the rate relative to the same step with a batch that is on the device already.
"""

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ast_core.augment.augmentation import draw_augmentations
from ast_core.batch import Batch, Norm, Partners
from ast_core.errors import ConfigError
from ast_core.execution import check_device, for_device, set_execution
from ast_core.fbank import fbank
from ast_core.features import KALDI128
from ast_core.flops import utilisation
from ast_core.models import create_model
from ast_core.models.patchout import draw_patchout
from ast_core.models.shapes import MODEL_SIZES, patch_grid
from ast_core.recipe import Recipe
from ast_core.step import make_optimizer, make_scaler, train_step
from benchmarks.feed import NUM_CLASSES, NUM_SOUNDS, sound, write_shards
from pipeline.dataset import Clips, PreparedDataset
from pipeline.train.data.feed import TrainFeed

STRIDE, LABELS_PER_CLIP = 10, 2
PATCHOUT = {"patchout_f": 4, "patchout_t": 40}
"""Patchout as in PaSST, for 1,024 frames. Fewer frames have fewer columns."""
ORIGINAL = "the original's design"
Step = Callable[[], object]


@dataclass(frozen=True)
class Variant:
    name: str
    recipe: dict[str, Any] = field(default_factory=dict)
    """A configuration, by the recipe keys that differ from the plain fp32 step."""
    is_mixed: bool = False
    """Whether half of the clips are mixed, as in the feed's batches."""
    fused_adam: bool = True

    @property
    def is_ours_and_whole(self) -> bool:
        return self.name != ORIGINAL and "patchout_f" not in self.recipe


FUSED, COMPILED = {"attention": "fused"}, {"attention": "fused", "compile": True}
BF16 = {"precision": "bf16"}
ALL_ON = BF16 | COMPILED
GRAPHS = {"cuda_graphs": True}
FLOAT8, FA4 = {"float8": True}, {"attention": "fa4"}
CUDA_VARIANTS = (
    Variant(ORIGINAL, {"precision": "fp16"}),
    Variant("fp32"),
    Variant("bf16", BF16),
    Variant("bf16, fused attention", BF16 | FUSED),
    Variant("bf16, fused attention, patchout", BF16 | FUSED | PATCHOUT),
    Variant("all on: bf16, fused attention and Adam, compiled", ALL_ON),
    Variant("all on, as CUDA graphs", ALL_ON | GRAPHS),
    Variant("all on, parts of 6, as CUDA graphs", ALL_ON | GRAPHS | {"micro_batch_size": 6}),
    Variant("all on, parts of 6", ALL_ON | {"micro_batch_size": 6}),
    Variant("all on, half mixed", ALL_ON, is_mixed=True),
    Variant("all on but fused Adam", ALL_ON, fused_adam=False),
    Variant("all on, gradients clipped", ALL_ON | {"grad_clip": 1.0}),
    Variant("all on, checkpointed", ALL_ON | {"activation_checkpointing": True}),
    Variant("all on, fp16 with a scaler for bf16", ALL_ON | {"precision": "fp16"}),
    Variant("all on, patchout", ALL_ON | PATCHOUT),
    Variant("all on, with patchout, as CUDA graphs", ALL_ON | PATCHOUT | GRAPHS),
    Variant("all on, float8", ALL_ON | FLOAT8),
    Variant("all on, FlashAttention 4", ALL_ON | FA4),
)
CPU_VARIANTS = (
    Variant(ORIGINAL),
    Variant("fp32"),
    Variant("fp32, fused attention", FUSED),
    Variant("fp32, fused, parts of 2", FUSED | {"micro_batch_size": 2}),
    Variant("fp32, fused, compiled", COMPILED),
    Variant("fp32, fused, compiled, parts of 2", COMPILED | {"micro_batch_size": 2}),
    Variant("fp32, fused, half mixed", FUSED, is_mixed=True),
    Variant("fp32, fused, Adam not fused", FUSED, fused_adam=False),
    Variant("fp32, fused, gradients clipped", FUSED | {"grad_clip": 1.0}),
    Variant("fp32, fused, checkpointed", FUSED | {"activation_checkpointing": True}),
    Variant("fp32, fused, compiled, patchout", COMPILED | PATCHOUT),
    Variant("bf16", BF16),
    Variant("bf16, fused attention", BF16 | FUSED),
    Variant("bf16, parts of 2", BF16 | {"micro_batch_size": 2}),
    Variant("bf16, compiled", BF16 | {"compile": True}),
    Variant("bf16, compiled, parts of 2", BF16 | {"compile": True, "micro_batch_size": 2}),
)


VARIANTS = {"cuda": CUDA_VARIANTS, "cpu": CPU_VARIANTS}
FED_VARIANTS = {
    "cuda": (
        Variant("all on", ALL_ON, is_mixed=True),
        Variant("all on, as CUDA graphs", ALL_ON | GRAPHS, is_mixed=True),
        Variant("all on, patchout", ALL_ON | PATCHOUT, is_mixed=True),
        Variant("all on, fp16 with a scaler for bf16", ALL_ON | {"precision": "fp16"}, is_mixed=True),
    ),
    "cpu": (Variant("fp32, fused", FUSED, is_mixed=True),),
}


def main(argv: list[str]) -> int:
    args = parse(argv)
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f"{describe(device)}; {args.model}, {args.frames} frames, torch {torch.__version__}\n")
    variants = (FED_VARIANTS if args.fed else VARIANTS)[device.type]
    variants = tuple(variant for variant in variants if any(text in variant.name for text in args.only))
    if for_device(Recipe(precision="bf16"), device).precision != "bf16":
        print("bf16 is left out: this device has no instructions for it (on AVX2 a step took seven times as long).\n")
        variants = tuple(variant for variant in variants if variant.recipe.get("precision") != "bf16")
    variants = tuple(variant for variant in variants if can_run(variant, args, device))
    if not variants:
        print(f"no configuration has {' or '.join(map(repr, args.only))} in its name")
        return 1
    if args.fed:
        say_fed(variants, args, device)
    else:
        say_steps(variants, args, device)
    return 0


def can_run(variant: Variant, args: argparse.Namespace, device: torch.device) -> bool:
    try:
        check_device(recipe_of(variant, args, 1), device)
    except ConfigError as err:
        print(f"{variant.name!r} is left out: {err}\n")
        return False
    return True


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--model", choices=list(MODEL_SIZES), help="base384 on a GPU, tiny224 on a CPU")
    parser.add_argument("--frames", type=int, default=1024)
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="12 to 192 on a GPU, 12 on a CPU")
    parser.add_argument("--steps", type=int, help="measured steps: 20 on a GPU (100 with --fed), 5 on a CPU")
    parser.add_argument("--threads", type=int, help="CPU threads; by default PyTorch's number")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="TEXT",
        help="only configurations with one of these texts in their name",
    )
    parser.add_argument("--fed", action="store_true", help="feed and step together, instead of steps only")
    parser.add_argument("--data", metavar="DIR", help="a prepared data set for --fed; by default shards are generated")
    parser.add_argument("--clips", type=int, help="clips in generated shards: 20,000 on a GPU, 512 on a CPU")
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = args.device == "cuda"
    args.model = args.model or ("base384" if on_gpu else "tiny224")
    args.batch_sizes = args.batch_sizes or ([12, 48, 96, 192] if on_gpu else [12])
    args.steps = args.steps or ((100 if args.fed else 20) if on_gpu else 5)
    args.clips = args.clips or (20_000 if on_gpu else 512)
    args.warm_up = 3 if on_gpu else 1
    return args


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} thread(s)"


# --- steps only


def say_steps(variants: tuple[Variant, ...], args: argparse.Namespace, device: torch.device) -> None:
    print("| | batch | clips/s | of the original's | MFU | peak memory, GiB |\n|---|---|---|---|---|---|")
    for batch_size in args.batch_sizes:
        took_s, peaks_gib = dict[str, float](), dict[str, float]()
        # On a GPU each is measured by itself, and its row is there if the rest is stopped.
        for some in [variants] if device.type == "cpu" else [(variant,) for variant in variants]:
            measure(some, args, batch_size, device, took_s, peaks_gib)
            for variant in some:
                print(row(variant, batch_size, took_s, peaks_gib, args, device), flush=True)
        ours = [v.name for v in variants if v.is_ours_and_whole and v.name in took_s]
        if ORIGINAL in took_s and ours:
            best = min(ours, key=took_s.__getitem__)
            ratio = took_s[ORIGINAL] / took_s[best]
            print(f"\nbatch {batch_size}: best without patchout is {best!r}, {ratio:.2f} times the original's\n")


def measure(
    variants: Iterable[Variant],
    args: argparse.Namespace,
    batch_size: int,
    device: torch.device,
    took_s: dict[str, float],
    peaks_gib: dict[str, float],
) -> None:
    """Add the seconds per step of each variant, and on a GPU the peak memory in GiB. What does not fit is left out."""
    build = {variant.name: builder(variant, args, batch_size, device) for variant in variants}
    if device.type == "cpu":
        took_s |= in_turns_s({name: make() for name, make in build.items()}, args)
        free_memory()
        return
    for name, make in build.items():
        torch.cuda.reset_peak_memory_stats(device)
        try:
            took_s[name] = at_a_stretch_s(make(), args, device)
            peaks_gib[name] = torch.cuda.max_memory_allocated(device) / 2**30
        except torch.cuda.OutOfMemoryError:
            pass  # its row says that it is out of memory
        free_memory()


def free_memory() -> None:
    """Free memory and compiled code: PyTorch compiles at most eight shapes of a block."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.compiler.reset()


def in_turns_s(steps: dict[str, Step], args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step of each configuration, in turns, on a CPU."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for name, step in steps.items():
        began_s = time.perf_counter()
        for _ in range(args.warm_up):
            step()
        print(f"{name}: {time.perf_counter() - began_s:.1f} s to warm up", file=sys.stderr, flush=True)
    spent_s: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.steps):
        for name, step in steps.items():
            began_s = clock()
            step()
            spent_s[name].append(clock() - began_s)
    return {name: statistics.median(each) for name, each in spent_s.items()}


def at_a_stretch_s(step: Step, args: argparse.Namespace, device: torch.device) -> float:
    """Seconds per step, for many steps that are queued on the device one after another."""
    for _ in range(args.warm_up):
        step()
    began_s = now_s(device)
    for _ in range(args.steps):
        step()
    return (now_s(device) - began_s) / args.steps


def now_s(device: torch.device) -> float:
    """Wall time after the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


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
    rate = batch_size / took_s[name]
    memory = f"{peaks_gib[name]:.1f}" if name in peaks_gib else "–"
    ratio = f"{took_s[ORIGINAL] / took_s[name]:.2f}" if ORIGINAL in took_s else "–"
    mfu = mfu_of(rate, recipe_of(variant, args, batch_size), device)
    return f"| {name} | {batch_size} | {rate:.2f} | {ratio} | {mfu} | {memory} |"


def mfu_of(clips_per_s: float, recipe: Recipe, device: torch.device) -> str:
    with torch.device("meta"):
        mfu = utilisation(clips_per_s, create_model(**recipe.model_args()), recipe, device)
    return "–" if mfu is None else f"{mfu:.0%}"


def recipe_of(variant: Variant, args: argparse.Namespace, batch_size: int) -> Recipe:
    shape = {"model_size": args.model, "input_tdim": args.frames, "label_dim": NUM_CLASSES, "batch_size": batch_size}
    plain = {"precision": "fp32", "attention": "plain", "timem": min(192, args.frames), "imagenet_pretrain": False}
    values = shape | plain | variant.recipe
    return Recipe(**values | {"patchout_t": values.get("patchout_t", 0) * args.frames // 1024})


def builder(variant: Variant, args: argparse.Namespace, batch_size: int, device: torch.device) -> Callable[[], Step]:
    recipe = recipe_of(variant, args, batch_size)
    if variant.name == ORIGINAL:
        return lambda: original_step(recipe, device)
    return lambda: step_on_one_batch(variant, recipe, device)


def our_step(variant: Variant, recipe: Recipe, device: torch.device) -> Callable[..., Tensor]:
    """`train_step` of a new model, without the batch and its random draws."""
    torch.manual_seed(0)
    model = create_model(**recipe.model_args())
    set_execution(model, device, recipe)
    model.to(device).train()
    optimizer = make_optimizer(model, recipe)
    if not variant.fused_adam:
        for group in optimizer.param_groups:
            group["fused"] = None  # PyTorch's own choice
    norm = Norm(recipe.dataset_mean, recipe.dataset_std, recipe.norm_divisor)
    scaler = make_scaler(recipe, device)
    return partial(train_step, model, optimizer, recipe=recipe, norm=norm, lr=recipe.lr, scaler=scaler)


def step_on_one_batch(variant: Variant, recipe: Recipe, device: torch.device) -> Step:
    """A step that always uses the same batch, which is on the device already."""
    num_clips, num_frames = recipe.batch_size, recipe.input_tdim
    step, (clips, targets) = our_step(variant, recipe, device), data(recipe, torch.device("cpu"))
    frames, partners = torch.full((num_clips,), num_frames), None
    if variant.is_mixed:
        mixed = np.arange(0, num_clips, 2)
        partners = Partners(mixed, clips[mixed].half(), frames[mixed], torch.full((len(mixed),), 0.5))
    batch = Batch(clips.half(), frames, targets, torch.ones(num_clips), partners).to(device)
    drawn = draw_augmentations(recipe, (0,), num_clips)
    grid = patch_grid(KALDI128.num_mel_bins, num_frames, STRIDE, STRIDE)
    patchout = draw_patchout((0,), grid, num_rows=recipe.patchout_f, num_columns=recipe.patchout_t)
    return lambda: step(batch, drawn, num_clips_global=num_clips, patchout=patchout)


def original_step(recipe: Recipe, device: torch.device) -> Step:
    """A step as in `YuanGongND/ast`: plain attention and Adam; on a GPU fp16 autocast with a scaler, on a CPU fp32."""
    torch.manual_seed(0)
    network = timm.create_model(MODEL_SIZES[recipe.model_size][0], num_classes=0)
    for block in network.blocks:
        block.attn.fused_attn = False
    dim, (rows, columns) = network.embed_dim, patch_grid(KALDI128.num_mel_bins, recipe.input_tdim, STRIDE, STRIDE)
    network.patch_embed.img_size = None
    network.patch_embed.proj = nn.Conv2d(1, dim, 16, stride=STRIDE)
    network.pos_embed = nn.Parameter(torch.randn(1, 2 + rows * columns, dim) * 0.02)
    model = nn.Sequential(network, nn.LayerNorm(dim), nn.Linear(dim, recipe.label_dim)).to(device).train()
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
    clips = torch.randn(recipe.batch_size, recipe.input_tdim, KALDI128.num_mel_bins)
    targets = torch.zeros(recipe.batch_size, recipe.label_dim)
    targets[:, :LABELS_PER_CLIP] = 1
    return clips.to(device), targets.to(device)


# --- fed by shards


def say_fed(variants: tuple[Variant, ...], args: argparse.Namespace, device: torch.device) -> None:
    with tempfile.TemporaryDirectory(prefix="ast-bench-") as folder:
        if args.data:
            dataset = PreparedDataset.open(args.data)
            clips, num_classes = dataset.clips(dataset.splits), len(dataset.labels)
        else:
            fbanks = [fbank(torch.from_numpy(sound(i))).half().numpy() for i in range(NUM_SOUNDS)]
            clips, num_classes = write_shards(Path(folder), fbanks, args.clips), NUM_CLASSES
        print(f"{len(clips):,} clips in {len(clips.shards)} shards, {args.steps} steps\n")
        print("| | batch | clips/s | of the step alone | MFU | data-wait share |\n|---|---|---|---|---|---|")
        for batch_size in args.batch_sizes:
            for variant in variants:
                recipe = replace(recipe_of(variant, args, batch_size), label_dim=num_classes)
                print(fed_row(variant, recipe, clips, args, device), flush=True)


def fed_row(variant: Variant, recipe: Recipe, clips: Clips, args: argparse.Namespace, device: torch.device) -> str:
    try:
        alone_s = at_a_stretch_s(step_on_one_batch(variant, recipe, device), args, device)
        free_memory()
        clips_per_s, data_wait_share = train_fed(variant, recipe, clips, args, device)
    except torch.cuda.OutOfMemoryError:
        return f"| {variant.name} | {recipe.batch_size} | out of memory | | | |"
    finally:
        free_memory()
    ratio, mfu = clips_per_s * alone_s / recipe.batch_size, mfu_of(clips_per_s, recipe, device)
    return f"| {variant.name} | {recipe.batch_size} | {clips_per_s:.2f} | {ratio:.2f} | {mfu} | {data_wait_share:.1%} |"


def train_fed(
    variant: Variant, recipe: Recipe, clips: Clips, args: argparse.Namespace, device: torch.device
) -> tuple[float, float]:
    """Clips per second, and the data-wait share as training logs it. The GPU is synchronised once, at the end."""
    step, feed = our_step(variant, recipe, device), TrainFeed(clips, recipe, recipe.label_dim)
    batches = chain.from_iterable(feed.epoch(epoch, device) for epoch in count(1))

    def train(num_steps: int) -> int:
        num_clips = 0
        for item in islice(batches, num_steps):
            step(item.batch, item.augmentations, num_clips_global=item.num_clips_global, patchout=item.patchout)
            num_clips += item.num_clips_global
        return num_clips

    train(args.warm_up)
    began_s, feed.waits.wait_s = now_s(device), 0.0
    num_clips = train(args.steps)
    took_s = now_s(device) - began_s
    return num_clips / took_s, feed.waits.wait_s / took_s


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
