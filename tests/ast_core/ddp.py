"""Training steps in one process or on several DDP ranks, in a module that other processes can import."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ast_core import ASTModel
from ast_core.augment.augmentation import take
from ast_core.execution import set_execution
from ast_core.models.patchout import draw_patchout
from ast_core.recipe import Recipe
from ast_core.step import make_optimizer, train_step
from pipeline.train.data.sampling import rank_share
from tests.ast_core import small
from tests.processes import START_METHOD

GLOBAL_BATCH = 5
"""Odd, so that two ranks need a padding clip."""


def model() -> ASTModel:
    """`small.model` with a third of its blocks, which has the same kinds of parameters."""
    made = small.model()
    del made.v.blocks[4:]
    return made


def train(recipe: Recipe, num_steps: int, *, rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    """Train; return this rank's losses, the gradients of the first step, and the weights after first and last step."""
    bare = model()
    set_execution(bare, torch.device("cpu"), recipe)
    trained: nn.Module = DistributedDataParallel(bare) if world_size > 1 else bare
    optimizer = make_optimizer(trained, recipe)
    result: dict[str, Any] = {"losses": []}
    for step in range(num_steps):
        share = rank_share(0, GLOBAL_BATCH, rank, world_size)
        whole, drawn = small.batch(GLOBAL_BATCH, seed=step), small.augmentations(GLOBAL_BATCH, seed=step)
        dropped = {"num_rows": recipe.patchout_f, "num_columns": recipe.patchout_t}
        mine = replace(small.take(whole, share.position), weight_B=torch.from_numpy(share.weight))
        loss = train_step(
            trained,
            optimizer,
            mine,
            take(drawn, share.position),
            recipe=recipe,
            norm=small.NORM,
            lr=recipe.lr,
            num_clips_global=GLOBAL_BATCH,
            world_size=world_size,
            patchout=draw_patchout((recipe.seed, 1, step), bare.v.patch_embed.grid_size, **dropped),
        )
        result["losses"].append(loss.item())
        if step == 0:
            result["gradients"] = {name: p.grad.clone() for name, p in bare.named_parameters() if p.grad is not None}
            result["first"] = {name: value.clone() for name, value in bare.state_dict().items()}
    return result | {"last": bare.state_dict()}


def train_on_ranks(runs: Sequence[tuple[Recipe, int]], *, world_size: int, folder: Path) -> list[dict[str, Any]]:
    """Train each recipe on real ranks; return rank 0's weights and gradients, and losses summed over ranks."""
    mp.start_processes(_rank, (runs, world_size, folder), nprocs=world_size, start_method=START_METHOD)
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]
    results = []
    for of_recipe in zip(*ranks, strict=True):
        losses = [sum(parts) for parts in zip(*(of_rank["losses"] for of_rank in of_recipe), strict=True)]
        results.append(of_recipe[0] | {"losses": losses})
    return results


def _rank(rank: int, runs: Sequence[tuple[Recipe, int]], world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    results = [train(*run, rank=rank, world_size=world_size) for run in runs]
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()
