"""The learning rate of each step equals that of the reference implementation's loop."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ast_core.recipe import Recipe, load_recipe
from ast_core.schedule import learning_rate, warmup_steps_of
from tests.reference import learning_rates

RECIPES = Path(__file__).parents[2] / "jobs" / "recipes"
FILES = {path.stem: path for path in RECIPES.rglob("*.yaml")}


def shipped(name: str, **overrides: str) -> Recipe:
    return load_recipe(FILES[name].read_text(encoding="utf-8"), overrides, origin=name)


def our_rates(recipe: Recipe, steps_per_epoch: int) -> list[float]:
    steps = range(recipe.epochs * steps_per_epoch)
    return [learning_rate(recipe, step, steps_per_epoch=steps_per_epoch) for step in steps]


@pytest.mark.parametrize("warmup", ["true", "false"])
@pytest.mark.parametrize("steps_per_epoch", [1, 25, 50, 61, 333])
@pytest.mark.parametrize("name", sorted(FILES))
def test_every_rate_of_a_shipped_recipe_equals_the_references(name: str, steps_per_epoch: int, warmup: str):
    """With 25 to 61 steps an epoch, decays fall into the warm-up; with 50, on a step that overwrites the rate."""
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
def test_every_rate_of_a_run_on_the_official_lists_equals_the_references(name: str, num_clips: int):
    recipe = shipped(name)
    steps_per_epoch = -(-num_clips // recipe.batch_size)
    fitted = replace(recipe, warmup_steps=warmup_steps_of(recipe, recipe.epochs * steps_per_epoch))
    assert fitted.warmup_steps == (1000 if recipe.warmup else 0)
    expected = list(learning_rates(recipe, steps_per_epoch))
    np.testing.assert_allclose(our_rates(fitted, steps_per_epoch), expected, rtol=1e-12, atol=0)


def test_warm_up_ends_in_a_long_first_epoch_and_the_rate_then_halves():
    recipe = shipped("audioset-full")
    expected = list(learning_rates(recipe, 2500))
    assert our_rates(recipe, 2500) == pytest.approx(expected, rel=1e-12, abs=0)
    assert [expected[step] / recipe.lr for step in (0, 49, 50, 999, 1000, 4999, 5000, 7500, 10_000)] == pytest.approx(
        [0, 0, 0.05, 0.95, 1, 1, 0.5, 0.25, 0.125]
    )


@pytest.mark.parametrize(
    ("num_steps", "warmup_steps"), [(1, 0), (9, 0), (25, 2), (999, 99), (9_999, 999), (10_000, 1000), (10**7, 1000)]
)
def test_case_1_warm_up_is_a_tenth_of_a_short_run(num_steps: int, warmup_steps: int):
    recipe = shipped("audioset-balanced")
    assert warmup_steps_of(recipe, num_steps) == warmup_steps
    assert warmup_steps_of(replace(recipe, warmup=False), num_steps) == 0
    assert warmup_steps_of(replace(recipe, warmup_steps=1000), num_steps) == 1000


@pytest.mark.parametrize("warmup_steps", [0, 1, 2, 19, 50, 1037])
def test_a_warm_up_of_any_length_rises_from_0_to_the_full_rate(warmup_steps: int):
    recipe = shipped("audioset-balanced", warmup_steps=str(warmup_steps), lrscheduler_start="20")
    rates = np.array(our_rates(recipe, 100)[:1900]) / recipe.lr
    assert (rates[warmup_steps:] == 1).all()
    assert (np.diff(rates[: warmup_steps + 1]) >= 0).all()
    assert warmup_steps == 0 or (rates[0] == 0 and (rates[:warmup_steps] < 1).all())
    assert len(np.unique(rates)) <= 26  # about twenty stages
