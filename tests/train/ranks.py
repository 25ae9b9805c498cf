"""Functions that tests run on real ranks of a process group. Other processes can import this module."""

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.train.data.sampling import rank_rows
from pipeline.train.evaluation.scoring import gather_rows
from tests.netcluster import enter_namespaces
from tests.processes import START_METHOD


def gathered(num_rows: list[int], *, world_size: int, folder: Path) -> list[list[torch.Tensor | None]]:
    """The result of `gather_rows` on each rank, for tables `[rows, 2]` whose row i is (i, -i)."""
    mp.start_processes(_gather, (num_rows, world_size, folder), nprocs=world_size, start_method=START_METHOD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def _gather(rank: int, num_rows: list[int], world_size: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    held = []
    for rows in num_rows:
        mine = torch.from_numpy(rank_rows(rows, rank, world_size)).float()
        held.append(gather_rows(torch.stack([mine, -mine], dim=1), rows, rank=rank, world_size=world_size))
    torch.save(held, folder / f"{rank}.pt")
    dist.destroy_process_group()


def sum_over_machines(first_pid: int, rank: int, world_size: int, url: str) -> float:
    """1 + 2 + … + world_size, from one rank on each machine. This process moves to the machine of `first_pid`."""
    enter_namespaces(first_pid, "uts", "net", "mnt")
    dist.init_process_group("gloo", init_method=url, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    total = torch.tensor(rank + 1.0)
    dist.all_reduce(total)
    dist.destroy_process_group()
    return float(total)
