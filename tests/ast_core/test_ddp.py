"""DDP on two real ranks makes the update of one process on the same global batch, with or without micro-batches.

With micro-batches it also uses activation checkpointing, which must work together with one exchange of gradients.

Only float32 rounding differs, as the order of summation does. Adam's steps have the size of lr for any gradient. If the
true gradient is 0, as that of the attention's key bias, the steps follow rounding. So the difference of a parameter is
compared with its distance from the start.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ast_core import ddp, small

NUM_STEPS = 50
MICRO_BATCHES = [None, 2]
SWITCHES: dict[str, Any] = {"patchout_f": 3, "patchout_t": 1, "grad_clip": 1e-2}
LOSS_TOLERANCE = 1e-5
LOGITS_TOLERANCE = 1e-4
"""Relative to the logits' spread, on clips that were not trained on."""
MOVED_TOLERANCE = 3e-2
"""Relative to the norm of a parameter's distance from its start. Measured: 3e-6 to 1e-2, depending on the CPU. Key
biases differ most: they do not change the logits, so their gradients are only rounding."""


@pytest.fixture(scope="module")
def one_process() -> dict[str, Any]:
    return ddp.train(small.recipe(lr=1e-4), NUM_STEPS)


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, dict[str, Any]]:
    """Runs by micro-batch size, and the run `switched` with `SWITCHES`. The processes start once for all runs."""
    runs = {
        size: (small.recipe(lr=1e-4, micro_batch_size=size, activation_checkpointing=size is not None), NUM_STEPS)
        for size in MICRO_BATCHES
    }
    runs["switched"] = (small.recipe(micro_batch_size=2, activation_checkpointing=True, **SWITCHES), 2)
    folder = tmp_path_factory.mktemp("ranks")
    return dict(zip(runs, ddp.train_on_ranks(list(runs.values()), world_size=2, folder=folder), strict=True))


@pytest.fixture(scope="module")
def start() -> dict[str, Tensor]:
    return ddp.model().state_dict()


@pytest.fixture(scope="module")
def logits() -> Callable[[Mapping[str, Tensor]], Tensor]:
    model = ddp.model().eval()

    @torch.no_grad()
    def logits_of(state: Mapping[str, Tensor]) -> Tensor:
        model.load_state_dict(state)
        return model((small.log_mel(4, seed=99) - small.NORM.mean) / (2 * small.NORM.std))

    return logits_of


@pytest.mark.parametrize("micro_batch_size", MICRO_BATCHES)
def test_two_ranks_get_the_gradients_of_one_process(
    one_process: dict, on_two_ranks: dict, micro_batch_size: int | None
):
    gradients = on_two_ranks[micro_batch_size]["gradients"]
    assert gradients.keys() == one_process["gradients"].keys()
    for name, expected in one_process["gradients"].items():
        assert (gradients[name] - expected).norm() <= 1e-4 * expected.norm(), name


@pytest.mark.parametrize("micro_batch_size", MICRO_BATCHES)
@pytest.mark.parametrize("after", ["first", "last"])
def test_two_ranks_reach_the_weights_of_one_process(
    one_process: dict,
    on_two_ranks: dict,
    start: dict[str, Tensor],
    logits: Callable,
    micro_batch_size: int | None,
    after: str,
):
    expected, got = one_process[after], on_two_ranks[micro_batch_size][after]
    for name, value in expected.items():
        assert (got[name] - value).norm() <= MOVED_TOLERANCE * (value - start[name]).norm(), name
    difference = (logits(got) - logits(expected)).abs().max()
    assert difference <= LOGITS_TOLERANCE * logits(expected).std()
    assert (logits(expected) - logits(start)).abs().max() > 100 * difference


@pytest.mark.parametrize("micro_batch_size", MICRO_BATCHES)
def test_fifty_losses_on_two_ranks_equal_those_of_one_process(
    one_process: dict, on_two_ranks: dict, micro_batch_size: int | None
):
    assert on_two_ranks[micro_batch_size]["losses"] == pytest.approx(one_process["losses"], rel=LOSS_TOLERANCE)
    assert len(set(one_process["losses"])) == NUM_STEPS


def test_patchout_and_clipping_on_two_ranks_equal_those_of_one_process(on_two_ranks: dict):
    """The whole gradient is clipped after the exchange. The norms of a rank's or a micro-batch's gradient differ."""
    one_process = ddp.train(small.recipe(**SWITCHES), 2)
    shared = on_two_ranks["switched"]
    assert shared["losses"] == pytest.approx(one_process["losses"], rel=LOSS_TOLERANCE)
    assert one_process["losses"] != pytest.approx(ddp.train(small.recipe(), 2)["losses"], rel=LOSS_TOLERANCE)
    for name, expected in one_process["gradients"].items():
        assert (shared["gradients"][name] - expected).norm() <= 1e-4 * expected.norm() + 1e-9, name
    norm = torch.stack([gradient.norm() for gradient in shared["gradients"].values()]).norm()
    assert norm.item() == pytest.approx(1e-2, rel=1e-4)
