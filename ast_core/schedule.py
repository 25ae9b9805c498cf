"""The learning rate at every step, as the original's loop sets it.

There a `MultiStepLR` multiplies the rate by `lrscheduler_decay` after epoch `lrscheduler_start` and every
`lrscheduler_step` epochs from then on. With `warmup`, up to step 1,000 the loop overwrites the rate every 50 steps by
`step / 1000 · lr` (0 for the first 50), which also undoes a decay that fell before. So the rate is a function of the
step alone.
"""

from ast_core.recipe import Recipe

WARMUP_STEPS = 1000
WARMUP_EVERY = 50


def learning_rate(recipe: Recipe, step: int, *, steps_per_epoch: int) -> float:
    """The rate of the optimiser step number `step`, counted from 0 over the whole run."""
    overwritten_at, rate = -1, recipe.lr
    if recipe.warmup:
        overwritten_at = min(step, WARMUP_STEPS) // WARMUP_EVERY * WARMUP_EVERY
        rate = recipe.lr * overwritten_at / WARMUP_STEPS
    num_decays = _decays_by(recipe, step // steps_per_epoch)
    if overwritten_at >= 0:
        num_decays -= _decays_by(recipe, overwritten_at // steps_per_epoch)
    return rate * recipe.lrscheduler_decay**num_decays


def _decays_by(recipe: Recipe, epochs_done: int) -> int:
    since_first = epochs_done - recipe.lrscheduler_start
    return 0 if since_first < 0 else 1 + since_first // recipe.lrscheduler_step
