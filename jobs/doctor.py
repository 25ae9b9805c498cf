"""Compare a prepared data set with the one that the paper used, and say what each difference costs.

    python jobs/doctor.py --data data
    python jobs/doctor.py --data data --embeddings tags-of-data
    python jobs/doctor.py --data s3://bucket/data --official mine=lists/mine_segments.csv --json findings.json --strict

Clips, labels, durations and label shares are compared with the official lists. The lists of balanced_train,
unbalanced_train and eval are read if a preparation has cached them on this machine; --official eval=eval fetches one.
Give other lists with --official. Nothing else is fetched. Norm, silence, duplicates, leakage, clipping, index and
sample weights are examined without a list. --embeddings finds copies of a recording in two splits too. The job does not
change the data set or start Ray, and reads an fbank only to confirm such copies.

Severities: serious (results will be wrong or far off), warning (fix it before a long run), unknown (could not be
compared), note (a difference that cannot be fixed), ok.
"""

if __name__ == "__main__":  # before the imports that follow, which take seconds
    from jobs import entry

    entry.begin()

import argparse
import shutil
from collections.abc import Sequence

from ast_core.errors import ConfigError
from jobs.common import JobParser, output_file, run, status_of_printed
from pipeline import storage
from pipeline.dataset import PreparedDataset
from pipeline.embeddings import nearest
from pipeline.embeddings.stored import StoredEmbeddings
from pipeline.inspect import findings as shown
from pipeline.inspect.checks import examine
from pipeline.redaction import without_secrets

EXIT_SERIOUS = 1


def parser() -> argparse.ArgumentParser:
    parser = JobParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="URI", help="a prepared data set")
    parser.add_argument(
        "--official",
        nargs="+",
        action="extend",
        default=[],
        metavar="SPLIT=LIST",
        help="segment list (path or URL) of a split, if the split's name does not say it or there is no network",
    )
    parser.add_argument(
        "--embeddings",
        metavar="TAGS",
        help="tags of this data set with embeddings (tag.py --embeddings): find copies of a recording in two splits",
    )
    parser.add_argument("--json", metavar="FILE", help="also write all findings and the table by class to this file")
    parser.add_argument(
        "--strict", action="store_true", help=f"exit status {EXIT_SERIOUS} if a finding is serious (else 0)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    official = _official(args.official)
    json_uri = None if args.json is None else output_file(args.json, "--json")
    data = PreparedDataset.open(args.data)
    embeddings = None
    if args.embeddings:
        nearest.check_installed()
        embeddings = StoredEmbeddings.open(args.embeddings)
    findings = examine(data, official, embeddings)
    if json_uri:
        storage.write_json(json_uri, shown.as_json(without_secrets(data.uri), findings))
    print(shown.table(findings, width=shutil.get_terminal_size((110, 24)).columns))
    serious = any(finding.severity == "serious" for finding in findings)
    return EXIT_SERIOUS if args.strict and serious else status_of_printed()


def _official(given: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=")[::2] for text in given]
    for text, (split, uri) in zip(given, pairs, strict=True):
        if not split or not uri:
            raise ConfigError(f"--official {text} is not SPLIT=LIST, as in eval=eval_segments.csv")
    if len(dict(pairs)) < len(pairs):
        raise ConfigError("--official gives a split two lists; give one list per split")
    return dict(pairs)


if __name__ == "__main__":
    run(main)
