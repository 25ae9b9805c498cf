"""Random generators, one for each purpose, so that draws for one purpose do not change those for another."""

from collections.abc import Sequence

import numpy as np


def rng_for(purpose: str, seed: Sequence[int]) -> np.random.Generator:
    """A generator that depends only on the arguments. Generators of different purposes are independent."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=tuple(purpose.encode())))
