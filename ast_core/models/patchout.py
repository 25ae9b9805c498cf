"""Patchout: patches that a training step leaves out, for models with a grid of patches."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ast_core.seeds import rng_for


@dataclass(frozen=True)
class Patchout:
    """The rows (frequency) and columns (time) of the patch grid that are kept, both sorted."""

    rows: np.ndarray
    columns: np.ndarray

    def kept_patches(self, num_columns: int) -> np.ndarray:
        """`[rows × columns]`: indices of the kept patches in a grid of `num_columns`, flattened row by row."""
        return (self.rows[:, None] * num_columns + self.columns).ravel()


def draw_patchout(seed: Sequence[int], grid: tuple[int, int], *, num_rows: int, num_columns: int) -> Patchout | None:
    """Structured patchout (PaSST: Koutini et al., 2022, https://arxiv.org/abs/2110.05069): drop whole rows and columns.

    There is one draw for the global batch, a function of `seed` = (run's seed, epoch, step). All ranks and
    micro-batches drop the same `num_rows` rows and `num_columns` columns, so all clips have the same number of tokens.
    Returns None if nothing is dropped.
    """
    if num_rows == num_columns == 0:
        return None

    def kept(axis: str, size: int, num_dropped: int) -> np.ndarray:
        return np.sort(rng_for(f"patchout {axis}", seed).permutation(size)[num_dropped:])

    return Patchout(kept("rows", grid[0], num_rows), kept("columns", grid[1], num_columns))
