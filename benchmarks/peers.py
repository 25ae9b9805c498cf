"""Measure what a user would write instead, on the same sounds and the same model, in turns on this machine.

    python -m benchmarks.peers [--rounds 3] [--clips 64] [--only prepare train tag] [--threads 2]
                               [--size tiny224 --stride 16] [--epochs 4]

prepare  `jobs/prepare_audioset.py`; a loop that starts the FFmpeg program for each clip and calls torchaudio's fbank;
         and `datasets.map` with `ASTFeatureExtractor`, as in the audio examples of Hugging Face
train    `jobs/train.py` from shards; and `Trainer` with `ASTForAudioClassification`, which computes features while it
         trains, as in Hugging Face's example for audio classification
tag      `jobs/tag.py` on a folder; and `transformers.pipeline("audio-classification")` on its files

Each is a process of its own, with its imports and start, so a rate grows with the number of clips: the second column
of rates leaves the start out, as each program reports it. The model is an AST with 1,024 frames and the same random
weights for all; `--size base384 --stride 10` is the published one. Each program has the precision that it has by
default: float32, but for `jobs/train.py` bf16 on a CPU with instructions for it; a row has its float32 too. Clips are
10 s of the demo's sounds, as FLAC.

The second table of the training has the time to the same loss: the lowest mean loss of an epoch that each of them
reaches, and the seconds until the end of the epoch that reaches it, as each program reports its time. Ours evaluates
the four held-out clips after each epoch, and averages weights; `Trainer` does neither.

`Trainer` needs the package accelerate.
"""

import argparse
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import torch

from ast_core.batch import Norm
from ast_core.checkpoints import ModelConfig, save_huggingface, save_model
from ast_core.labels import LabelVocabulary
from ast_core.models import create_model
from ast_core.recipe import Recipe
from jobs.demo.sounds import GENERATORS, mixture
from tests import fakes

ROOT = Path(__file__).resolve().parents[1]
CLIP_S, BATCH_CLIPS, LR = 10.0, 8, 1e-4
NORM = Norm(-4.27, 4.57)


@dataclass(frozen=True)
class Took:
    wall_s: float
    """Seconds of the whole process."""
    own_s: float
    """Seconds of the work, as the program itself reports them."""
    losses: tuple[float, ...] = ()
    """Mean training loss of each epoch."""


@dataclass(frozen=True)
class Place:
    """Where the sounds and models of a benchmark are."""

    folder: Path
    num_clips: int
    threads: int
    size: str
    stride: int
    epochs: int

    @property
    def model(self) -> dict[str, Any]:
        return {"model_size": self.size, "fstride": self.stride, "tstride": self.stride, "input_tdim": 1024}

    @property
    def sounds(self) -> Path:
        return self.folder / "sounds"

    @property
    def manifest(self) -> Path:
        return self.folder / "train.csv"

    @property
    def ours(self) -> Path:
        return self.folder / "ours"

    @property
    def huggingface(self) -> Path:
        return self.folder / "huggingface"

    @property
    def data(self) -> Path:
        return self.folder / "data"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default 3)")
    parser.add_argument("--clips", type=int, default=64, help="clips of 10 s (default 64)")
    parser.add_argument("--only", nargs="+", choices=list(WORK), default=list(WORK))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads of each (default: all)")
    parser.add_argument("--size", default="tiny224", help="size of the AST (default tiny224)")
    parser.add_argument("--stride", type=int, default=16, help="stride of its patches (default 16)")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of training (default 4)")
    parser.add_argument("--peer", nargs=2, help=argparse.SUPPRESS)  # this process is one of the peers
    args = parser.parse_args(argv)
    folder = functools.partial(
        Place, num_clips=args.clips, threads=args.threads, size=args.size, stride=args.stride, epochs=args.epochs
    )
    if args.peer:
        return run_peer(args.peer[0], folder(Path(args.peer[1])))
    with tempfile.TemporaryDirectory(prefix="ast-bench-") as name:
        place = folder(Path(name))
        make(place)
        print("| work | program | clips/s, start included | ours of it | clips/s, as it reports | ours of it |")
        print("|---|---|---|---|---|---|")
        for work in args.only:
            took: dict[str, list[Took]] = defaultdict(list)
            for number in range(args.rounds):
                for program, run in WORK[work].items():
                    took[program].append(run(place, f"{work}-{number}"))
                    print(f"{work}: {program}: {took[program][-1]}", file=sys.stderr, flush=True)
            say(work, took, args.clips * (args.epochs if work == "train" else 1), args.epochs)
    return 0


def say(work: str, took: dict[str, list[Took]], num_clips: int, epochs: int) -> None:
    (ours, runs_of_ours), *_ = took.items()
    for program, runs in took.items():
        rates, ratios = [], []
        for seconds in (lambda run: run.wall_s, lambda run: run.own_s):
            rates.append(num_clips / statistics.median(map(seconds, runs)))
            each = [seconds(peer) / seconds(own) for peer, own in zip(runs, runs_of_ours, strict=True)]
            spread = f"{statistics.median(each):.2f} ({min(each):.2f}, {max(each):.2f})"
            ratios.append("" if program == ours else spread)
        print(f"| {work} | {program} | {rates[0]:.2f} | {ratios[0]} | {rates[1]:.2f} | {ratios[1]} |", flush=True)
    if runs_of_ours[0].losses:
        say_time_to_loss(took, epochs)


def say_time_to_loss(took: dict[str, list[Took]], num_epochs: int) -> None:
    target = max(min(run.losses) for runs in took.values() for run in runs)
    print(f"\n| to a loss of {target:.3f} | epochs | s | ours of it |\n|---|---|---|---|")
    needed: dict[str, list[float]] = {}
    for program, runs in took.items():
        epochs = [next(i for i, loss in enumerate(run.losses, 1) if loss <= target) for run in runs]
        needed[program] = [run.own_s * epoch / num_epochs for run, epoch in zip(runs, epochs, strict=True)]
        ours = next(iter(needed.values()))
        ratio = statistics.median(theirs / own for theirs, own in zip(needed[program], ours, strict=True))
        print(f"| {program} | {epochs} | {statistics.median(needed[program]):.1f} | {ratio:.2f} |", flush=True)
    print()


def make(place: Place) -> None:
    """Write sounds, their list, and one model in both formats."""
    place.sounds.mkdir()
    (place.folder / "bin").mkdir()
    (place.folder / "bin" / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    classes, rows = list(GENERATORS)[:4], ["path,labels,split"]
    for i in range(place.num_clips):
        rng = np.random.default_rng(i)
        waveform = mixture(rng, [classes[i % len(classes)]], CLIP_S, fakes.RATE_HZ)
        fakes.write_media(place.sounds / f"{i:05d}.flac", waveform, channels=1)
        rows.append(f"sounds/{i:05d}.flac,{classes[i % len(classes)]},train")
    (place.folder / "held-out").mkdir()
    for i, name in enumerate(classes):
        waveform = mixture(np.random.default_rng(10_000 + i), [name], CLIP_S, fakes.RATE_HZ)
        fakes.write_media(place.folder / "held-out" / f"{i}.flac", waveform)
        rows.append(f"held-out/{i}.flac,{name},eval")
    place.manifest.write_text("\n".join(rows) + "\n")
    recipe = Recipe(label_dim=len(classes), imagenet_pretrain=False, precision="fp32", **place.model)
    config = ModelConfig(recipe, NORM, LabelVocabulary.from_names(sorted(classes)))
    torch.manual_seed(0)
    state = create_model(**recipe.model_args()).state_dict()
    save_model(place.ours, state, config)
    save_huggingface(place.huggingface, state, config)


def timed(command: Sequence[str], place: Place) -> tuple[float, str]:
    """Seconds of a process, and what it printed."""
    env = os.environ | {
        "OMP_NUM_THREADS": str(place.threads),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    env["PATH"] = f"{place.folder / 'bin'}:{env['PATH']}"  # `transformers` calls FFmpeg's program
    began_s = time.monotonic()
    done = subprocess.run([sys.executable, *command], cwd=place.folder, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command} ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return time.monotonic() - began_s, done.stdout


# --- ours


def our_preparation(place: Place, name: str) -> Took:
    """The data set of the first run stays, for the training."""
    output = place.data if not place.data.exists() else place.folder / name
    job = str(ROOT / "jobs/prepare_audioset.py")
    wall_s, _ = timed([job, "--manifest", "train.csv", "--output", str(output)], place)
    return Took(wall_s, wall_s)


def our_training(place: Place, name: str, *more: str) -> Took:
    if not place.data.exists():
        our_preparation(place, name)
    values = place.model | {"imagenet_pretrain": "false", "epochs": place.epochs, "batch_size": BATCH_CLIPS, "lr": LR}
    values |= {"loss": "CE", "freqm": 0, "timem": 0, "warmup": "false", "lrscheduler_start": 100}
    values |= {"adam_beta1": 0.9, "weight_decay": 0, "grad_clip": 1.0}  # as in `Trainer`
    keys = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    command = [str(ROOT / "jobs/train.py"), "--recipe", "esc10", "--data", str(place.data), "--output", name, *keys]
    command += ["--train-splits", "train", "--eval-splits", "eval", "--init-from", str(place.ours)]
    command += ["--num-workers", "1", "--cpus-per-worker", str(place.threads), *more]
    wall_s, _ = timed(command, place)
    summary = json.loads((place.folder / name / "summary.json").read_text())
    lines = [json.loads(line) for line in (place.folder / name / "metrics.jsonl").read_text().splitlines()]
    losses = tuple(round(line["loss"], 4) for line in lines if line["kind"] == "epoch")
    return Took(wall_s, place.num_clips * place.epochs / summary["clips_per_s"], losses)


def our_tagging(place: Place, name: str) -> Took:
    command = [str(ROOT / "jobs/tag.py"), "--checkpoint", str(place.ours), "--input", "sounds", "--output", name]
    wall_s, _ = timed(command, place)
    return Took(wall_s, wall_s)


# --- the others


def peer(name: str) -> Callable[[Place, str], Took]:
    """A function of PEERS as a process of its own, which prints its seconds and losses as JSON."""

    def run(place: Place, _: str) -> Took:
        if name == "trainer" and find_spec("accelerate") is None:
            raise SystemExit("Trainer needs the package accelerate: pip install accelerate, or leave out `train`")
        words = ["-m", "benchmarks.peers", "--clips", str(place.num_clips), "--threads", str(place.threads)]
        words += ["--epochs", str(place.epochs)]
        wall_s, printed = timed([*words, "--peer", name, str(place.folder)], place)
        told = json.loads(re.findall(r"^\{.*\}$", printed, re.MULTILINE)[-1])
        return Took(wall_s, told["own_s"], tuple(told.get("losses", ())))

    return run


def run_peer(name: str, place: Place) -> int:
    torch.set_num_threads(place.threads)
    print(json.dumps(PEERS[name](place)))
    return 0


def ffmpeg_and_torchaudio(place: Place) -> dict[str, Any]:
    import torchaudio

    began_s = time.monotonic()
    for path in sorted(place.sounds.iterdir()):
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", str(path)]
        command += ["-ac", "1", "-ar", "16000", "-f", "f32le", "-"]
        raw = subprocess.run(command, capture_output=True, check=True)
        waveform = torch.frombuffer(bytearray(raw.stdout), dtype=torch.float32)
        features = torchaudio.compliance.kaldi.fbank(
            (waveform - waveform.mean())[None],
            htk_compat=True,
            sample_frequency=16_000,
            use_energy=False,
            window_type="hanning",
            num_mel_bins=128,
            dither=0.0,
            frame_shift=10,
        )
        torch.save(features.half(), place.folder / f"{path.stem}.pt")
    return {"own_s": time.monotonic() - began_s}


def sounds_as_dataset(place: Place) -> Any:
    """The sounds as a data set of Hugging Face. Its `Audio` would need torchcodec, so the files are read as bytes."""
    import csv

    from datasets import Dataset

    with place.manifest.open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
    names = sorted({row["labels"] for row in rows})
    paths = [str(place.folder / row["path"]) for row in rows]
    return Dataset.from_dict({"path": paths, "label": [names.index(row["labels"]) for row in rows]})


def extract(batch: dict[str, list[Any]], extractor: Any) -> dict[str, Any]:
    from transformers.pipelines.audio_utils import ffmpeg_read

    waveforms = [ffmpeg_read(Path(path).read_bytes(), 16_000) for path in batch["path"]]
    features = extractor(waveforms, sampling_rate=16_000, return_tensors="np")["input_values"]
    return {"input_values": features, "labels": batch["label"]}


def datasets_map(place: Place) -> dict[str, Any]:
    from transformers import ASTFeatureExtractor

    extractor = ASTFeatureExtractor.from_pretrained(place.huggingface)
    began_s = time.monotonic()
    mapped = sounds_as_dataset(place).map(
        extract, batched=True, batch_size=BATCH_CLIPS, fn_kwargs={"extractor": extractor}, num_proc=place.threads
    )
    assert len(mapped) == place.num_clips
    return {"own_s": time.monotonic() - began_s}


def trainer(place: Place) -> dict[str, Any]:
    from transformers import ASTFeatureExtractor, ASTForAudioClassification, Trainer, TrainingArguments

    extractor = ASTFeatureExtractor.from_pretrained(place.huggingface)
    data = sounds_as_dataset(place).with_transform(lambda batch: extract(batch, extractor))
    arguments = TrainingArguments(
        output_dir=str(place.folder / "trainer"),
        num_train_epochs=place.epochs,
        per_device_train_batch_size=BATCH_CLIPS,
        learning_rate=LR,
        lr_scheduler_type="constant",
        remove_unused_columns=False,
        logging_strategy="epoch",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=0,
    )
    model = ASTForAudioClassification.from_pretrained(place.huggingface, problem_type="single_label_classification")
    trains = Trainer(model=model, args=arguments, train_dataset=data)
    result = trains.train()
    losses = [round(record["loss"], 4) for record in trains.state.log_history if "loss" in record]
    return {"own_s": result.metrics["train_runtime"], "losses": losses}


def pipeline(place: Place) -> dict[str, Any]:
    from transformers import pipeline

    tag = pipeline("audio-classification", model=str(place.huggingface), device="cpu")
    began_s = time.monotonic()
    found = list(tag([str(path) for path in sorted(place.sounds.iterdir())], batch_size=BATCH_CLIPS))
    assert len(found) == place.num_clips
    return {"own_s": time.monotonic() - began_s}


PEERS: dict[str, Callable[[Place], dict[str, Any]]] = {
    "ffmpeg_and_torchaudio": ffmpeg_and_torchaudio,
    "datasets_map": datasets_map,
    "trainer": trainer,
    "pipeline": pipeline,
}
WORK: dict[str, dict[str, Callable[[Place, str], Took]]] = {
    "prepare": {
        "jobs/prepare_audioset.py": our_preparation,
        "an FFmpeg process a clip, torchaudio's fbank": peer("ffmpeg_and_torchaudio"),
        "datasets.map, ASTFeatureExtractor": peer("datasets_map"),
    },
    "train": {
        "jobs/train.py": our_training,
        "jobs/train.py, fp32": lambda place, name: our_training(place, f"{name}-fp32", "--precision", "fp32"),
        "transformers.Trainer": peer("trainer"),
    },
    "tag": {"jobs/tag.py": our_tagging, "transformers.pipeline": peer("pipeline")},
}

if __name__ == "__main__":
    sys.exit(main())
