"""Evaluate a checkpoint, or the ensemble of several, on a split of a prepared data set.

    python jobs/evaluate.py --checkpoint runs/1/averaged --data data --split eval
    python jobs/evaluate.py --checkpoint runs/1 runs/2 runs/3 --data data --split eval
    python jobs/evaluate.py --checkpoint audioset_10_10_0.4593.pth --data data --split eval
    python jobs/evaluate.py --checkpoint runs/1 --data data --split eval --scores scores.csv

A checkpoint is a run (its best model is used), a model folder, a Hugging Face folder, or one of the published `.pth`
files; `jobs/export.py` converts any other file of weights to a model folder. The members of an ensemble may differ in
shape. Their scores (sigmoids) are averaged.
"""

# This file is longer than other jobs because it also loads the members of an ensemble and compares their classes with
# those of the data set, which nothing else does.

if __name__ == "__main__":  # before the imports that follow, which take seconds
    from jobs import entry

    entry.begin()

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import torch

from ast_core.checkpoints import ModelConfig
from ast_core.errors import ConfigError, DataError
from ast_core.execution import for_device, set_attention
from ast_core.features import FeatureSettings
from ast_core.labels import LabelVocabulary
from ast_core.metrics import bootstrap_map
from ast_core.models.tagger import Tagger
from jobs.common import add_ray_options, output_uri, run
from jobs.ray_session import ray_session
from pipeline import storage
from pipeline.dataset import Clips, PreparedDataset
from pipeline.ray_errors import user_errors_from_tasks
from pipeline.redaction import without_secrets
from pipeline.train import models
from pipeline.train.data.feed import Targets
from pipeline.train.data_checks import length_lines
from pipeline.train.evaluation.score_table import check_suffix, write_score_table
from pipeline.train.evaluation.scoring import class_counts, evaluate, score_metrics
from pipeline.train.metrics_log import finite_or_null, per_class_csv, per_class_table
from pipeline.train.models import class_order

CLASSES_SHOWN = 5
"""Number of classes that an error message names."""

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
    loaded = [models.read(uri) for uri in checkpoints]
    columns = [_check(uri, config, dataset) for uri, (_, config) in zip(checkpoints, loaded, strict=True)]
    for line in _length_lines(clips, [config for _, config in loaded], dataset.features):
        print(line, flush=True)
    with ray_session(args.address, args.num_cpus):
        use_gpu = _use_gpu(args)
        device = args.device if use_gpu else "cpu"
        threads = _threads(args, len(loaded))
        score = ray.remote(num_cpus=threads, num_gpus=int(use_gpu))(_score)
        with user_errors_from_tasks():
            found = ray.get([score.remote(model, config, dataset, clips, device, threads) for model, config in loaded])
    scores = [member[:, order] for member, order in zip(found, columns, strict=True)]
    members = [score_metrics(member, clips).scalars() for member in scores]
    ensemble = np.mean(scores, axis=0)
    metrics = score_metrics(ensemble, clips)
    interval = None
    if args.bootstrap:
        target = Targets(clips, len(dataset.labels))(np.arange(len(clips)))
        interval = bootstrap_map(ensemble, target, num_resamples=args.bootstrap)
    if len(members) > 1:
        for uri, figures in zip(checkpoints, members, strict=True):
            print(f"{_figures_line(figures)}  {uri}")
    name = f"  ensemble of {len(members)}" if len(members) > 1 else ""
    print(f"{_figures_line(metrics.scalars(), interval)}{name}  on {len(clips):,} clips of {', '.join(args.split)}")
    if args.per_class:
        print(per_class_table(per_class_csv(dataset.labels, metrics, None, class_counts(clips, len(dataset.labels)))))
    if scores_uri:
        write_score_table(scores_uri, clips.clip_id, dataset.labels, ensemble)
    if json_uri:
        names = [without_secrets(uri) for uri in checkpoints]
        value: dict[str, Any] = {"checkpoints": names} | finite_or_null(metrics.scalars())
        value["map_interval"] = interval if interval is not None and np.isfinite(interval).all() else None
        value["members"] = [
            {"checkpoint": uri} | finite_or_null(figures) for uri, figures in zip(names, members, strict=True)
        ]
        storage.write_json(json_uri, value)
    return 0


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


def _check(uri: str, config: ModelConfig, dataset: PreparedDataset) -> list[int]:
    """The column of each class of the data set in the checkpoint's scores. Raises DataError if they do not fit."""
    if other := dataset.features.differences(config.features):
        raise DataError(
            f"{uri} was trained on other features than {dataset.uri} has: {other}; prepare the data again with "
            f"--features {config.features.option}"
        )
    order = class_order(config.labels, dataset.labels)
    if order is None:
        raise DataError(
            f"{uri} was trained for other labels ({len(config.labels)} classes) than {dataset.uri} has "
            f"({len(dataset.labels)}): {differing(config.labels, dataset.labels)}"
        )
    return order


def differing(of_model: LabelVocabulary, of_data: LabelVocabulary) -> str:
    """One line that names some of the classes that only one of two vocabularies has."""
    parts = []
    for who, ours, theirs in (("only the model has", of_model, of_data), ("only the data has", of_data, of_model)):
        known = {*theirs.mids, *theirs.names}
        missing = [
            name for mid, name in zip(ours.mids, ours.names, strict=True) if mid not in known and name not in known
        ]
        if missing:
            more = f" and {len(missing) - CLASSES_SHOWN:,} more" if len(missing) > CLASSES_SHOWN else ""
            parts.append(f"{who} {', '.join(map(repr, missing[:CLASSES_SHOWN]))}{more}")
    return "; ".join(parts) or "several classes have the same name"


def _length_lines(clips: Clips, configs: Sequence[ModelConfig], features: FeatureSettings) -> list[str]:
    """Lines about the share of the clips that is cut off, one for each input length of the models."""
    lengths = sorted({config.recipe.input_tdim for config in configs})
    return [line for frames in lengths for line in length_lines(clips.num_frames, frames, "evaluation", features)]


def _score(
    model: Tagger, config: ModelConfig, dataset: PreparedDataset, clips: Clips, wanted: str, threads: int
) -> np.ndarray:
    """Scores `[clips, C]` of one checkpoint, with the classes in its own order."""
    torch.set_num_threads(threads)
    # Ray does not hide GPUs from a task that reserved none, so `wanted` decides.
    use_gpu = wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if use_gpu else "cpu")
    recipe = for_device(config.recipe, device, trains=False)
    set_attention(model, device, recipe)
    scores = evaluate(
        model.to(device), clips, recipe=recipe, norm=config.norm, num_classes=len(dataset.labels), device=device
    )
    assert scores is not None  # a single process is rank 0
    return scores


def _figures_line(figures: dict[str, float], interval: tuple[float, float] | None = None) -> str:
    """The figures as one line: `map 0.4590 [0.4512, 0.4668]  mauc 0.9755  …`"""
    words = {name: f"{name} {value:.4f}" for name, value in figures.items()}
    if interval is not None:
        words["map"] += f" [{interval[0]:.4f}, {interval[1]:.4f}]"
    return "  ".join(words.values())


if __name__ == "__main__":
    run(main)
