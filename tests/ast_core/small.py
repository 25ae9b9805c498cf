"""A small model, recipe and batches for tests: 34 tokens, 5 classes."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ast_core import ASTModel
from ast_core.augment.augmentation import Drawn, draw_augmentations
from ast_core.batch import Batch, Norm, Partners
from ast_core.checkpoints import ModelConfig, save_model
from ast_core.fbank import POWER_FLOOR
from ast_core.labels import LabelVocabulary
from ast_core.models import create_model
from ast_core.recipe import Recipe

NUM_CLASSES, NUM_FRAMES, NUM_MEL_BINS = 5, 64, 128
SHAPE: dict[str, Any] = {"model_size": "tiny224", "fstride": 16, "tstride": 16, "input_tdim": NUM_FRAMES}
NORM = Norm(mean=-4.0, std=4.5)


def model(*, seed: int = 0, label_dim: int = NUM_CLASSES) -> ASTModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ASTModel(label_dim=label_dim, imagenet_pretrain=False, **SHAPE)


def save_linear_tagger(folder: Path) -> str:
    """A linear model of one second and three classes, with random weights, as a checkpoint."""
    recipe = Recipe(model="linear", hidden=64, n_layers=1, input_tdim=100, label_dim=3, timem=0, freqm=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        state = create_model(**recipe.model_args()).state_dict()
    save_model(folder, state, ModelConfig(recipe, NORM, LabelVocabulary.from_names(["a", "b", "c"])))
    return str(folder)


def deit_state(model: ASTModel) -> dict[str, torch.Tensor]:
    """A model's weights as a DeiT state dict. The positions of the 14 × 14 patches and the two heads are 0."""
    state = model.v.state_dict()
    state["pos_embed"] = torch.zeros(1, 2 + 14 * 14, state["pos_embed"].shape[-1])
    state["head.weight"] = state["head_dist.weight"] = torch.zeros(1000, state["norm.weight"].numel())
    state["head.bias"] = state["head_dist.bias"] = torch.zeros(1000)
    return state


def recipe(**changes: Any) -> Recipe:
    defaults = {"label_dim": NUM_CLASSES, "freqm": 24, "timem": 24, "precision": "fp32"}
    return Recipe(**SHAPE | defaults | changes)


def log_mel(num_clips: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(num_clips, NUM_FRAMES, NUM_MEL_BINS, generator=generator)
    return (normal * NORM.std + NORM.mean).clamp_min(math.log(POWER_FLOOR))


def batch(num_clips: int, *, seed: int = 0, one_label: bool = False) -> Batch:
    """Clips of full length. Half of them have a mixup partner. A clip has one label, or several."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(NUM_CLASSES, (num_clips,), generator=generator)
    target = torch.nn.functional.one_hot(label, NUM_CLASSES).float()
    if not one_label:
        target = (target + (torch.rand(num_clips, NUM_CLASSES, generator=generator) < 0.3)).clamp_max(1)
    frames = torch.full((num_clips,), NUM_FRAMES)
    mixed = np.arange(1, num_clips, 2)
    partners = Partners(
        mixed,
        log_mel(num_clips, seed=seed + 1)[mixed],
        torch.full((len(mixed),), NUM_FRAMES // 2),
        torch.full((len(mixed),), 0.4),
    )
    return Batch(log_mel(num_clips, seed=seed), frames, target, torch.ones(num_clips), partners)


def take(whole: Batch, positions: np.ndarray) -> Batch:
    """The clips at `positions` of a batch, with their partners."""
    parts = [whole.part(i, i + 1) for i in positions.tolist()]
    partners = [part.partners for part in parts]
    mixed = np.flatnonzero([len(p.position) for p in partners])
    together = {
        name: torch.cat([getattr(p, name) for p in partners]) for name in ("fbank_KTM", "num_frames_K", "lam_K")
    }
    tensors = {name: value[positions] for name, value in vars(whole).items() if isinstance(value, torch.Tensor)}
    return Batch(**tensors, partners=Partners(mixed, **together), features=whole.features)


def augmentations(num_clips: int, *, seed: int = 0, noise: bool = True, **changes: Any) -> tuple[Drawn, ...]:
    """Mixup, SpecAugment, and noise and roll, unless `changes` of the recipe switch them off."""
    return draw_augmentations(recipe(noise=noise, **changes), (seed,), num_clips)


def only_mixup(num_clips: int) -> tuple[Drawn, ...]:
    return augmentations(num_clips, noise=False, freqm=0, timem=0)


def values(drawn: Sequence[Drawn]) -> dict[str, np.ndarray]:
    """The random numbers of all augmentations."""
    return {name: numbers for one in drawn for name, numbers in one.values.items()}
