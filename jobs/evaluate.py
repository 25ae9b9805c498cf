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
from functools import partial

from ast_core.errors import ConfigError
from jobs.common import JobParser, add_ray_options, output_file, run, status_of_printed
from pipeline import storage

MAX_RESAMPLES = 100_000
"""Upper bound of --bootstrap: a hundred times the usual number. A larger number is probably a typing error."""


def parser() -> argparse.ArgumentParser:
    parser = JobParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    json_uri = None if args.json is None else output_file(args.json, "--json")
    scores_uri = None if args.scores is None else output_file(args.scores, "--scores")
    from jobs.ray_session import ray_session  # PyTorch and Ray, which `--help` does not need
    from pipeline.train.evaluation.checkpoint_evaluation import Place, evaluate_checkpoints
    from pipeline.train.evaluation.score_table import check_suffix, write_score_table

    if scores_uri:
        check_suffix(scores_uri, "--scores")
    place = Place(args.device, args.address, partial(ray_session, args.address, args.num_cpus))
    found = evaluate_checkpoints(args.checkpoint, args.data, args.split, place, num_resamples=args.bootstrap)
    print(*found.lines(per_class=args.per_class), sep="\n")
    if scores_uri:
        write_score_table(scores_uri, found.clips.clip_id, found.labels, found.scores_NC)
    if json_uri:
        storage.write_json(json_uri, found.to_dict())
    return status_of_printed()


if __name__ == "__main__":
    run(main)
