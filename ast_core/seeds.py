"""Random generators: one for each purpose, so that what is drawn for one never shifts what is drawn for another."""

from collections.abc import Sequence

import numpy as np


def rng_for(purpose: str, seed: Sequence[int]) -> np.random.Generator:
    """A function of its arguments alone; generators of different purposes are independent."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=tuple(purpose.encode())))
