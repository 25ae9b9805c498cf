"""Add labels that a teacher hears and AudioSet's ontology relates to a clip's labels, as PSLA does.

    python jobs/evaluate.py --checkpoint teacher --data data --split balanced_train --scores scores.parquet
    python jobs/enhance_labels.py --data data --split balanced_train --scores scores.parquet \\
        --ontology ontology.json --output data-enhanced
    python jobs/train.py --data data-enhanced …

The output is a small data set with new labels, which reads the clips from the shards of the first one. Keep both.
"""

if __name__ == "__main__":  # before the imports that follow, which take seconds
    from jobs import entry

    entry.begin()

import argparse
from collections.abc import Sequence

from ast_core.errors import ConfigError
from ast_core.label_enhancement import class_thresholds, enhanced, related_classes
from jobs.common import JobParser, output_uri, run
from pipeline import relabel, storage
from pipeline.dataset import PreparedDataset


def parser() -> argparse.ArgumentParser:
    parser = JobParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="URI", help="a prepared data set")
    parser.add_argument("--split", required=True, help="the split whose labels are enhanced; others are taken over")
    parser.add_argument(
        "--scores", required=True, metavar="FILE", help="the teacher's scores of this split, from evaluate.py --scores"
    )
    parser.add_argument(
        "--ontology", required=True, metavar="FILE", help="ontology.json of https://github.com/audioset/ontology"
    )
    parser.add_argument(
        "--threshold",
        default="mean",
        metavar="mean|P",
        help="a class is added above the mean, or the P-th percentile, of its scores over the clips that have it "
        "(default mean)",
    )
    parser.add_argument("--output", required=True, metavar="URI", help="a new folder for the data set with new labels")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    percentile = _percentile(args.threshold)
    from pipeline.train.evaluation.score_table import check_suffix, read_score_table  # imports PyTorch

    check_suffix(args.scores, "--scores")
    output = output_uri(args.output)
    relabel.check_output(output)
    data = PreparedDataset.open(args.data)
    index = data.index(args.split)
    related = related_classes(storage.read_json(args.ontology), data.labels)
    scores = read_score_table(args.scores, index["clip_id"], data.labels)
    target = relabel.target_of(index["labels"].combine_chunks(), len(data.labels))
    new = enhanced(target, scores, related, class_thresholds(target, scores, percentile))
    num_before, num_added = int(target.sum()), int(new.sum() - target.sum())
    about = {"enhanced_above": args.threshold, "added": num_added}
    relabel.write_view(data, output, args.split, relabel.labels_of(new), about)
    num_clips = int((new != target).any(axis=1).sum())
    print(f"{args.split}: {num_added:,} labels added to {num_before:,}, in {num_clips:,} of {len(new):,} clips")
    print(f"data set: {output}")
    return 0


def _percentile(threshold: str) -> float | None:
    """None for the mean."""
    if threshold == "mean":
        return None
    try:
        percentile = float(threshold)
    except ValueError:
        percentile = -1.0
    if not 0 <= percentile <= 100:
        raise ConfigError(f"--threshold is {threshold}; use mean, or a percentile from 0 to 100")
    return percentile


if __name__ == "__main__":
    run(main)
