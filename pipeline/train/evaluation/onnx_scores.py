"""Scores of prepared clips by an ONNX network, to compare it with the model that it was made from. No Ray.

N clips, C classes.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ast_core.batch import model_input
from ast_core.checkpoints import ModelConfig
from ast_core.checkpoints.onnx import session
from pipeline.dataset import Clips, PreparedDataset
from pipeline.train.data.feed import eval_batches
from pipeline.train.evaluation.scoring import EVAL_BATCH_CLIPS, score_metrics
from pipeline.train.models import columns_for


@dataclass(frozen=True)
class Loss:
    """The mAP of a network before and after quantisation."""

    map_before: float
    map_after: float
    num_clips: int


def loss_in_map(
    checkpoint: str,
    config: ModelConfig,
    data: str,
    splits: Sequence[str],
    *,
    before: str | os.PathLike[str],
    after: str | os.PathLike[str],
) -> Loss:
    """Compare two files of `save_onnx`, made from a checkpoint, on splits of a prepared data set.

    Raises:
        DataError: the data set or a split does not exist, or has other features or classes than the model.
    """
    dataset = PreparedDataset.open(data)
    columns = columns_for(checkpoint, config, dataset)
    clips = dataset.clips(splits)
    map_before, map_after = (
        score_metrics(onnx_scores(file, clips, config)[:, columns], clips).scalars()["map"] for file in (before, after)
    )
    return Loss(map_before, map_after, len(clips))


def onnx_scores(network: str | os.PathLike[str], clips: Clips, config: ModelConfig) -> np.ndarray:
    """Sigmoids `[N, C]`, with the classes in the model's order."""
    run = session(network).run
    batches = eval_batches(
        clips,
        config.recipe,
        len(config.labels),
        rank=0,
        world_size=1,
        batch_size=EVAL_BATCH_CLIPS,
        device=torch.device("cpu"),
    )
    logits = [run(["logits"], {"fbank": model_input(batch, config.norm).numpy()})[0] for batch in batches]
    scores: np.ndarray = torch.from_numpy(np.concatenate(logits)).sigmoid().numpy()
    return scores
