"""The learning rate at each step, as in the training loop of the reference implementation.

A `MultiStepLR` multiplies the rate by `lrscheduler_decay` after epoch `lrscheduler_start` and then every
`lrscheduler_step` epochs. With `warmup`, the loop overwrites the rate every 50 steps up to step 1,000 with
`step / 1000 · lr` (0 for the first 50 steps), which also removes earlier decays. So the rate is a function of the step
only. A warm-up of another length also rises in twenty stages, or at each step if it has fewer than twenty steps.
"""

from ast_core.recipe import Recipe

WARMUP_STEPS = 1000
"""Length of the reference implementation's warm-up, for runs of any length."""

WARMUP_STAGES = 20
"""A warm-up of 1,000 steps raises the rate every 50 steps."""

WARMUP_SHARE = 0.1
"""Without `warmup_steps` in the recipe, at most this share of a run's steps is warm-up."""


def warmup_steps_of(recipe: Recipe, num_steps: int) -> int:
    """The number of warm-up steps in a run of `num_steps` steps: `warmup_steps`, or else at most a tenth of the run.

    A run of 10,000 steps or more has 1,000, as in the reference implementation. This holds for all published recipes
    that use warm-up, on their published data.
    """
    if not recipe.warmup:
        return 0
    if recipe.warmup_steps is not None:
        return recipe.warmup_steps
    return min(WARMUP_STEPS, int(WARMUP_SHARE * num_steps))


def learning_rate(recipe: Recipe, step: int, *, steps_per_epoch: int) -> float:
    """The learning rate of step `step`, counted from 0 over the whole run.

    A recipe without `warmup_steps` has 1,000 here. Call `warmup_steps_of` before a run to fit them to its length.
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
