"""A comparison that is killed, in a module that another process can import."""

import os
import signal
from collections.abc import Sequence
from typing import Any

import torch

from jobs.compare import main
from pipeline.compare import measure
from pipeline.train import worker


def compare_until_killed(step: int, argv: Sequence[str]) -> None:
    """Compare, and end this process with SIGKILL before a training step, counted over all runs from 1.

    PyTorch has one thread, as in the tests' own process, so that sums are in the same order.
    """
    torch.set_num_threads(1)
    torch.set_num_threads = lambda _: None
    train_step, calls = worker.train_step, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(*args, **kwargs)

    worker.train_step = counted
    measure.MEASURED_S = 0.01
    main(argv)
