"""One training step: a batch of raw log-mel → augmentation → loss → update. And the same model at evaluation.

B clips, T frames, M mel bins, C classes.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ast_core.augment import Augmentation, MixupDomain, mixup_batch, noise_and_roll, normalise, spec_augment
from ast_core.model import ASTModel
from ast_core.recipe import Recipe


@dataclass(frozen=True)
class Batch:
    """Raw log-mel as stored, padded with 0 or cut to the recipe's frames, and what is to be done to it."""

    fbank_BTM: Tensor
    num_frames_B: Tensor
    target_BC: Tensor
    """Labels, mixed by λ already; rows sum over a clip's labels."""
    weight_B: Tensor
    """1, or 0 for a clip that only fills up the batch so that all ranks have the same number."""
    partner_BTM: Tensor | None = None
    """For mixup; None where no clip of the batch is mixed."""
    partner_frames_B: Tensor | None = None
    lam_B: Tensor | None = None

    def __len__(self) -> int:
        return len(self.num_frames_B)

    def to(self, device: torch.device) -> "Batch":
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if v is not None}
        return replace(self, **moved)

    def pinned(self) -> "Batch":
        """In page-locked memory, from which a GPU fetches it while the CPU goes on."""
        return replace(self, **{k: v.pin_memory() for k, v in vars(self).items() if v is not None})

    def part(self, begin: int, end: int) -> "Batch":
        return replace(self, **{k: v[begin:end] for k, v in vars(self).items() if v is not None})


@dataclass(frozen=True)
class Norm:
    """Mean and standard deviation of raw log-mel."""

    mean: float
    std: float


def model_input(
    batch: Batch, norm: Norm, augmentation: Augmentation | None, mixup_domain: MixupDomain = "power"
) -> Tensor:
    """The network's input `[B, T, M]` in float32, in the original's order of operations."""
    fbank = batch.fbank_BTM.float()
    if batch.partner_BTM is not None and batch.partner_frames_B is not None and batch.lam_B is not None:
        partner = batch.partner_BTM.float()
        fbank = mixup_batch(fbank, batch.num_frames_B, partner, batch.partner_frames_B, batch.lam_B, mixup_domain)
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


def set_attention(model: ASTModel, device: torch.device, recipe: Recipe) -> None:
    """By default fused attention, except in bf16 on a CPU, where PyTorch 2.11's is slower than plain products.

    `python -m benchmarks.attention` measures by how much.
    """
    slow_when_fused = device.type == "cpu" and recipe.precision == "bf16"
    model.set_fused_attention(not slow_when_fused if recipe.attention == "auto" else recipe.attention == "fused")


def set_execution(model: ASTModel, device: torch.device, recipe: Recipe) -> None:
    """The recipe's switches of how training computes; none changes what is computed beyond rounding."""
    set_attention(model, device, recipe)
    model.set_activation_checkpointing(recipe.activation_checkpointing)
    if recipe.compile:
        model.compile_blocks()


def autocast(device: torch.device, recipe: Recipe) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.precision == "bf16")


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
) -> Tensor:
    """Update `model` with this rank's share of a global batch of `num_clips_global` clips.

    The share goes through the network `recipe.micro_batch_size` clips at a time; gradients add up, and ranks exchange
    them once.

    Returns this rank's part of the global mean loss, a detached scalar: summed over ranks it is the batch's mean.
    The gradient that DDP averages over `world_size` ranks is that of this same mean, so the number of ranks does not
    change the update.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=batch.fbank_BTM.device)
    for part, drawn, is_last in _micro_batches(batch, augmentation, recipe.micro_batch_size or len(batch)):
        with nullcontext() if is_last else _without_exchange(model):
            with autocast(part.fbank_BTM.device, recipe):
                logits = model(model_input(part, norm, drawn, recipe.mixup_domain))
            loss = (clip_losses(logits, part.target_BC, recipe.loss) * part.weight_B).sum() / num_clips_global
            (loss * world_size).backward()
        total += loss.detach()
    optimizer.step()
    return total


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
