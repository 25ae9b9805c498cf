"""Find sounds by example: the stored windows whose embeddings are nearest to those of a recording, or of a class.

    python jobs/tag.py --checkpoint runs/1 --input s3://bucket/field --output tags --embeddings
    python jobs/search.py --embeddings tags --like owl.wav
    python jobs/search.py --embeddings tags --like-class owl --labels data --examples tags-of-data --output owls.csv

The example is embedded by the model with which the recordings were tagged; if it is one of them, its stored embeddings
are taken. The example of a class is the mean direction of the recordings that have it. The search is exact, by FAISS
(pip install -e '.[search]'), and reads the embeddings part by part. The job does not use Ray.
"""

if __name__ == "__main__":  # before the imports that follow, which take seconds
    from jobs import entry

    entry.begin()

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ast_core.errors import ConfigError, DataError
from jobs.common import JobParser, check_numbers, output_file, run, status_of_printed

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from pipeline.embeddings.stored import StoredEmbeddings


def parser() -> argparse.ArgumentParser:
    parser = JobParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embeddings", required=True, metavar="URI", help="a folder of tags with embeddings")
    like = parser.add_mutually_exclusive_group(required=True)
    like.add_argument(
        "--like",
        nargs="+",
        metavar="PATH",
        help="recordings, as --input of tag.py; a list with start_s and end_s names sections",
    )
    like.add_argument("--like-class", metavar="NAME", help="a class of --labels: its display name or MID")
    parser.add_argument(
        "--labels", metavar="URI", help="for --like-class: a prepared data set, or a list with path or url, and labels"
    )
    parser.add_argument("--split", nargs="+", metavar="SPLIT", help="splits of --labels (default: all)")
    parser.add_argument(
        "--examples", metavar="URI", help="tags with the embeddings of --labels (default: those of --embeddings)"
    )
    parser.add_argument(
        "--checkpoint", metavar="C", help="the model, if it is no longer where it was when the recordings were tagged"
    )
    parser.add_argument("--most", type=int, default=20, metavar="N", help="windows to find (default 20)")
    parser.add_argument("--output", metavar="FILE", help="write the result to this .csv or .parquet file")
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda if there is a GPU"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    check_numbers(args, most=1_000_000)
    if (args.like_class is None) != (args.labels is None):
        raise ConfigError("give --like-class and --labels together, or neither of them")
    output = None if args.output is None else output_file(args.output, "--output")
    from pipeline.embeddings import nearest, search
    from pipeline.embeddings.stored import StoredEmbeddings

    nearest.check_installed()
    if output is not None:
        search.check_suffix(output, "--output")
    embeddings = StoredEmbeddings.open(args.embeddings)
    queries, without = _example_of_class(args, embeddings) if args.labels else _recordings(args, embeddings)
    found = search.nearest_windows(embeddings, queries, most=args.most, without=without)
    print(search.found_text(found))
    if output is not None:
        search.write_found(output, found)
        print(f"wrote {output}")
    return status_of_printed()


def _example_of_class(args: argparse.Namespace, embeddings: "StoredEmbeddings") -> "tuple[np.ndarray, pa.Array]":
    from pipeline.embeddings.labels import Labels
    from pipeline.embeddings.search import centre_of_class
    from pipeline.embeddings.stored import StoredEmbeddings

    labels = Labels.open(args.labels)
    index = labels.vocabulary.index_of.get(args.like_class)
    if index is None:
        raise ConfigError(f"--like-class {args.like_class} is not a class of {args.labels}")
    examples = embeddings if args.examples is None else StoredEmbeddings.open(args.examples)
    if examples.model_sha256 != embeddings.model_sha256:
        raise DataError(
            f"{examples.uri} and {embeddings.uri} have embeddings of different models; tag with one of them"
        )
    return centre_of_class(examples, labels.of(args.split or labels.splits), index)


def _recordings(args: argparse.Namespace, embeddings: "StoredEmbeddings") -> "tuple[np.ndarray, pa.Array]":
    from pipeline.tag.example import embedded

    return embedded(args.like, embeddings, args.checkpoint, args.device)


if __name__ == "__main__":
    run(main)
