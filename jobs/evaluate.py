"""Evaluate a checkpoint, or the ensemble of several, on a split of a prepared data set.

    python jobs/evaluate.py --checkpoint runs/1/averaged --data data --split eval
    python jobs/evaluate.py --checkpoint runs/1 runs/2 runs/3 --data data --split eval
    python jobs/evaluate.py --checkpoint audioset_10_10_0.4593.pth --data data --split eval
    python jobs/evaluate.py --checkpoint runs/1 --data data --split eval --scores scores.csv

A checkpoint is a run (its best model is used), a model folder, a Hugging Face folder, or one of the published `.pth`
files; `jobs/export.py` converts any other file of weights to a model folder. The members of an ensemble may differ in
shape. Their scores (sigmoids) are averaged.
"""

if __name__ == "__main__":  # before the imports that follow, which take seconds
    from jobs import entry

    entry.begin()

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray

from ast_core.errors import ConfigError
from ast_core.metrics import bootstrap_map
from jobs.common import add_ray_options, output_uri, run
from jobs.ray_session import ray_session
from pipeline import storage
from pipeline.dataset import Clips, PreparedDataset
from pipeline.redaction import without_secrets
from pipeline.train import models
from pipeline.train.data.feed import Targets
from pipeline.train.evaluation import ensemble
from pipeline.train.evaluation.score_table import check_suffix, write_score_table
from pipeline.train.evaluation.scoring import class_counts, score_metrics
from pipeline.train.metrics_log import finite_or_null, per_class_csv, per_class_table

MAX_RESAMPLES = 100_000
"""Upper bound of --bootstrap: a hundred times the usual number. A larger number is probably a typing error."""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", required=True, nargs="+", metavar="C", help="path or URI; the scores of several are averaged"
    )
    parser.add_argument("--data", required=True, metavar="URI", help="a prepared data set")
    parser.add_argument("--split", required=True, nargs="+", metavar="SPLIT", help="splits to evaluate on, together")
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda if there is a GPU"
    )
    parser.add_argument(
        "--bootstrap",
        type=int,
        default=1000,
        metavar="N",
        help="number of bootstrap resamples for the 95 %% interval of the mAP (default 1000; 0 is off)",
    )
    parser.add_argument("--per-class", action="store_true", help="print the figures of each class, best first")
    parser.add_argument(
        "--scores",
        metavar="FILE",
        help="write the scores of each clip to this .csv or .parquet file, one column per class",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    add_ray_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if not 0 <= args.bootstrap <= MAX_RESAMPLES:
        raise ConfigError(f"--bootstrap is {args.bootstrap}; use 0 (off) to {MAX_RESAMPLES:,}")
    json_uri = output_uri(args.json, "--json") if args.json else None
    scores_uri = output_uri(args.scores, "--scores") if args.scores else None
    if scores_uri:
        check_suffix(scores_uri, "--scores")
    dataset = PreparedDataset.open(args.data)
    clips = dataset.clips(args.split)
    checkpoints = [models.find(uri) for uri in args.checkpoint]
    members = [ensemble.read_member(uri, dataset) for uri in checkpoints]
    for line in ensemble.length_lines(members, clips, dataset.features):
        print(line, flush=True)
    scores = score_clips(members, dataset, clips, args)
    of_members = [score_metrics(member, clips).scalars() for member in scores]
    mean_scores = np.mean(scores, axis=0)
    metrics = score_metrics(mean_scores, clips)
    interval = None
    if args.bootstrap:
        target = Targets(clips, len(dataset.labels))(np.arange(len(clips)))
        interval = bootstrap_map(mean_scores, target, num_resamples=args.bootstrap)
    if len(members) > 1:
        for uri, figures in zip(checkpoints, of_members, strict=True):
            print(f"{_figures_line(figures)}  {uri}")
    name = f"  ensemble of {len(members)}" if len(members) > 1 else ""
    print(f"{_figures_line(metrics.scalars(), interval)}{name}  on {len(clips):,} clips of {', '.join(args.split)}")
    if args.per_class:
        print(per_class_table(per_class_csv(dataset.labels, metrics, None, class_counts(clips, len(dataset.labels)))))
    if scores_uri:
        write_score_table(scores_uri, clips.clip_id, dataset.labels, mean_scores)
    if json_uri:
        names = [without_secrets(uri) for uri in checkpoints]
        value: dict[str, Any] = {"checkpoints": names} | finite_or_null(metrics.scalars())
        value["map_interval"] = interval if interval is not None and np.isfinite(interval).all() else None
        value["members"] = [
            {"checkpoint": uri} | finite_or_null(figures) for uri, figures in zip(names, of_members, strict=True)
        ]
        storage.write_json(json_uri, value)
    return 0


def score_clips(
    members: Sequence[ensemble.Member], dataset: PreparedDataset, clips: Clips, args: argparse.Namespace
) -> list[np.ndarray]:
    """Scores `[clips, classes]` of each member, computed on Ray as the options of a job say."""
    with ray_session(args.address, args.num_cpus):
        use_gpu = _use_gpu(args)
        device, threads = args.device if use_gpu else "cpu", _threads(args, len(members))
        return ensemble.scores(members, dataset, clips, device=device, use_gpu=use_gpu, threads=threads)


def _use_gpu(args: argparse.Namespace) -> bool:
    has_gpu = ray.cluster_resources().get("GPU", 0) >= 1
    if args.device == "cuda" and not has_gpu:
        if args.address == "local":
            raise ConfigError("--device cuda needs a GPU, this machine has none; use cpu")
        print("--device cuda needs a GPU, the cluster has none now; scoring begins when it has one", flush=True)
    return args.device == "cuda" or (args.device == "auto" and has_gpu)


def _threads(args: argparse.Namespace, num_checkpoints: int) -> int:
    """Threads per checkpoint: an equal share of this machine; one on a cluster, where other jobs may use the rest."""
    num_cpus = ray.cluster_resources().get("CPU", 1) if args.address == "local" else 1
    return max(1, int(num_cpus) // num_checkpoints)


def _figures_line(figures: dict[str, float], interval: tuple[float, float] | None = None) -> str:
    """The figures as one line: `map 0.4590 [0.4512, 0.4668]  mauc 0.9755  …`"""
    words = {name: f"{name} {value:.4f}" for name, value in figures.items()}
    if interval is not None:
        words["map"] += f" [{interval[0]:.4f}, {interval[1]:.4f}]"
    return "  ".join(words.values())


if __name__ == "__main__":
    run(main)
