"""Training on CPUs where other programs use them too: how often OpenMP's threads look for each other before they sleep.

    python -m benchmarks.busy_machine [--busy 0 2 …] [--rounds 3] [--seconds 8]

Trains a small AST with two threads, alone and beside programs that never sleep (--busy), with the spin count of
OpenMP's library and with SPIN_COUNT, in turns. Each measurement is a process of its own, because the count is
read when PyTorch is imported.
"""

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack

SPIN_COUNT = {"GOMP_SPINCOUNT": "1000"}
STEPS = """
import sys, time
import torch
from ast_core.models import create_model
from ast_core.recipe import Recipe

recipe = Recipe(model_size="tiny224", fstride=16, tstride=16, input_tdim=512, label_dim=3, imagenet_pretrain=False)
torch.set_num_threads(2)
torch.manual_seed(0)
model = create_model(**recipe.model_args())
optimizer = torch.optim.Adam(model.parameters())
fbank, target = torch.randn(8, 512, 128), torch.rand(8, 3)

def step():
    optimizer.zero_grad()
    torch.nn.functional.binary_cross_entropy_with_logits(model(fbank), target).backward()
    optimizer.step()

step()
began_s, began_cpu_s, clips = time.perf_counter(), time.process_time(), 0
while time.perf_counter() - began_s < float(sys.argv[1]):
    step()
    clips += len(fbank)
print(clips / (time.perf_counter() - began_s), (time.process_time() - began_cpu_s) / clips)
"""


def measured(seconds: float, settings: dict[str, str]) -> tuple[float, float]:
    """Clips a second, and CPU seconds a clip."""
    env = {name: value for name, value in os.environ.items() if name not in SPIN_COUNT} | settings
    printed = subprocess.check_output([sys.executable, "-c", STEPS, str(seconds)], env=env, text=True)
    clips_per_s, cpu_s = map(float, printed.split())
    return clips_per_s, cpu_s


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", nargs="+", type=int, default=[0, 1, 2], help="numbers of programs that never sleep")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--seconds", type=float, default=8.0, metavar="S", help="length of a measurement")
    args = parser.parse_args(argv)
    columns = ["beside", "clips/s before", "clips/s", "of before", "CPU s a clip before", "CPU s a clip"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for busy in args.busy:
        figures: list[list[tuple[float, float]]] = [[], []]
        with ExitStack() as stack:
            for _ in range(busy):
                loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
                stack.callback(loop.wait)
                stack.callback(loop.kill)
            for _ in range(args.rounds):
                for each, settings in zip(figures, ({}, SPIN_COUNT), strict=True):
                    each.append(measured(args.seconds, settings))
        (before, cpu_before), (now, cpu_now) = (map(statistics.median, zip(*each, strict=True)) for each in figures)
        cells = [f"{before:.1f}", f"{now:.1f}", f"{now / before:.2f}", f"{cpu_before:.3f}", f"{cpu_now:.3f}"]
        print(f"| {busy} busy programs | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
