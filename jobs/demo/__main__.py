"""Run the whole pipeline on this machine in minutes: synthesised sounds → yt-dlp → shards → training → scores.

    python -m jobs.demo [--output demo-out] [--compare]

The demo synthesises sounds of 14 AudioSet classes, encodes them in three codecs and serves them over HTTP on loopback.
The rest is a real run: it calls the jobs and prints their command lines. With --compare it trains three models on the
same data, and puts them on one page.
"""

if __name__ == "__main__":  # before the imports that follow, which take seconds
    from jobs import entry

    entry.begin()

import argparse
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ast_core.labels import LabelVocabulary, audioset_labels
from jobs import compare, evaluate, prepare_audioset, train
from jobs.common import JobParser, add_ray_options, run
from jobs.demo.media_server import serve
from jobs.demo.sounds import GENERATORS
from jobs.demo.sounds_dataset import build_dataset
from jobs.ray_session import ray_session
from pipeline import storage
from pipeline.train.metrics_log import per_class_table, read_summary

NUM_TRAIN, NUM_EVAL = 440, 110
COMPARED = ("demo", "demo-talnet", "demo-linear")
"""Recipes of the comparison."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = JobParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="demo-out", help="folder for all files (default demo-out)")
    parser.add_argument("--seed", type=int, default=0, help="seed of sounds and training (default 0)")
    parser.add_argument("--compare", action="store_true", help="train three models, and compare them on one page")
    add_ray_options(parser)
    args = parser.parse_args(argv)
    out, began_s = Path(args.output).absolute(), time.monotonic()

    print(f"1. Synthesising {NUM_TRAIN} training and {NUM_EVAL} evaluation clips in {out / 'sounds'}; some have faults")
    dataset = build_dataset(out / "sounds", num_train=NUM_TRAIN, num_eval=NUM_EVAL, seed=args.seed)
    labels = demo_labels()
    (out / "labels.csv").write_text(labels.to_csv(), encoding="utf-8")
    for video_id, fault in dataset.faults.items():
        print(f"   {video_id} is {fault}")

    data = str(out / "data")
    common = ["--data", data, "--train-splits", "train", "--eval-splits", "eval"]
    common += ["--num-workers", "2", "--device", "cpu", "--seed", str(args.seed)]
    with ray_session(args.address, args.num_cpus):
        with serve(dataset.media_dir) as base_url:
            print("\n2. Fetching the sections with yt-dlp and preparing them on Ray")
            lists = ["--segments", str(dataset.train_list), str(dataset.eval_list)]
            prepare = [*lists, "--media-url", f"{base_url}/{{video_id}}", "--labels", str(out / "labels.csv")]
            _run(prepare_audioset.main, "jobs/prepare_audioset.py", [*prepare, "--output", data])
        if args.compare:
            print("\n3. Training an AST, a CRNN and a linear model from scratch with two workers")
            recipes = ["--recipes", *COMPARED, "--output", str(out / "comparison")]
            _run(compare.main, "jobs/compare.py", [*recipes, *common])
        else:
            _train_and_evaluate(data, str(out / "run"), common)
    print(f"{time.monotonic() - began_s:.0f} s in all")
    return 0


def _train_and_evaluate(data: str, run: str, common: list[str]) -> None:
    print("\n3. Training a small AST from scratch with two workers")
    _run(train.main, "jobs/train.py", ["--recipe", "demo", "--output", run, *common])
    print("\n4. Evaluating the untrained model, for comparison")
    score = ["--checkpoint", f"{run}/initial", "--data", data, "--split", "eval"]
    _run(evaluate.main, "jobs/evaluate.py", score)
    print("\n" + per_class_table(storage.read_bytes(storage.join(run, "per_class.csv")).decode()))
    summary = read_summary(run)
    print(
        f"\neval mAP {summary['map']:.3f} (averaged weights {summary['averaged']['map']:.3f})\n"
        f"data set      {data}\nrun           {run}\nbest model    {run}/best\nTensorBoard   tensorboard --logdir {run}"
    )


def demo_labels() -> LabelVocabulary:
    """The vocabulary of the demo: some of AudioSet's classes."""
    audioset = audioset_labels()
    indices = sorted(audioset.index_of[mid] for mid in GENERATORS)
    return LabelVocabulary(tuple(audioset.mids[i] for i in indices), tuple(audioset.names[i] for i in indices))


def _run(job: Callable[[Sequence[str]], int], script: str, argv: list[str]) -> None:
    print(f"   $ python {shlex.join([script, *argv])}\n", flush=True)
    job(argv)


if __name__ == "__main__":
    run(main)
