"""Scores of every clip of an evaluation split, each computed exactly once, and their metrics."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ast_core.batch import Norm
from ast_core.errors import DataError
from ast_core.metrics import TaggingMetrics, selection_metrics, tagging_metrics
from ast_core.recipe import Recipe
from ast_core.step import predict
from pipeline.dataset import Clips
from pipeline.train.data.feed import Targets, eval_batches
from pipeline.train.data.sampling import rank_rows
from pipeline.train.data.shard_cache import ShardCache

EVAL_BATCH_CLIPS = 32


def evaluate(
    model: nn.Module,
    clips: Clips,
    *,
    recipe: Recipe,
    norm: Norm,
    num_classes: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    cache: ShardCache | None = None,
) -> np.ndarray | None:
    """Sigmoid scores `[clips, C]` in the order of `clips` on rank 0; None on the other ranks."""
    model.eval()
    batches = eval_batches(
        clips,
        recipe,
        num_classes,
        rank=rank,
        world_size=world_size,
        batch_size=min(EVAL_BATCH_CLIPS, recipe.micro_batch_size or EVAL_BATCH_CLIPS),
        device=device,
        cache=cache,
    )
    scores = [predict(model, batch, recipe=recipe, norm=norm) for batch in batches]
    mine = torch.cat(scores) if scores else torch.empty(0, num_classes, device=device)
    gathered = gather_rows(mine, len(clips), rank=rank, world_size=world_size)
    return None if gathered is None else gathered.cpu().numpy()


def gather_rows(mine: Tensor, num_rows: int, *, rank: int, world_size: int) -> Tensor | None:
    """Concatenate the rows of all ranks (`rank_rows`) on rank 0; None on the other ranks."""
    if world_size == 1:
        return mine
    sizes = [len(rank_rows(num_rows, r, world_size)) for r in range(world_size)]
    padded = mine.new_zeros(max(sizes), *mine.shape[1:])
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in sizes] if rank == 0 else None
    dist.gather(padded, parts)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]) if parts is not None else None


def score_metrics(scores: np.ndarray, clips: Clips, model: str = "the model") -> TaggingMetrics:
    """The metrics of scores `[clips, C]`; `model` names the model in the error.

    Raises:
        DataError: a score is NaN.
    """
    if np.isnan(scores).any():
        raise DataError(
            f"{model} gives scores that are not numbers: its weights are damaged, or it diverged in training"
        )
    return tagging_metrics(scores, Targets(clips, scores.shape[1])(np.arange(len(clips))))


def selection_metric(metrics: TaggingMetrics, recipe: Recipe) -> float:
    """The metric that picks the best epoch, by the recipe's `metrics`."""
    return metrics.values[selection_metrics()[recipe.metrics].name]


def class_counts(clips: Clips, num_classes: int) -> Sequence[int]:
    """The number of clips that have each class."""
    return np.bincount(clips.labels.flatten().to_numpy(), minlength=num_classes).tolist()
