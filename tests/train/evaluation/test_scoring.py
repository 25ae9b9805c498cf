"""Rank 0 gets the scores of all ranks, each row once and in order."""

from pathlib import Path

import torch

from tests.train import ranks


def test_rank_0_gets_every_row_in_order_and_other_ranks_get_none(tmp_path: Path):
    num_rows = [7, 6, 2, 1]  # uneven, even, fewer than ranks
    first, *others = ranks.gathered(num_rows, world_size=3, folder=tmp_path)
    for rows, table in zip(num_rows, first, strict=True):
        expected = torch.arange(rows).float()
        assert torch.equal(table, torch.stack([expected, -expected], dim=1))
    assert others == [[None] * len(num_rows)] * 2
