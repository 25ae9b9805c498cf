"""Evaluate a checkpoint, or the ensemble of several, on a split of a prepared data set.

    python jobs/evaluate.py --checkpoint runs/1/averaged --data data --split eval
    python jobs/evaluate.py --checkpoint runs/1 runs/2 runs/3 --data data --split eval

A checkpoint is a folder with model.safetensors and config.json, or a run, whose best model is taken.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import torch

from ast_core.checkpoints import CONFIG_FILE, WEIGHTS_FILE
from ast_core.errors import DataError
from ast_core.step import set_attention
from jobs.common import add_ray_options, output_uri, ray_session, run_job
from pipeline import storage
from pipeline.dataset import Clips, PreparedDataset
from pipeline.train import models
from pipeline.train.evaluation import class_counts, evaluate, score_metrics
from pipeline.train.report import finite_or_null, per_class_csv, per_class_table


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", required=True, nargs="+", metavar="C", help="several are averaged in their scores"
    )
    parser.add_argument("--data", required=True, metavar="URI", help="a prepared data set")
    parser.add_argument("--split", required=True, nargs="+", metavar="SPLIT")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--per-class", action="store_true", help="print the classes, best first")
    parser.add_argument("--json", metavar="FILE", help="write the figures here too")
    add_ray_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    dataset = PreparedDataset.open(args.data)
    clips = dataset.clips(args.split)
    checkpoints = [_model_folder(uri) for uri in args.checkpoint]
    for uri in checkpoints:
        labels = models.load_config(uri).labels
        if labels != dataset.labels:
            raise DataError(f"{uri} was trained for other labels ({len(labels)} classes) than {dataset.uri} has")
    with ray_session(args.address, args.num_cpus):
        use_gpu = args.device == "cuda" or (args.device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)
        score = ray.remote(num_cpus=1, num_gpus=int(use_gpu))(_score)
        scores = np.mean(ray.get([score.remote(uri, dataset, clips) for uri in checkpoints]), axis=0)
    metrics = score_metrics(scores, clips)
    figures = metrics.scalars()
    print(
        "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        + f"  on {len(clips):,} clips of {', '.join(args.split)}"
    )
    if args.per_class:
        none = [0] * len(dataset.labels)
        print(per_class_table(per_class_csv(dataset.labels, metrics, none, class_counts(clips, len(dataset.labels)))))
    if args.json:
        _write_json(output_uri(args.json, "--json"), checkpoints, figures)
    return 0


def _model_folder(uri: str) -> str:
    for folder in (uri, storage.join(uri, "best")):
        if models.exists(folder):
            return storage.absolute(folder)
    raise DataError(f"{uri} is neither a model folder ({WEIGHTS_FILE}, {CONFIG_FILE}) nor a run with a best model")


def _score(uri: str, dataset: PreparedDataset, clips: Clips) -> np.ndarray:
    """Scores `[clips, C]` of one checkpoint."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, config = models.load(uri)
    set_attention(model, device, config.recipe)
    scores = evaluate(
        model.to(device), clips, recipe=config.recipe, norm=config.norm, num_classes=len(dataset.labels), device=device
    )
    assert scores is not None  # a single process is rank 0
    return scores


def _write_json(uri: str, checkpoints: Sequence[str], figures: dict[str, float]) -> None:
    value: dict[str, Any] = {"checkpoints": list(checkpoints)} | finite_or_null(figures)
    storage.write_json(uri, value)


if __name__ == "__main__":
    sys.exit(run_job(main))
