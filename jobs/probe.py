"""How well do a model's embeddings separate classes? A linear probe and nearest neighbours on stored embeddings.

    python jobs/tag.py --checkpoint runs/1 --input data --output tags --embeddings clip
    python jobs/probe.py --embeddings tags --labels data --train-splits train --eval-splits eval
    python jobs/probe.py --embeddings tags --labels mine.csv --train-splits train --eval-splits test --json probe.json

The labels are those of a prepared data set, or of a manifest whose recordings were tagged. They may be other classes
than the model's. Both probes are scikit-learn's; the model does not change. The embedding of a recording with several
windows is their mean. The job does not use Ray.
"""

if __name__ == "__main__":  # before the imports that follow, which take seconds
    from jobs import entry

    entry.begin()

import argparse
from collections.abc import Sequence

from ast_core.errors import ConfigError
from jobs.common import JobParser, check_numbers, output_file, run, status_of_printed
from pipeline import storage
from pipeline.redaction import without_secrets

MAX_RESAMPLES = 100_000


def parser() -> argparse.ArgumentParser:
    parser = JobParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embeddings", required=True, metavar="URI", help="a folder of tags with embeddings")
    parser.add_argument(
        "--labels",
        required=True,
        metavar="URI",
        help="a prepared data set, or a .csv, .tsv or .parquet list with path or url, labels, split",
    )
    parser.add_argument("--train-splits", required=True, nargs="+", metavar="SPLIT", help="splits to train probes on")
    parser.add_argument("--eval-splits", required=True, nargs="+", metavar="SPLIT", help="splits to score")
    parser.add_argument("--neighbours", type=int, default=20, metavar="K", help="nearest neighbours (default 20)")
    parser.add_argument(
        "--bootstrap",
        type=int,
        default=1000,
        metavar="N",
        help="bootstrap resamples for the 95 %% intervals (default 1000; 0 is off)",
    )
    parser.add_argument("--per-class", action="store_true", help="print the AP and AUC of each class")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    check_numbers(args, neighbours=100_000)
    if not 0 <= args.bootstrap <= MAX_RESAMPLES:
        raise ConfigError(f"--bootstrap is {args.bootstrap}; use 0 (off) to {MAX_RESAMPLES:,}")
    if both := sorted({*args.train_splits} & {*args.eval_splits}):
        raise ConfigError(
            f"{both[0]} is in --train-splits and in --eval-splits; a probe is scored on clips it has not seen"
        )
    json_uri = None if args.json is None else output_file(args.json, "--json")
    from pipeline.embeddings import probe
    from pipeline.embeddings.labels import Labels, readable
    from pipeline.embeddings.stored import StoredEmbeddings

    embeddings, labels = StoredEmbeddings.open(args.embeddings), Labels.open(args.labels)
    train, evaluation = (readable(labels.of(splits), embeddings) for splits in (args.train_splits, args.eval_splits))
    probed = probe.probe(embeddings, train, evaluation, neighbours=args.neighbours, num_resamples=args.bootstrap)
    for one in probed:
        print(one.line())
        if args.per_class:
            print(probe.per_class_table(one, labels.vocabulary, evaluation))
    if json_uri:
        storage.write_json(
            json_uri,
            {
                "embeddings": without_secrets(embeddings.uri),
                "model_sha256": embeddings.model_sha256,
                "labels": without_secrets(labels.uri),
                "train_splits": args.train_splits,
                "eval_splits": args.eval_splits,
                "train_recordings": len(train.recordings),
                "eval_recordings": len(evaluation.recordings),
                "probes": [one.to_dict() for one in probed],
            },
        )
    return status_of_printed()


if __name__ == "__main__":
    run(main)
