"""How well embeddings tell copies of a recording from other recordings: the reason for the doctor's threshold.

    python -m benchmarks.near_duplicates --esc10 DIR [--output FOLDER] [--checkpoint C]

A TALNet is trained on folds 1 to 4 of ESC-10 (or C is taken). Then the clips of folds 1 and 5 are compared with edited
copies of every second clip: coded as MP3 and as Opus at low rates, 6 dB quieter, cut 0.3 s later, with noise 30 dB
below. For each threshold of the cosine around the mean, as the doctor computes it, the table has the share of copies
whose original is that near, and the number of pairs of different recordings that are. Cuts of one longer recording,
which ESC-10 has, are not counted.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pyarrow as pa

from benchmarks.compare_esc10 import COMMON, MODELS
from benchmarks.event_recordings import RATE_HZ
from pipeline.embeddings.nearest import unit_vectors
from pipeline.embeddings.stored import StoredEmbeddings
from pipeline.prepare.audio.decode import decode_media
from tests import fakes

ROOT = Path(__file__).parents[1]
THRESHOLDS = (0.8, 0.9, 0.95, 0.98, 0.99)
FOLDS = {"1": "seen in training", "5": "not seen"}


def coded(path: Path, waveform: np.ndarray, *options: str) -> Path:
    """Write a waveform as FLAC, and FFmpeg's encoding of it with `options` to `path`."""
    source = fakes.write_media(path.with_suffix(".source.flac"), waveform)
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y", "-i", str(source), *options, str(path)]
    subprocess.run(ffmpeg, check=True)
    source.unlink()
    return path


def noisy(waveform: np.ndarray) -> np.ndarray:
    level = np.sqrt((waveform**2).mean()) * 10 ** (-30 / 20)
    return waveform + np.random.default_rng(0).normal(0, level, len(waveform)).astype(np.float32)


EDITS: dict[str, Callable[[Path, np.ndarray], Path]] = {
    "MP3, 48 kbit/s": lambda path, wave: coded(path.with_suffix(".mp3"), wave, "-b:a", "48k"),
    "Opus, 24 kbit/s": lambda path, wave: coded(path.with_suffix(".ogg"), wave, "-c:a", "libopus", "-b:a", "24k"),
    "6 dB quieter": lambda path, wave: fakes.write_media(path.with_suffix(".flac"), wave / 2),
    "0.3 s later": lambda path, wave: fakes.write_media(path.with_suffix(".flac"), wave[round(0.3 * RATE_HZ) :]),
    "noise at -30 dB": lambda path, wave: fakes.write_media(path.with_suffix(".flac"), noisy(wave)),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--esc10", type=Path, default=ROOT.parent / "shared" / "data" / "esc10", metavar="DIR")
    parser.add_argument("--output", type=Path, help="keep everything here (default: a temporary folder)")
    parser.add_argument("--checkpoint", metavar="C", help="embed with this model")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="ast-bench-") as temporary:
        out = (args.output or Path(temporary)).absolute()
        checkpoint = args.checkpoint or train(args.esc10, out)
        for fold, what in FOLDS.items():
            table(f"fold {fold}, {what}", embedded(args.esc10, out / fold, fold, checkpoint))
    return 0


def train(esc10: Path, out: Path) -> str:
    out.mkdir(parents=True, exist_ok=True)
    (out / "talnet.yaml").write_text(json.dumps(COMMON | MODELS["talnet"]))
    run("prepare_audioset.py", "--esc50", str(esc10), "--output", str(out / "data"), "--features", "small64")
    splits = ["--train-splits", "fold1", "fold2", "fold3", "fold4", "--eval-splits", "fold5"]
    where = ["--data", str(out / "data"), "--output", str(out / "run"), "--num-workers", "2"]
    run("train.py", "--recipe", str(out / "talnet.yaml"), *splits, *where)
    return str(out / "run" / "averaged")


def embedded(esc10: Path, out: Path, fold: str, checkpoint: str) -> tuple[list[str], list[str], np.ndarray]:
    """The source, the edit (empty: none) and the embedding of each clip, `[N, D]`."""
    (out / "copies").mkdir(parents=True, exist_ok=True)
    paths, sources, edits = list[Path](), list[str](), list[str]()
    for number, path in enumerate(sorted(esc10.glob(f"[0-9]*/{fold}-*"))):
        paths, sources, edits = [*paths, path], [*sources, path.stem], [*edits, ""]
        if number % 2 == 0:
            name = list(EDITS)[number // 2 % len(EDITS)]
            waveform, _ = decode_media(str(path), None, 0.0, None)
            copy = EDITS[name](out / "copies" / path.stem, np.clip(waveform, -1, 1))
            paths, sources, edits = [*paths, copy], [*sources, path.stem], [*edits, name]
    with open(out / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path"], *([path] for path in paths)])
    given = ["--checkpoint", checkpoint, "--input", str(out / "list.csv"), "--output", str(out / "tags")]
    run("tag.py", *given, "--embeddings", "clip", "--num-workers", "0")
    means = StoredEmbeddings.open(str(out / "tags")).means(pa.array(map(str, paths)))
    return sources, edits, means


def table(title: str, clips: tuple[list[str], list[str], np.ndarray]) -> None:
    sources, edits, vectors = clips
    unit = unit_vectors(vectors, vectors.mean(axis=0))
    cosine = unit @ unit.T
    recording = [source.split("-")[1] for source in sources]  # cuts of one recording have its number
    of_copy = {i: cosine[i, sources.index(sources[i])] for i, edit in enumerate(edits) if edit}
    originals = [i for i, edit in enumerate(edits) if not edit]
    others = np.array([cosine[i, j] for i in originals for j in originals if i < j and recording[i] != recording[j]])
    print(f"\n| {title} | " + " | ".join(f"{threshold:g}" for threshold in THRESHOLDS) + " |")
    print("|---" * (len(THRESHOLDS) + 1) + "|")
    for name in EDITS:
        found = np.array([value for i, value in of_copy.items() if edits[i] == name])
        print(
            f"| copies, {name} ({len(found)}) | " + " | ".join(f"{(found >= t).mean():.2f}" for t in THRESHOLDS) + " |"
        )
    print(
        f"| other recordings, of {len(others):,} pairs | "
        + " | ".join(str((others >= t).sum()) for t in THRESHOLDS)
        + " |"
    )


def run(job: str, *argv: str) -> None:
    subprocess.run([sys.executable, str(ROOT / "jobs" / job), *argv], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
