"""The learning rate at every step, as the original's loop sets it.

There a `MultiStepLR` multiplies the rate by `lrscheduler_decay` after epoch `lrscheduler_start` and every
`lrscheduler_step` epochs from then on. With `warmup`, up to step 1,000 the loop overwrites the rate every 50 steps by
`step / 1000 · lr` (0 for the first 50), which also undoes a decay that fell before. So the rate is a function of the
step alone. A warm-up of other `warmup_steps` rises in twenty stages too, or at each step if it has fewer.
"""

from ast_core.recipe import Recipe

WARMUP_STEPS = 1000
"""The original's, of whatever run."""

WARMUP_STAGES = 20
"""A warm-up of 1,000 steps raises the rate every 50."""

WARMUP_SHARE = 0.1
"""Where a recipe does not say `warmup_steps`, at most this share of a run's steps is warm-up."""


def warmup_steps_of(recipe: Recipe, num_steps: int) -> int:
    """Steps of warm-up in a run of `num_steps` steps: the recipe's own, or those that fit the run's length.

    A run of 10,000 steps or more has the original's 1,000, as all published recipes have on the data they were
    published with.
    """
    if not recipe.warmup:
        return 0
    if recipe.warmup_steps is not None:
        return recipe.warmup_steps
    return min(WARMUP_STEPS, int(WARMUP_SHARE * num_steps))


def learning_rate(recipe: Recipe, step: int, *, steps_per_epoch: int) -> float:
    """The rate of the optimiser step number `step`, counted from 0 over the whole run.

    A recipe without `warmup_steps` has the original's here, whatever the length of the run: `warmup_steps_of` decides
    them before a run begins.
    """
    overwritten_at, rate = -1, recipe.lr
    steps = WARMUP_STEPS if recipe.warmup_steps is None else recipe.warmup_steps
    if recipe.warmup and steps:
        every = max(1, steps // WARMUP_STAGES)
        overwritten_at = steps if step >= steps else step // every * every
        rate = recipe.lr * overwritten_at / steps
    num_decays = _decays_by(recipe, step // steps_per_epoch)
    if overwritten_at >= 0:
        num_decays -= _decays_by(recipe, overwritten_at // steps_per_epoch)
    return rate * recipe.lrscheduler_decay**num_decays


def _decays_by(recipe: Recipe, epochs_done: int) -> int:
    since_first = epochs_done - recipe.lrscheduler_start
    return 0 if since_first < 0 else 1 + since_first // recipe.lrscheduler_step
