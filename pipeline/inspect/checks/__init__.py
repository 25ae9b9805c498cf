"""The doctor's checks: they compare a prepared data set with the paper's data and say what each difference costs.

Each check is a pure function from `DatasetSummary` to findings, and each file has one family of checks. `CHECKS` lists
all of them. Thresholds are constants with their reasons.
"""

from collections.abc import Mapping

from pipeline.dataset import PreparedDataset
from pipeline.embeddings.stored import StoredEmbeddings
from pipeline.inspect.checks.check import Check
from pipeline.inspect.checks.consistency import (
    check_failures,
    check_features,
    check_index,
    check_vocabulary,
    check_weights,
)
from pipeline.inspect.checks.near_duplicates import check_near_duplicates
from pipeline.inspect.checks.norm import check_norm
from pipeline.inspect.checks.official_lists import check_clips, check_labels, check_marginals
from pipeline.inspect.checks.repeats import check_duplicates, check_leakage
from pipeline.inspect.checks.sound import check_clipping, check_durations, check_silence, check_values
from pipeline.inspect.dataset_summary import DatasetSummary, summarize
from pipeline.inspect.findings import WORST_FIRST, Finding

CHECKS: tuple[Check, ...] = (
    check_vocabulary,
    check_features,
    check_index,
    check_weights,
    check_values,
    check_leakage,
    check_clips,
    check_labels,
    check_marginals,
    check_durations,
    check_failures,
    check_norm,
    check_silence,
    check_clipping,
    check_duplicates,
    check_near_duplicates,
)


def examine(
    data: PreparedDataset,
    official: Mapping[str, str] | None = None,
    embeddings: StoredEmbeddings | None = None,
) -> list[Finding]:
    """All findings, worst first.

    Args:
        official: Path or URL of the official segment list, by split, for splits without an official name.
        embeddings: Of the clips of all splits, for the search for near-duplicates.

    Raises:
        DataError: `official` names a split that does not exist, a file is missing or damaged, or a clip has no
            embedding.
    """
    return examine_summary(summarize(data, official, embeddings=embeddings))


def examine_summary(summary: DatasetSummary) -> list[Finding]:
    findings = [found for check in CHECKS for found in check(summary)]
    return sorted(findings, key=lambda found: WORST_FIRST.index(found.severity))
