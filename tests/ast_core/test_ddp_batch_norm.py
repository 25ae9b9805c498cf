"""BatchNorm on two DDP ranks: each rank normalises by its own clips, and rank 0's running statistics are the model's.

So two ranks make the update of one process whose micro-batches are the ranks' shares. Only float32 rounding differs.
"""

from typing import Any

import pytest
import torch

from ast_core.recipe import Recipe
from tests.ast_core import ddp, small

NUM_CLIPS = 6
SHARES = ([0, 2, 4], [1, 3, 5])
"""The clips of each of two ranks."""


def recipe(**changes: Any) -> Recipe:
    shape = {"label_dim": small.NUM_CLASSES, "input_tdim": small.NUM_FRAMES, "freqm": 24, "timem": 24, "lr": 1e-4}
    return Recipe(model="talnet", embedding_size=128, precision="fp32", **shape | changes)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    (run,) = ddp.train_on_ranks([(recipe(), 3)], world_size=2, folder=folder, num_clips=NUM_CLIPS)
    return run


@pytest.fixture(scope="module")
def micro_batches() -> dict[str, Any]:
    """One process, whose micro-batches have the clips of the ranks."""
    order = [*SHARES[0], *SHARES[1]]
    return ddp.train(recipe(micro_batch_size=len(SHARES[0])), 3, num_clips=NUM_CLIPS, order=order)


def test_two_ranks_get_the_gradients_of_micro_batches_of_the_same_clips(two_ranks: dict, micro_batches: dict):
    for name, expected in micro_batches["gradients"].items():
        is_before_norm = name.startswith("encoder") and name.endswith("conv.bias")  # its gradient is only rounding
        assert is_before_norm or (two_ranks["gradients"][name] - expected).norm() <= 1e-3 * expected.norm(), name
    assert two_ranks["losses"] == pytest.approx(micro_batches["losses"], rel=1e-4)


def test_statistics_of_the_whole_batch_would_give_other_gradients(two_ranks: dict):
    whole = ddp.train(recipe(), 1, num_clips=NUM_CLIPS)["gradients"]
    name = "encoder.5.conv.weight"
    assert (two_ranks["gradients"][name] - whole[name]).norm() > 0.05 * whole[name].norm()


def test_ranks_differ_in_running_statistics_until_they_share_those_of_rank_0(two_ranks: dict):
    first, second = two_ranks["ranks"]
    buffers = [name for name in first["last"] if "running" in name]
    assert len(buffers) == 20
    assert not any(torch.equal(first["last"][name], second["last"][name]) for name in buffers)
    for name, value in first["last"].items():
        assert torch.equal(first["shared"][name], value), name
        assert torch.equal(second["shared"][name], value), name
