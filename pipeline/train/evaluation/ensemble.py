"""The members of an ensemble: whether they fit a data set, and their scores on its clips."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import ray
import torch

from ast_core.checkpoints import ModelConfig
from ast_core.errors import UserError
from ast_core.execution import for_device, set_attention
from ast_core.features import FeatureSettings
from ast_core.models.tagger import Tagger
from pipeline.dataset import Clips, PreparedDataset
from pipeline.memory_errors import too_small_memory
from pipeline.ray_errors import user_errors_from_tasks
from pipeline.train import data_checks, models
from pipeline.train.evaluation.scoring import evaluate

MORE_MEMORY = {
    "GPU": "use --device cpu, or a GPU with more memory",
    "machine": "use a machine with more memory, or evaluate one checkpoint at a time",
}
"""What to do if memory is too small. Batches of evaluation have a fixed size."""


@dataclass(frozen=True)
class Member:
    model: Tagger
    config: ModelConfig
    columns: list[int]
    """The column of each class of the data set in the model's scores."""


def read_member(uri: str, dataset: PreparedDataset) -> Member:
    """Read a checkpoint. Raises DataError if its features or classes are not those of the data set."""
    model, config = models.read(uri)
    return Member(model, config, models.columns_for(uri, config, dataset))


def length_lines(members: Sequence[Member], clips: Clips, features: FeatureSettings) -> list[str]:
    """Lines about the share of the clips that is cut off, one for each input length of the models."""
    lengths = sorted({member.config.recipe.input_tdim for member in members})
    return [
        line
        for frames in lengths
        for line in data_checks.length_lines(clips.num_frames, frames, "evaluation", features)
    ]


def scores(
    members: Sequence[Member], dataset: PreparedDataset, clips: Clips, *, device: str, use_gpu: bool, threads: int
) -> list[np.ndarray]:
    """Scores (sigmoids) `[clips, classes]` of each member, with the classes in the order of the data set.

    Args:
        device: cpu, cuda, or auto: cuda on a node with a GPU.
        use_gpu: reserve a GPU for each member.
        threads: CPUs that are reserved for each member, and PyTorch's threads.
    """
    score = ray.remote(num_cpus=threads, num_gpus=int(use_gpu))(_score)
    with user_errors_from_tasks():
        found = ray.get(
            [score.remote(member.model, member.config, dataset, clips, device, threads) for member in members]
        )
    return [of_member[:, member.columns] for of_member, member in zip(found, members, strict=True)]


def _score(
    model: Tagger, config: ModelConfig, dataset: PreparedDataset, clips: Clips, wanted: str, threads: int
) -> np.ndarray:
    """Scores `[clips, C]` of one checkpoint, with the classes in its own order.

    Raises:
        UserError: the memory of the GPU, or the machine, is too small.
    """
    torch.set_num_threads(threads)
    # Ray does not hide GPUs from a task that reserved none, so `wanted` decides.
    use_gpu = wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if use_gpu else "cpu")
    recipe = for_device(config.recipe, device, trains=False)
    set_attention(model, device, recipe)
    try:
        scores = evaluate(
            model.to(device), clips, recipe=recipe, norm=config.norm, num_classes=len(dataset.labels), device=device
        )
    except (RuntimeError, MemoryError) as err:
        if (where := too_small_memory(err)) is None:
            raise
        raise UserError(f"the {where} has too little memory for this model: {MORE_MEMORY[where]}") from err
    assert scores is not None  # a single process is rank 0
    return scores
