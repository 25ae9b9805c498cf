"""One training step: a batch of raw log-mel → augmentation → loss → update. And the same model at evaluation.

B clips, T frames, M mel bins, C classes.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ast_core.augment import Augmentation, mixup_batch, noise_and_roll, normalise, spec_augment
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

    def to(self, device: torch.device) -> "Batch":
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if v is not None}
        return replace(self, **moved)


@dataclass(frozen=True)
class Norm:
    """Mean and standard deviation of raw log-mel."""

    mean: float
    std: float


def model_input(batch: Batch, norm: Norm, augmentation: Augmentation | None) -> Tensor:
    """The network's input `[B, T, M]` in float32, in the original's order of operations."""
    fbank = batch.fbank_BTM.float()
    if batch.partner_BTM is not None and batch.partner_frames_B is not None and batch.lam_B is not None:
        fbank = mixup_batch(fbank, batch.num_frames_B, batch.partner_BTM.float(), batch.partner_frames_B, batch.lam_B)
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


def set_fastest_attention(model: ASTModel, device: torch.device, recipe: Recipe) -> None:
    """Fused attention, except in bf16 on a CPU, where PyTorch 2.11's is slower than plain products at all our sizes.

    `python -m benchmarks.attention` measures by how much.
    """
    model.set_fused_attention(not (device.type == "cpu" and recipe.precision == "bf16"))


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

    Returns this rank's part of the global mean loss, a detached scalar: summed over ranks it is the batch's mean.
    The gradient that DDP averages over `world_size` ranks is that of this same mean, so the number of ranks does not
    change the update.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    with autocast(batch.fbank_BTM.device, recipe):
        logits = model(model_input(batch, norm, augmentation))
    loss = (clip_losses(logits, batch.target_BC, recipe.loss) * batch.weight_B).sum() / num_clips_global
    optimizer.zero_grad(set_to_none=True)
    (loss * world_size).backward()
    optimizer.step()
    return loss.detach()


@torch.inference_mode()
def predict(model: nn.Module, batch: Batch, *, recipe: Recipe, norm: Norm) -> Tensor:
    """Sigmoid scores `[B, C]` in float32, as the original scores with either loss."""
    with autocast(batch.fbank_BTM.device, recipe):
        logits = model(model_input(batch, norm, None))
    return logits.float().sigmoid()
