"""How well embeddings tell copies of a recording from other recordings: the reason for the doctor's threshold.

    python -m benchmarks.near_duplicates --esc10 DIR [--output FOLDER] [--checkpoint C]

A TALNet is trained on folds 1 to 4 of ESC-10 (or C is taken). Then the clips of folds 1 and 5 are compared with edited
copies of every second clip: coded as MP3 and as Opus at low rates, 6 dB quieter, cut 0.3 s later, with noise 30 dB
below. The first table has the share of copies whose original has at least this cosine (around the mean, as the doctor
computes it), and the number of pairs of different recordings that have it. The second has the same for the correlation
of log-mel, which the doctor computes for candidates; pairs of different recordings are those with a cosine of 0.7 or
more. Cuts of one longer recording, which ESC-10 has, are not counted.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pyarrow as pa

from ast_core.features import KALDI128
from benchmarks.compare_esc10 import COMMON, MODELS
from benchmarks.event_recordings import RATE_HZ
from pipeline.embeddings.nearest import unit_vectors
from pipeline.embeddings.stored import StoredEmbeddings
from pipeline.inspect.same_sound import log_mel_correlation
from pipeline.prepare.audio.decode import decode_media
from pipeline.prepare.audio.features import clip_fbank
from tests import fakes

ROOT = Path(__file__).parents[1]
COSINES, CORRELATIONS = (0.8, 0.9, 0.95, 0.98, 0.99), (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
NEAR = 0.7
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
        trained = out / "run" / "averaged"
        checkpoint = args.checkpoint or (str(trained) if trained.is_dir() else train(args.esc10, out))
        for fold, what in FOLDS.items():
            tables(f"fold {fold}, {what}", embedded(args.esc10, out / fold, fold, checkpoint))
    return 0


def train(esc10: Path, out: Path) -> str:
    out.mkdir(parents=True, exist_ok=True)
    (out / "talnet.yaml").write_text(json.dumps(COMMON | MODELS["talnet"]))
    run("prepare_audioset.py", "--esc50", str(esc10), "--output", str(out / "data"), "--features", "small64")
    splits = ["--train-splits", "fold1", "fold2", "fold3", "fold4", "--eval-splits", "fold5"]
    where = ["--data", str(out / "data"), "--output", str(out / "run"), "--num-workers", "2", "--device", "cpu"]
    run("train.py", "--recipe", str(out / "talnet.yaml"), *splits, *where)
    return str(out / "run" / "averaged")


@dataclass(frozen=True)
class Clips:
    paths: list[Path]
    sources: list[str]
    """The file name of the original."""
    edits: list[str]
    """Empty: none."""
    vectors_ND: np.ndarray

    def recording(self, clip: int) -> str:
        """The recording that a clip was cut from: a number in ESC-10's file names."""
        return self.sources[clip].split("-")[1]


def embedded(esc10: Path, out: Path, fold: str, checkpoint: str) -> Clips:
    """The originals and copies of a fold, with their embeddings."""
    (out / "copies").mkdir(parents=True, exist_ok=True)
    paths, sources, edits = list[Path](), list[str](), list[str]()
    for number, path in enumerate(sorted(esc10.glob(f"[0-9]*/{fold}-*"))):
        paths, sources, edits = [*paths, path], [*sources, path.stem], [*edits, ""]
        if number % 2 == 0:
            name = list(EDITS)[number // 2 % len(EDITS)]
            copy = EDITS[name](out / "copies" / path.stem, waveform_of(path))
            paths, sources, edits = [*paths, copy], [*sources, path.stem], [*edits, name]
    with open(out / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows([["path"], *([path] for path in paths)])
    given = ["--checkpoint", checkpoint, "--input", str(out / "list.csv"), "--output", str(out / "tags")]
    run("tag.py", *given, "--embeddings", "clip", "--num-workers", "0")
    return Clips(paths, sources, edits, StoredEmbeddings.open(str(out / "tags")).means(pa.array(map(str, paths))))


def waveform_of(path: Path) -> np.ndarray:
    return np.clip(decode_media(str(path), None, 0.0, None)[0], -1, 1)


def tables(title: str, clips: Clips) -> None:
    unit = unit_vectors(clips.vectors_ND, clips.vectors_ND.mean(axis=0))
    cosine_NN = unit @ unit.T
    fbanks = [clip_fbank(waveform_of(path)) for path in clips.paths]
    originals = [i for i, edit in enumerate(clips.edits) if not edit]
    copies = [(i, clips.sources.index(clips.sources[i])) for i, edit in enumerate(clips.edits) if edit]
    others = [(i, j) for i in originals for j in originals if i < j and clips.recording(i) != clips.recording(j)]
    near = [pair for pair in others if cosine_NN[pair] >= NEAR]

    def alike(pair: tuple[int, int]) -> float:
        return log_mel_correlation(fbanks[pair[0]], fbanks[pair[1]], KALDI128.log_scale.nats_per_unit)

    for measure, thresholds, value, compared in (
        ("cosine of embeddings", COSINES, lambda pair: cosine_NN[pair], others),
        ("correlation of log-mel", CORRELATIONS, alike, near),
    ):
        print(f"\n| {title}: {measure} | " + " | ".join(f"{threshold:g}" for threshold in thresholds) + " |")
        print("|---" * (len(thresholds) + 1) + "|")
        for name in EDITS:
            found = np.array([value(pair) for pair in copies if clips.edits[pair[0]] == name])
            cells = [f"{(found >= threshold).mean():.2f}" for threshold in thresholds]
            print(f"| copies, {name} ({len(found)}) | {' | '.join(cells)} |")
        found = np.array(list(map(value, compared)))
        cells = [str((found >= threshold).sum()) for threshold in thresholds]
        print(f"| other recordings, of {len(found):,} pairs | {' | '.join(cells)} |", flush=True)


def run(job: str, *argv: str) -> None:
    subprocess.run([sys.executable, str(ROOT / "jobs" / job), *argv], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
