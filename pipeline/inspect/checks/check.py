"""What the checks share: kinds of checks, thresholds that several use, and the parts of a finding."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any, Literal

import numpy as np

from pipeline.inspect import explanations
from pipeline.inspect.dataset_summary import DatasetSummary, OfficialList, SplitSummary
from pipeline.inspect.findings import Finding, Severity

Check = Callable[[DatasetSummary], Iterator[Finding]]
SplitCheck = Callable[[DatasetSummary, SplitSummary], Finding]
ListCheck = Callable[[DatasetSummary, SplitSummary, OfficialList], Finding]

MOST = 0.5
"""If more than half is missing, the cause is an unfinished run or the wrong folder, not videos lost on YouTube."""
A_FEW = 0.01
"""A hundredth of the clips: the difference between revisions of a list, and enough to make another run worthwhile."""


def for_each_split(check: SplitCheck) -> Check:
    """Decorator: run a check on each split that has clips. Other checks report splits without clips."""

    @wraps(check)
    def over_splits(summary: DatasetSummary) -> Iterator[Finding]:
        return (check(summary, split) for split in summary.splits if len(split.clips))

    return over_splits


def compared_with_list(name: str) -> Callable[[ListCheck], Check]:
    """Decorator for a check that needs the official list. If the list is not available, the finding is `unknown`."""

    def decorate(check: ListCheck) -> Check:
        @wraps(check)
        def over_splits(summary: DatasetSummary) -> Iterator[Finding]:
            for split in filter(lambda split: len(split.clips), summary.splits):
                if split.official:
                    yield check(summary, split, split.official)
                elif split.no_list:
                    yield Finding(name, split.name, "unknown", f"not compared: {split.no_list}", explanations.NO_LIST)

        return over_splits

    return decorate


def finding(
    check: str,
    split: SplitSummary | str,
    severity: Severity,
    what: list[str],
    costs: list[str],
    figures: Mapping[str, Any],
) -> Finding:
    """A finding without the empty parts of `what`, and without costs if its severity is `ok`."""
    name = split if isinstance(split, str) else split.name
    return Finding(
        check, name, severity, "; ".join(filter(None, what)), "" if severity == "ok" else " ".join(costs), figures
    )


def grade(value: float, *, note: float = math.inf, warning: float = math.inf, serious: float = math.inf) -> Severity:
    """The worst severity whose threshold `value` exceeds."""
    return "serious" if value > serious else "warning" if value > warning else "note" if value > note else "ok"


def percent(share: float) -> str:
    if 0 < share < 0.0001:
        return "under 0.01 %"
    return f"{100 * share:.{2 if share < 0.1 else 3}g} %"


def some(items: list[str], at_most: int) -> str:
    return ", ".join(items[:at_most]) + (", …" if len(items) > at_most else "")


def silent_clips(split: SplitSummary) -> np.ndarray:
    """`[clips]`: whether every frame is silent. All silent clips have equal audio, so they are no duplicates."""
    return split.column("num_silent_frames") == split.column("num_frames")


def role(split: str) -> Literal["train", "eval", "either"]:
    """The use of a split, by its name. Folds are used for both."""
    if "train" in split:
        return "train"
    return "eval" if re.search("eval|test|valid", split) else "either"
