"""Training steps in one process or on several DDP ranks, in a module that other processes can import."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timm.layers import DropPath
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ast_core import ASTModel
from ast_core.augment.augmentation import take
from ast_core.execution import set_execution
from ast_core.models import create_model
from ast_core.models.patchout import Patchout, draw_patchout
from ast_core.models.tagger import Tagger
from ast_core.recipe import Recipe
from ast_core.step import make_optimizer, share_buffers, train_step
from pipeline.train.data.sampling import rank_share
from tests.ast_core import small
from tests.processes import START_METHOD

GLOBAL_BATCH = 5
"""Odd, so that two ranks need a padding clip."""


def model() -> ASTModel:
    """`small.model` with a sixth of its blocks, which has the same kinds of parameters."""
    made = small.model()
    del made.v.blocks[2:]
    return made


def new_model(recipe: Recipe) -> Tagger:
    if recipe.model == "ast":
        return model()
    return create_model(**recipe.model_args())


def without_dropout(model: Tagger) -> Tagger:
    """The same model with the draws inside it off: they differ between ranks, and between clips in another order."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, DropPath):
            module.drop_prob = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return model


def train(
    recipe: Recipe,
    num_steps: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    num_clips: int = GLOBAL_BATCH,
    order: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Train; return this rank's losses, the gradients of the first step, and the weights after first and last step.

    Dropout is off. `order` is the order of a batch's clips in one process.
    """
    torch.manual_seed(0)
    bare = without_dropout(new_model(recipe))
    set_execution(bare, torch.device("cpu"), recipe)
    trained: nn.Module = DistributedDataParallel(bare) if world_size > 1 else bare
    optimizer = make_optimizer(trained, recipe)
    result: dict[str, Any] = {"losses": []}
    for step in range(num_steps):
        share = rank_share(0, num_clips, rank, world_size)
        position = share.position if order is None else np.array(order)
        whole, drawn = small.batch(num_clips, seed=step), small.augmentations(num_clips, seed=step)
        mine = replace(small.take(whole, position), weight_B=torch.from_numpy(share.weight))
        loss = train_step(
            trained,
            optimizer,
            mine,
            take(drawn, position),
            recipe=recipe,
            norm=small.NORM,
            lr=recipe.lr,
            num_clips_global=num_clips,
            world_size=world_size,
            patchout=_patchout(recipe, bare, step),
        )
        result["losses"].append(loss.item())
        if step == 0:
            result["gradients"] = {name: p.grad.clone() for name, p in bare.named_parameters() if p.grad is not None}
            result["first"] = {name: value.clone() for name, value in bare.state_dict().items()}
    result["last"] = {name: value.clone() for name, value in bare.state_dict().items()}
    if world_size > 1:
        share_buffers(bare)
        result["shared"] = bare.state_dict()
    return result


def _patchout(recipe: Recipe, bare: Tagger, step: int) -> Patchout | None:
    if not isinstance(bare, ASTModel):
        return None
    dropped = {"num_rows": recipe.patchout_f, "num_columns": recipe.patchout_t}
    return draw_patchout((recipe.seed, 1, step), bare.v.patch_embed.grid_size, **dropped)


def train_on_ranks(
    runs: Sequence[tuple[Recipe, int]], *, world_size: int, folder: Path, num_clips: int = GLOBAL_BATCH
) -> list[dict[str, Any]]:
    """Train each recipe on real ranks; return rank 0's weights and gradients, and losses summed over ranks.

    `ranks` has the results of all ranks.
    """
    mp.start_processes(_rank, (runs, world_size, folder, num_clips), nprocs=world_size, start_method=START_METHOD)
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]
    results = []
    for of_recipe in zip(*ranks, strict=True):
        losses = [sum(parts) for parts in zip(*(of_rank["losses"] for of_rank in of_recipe), strict=True)]
        results.append(of_recipe[0] | {"losses": losses, "ranks": of_recipe})
    return results


def _rank(rank: int, runs: Sequence[tuple[Recipe, int]], world_size: int, folder: Path, num_clips: int) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    results = [train(*run, rank=rank, world_size=world_size, num_clips=num_clips) for run in runs]
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()
