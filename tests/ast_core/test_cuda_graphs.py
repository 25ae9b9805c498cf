"""Compiled blocks as CUDA graphs, on a real GPU. The next replay overwrites their outputs."""

from typing import Any

import pytest
import torch

from ast_core.execution import set_execution
from ast_core.step import make_optimizer, predict, train_step
from tests.ast_core import small

GPU = torch.device("cuda")


def trained(changes: dict[str, Any], num_steps: int = 5) -> list[float]:
    """The losses of `num_steps` steps, and the mean score after them."""
    recipe, model = small.recipe(precision="bf16", **changes), small.model()
    set_execution(model, GPU, recipe)
    model.to(GPU).train()
    optimizer, losses = make_optimizer(model, recipe), []
    batch, args = small.batch(6).pinned().to(GPU), {"recipe": recipe, "norm": small.NORM, "num_clips_global": 6}
    for step in range(num_steps):
        drawn = small.augmentations(6, seed=step, noise=False)
        losses.append(train_step(model, optimizer, batch, drawn, lr=2e-4, **args))
        if step == 2:  # when the graphs are already being replayed
            model.eval()
            predict(model, batch, recipe=recipe, norm=small.NORM)
            model.train()
    scores = predict(model.eval(), batch, recipe=recipe, norm=small.NORM)
    return [float(value) for value in (*losses, scores.mean())]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("changes", [{}, {"micro_batch_size": 2}, {"grad_clip": 0.1}], ids=str)
def test_cuda_graphs_train_as_plain_blocks(changes: dict[str, Any]):
    from torch._inductor.cudagraph_trees import get_container  # three seconds of imports, only here

    replayed = trained(changes | {"compile": True, "cuda_graphs": True})
    graphs = get_container(torch.cuda.current_device()).tree_manager
    assert graphs is not None
    assert len(graphs.roots) > 0
    plain = trained(changes)
    assert replayed == pytest.approx(plain, rel=5e-3)
    assert plain[4] < 0.9 * plain[0]
