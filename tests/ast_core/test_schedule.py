"""The rate at every step is the one that the original's loop would use."""

from pathlib import Path

import numpy as np
import pytest

from ast_core.recipe import Recipe, load_recipe
from ast_core.schedule import learning_rate
from tests.reference import learning_rates

RECIPES = Path(__file__).parents[2] / "jobs" / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def shipped(name: str, **overrides: str) -> Recipe:
    return load_recipe((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"), overrides, origin=name)


def our_rates(recipe: Recipe, steps_per_epoch: int) -> list[float]:
    steps = range(recipe.epochs * steps_per_epoch)
    return [learning_rate(recipe, step, steps_per_epoch=steps_per_epoch) for step in steps]


@pytest.mark.parametrize("warmup", ["true", "false"])
@pytest.mark.parametrize("steps_per_epoch", [1, 25, 50, 61, 333])
@pytest.mark.parametrize("name", NAMES)
def test_every_rate_of_a_shipped_recipe_is_the_originals(name: str, steps_per_epoch: int, warmup: str):
    """At 25 to 61 steps decays fall inside the warm-up, at 50 just on a step that overwrites the rate."""
    recipe = shipped(name, warmup=warmup)
    expected = list(learning_rates(recipe, steps_per_epoch))
    assert our_rates(recipe, steps_per_epoch) == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize(
    ("name", "num_clips"),
    [
        ("audioset-full", 22_160 + 2_041_789),
        ("audioset-balanced", 22_160),
        ("esc50", 1600),
        ("esc10", 320),
        ("speechcommands", 84_843),
    ],
)
def test_every_rate_of_a_whole_run_on_the_official_lists_is_the_originals(name: str, num_clips: int):
    recipe = shipped(name)
    steps_per_epoch = -(-num_clips // recipe.batch_size)
    expected = list(learning_rates(recipe, steps_per_epoch))
    np.testing.assert_allclose(our_rates(recipe, steps_per_epoch), expected, rtol=1e-12, atol=0)


def test_a_long_epoch_warms_up_within_the_first_and_then_halves():
    recipe = shipped("audioset-full")
    expected = list(learning_rates(recipe, 2500))
    assert our_rates(recipe, 2500) == pytest.approx(expected, rel=1e-12, abs=0)
    assert [expected[step] / recipe.lr for step in (0, 49, 50, 999, 1000, 4999, 5000, 7500, 10_000)] == pytest.approx(
        [0, 0, 0.05, 0.95, 1, 1, 0.5, 0.25, 0.125]
    )
