"""The learning rate at every step, as the original's loop sets it.

There a `MultiStepLR` multiplies the rate by `lrscheduler_decay` after epoch `lrscheduler_start` and every
`lrscheduler_step` epochs from then on. With `warmup`, up to step 1,000 the loop overwrites the rate every 50 steps by
`step / 1000 · lr` (0 for the first 50), which also undoes a decay that fell before. So the rate is a function of the
step alone.
"""

WARMUP_STEPS = 1000
WARMUP_EVERY = 50


def learning_rate(
    step: int, *, steps_per_epoch: int, lr: float, warmup: bool, start_epoch: int, every_epochs: int, decay: float
) -> float:
    """The rate of the optimiser step number `step`, counted from 0 over the whole run."""
    overwritten_at, rate = -1, lr
    if warmup:
        overwritten_at = min(step, WARMUP_STEPS) // WARMUP_EVERY * WARMUP_EVERY
        rate = lr * overwritten_at / WARMUP_STEPS
    num_decays = _decays_by(step // steps_per_epoch, start_epoch, every_epochs)
    if overwritten_at >= 0:
        num_decays -= _decays_by(overwritten_at // steps_per_epoch, start_epoch, every_epochs)
    return rate * decay**num_decays


def _decays_by(epochs_done: int, start_epoch: int, every_epochs: int) -> int:
    return 0 if epochs_done < start_epoch else 1 + (epochs_done - start_epoch) // every_epochs
