"""Check that the memory of a training worker's feed does not grow in a long run on many clips.

    python -m benchmarks.feed_memory [--clips 200000] [--batches N]

The clips are short, so that the feed's buffers do not hide memory that grows with the number of clips. A separate
process draws epochs with sample weights and mixup of half of the clips. Its resident set is read a thousand times. The
exit status is 1 if it grows by more than 5 % after the first tenth. Runs without Ray.
"""

import argparse
import math
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import count, islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from ast_core.features import KALDI128
from ast_core.recipe import Recipe
from benchmarks.feed import NUM_CLASSES, write_shards
from pipeline.dataset import Clips
from pipeline.train.data.feed import TrainBatch, TrainFeed

SHORTEST_FRAMES, LONGEST_FRAMES = 20, 50
RECIPE = Recipe(
    model_size="tiny224",
    imagenet_pretrain=False,
    input_tdim=64,
    timem=20,
    batch_size=12,
    mixup=0.5,
    sampling="weighted",
)
NUM_EPOCHS, NUM_SAMPLES = 6, 1000
MOST_GROWTH = 0.05


@dataclass(frozen=True)
class Watched:
    """Samples of the memory of a process that runs the feed."""

    duration_s: float
    num_batches: np.ndarray
    """`[samples]`: number of batches read at each sample."""
    rss_mb: np.ndarray
    """`[samples]`: resident set in MB."""
    max_rss_mb: float

    def median_mb(self, begin: float, end: float) -> float:
        """Median of the samples between two shares of the run."""
        share = self.num_batches / self.num_batches[-1]
        return float(np.median(self.rss_mb[(begin <= share) & (share <= end)]))

    def slope_mb_a_batch(self, begin: float) -> float:
        """Slope of the straight line through the samples after a share of the run."""
        late = self.num_batches >= begin * self.num_batches[-1]
        return float(np.polyfit(self.num_batches[late], self.rss_mb[late], 1)[0])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=200_000)
    parser.add_argument("--batches", type=int, help=f"of {RECIPE.batch_size} clips each (default: {NUM_EPOCHS} epochs)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="ast-bench-") as folder:
        rng = np.random.default_rng(0)
        lengths = range(SHORTEST_FRAMES, LONGEST_FRAMES + 1)
        fbanks = [rng.normal(-4, 4, (n, KALDI128.num_mel_bins)).astype(np.float16) for n in lengths]
        clips = write_shards(Path(folder), fbanks, args.clips)
        steps_per_epoch = TrainFeed(clips, RECIPE, NUM_CLASSES).steps_per_epoch
        num_batches = args.batches or NUM_EPOCHS * steps_per_epoch
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as own_process:
            seen = own_process.submit(_watch, clips, num_batches).result()
    first_mb, last_mb = seen.median_mb(0.1, 0.2), seen.median_mb(0.9, 1)
    growth_mb = last_mb - first_mb
    num_epochs = num_batches / steps_per_epoch
    by_epoch = [seen.median_mb(i / num_epochs, (i + 1) / num_epochs) for i in range(math.ceil(num_epochs))]
    print(
        f"{args.clips:,} clips in shards, {num_batches:,} batches of {RECIPE.batch_size}, {seen.duration_s:.0f} s, "
        f"{len(seen.rss_mb)} samples\n"
        f"resident: {first_mb:.1f} MB after the first tenth, {last_mb:.1f} MB in the last, {seen.max_rss_mb:.1f} MB at "
        f"most\ngrowth: {growth_mb:+.1f} MB ({growth_mb / first_mb:+.1%}, allowed {MOST_GROWTH:.0%}); slope "
        f"{seen.slope_mb_a_batch(0.1) * 100_000 / RECIPE.batch_size:+.2f} MB per 100,000 clips\n"
        f"median of each epoch: {', '.join(f'{mb:.0f}' for mb in by_epoch)} MB"
    )
    return int(growth_mb > MOST_GROWTH * first_mb)


def _watch(clips: Clips, num_batches: int) -> Watched:
    torch.set_num_threads(1)
    began_s = time.monotonic()
    samples = []
    for i, _ in enumerate(islice(_epochs(clips), num_batches), 1):
        if i % max(1, num_batches // NUM_SAMPLES) == 0:
            samples.append((i, _rss_mb()))
    batches, rss_mb = np.array(samples).T
    max_rss_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return Watched(time.monotonic() - began_s, batches, rss_mb, max_rss_mb)


def _epochs(clips: Clips) -> Iterator[TrainBatch]:
    feed = TrainFeed(clips, RECIPE, NUM_CLASSES)
    for epoch in count(1):
        yield from feed.epoch(epoch, torch.device("cpu"))


def _rss_mb() -> float:
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return resident_pages * resource.getpagesize() / 1e6


if __name__ == "__main__":
    sys.exit(main())
