"""Every model in training: resumed losses, precision, and two DDP ranks.

64 frames of 128 mel bins, 5 classes.
"""

import io
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ast_core.models import MODELS
from ast_core.recipe import Recipe
from ast_core.step import make_optimizer, seed_network, train_step
from tests.ast_core import ddp, small
from tests.ast_core.models.small_models import SMALL

NUM_CLIPS = 6
NUM_STEPS = 3
QUICK = ("ast", "cnn_transformer", "efficientnet", "linear")
"""One model of each kind: with patches, with BatchNorm and dropout, of timm, and of frames."""
SHARES = ([0, 2, 4], [1, 3, 5])
"""The clips of each of two ranks."""
BF16_TOLERANCE = 0.05
"""Relative difference of losses in the first steps. Measured: 0.004 at most, and 0.014 for mobilenetv2."""
GRADIENT_TOLERANCE = 1e-3
"""Relative to the norm of the whole gradient. Measured: 2e-5 at most."""

every_model = pytest.mark.parametrize("name", MODELS)
every_model_slowly = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MODELS]
)


def recipe(name: str, **changes: Any) -> Recipe:
    shape = {"label_dim": small.NUM_CLASSES, "input_tdim": small.NUM_FRAMES, "freqm": 24, "timem": 24, "lr": 1e-4}
    strides = {"fstride": 16, "tstride": 16} if name == "ast" else {}
    return Recipe(model=name, **{"precision": "fp32"} | shape | strides | SMALL.get(name, {}) | changes)


class Training:
    """A model and its optimiser, and the steps of an epoch."""

    def __init__(self, of: Recipe, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.recipe, self.model = of, ddp.new_model(of).train()
        self.optimizer = make_optimizer(self.model, of)

    def losses(self, first: int, last: int) -> list[float]:
        """Train some of the steps as a worker does; each step has a batch of its own."""
        return [self._step(step) for step in range(first, last)]

    def _step(self, step: int) -> float:
        seed_network((self.recipe.seed, step, 0))
        batch, drawn = small.batch(NUM_CLIPS, seed=step), small.augmentations(NUM_CLIPS, seed=step)
        how: dict[str, Any] = {"recipe": self.recipe, "norm": small.NORM, "lr": self.recipe.lr}
        return train_step(self.model, self.optimizer, batch, drawn, num_clips_global=NUM_CLIPS, **how).item()

    def saved(self) -> io.BytesIO:
        file = io.BytesIO()
        torch.save([self.model.state_dict(), self.optimizer.state_dict()], file)
        file.seek(0)
        return file

    def restore(self, file: io.BytesIO) -> None:
        for part, state in zip((self.model, self.optimizer), torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)


@every_model_slowly
def test_a_resumed_training_equals_an_uninterrupted_one(name: str):
    """The state of model and optimiser, and the seed of each step, are all that a checkpoint needs."""
    whole, begun, resumed = Training(recipe(name)), Training(recipe(name)), Training(recipe(name), seed=1)
    expected = whole.losses(0, NUM_STEPS)
    assert begun.losses(0, 1) == expected[:1]
    resumed.restore(begun.saved())
    assert resumed.losses(1, NUM_STEPS) == expected[1:]
    found = resumed.model.state_dict()
    assert [key for key, value in whole.model.state_dict().items() if not torch.equal(found[key], value)] == []


@every_model_slowly
def test_losses_in_bf16_are_those_of_fp32(name: str):
    exact, rounded = (
        Training(recipe(name, precision=precision)).losses(0, NUM_STEPS) for precision in ("fp32", "bf16")
    )
    assert rounded == pytest.approx(exact, rel=BF16_TOLERANCE)
    assert rounded != exact


# --- two ranks


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Two steps of each model. The processes start once for all."""
    runs = [(recipe(name), 2) for name in MODELS]
    folder = tmp_path_factory.mktemp("ranks")
    return dict(zip(MODELS, ddp.train_on_ranks(runs, world_size=2, folder=folder, num_clips=NUM_CLIPS), strict=True))


def difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The norm of the difference of two gradients, relative to that of the expected one."""
    assert found.keys() == expected.keys()
    ours, theirs = (torch.cat([of[name].flatten() for name in expected]) for of in (found, expected))
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.slow
@every_model
def test_two_ranks_make_the_updates_of_one_process_with_their_micro_batches(name: str, on_two_ranks: dict):
    """Dropout is off: each rank draws its own. `test_ddp_batch_norm.py` and `test_ddp.py` test two models further."""
    order = [*SHARES[0], *SHARES[1]]
    one = ddp.train(recipe(name, micro_batch_size=len(SHARES[0])), 2, num_clips=NUM_CLIPS, order=order)
    assert on_two_ranks[name]["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert difference(on_two_ranks[name]["gradients"], one["gradients"]) < GRADIENT_TOLERANCE


@pytest.mark.slow
@every_model
def test_only_batch_norm_makes_the_update_depend_on_the_shares(name: str, on_two_ranks: dict):
    has_batch_norm = any(isinstance(module, nn.BatchNorm2d) for module in ddp.new_model(recipe(name)).modules())
    whole = ddp.train(recipe(name), 1, num_clips=NUM_CLIPS)["gradients"]
    if has_batch_norm:
        assert difference(on_two_ranks[name]["gradients"], whole) > 100 * GRADIENT_TOLERANCE
    else:
        assert difference(on_two_ranks[name]["gradients"], whole) < GRADIENT_TOLERANCE
