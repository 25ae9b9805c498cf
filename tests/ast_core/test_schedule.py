"""The rate at every step is the one that the original's loop would use."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ast_core.recipe import Recipe, load_recipe
from ast_core.schedule import learning_rate

RECIPES = Path(__file__).parents[2] / "jobs" / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def shipped(name: str, **overrides: str) -> Recipe:
    return load_recipe((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"), overrides, origin=name)


def rates_of_the_original(recipe: Recipe, steps_per_epoch: int) -> Iterator[float]:
    """Its loop, with torch's own scheduler."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=recipe.lr)
    milestones = list(range(recipe.lrscheduler_start, 1000, recipe.lrscheduler_step))
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=recipe.lrscheduler_decay)
    global_step = 0
    for _ in range(recipe.epochs):
        for _ in range(steps_per_epoch):
            if global_step <= 1000 and global_step % 50 == 0 and recipe.warmup:
                for group in optimizer.param_groups:
                    group["lr"] = global_step / 1000 * recipe.lr
            yield optimizer.param_groups[0]["lr"]
            optimizer.step()
            global_step += 1
        scheduler.step()


def our_rates(recipe: Recipe, steps_per_epoch: int) -> list[float]:
    return [
        learning_rate(
            step,
            steps_per_epoch=steps_per_epoch,
            lr=recipe.lr,
            warmup=recipe.warmup,
            start_epoch=recipe.lrscheduler_start,
            every_epochs=recipe.lrscheduler_step,
            decay=recipe.lrscheduler_decay,
        )
        for step in range(recipe.epochs * steps_per_epoch)
    ]


@pytest.mark.parametrize("warmup", ["true", "false"])
@pytest.mark.parametrize("steps_per_epoch", [1, 25, 50, 61, 333])
@pytest.mark.parametrize("name", NAMES)
def test_every_rate_of_a_shipped_recipe_is_the_originals(name: str, steps_per_epoch: int, warmup: str):
    """At 25 to 61 steps decays fall inside the warm-up, at 50 just on a step that overwrites the rate."""
    recipe = shipped(name, warmup=warmup)
    expected = list(rates_of_the_original(recipe, steps_per_epoch))
    assert our_rates(recipe, steps_per_epoch) == pytest.approx(expected, rel=1e-12, abs=0)


def test_a_long_epoch_warms_up_within_the_first_and_then_halves():
    recipe = shipped("audioset-full")
    expected = list(rates_of_the_original(recipe, 2500))
    assert our_rates(recipe, 2500) == pytest.approx(expected, rel=1e-12, abs=0)
    assert [expected[step] / recipe.lr for step in (0, 49, 50, 999, 1000, 4999, 5000, 7500, 10_000)] == pytest.approx(
        [0, 0, 0.05, 0.95, 1, 1, 0.5, 0.25, 0.125]
    )
