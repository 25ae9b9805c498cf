"""One training step (a batch of raw log-mel → augmentation → loss → update), and scores for evaluation.

B clips, T frames, M mel bins, C classes.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ast_core.augment.augmentation import Drawn, take
from ast_core.batch import Batch, Norm, model_input
from ast_core.execution import autocast, begin_graph_step, uses_cuda_graphs
from ast_core.models.patchout import Patchout
from ast_core.recipe import Recipe
from ast_core.seeds import rng_for


def clip_losses(logits_BC: Tensor, target_BC: Tensor, loss: str) -> Tensor:
    """`[B]`: BCE averaged over classes (`BCE`), or cross-entropy with the target as a distribution (`CE`)."""
    logits_BC = logits_BC.float()
    if loss == "BCE":
        return F.binary_cross_entropy_with_logits(logits_BC, target_BC, reduction="none").mean(dim=1)
    return F.cross_entropy(logits_BC, target_BC, reduction="none")


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Adam as in the reference implementation: weight decay is L2 in the gradient, not decoupled."""
    return torch.optim.Adam(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=recipe.lr,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        weight_decay=recipe.weight_decay,
        fused=True,
    )


MIN_LOSS_SCALE = 2.0**-10
"""Below this scale of the loss, gradients of fp16 that overflow do not become finite by a lower one.

Training begins at 2**16. Each overflow halves the scale, and 2000 steps without one double it.
"""


def make_scaler(recipe: Recipe, device: torch.device) -> torch.amp.GradScaler | None:
    """The loss scaler of fp16, whose small gradients would become 0 without it. None for other precisions.

    Its state belongs to the checkpoint of a run.
    """
    return torch.amp.GradScaler(device.type) if recipe.precision == "fp16" else None


def seed_network(seed: Sequence[int]) -> None:
    """Seed the draws inside a network, such as dropout, so that a resumed run draws as an uninterrupted one does.

    Call this before each step, with numbers that differ between steps and ranks.
    """
    torch.manual_seed(int(rng_for("network", seed).integers(1 << 63)))


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    augmentations: Sequence[Drawn],
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

    The share goes through the network in micro-batches of `recipe.micro_batch_size` clips. Gradients accumulate, and
    ranks exchange them once. DDP averages gradients over `world_size` ranks; the loss is scaled so that the average is
    the gradient of the global mean loss. So the number of ranks does not change the update. `recipe.grad_clip` clips
    the whole gradient after the exchange.

    Args:
        patchout: the draw for the global batch (`draw_patchout`).
        scaler: the result of `make_scaler`, the same object during the whole run.

    Returns:
        This rank's part of the global mean loss, a detached scalar. The sum over ranks is the mean of the batch.
    """
    assert patchout is not None or not (recipe.patchout_f or recipe.patchout_t), "the recipe asks for patchout"
    assert scaler is not None or recipe.precision != "fp16", "fp16 needs a scaler"
    device = batch.fbank_BTM.device
    for group in optimizer.param_groups:
        group["lr"] = lr
    _clear_gradients(optimizer, accumulate=recipe.micro_batch_size is not None and uses_cuda_graphs(device, recipe))
    total = torch.zeros((), device=device)
    for part, drawn, is_last in _micro_batches(batch, augmentations, recipe.micro_batch_size or len(batch)):
        with nullcontext() if is_last else _without_exchange(model):
            begin_graph_step(device, recipe)
            with autocast(device, recipe):
                logits = model(model_input(part, norm, drawn), patchout)
            loss = (clip_losses(logits, part.target_BC, recipe.loss) * part.weight_B).sum() / num_clips_global
            scaled = loss * world_size if scaler is None else scaler.scale(loss * world_size)
            scaled.backward()
        total += loss.detach()
    _update(model, optimizer, recipe, scaler)
    return total


def _clear_gradients(optimizer: torch.optim.Optimizer, *, accumulate: bool) -> None:
    """Clear the gradients; with `accumulate`, allocate zeros for the sums.

    A CUDA graph reuses its gradient buffers at every replay, so sums over micro-batches need memory outside the graph.
    """
    optimizer.zero_grad(set_to_none=True)
    if accumulate:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)


def _update(
    model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, scaler: torch.amp.GradScaler | None
) -> None:
    """Clip the gradient and update. With a scaler, all ranks skip the update if the gradient overflowed."""
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
    batch: Batch, augmentations: Sequence[Drawn], num_clips: int
) -> Iterator[tuple[Batch, Sequence[Drawn], bool]]:
    """The parts of `batch`, each with its augmentations and whether it is the last."""
    for begin in range(0, len(batch), num_clips):
        end = min(begin + num_clips, len(batch))
        yield batch.part(begin, end), take(augmentations, np.arange(begin, end)), end == len(batch)


def _without_exchange(model: nn.Module) -> AbstractContextManager[None]:
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def share_buffers(model: nn.Module) -> None:
    """Give all ranks the running statistics of rank 0, which are those that are saved.

    Each rank normalises by the statistics of its own clips, and DDP copies rank 0's buffers to the others at the
    beginning of the next step only. Without this call, ranks would evaluate different models.
    """
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)


@torch.no_grad()
def predict(model: nn.Module, batch: Batch, *, recipe: Recipe, norm: Norm) -> Tensor:
    """Sigmoid scores `[B, C]` in float32. The reference implementation also uses the sigmoid with either loss.

    Not in inference mode, in which a GRU in bf16 on a CPU takes more than ten times as long (PyTorch 2.11).
    """
    with autocast(batch.fbank_BTM.device, recipe):
        logits = model(model_input(batch, norm))
    return logits.float().sigmoid()
