"""One training step: a batch of raw log-mel → augmentation → loss → update. And the same model at evaluation.

B clips, T frames, M mel bins, C classes.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ast_core.augment import Augmentation, MixupDomain, Patchout, mixup_batch, noise_and_roll, normalise, spec_augment
from ast_core.errors import ConfigError
from ast_core.model import ASTModel
from ast_core.recipe import Recipe
from ast_core.transfer import to_device

logger = logging.getLogger(__name__)
G = TypeVar("G", "Batch", "Partners")
COMPILE_BACKEND = "inductor"
AUTOCAST_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Partners:
    """What is mixed into K of the clips of a batch: half as much to read, copy and mix as a partner for each."""

    position: np.ndarray
    """`[K]`, ascending: the clips of the batch that are mixed."""
    fbank_KTM: Tensor
    num_frames_K: Tensor
    lam_K: Tensor
    """Share of the clip in the mixture."""


@dataclass(frozen=True)
class Batch:
    """Raw log-mel as stored, padded with 0 or cut to the recipe's frames, and what is to be done to it."""

    fbank_BTM: Tensor
    num_frames_B: Tensor
    target_BC: Tensor
    """Labels, mixed by λ already; rows sum over a clip's labels."""
    weight_B: Tensor
    """1, or 0 for a clip that only fills up the batch so that all ranks have the same number."""
    partners: Partners | None = None
    """For mixup; None where no clip of the batch is mixed."""

    def __len__(self) -> int:
        return len(self.num_frames_B)

    def to(self, device: torch.device) -> "Batch":
        return _each_tensor(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """In page-locked memory, from which a GPU fetches it while the CPU goes on."""
        return _each_tensor(self, Tensor.pin_memory)

    def part(self, begin: int, end: int) -> "Batch":
        part = _each_tensor(replace(self, partners=None), lambda tensor: tensor[begin:end])
        if self.partners is None:
            return part
        first, last = np.searchsorted(self.partners.position, [begin, end])
        partners = _each_tensor(self.partners, lambda tensor: tensor[first:last])
        return replace(part, partners=replace(partners, position=self.partners.position[first:last] - begin))


def _each_tensor(group: G, change: Callable[[Tensor], Tensor]) -> G:
    changed: dict[str, Any] = {
        name: change(value) if isinstance(value, Tensor) else _each_tensor(value, change)
        for name, value in vars(group).items()
        if isinstance(value, Tensor | Partners)
    }
    return replace(group, **changed)


@dataclass(frozen=True)
class Norm:
    """Mean and standard deviation of raw log-mel."""

    mean: float
    std: float


def model_input(
    batch: Batch, norm: Norm, augmentation: Augmentation | None, mixup_domain: MixupDomain = "power"
) -> Tensor:
    """The network's input `[B, T, M]` in float32, in the original's order of operations."""
    fbank = batch.fbank_BTM.to(torch.float32, copy=True)
    if (partners := batch.partners) is not None and len(partners.position):
        mixed = to_device(partners.position, fbank.device)
        of_mixed = fbank[mixed], batch.num_frames_B[mixed]
        of_partners = partners.fbank_KTM.float(), partners.num_frames_K, partners.lam_K
        fbank[mixed] = mixup_batch(*of_mixed, *of_partners, mixup_domain)
    if augmentation is None:
        return normalise(fbank, norm.mean, norm.std)
    return noise_and_roll(normalise(spec_augment(fbank, augmentation), norm.mean, norm.std), augmentation)


def clip_losses(logits_BC: Tensor, target_BC: Tensor, loss: str) -> Tensor:
    """`[B]`: BCE averaged over classes, or cross-entropy against the target as a distribution."""
    logits_BC = logits_BC.float()
    if loss == "BCE":
        return F.binary_cross_entropy_with_logits(logits_BC, target_BC, reduction="none").mean(dim=1)
    return F.cross_entropy(logits_BC, target_BC, reduction="none")


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The original's Adam: L2 inside the gradient, not decoupled."""
    return torch.optim.Adam(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=recipe.lr,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        weight_decay=recipe.weight_decay,
        fused=True,
    )


def for_device(recipe: Recipe, device: torch.device, *, trains: bool = True) -> Recipe:
    """The recipe with `compile` decided, in a precision that the device has instructions for.

    In place of bf16 that is fp32, and it is announced: PyTorch would emulate bf16, several times slower than fp32 (on
    AVX2 seven times). Raises ConfigError for fp16 on a CPU: what CPUs have instructions for, if any, is bf16, which
    needs no scale. A model that is no longer trained is computed in fp32 there: who scores it did not choose its
    precision.
    """
    if recipe.compile is None:
        recipe = replace(recipe, compile=device.type == "cuda")
    if recipe.precision == "fp16" and device.type == "cpu":
        if trains:
            raise ConfigError("precision fp16 takes a GPU; use bf16")
        _announce("precision fp16 takes a GPU: computing in fp32")
    elif recipe.precision == "bf16" and not _has_bf16(device):
        hint = "; precision fp16 is faster on it" if device.type == "cuda" else ""
        name = {"cpu": "CPU", "cuda": "GPU"}[device.type]
        _announce(f"this {name} has no instructions for bf16: computing in fp32{hint}")
    else:
        return recipe
    return replace(recipe, precision="fp32")


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # avx512_bf16 and amx_bf16 of x86, bf16 and sve_bf16 of ARM
    return any(has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16"))


@cache
def _announce(text: str) -> None:
    """Once a process, however many models it computes."""
    logger.warning(text)


def set_attention(model: ASTModel, device: torch.device, recipe: Recipe) -> bool:
    """Set fused or plain attention, and return whether it is fused.

    By default it is, except in bf16 on a CPU, where PyTorch 2.11's is slower than plain products.

    `python -m benchmarks.attention` measures by how much.
    """
    slow_when_fused = device.type == "cpu" and recipe.precision == "bf16"
    fused = not slow_when_fused if recipe.attention == "auto" else recipe.attention == "fused"
    model.set_fused_attention(fused)
    return fused


def set_execution(model: ASTModel, device: torch.device, recipe: Recipe) -> dict[str, Any]:
    """The recipe's switches of how training computes; none changes what is computed beyond rounding.

    `recipe` is that of `for_device`. The model may still be on another device than the one it will train on.

    Returns what was decided: `device`, `precision`, `compile`, `cuda_graphs` and `attention` (fused or plain).
    """
    fused, compiled = set_attention(model, device, recipe), False
    model.set_activation_checkpointing(recipe.activation_checkpointing)
    if recipe.compile:
        reason = _why_not_compiled(model, device, recipe)
        if reason is None:
            model.compile_blocks(**_how_to_compile(device, recipe))
            compiled = True
        else:
            logger.warning(f"training goes on without torch.compile, which fails here: {reason}")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": recipe.precision,
        "compile": compiled,
        "cuda_graphs": compiled and _has_graphs(device, recipe),
        "attention": "fused" if fused else "plain",
    }


def _how_to_compile(device: torch.device, recipe: Recipe) -> dict[str, Any]:
    """Each shape for itself: kernels for sizes that change, once there, would serve those that do not as well."""
    options = {"options": {"triton.cudagraphs": True}} if _has_graphs(device, recipe) else {}
    return {"backend": COMPILE_BACKEND, "dynamic": False} | options


def _has_graphs(device: torch.device, recipe: Recipe) -> bool:
    """Whether the compiled blocks, where they compile, are CUDA graphs. Checkpointed ones run again on the way back."""
    is_asked_for = bool(recipe.compile) and recipe.cuda_graphs
    return device.type == "cuda" and is_asked_for and not recipe.activation_checkpointing


def _why_not_compiled(model: ASTModel, device: torch.device, recipe: Recipe) -> str | None:
    """None where a block compiles and runs on the device, forward and back; else the reason, in one line.

    `torch.compile` does nothing before the first call, and its errors (no C++ compiler, no Triton, a kernel that the
    card refuses) then come out of the middle of a training step, on the way back too, where they cannot be told from
    those of training. So a copy of one block is tried on a few tokens, for some seconds; the model itself stays as it
    is. What fails with the full batch alone is still an error, and not swallowed.
    """
    block = copy.deepcopy(model.v.blocks[0]).to(device).train()
    tokens_BND = torch.zeros(2, 8, model.v.embed_dim, device=device, requires_grad=True)
    try:
        compiled = torch.compile(block, **_how_to_compile(device, recipe))
        for _ in range(3 if _has_graphs(device, recipe) else 1):  # a graph is recorded second, and then replayed
            _begin_graphs(device, recipe)
            block.zero_grad()
            tokens_BND.grad = None
            with autocast(device, recipe):
                total = compiled(tokens_BND).float().sum()
            total.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # kernels report late
    except Exception as err:  # whatever a backend, a compiler or a driver raises
        said = " ".join(str(err).strip().split("\n\n")[0].split())  # advice on debugging PyTorch follows
        return f"{type(err).__name__}: {said}"[:250]
    finally:
        # Otherwise the trial's shape counts as a first one, and the batch is compiled for shapes that change.
        torch.compiler.reset()
    return None


def make_scaler(recipe: Recipe, device: torch.device) -> torch.amp.GradScaler | None:
    """For fp16, whose smallest gradients would vanish without a scale; part of a run's state. None for the others."""
    return torch.amp.GradScaler(device.type) if recipe.precision == "fp16" else None


def autocast(device: torch.device, recipe: Recipe) -> torch.autocast:
    dtype = AUTOCAST_DTYPE.get(recipe.precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    augmentation: Augmentation,
    *,
    recipe: Recipe,
    norm: Norm,
    lr: float,
    num_clips_global: int,
    world_size: int = 1,
    patchout: Patchout | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """Update `model` with this rank's share of a global batch of `num_clips_global` clips.

    The share goes through the network `recipe.micro_batch_size` clips at a time; gradients add up, and ranks exchange
    them once.

    Returns this rank's part of the global mean loss, a detached scalar: summed over ranks it is the batch's mean.
    The gradient that DDP averages over `world_size` ranks is that of this same mean, so the number of ranks does not
    change the update, nor where `recipe.grad_clip` cuts: it looks at the whole gradient, after the exchange.

    `patchout` is of the global batch (`draw_patchout`), `scaler` that of `make_scaler`, for the whole run.
    """
    assert patchout is not None or not (recipe.patchout_f or recipe.patchout_t), "the recipe asks for patchout"
    assert scaler is not None or recipe.precision != "fp16", "fp16 wants a scaler"
    device = batch.fbank_BTM.device
    for group in optimizer.param_groups:
        group["lr"] = lr
    _forget_gradients(optimizer, adds_up=recipe.micro_batch_size is not None and _has_graphs(device, recipe))
    total = torch.zeros((), device=device)
    for part, drawn, is_last in _micro_batches(batch, augmentation, recipe.micro_batch_size or len(batch)):
        with nullcontext() if is_last else _without_exchange(model):
            _begin_graphs(device, recipe)
            with autocast(device, recipe):
                logits = model(model_input(part, norm, drawn, recipe.mixup_domain), patchout)
            loss = (clip_losses(logits, part.target_BC, recipe.loss) * part.weight_B).sum() / num_clips_global
            scaled = loss * world_size if scaler is None else scaler.scale(loss * world_size)
            scaled.backward()
        total += loss.detach()
    _update(model, optimizer, recipe, scaler)
    return total


def _begin_graphs(device: torch.device, recipe: Recipe) -> None:
    """What the graphs gave before may be written over from here on."""
    if _has_graphs(device, recipe):
        torch.compiler.cudagraph_mark_step_begin()


def _forget_gradients(optimizer: torch.optim.Optimizer, *, adds_up: bool) -> None:
    """Gradients that a CUDA graph has made lie in memory of its own, which its next replay writes over. Where several
    are added up, that takes memory apart, from the first on.
    """
    optimizer.zero_grad(set_to_none=True)
    if adds_up:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)


def _update(
    model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, scaler: torch.amp.GradScaler | None
) -> None:
    """Clip and step. With a scaler a gradient that overflowed steps nowhere: on no rank, as all have the same."""
    if recipe.grad_clip is not None:
        if scaler is not None:
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


def _micro_batches(
    batch: Batch, augmentation: Augmentation, num_clips: int
) -> Iterator[tuple[Batch, Augmentation, bool]]:
    """Parts of `batch` with their augmentation, and whether a part is the last."""
    for begin in range(0, len(batch), num_clips):
        end = min(begin + num_clips, len(batch))
        yield batch.part(begin, end), augmentation.take(np.arange(begin, end)), end == len(batch)


def _without_exchange(model: nn.Module) -> AbstractContextManager[None]:
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


@torch.inference_mode()
def predict(model: nn.Module, batch: Batch, *, recipe: Recipe, norm: Norm) -> Tensor:
    """Sigmoid scores `[B, C]` in float32, as the original scores with either loss."""
    with autocast(batch.fbank_BTM.device, recipe):
        logits = model(model_input(batch, norm, None))
    return logits.float().sigmoid()
