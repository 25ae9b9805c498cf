"""Measure the feed: clips per second of one core's time, compared with the reference implementation's data loader.

    python -m benchmarks.feed [--clips 10000] [--ray]

For each clip, the reference implementation reads a WAV, mixes half of the clips with a second WAV, computes
torchaudio's fbank and applies SpecAugment. Ours reads shards. The benchmark does not need Ray. --ray adds Ray Data,
which reads the same shards in their order, each clip once and without partners; training needs more than this.

It also measures how well the order is shuffled: the correlation of labels at several distances in the order, compared
with an ideal shuffle.
"""

import argparse
import sys
import tempfile
import time
import wave
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import torchaudio

from ast_core.augment.mixup import MIXUP_BETA
from ast_core.batch import Norm, model_input
from ast_core.fbank import fbank
from ast_core.features import KALDI128
from ast_core.recipe import Recipe
from pipeline import dataset
from pipeline.dataset import Clips
from pipeline.train.data.feed import TrainFeed
from pipeline.train.data.sampling import GROUPS_PER_SHUFFLE_WINDOW, epoch_order

CLIP_S, NUM_FRAMES, NUM_SOUNDS, NUM_CLASSES, CLIPS_A_SHARD = 10, 1024, 64, 527, 128
RECIPE = Recipe(model_size="tiny224", imagenet_pretrain=False, batch_size=12)
"""Mixes half of the clips; freqm 48 and timem 192, as in the recipes of AudioSet."""

NORM = Norm(RECIPE.dataset_mean, RECIPE.dataset_std)
CPU = torch.device("cpu")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--clips", type=int, default=10_000, help="clips in the shards, twice what the feed holds; a pass draws as many"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds of all variants in turns; the fastest one counts")
    parser.add_argument("--ray", action="store_true", help="also measure Ray Data, which must be installed")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="ast-bench-") as folder:
        sounds = [sound(i) for i in range(NUM_SOUNDS)]
        files = _write_wavs(Path(folder, "wav"), sounds)
        fbanks = [fbank(torch.from_numpy(samples)).half().numpy() for samples in sounds]
        clips = write_shards(Path(folder, "shards"), fbanks, args.clips)
        ways: dict[str, Callable[[], int]] = {
            "the original's: WAV, mixup, torchaudio's fbank, SpecAugment": lambda: _originals(files, len(clips) // 8),
            "feed, partners read, augmentation left to the device": lambda: _feed(clips, augmented=False),
            "feed, with mixup and SpecAugment on the CPU": lambda: _feed(clips, augmented=True),
        }
        rates = dict.fromkeys(ways, (0.0, 0.0))
        for _ in range(args.rounds):
            for name, run in ways.items():
                rates[name] = max(rates[name], _rate(run))
        if args.ray:
            rates["Ray Data, in the order of the shards, without partners"] = _ray_rate(clips)
    (first, _), *_ = rates.values()
    print("| | clips/s of one core's time | of the original's | clips/s on the clock |\n|---|---|---|---|")
    for name, (of_cpu, of_clock) in rates.items():
        print(f"| {name} | {of_cpu:,.0f} | {of_cpu / first:.1f} | {of_clock:,.0f} |")
    _say_shuffle()
    return 0


def _rate(run: Callable[[], int]) -> tuple[float, float]:
    """Clips per second of CPU time of all threads, and per second of wall time."""
    cpu_s, clock_s = time.process_time(), time.perf_counter()
    num_clips = run()
    return num_clips / (time.process_time() - cpu_s), num_clips / (time.perf_counter() - clock_s)


def sound(seed: int) -> np.ndarray:
    """Ten seconds of noise with varying spectrum and loudness, whose fbanks compress like those of recordings."""
    rng = np.random.default_rng(seed)
    spectrum = np.fft.rfft(rng.standard_normal(CLIP_S * KALDI128.sample_rate_hz))
    spectrum /= 1 + np.arange(len(spectrum)) / rng.uniform(500, 20_000)
    loudness = np.interp(np.linspace(0, 40, CLIP_S * KALDI128.sample_rate_hz), np.arange(41), rng.uniform(0.02, 1, 41))
    samples = np.fft.irfft(spectrum) * loudness
    return (samples / np.abs(samples).max() * 0.9).astype(np.float32)


def _write_wavs(folder: Path, sounds: Sequence[np.ndarray]) -> list[str]:
    folder.mkdir()
    for i, samples in enumerate(sounds):
        with wave.open(str(folder / f"{i}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(KALDI128.sample_rate_hz)
            file.writeframes((samples * 32767).astype("<i2").tobytes())
    return [str(folder / f"{i}.wav") for i in range(len(sounds))]


def write_shards(folder: Path, fbanks: Sequence[np.ndarray], num_clips: int) -> Clips:
    """Write shards that repeat these fbanks, with random labels and sample weights."""
    rng = np.random.default_rng(0)
    begins = range(0, num_clips, CLIPS_A_SHARD)
    shards = [str(folder / f"{begin}.parquet") for begin in begins]
    hashes = [dataset.hash_fbank(fbank) for fbank in fbanks]

    def write(uri: str, begin: int) -> None:
        rows = [fbanks[i % len(fbanks)] for i in range(begin, min(begin + CLIPS_A_SHARD, num_clips))]
        values = pa.array(np.concatenate(rows).reshape(-1))
        frames = pa.FixedSizeListArray.from_arrays(values, type=dataset.fbank_type(128).value_type)
        offsets = np.cumsum([0, *map(len, rows)]).astype(np.int32)
        column = pa.ListArray.from_arrays(offsets, frames, type=dataset.fbank_type(128))
        facts = {
            "clip_id": pa.array([str(i) for i in range(begin, begin + len(rows))]),
            "num_frames": pa.array(list(map(len, rows)), pa.int16()),
            "fbank_hash": pa.array([hashes[i % len(fbanks)] for i in range(begin, begin + len(rows))], pa.int64()),
        }
        shard = pa.table(facts | {"fbank": column})
        dataset.write_table(uri, shard, row_group_size=dataset.ROW_GROUP_CLIPS)

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, shards, begins))
    clip = np.arange(num_clips)
    return Clips(
        shards=shards,
        shard_of=clip // CLIPS_A_SHARD,
        row=clip % CLIPS_A_SHARD,
        num_frames=np.array([len(fbank) for fbank in fbanks])[clip % len(fbanks)],
        labels=pa.array(rng.integers(NUM_CLASSES, size=(num_clips, 2)).tolist(), dataset.LABELS),
        clip_id=pa.array([str(i) for i in clip]),
        num_mel_bins=KALDI128.num_mel_bins,
        weight=rng.pareto(1.5, num_clips) + 0.1,
        fbank_hash=np.array(hashes)[clip % len(fbanks)],
    )


def _originals(files: Sequence[str], num_clips: int) -> int:
    """The reference implementation's data loader, from its description. Its WAV reading costs at least as much."""
    rng = np.random.default_rng(0)
    freq_mask = torchaudio.transforms.FrequencyMasking(RECIPE.freqm)
    time_mask = torchaudio.transforms.TimeMasking(RECIPE.timem)
    batch = []
    for file in rng.choice(files, num_clips):
        waveform = _read_wav(file)
        target = torch.zeros(NUM_CLASSES)
        if rng.random() < RECIPE.mixup:
            lam = float(rng.beta(MIXUP_BETA, MIXUP_BETA))
            waveform = lam * waveform + (1 - lam) * _read_wav(rng.choice(files))
            waveform = waveform - waveform.mean()
            target[rng.integers(NUM_CLASSES, size=2)] = 1 - lam
        features = torchaudio.compliance.kaldi.fbank(
            waveform,
            htk_compat=True,
            sample_frequency=KALDI128.sample_rate_hz,
            use_energy=False,
            window_type="hanning",
            num_mel_bins=KALDI128.num_mel_bins,
            dither=0.0,
            frame_shift=10,
        )
        padded = torch.nn.functional.pad(features, (0, 0, 0, NUM_FRAMES - len(features)))
        masked = time_mask(freq_mask(padded.T.unsqueeze(0))).squeeze(0).T
        batch.append((masked - NORM.mean) / (2 * NORM.std))
        if len(batch) == RECIPE.batch_size:
            torch.stack(batch)
            batch = []
    return num_clips


def _read_wav(file: str) -> torch.Tensor:
    with wave.open(file, "rb") as opened:
        samples = np.frombuffer(opened.readframes(opened.getnframes()), "<i2")
    waveform = torch.from_numpy(samples.astype(np.float32) / 32768).unsqueeze(0)
    return waveform - waveform.mean()


def _feed(clips: Clips, *, augmented: bool) -> int:
    num_clips = 0
    for item in TrainFeed(clips, RECIPE, NUM_CLASSES).epoch(1, CPU):
        if augmented:
            model_input(item.batch, NORM, item.augmentations)
        num_clips += item.num_clips_global
    return num_clips


def _ray_rate(clips: Clips) -> tuple[float, float]:
    """The figures of `_rate` for Ray Data. The CPU time is that of its workers and of this process."""
    import ray

    from benchmarks.prepare import Spent
    from jobs.ray_session import ray_session

    with ray_session("local", 2):
        data = ray.data.read_parquet(clips.shards, columns=["fbank"])
        spent, num_clips = Spent(), 0
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        with spent:
            for batch in data.iter_batches(batch_size=RECIPE.batch_size, batch_format="pyarrow", prefetch_batches=4):
                num_clips += len(batch)
        clock_s, own_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
    return num_clips / (spent.cpu_s()["workers"] + own_s), num_clips / clock_s


def _say_shuffle(num_clips: int = 20_000, num_epochs: int = 10) -> None:
    """Print the quality of the shuffle for clips stored by class, which is the worst case, and in no order."""
    row_group = np.arange(num_clips) // dataset.ROW_GROUP_CLIPS
    usual = partial(epoch_order, seed=0, num_clips=num_clips, weight=None, mixup=0.0, mixup_beta=10.0)
    orders = [usual(epoch=e, row_group=row_group).clip for e in range(num_epochs)]
    rng = np.random.default_rng(0)
    by_class = np.arange(num_clips) * 100 // num_clips
    windows = f"windows of {GROUPS_PER_SHUFFLE_WINDOW} row groups"
    print(f"\nOf {num_clips:,} clips in 100 classes, {windows}, {num_epochs} epochs:")
    print("\n| order | same class at distance 1 | 2 | 24 | 1,000 |\n|---|---|---|---|---|")
    ideal = [rng.permutation(num_clips) for _ in range(num_epochs)]
    for name, label, order in (
        ("ideal shuffle", by_class, ideal),
        ("clips lie in no order", rng.permutation(by_class), orders),
        ("clips lie by class", by_class, orders),
    ):
        shares = [np.mean([np.mean(label[o][d:] == label[o][:-d]) for o in order]) for d in (1, 2, 24, 1000)]
        print(f"| {name} | {' | '.join(f'{share:.2%}' for share in shares)} |")


if __name__ == "__main__":
    sys.exit(main())
