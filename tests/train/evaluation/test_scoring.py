"""Scores come together on one rank, each row once and in order, and nowhere else."""

from pathlib import Path

import torch

from tests.train import ranks


def test_every_row_comes_to_rank_0_in_order_and_the_others_keep_none_of_the_whole(tmp_path: Path):
    num_rows = [7, 6, 2, 1]  # uneven, even, fewer than ranks
    first, *others = ranks.gathered(num_rows, world_size=3, folder=tmp_path)
    for rows, table in zip(num_rows, first, strict=True):
        expected = torch.arange(rows).float()
        assert torch.equal(table, torch.stack([expected, -expected], dim=1))
    assert others == [[None] * len(num_rows)] * 2
