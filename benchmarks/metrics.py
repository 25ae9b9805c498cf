"""Measure the metrics of an evaluation of AudioSet's size, and the bootstrap interval of mAP, on one CPU core.

python -m benchmarks.metrics
"""

import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from ast_core.metrics import bootstrap_map, tagging_metrics

NUM_CLIPS, NUM_CLASSES, LABELS_A_CLIP = 20_000, 527, 2.7
REPEATS = 5


def main() -> int:
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    frequency = rng.lognormal(sigma=1.3, size=NUM_CLASSES)
    target = rng.random((NUM_CLIPS, NUM_CLASSES)) < LABELS_A_CLIP * frequency / frequency.sum()
    score = rng.random(target.shape, dtype=np.float32) + 0.5 * target
    work: dict[str, Callable[[], object]] = {
        "tagging_metrics": lambda: tagging_metrics(score, target),
        "bootstrap_map, 1000 resamples": lambda: bootstrap_map(score, target),
    }
    print(f"{NUM_CLIPS:,} clips, {NUM_CLASSES} classes, {target.sum():,} labels\n\n| | s |\n|---|---|")
    for name, call in work.items():
        print(f"| {name} | {min(cpu_s(call) for _ in range(REPEATS)):.2f} |")
    return 0


def cpu_s(work: Callable[[], object]) -> float:
    began_s = time.process_time()
    work()
    return time.process_time() - began_s


if __name__ == "__main__":
    sys.exit(main())
