"""What the doctor finds, and how it is shown: a table for people, JSON for programs."""

import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Severity = Literal["serious", "warning", "unknown", "note", "ok"]
WORST_FIRST: tuple[Severity, ...] = ("serious", "warning", "unknown", "note", "ok")


@dataclass(frozen=True)
class Finding:
    check: str
    split: str
    """Two splits are joined by ` + `; empty for the whole data set."""
    severity: Severity
    what: str
    """One line, with the figures."""
    cost: str = ""
    """What it means for a training run, with the published evidence; empty if all is well."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """For programs."""


def worse(one: Severity, two: Severity) -> Severity:
    return min(one, two, key=WORST_FIRST.index)


def table(findings: Sequence[Finding], *, width: int = 110) -> str:
    """Severity, check, split and what of each; then the cost of each that is not ok; then one line in all.

    What is said of several splits, or by several checks, has one line, and what costs the same one text.
    """
    splits_of: dict[tuple[str, str, str], list[str]] = {}
    about: dict[tuple[str, str], list[Finding]] = {}
    for found in findings:
        splits_of.setdefault((found.severity, found.check, found.what), []).append(found.split)
        if found.severity != "ok":
            about.setdefault((found.severity, found.cost), []).append(found)
    checks_of: dict[tuple[str, str, str], list[str]] = {}
    for (severity, check, what), splits in splits_of.items():
        checks_of.setdefault((severity, _named(splits), what), []).append(check)
    rows = [("severity", "check", "split", "what")]
    rows += [
        (severity, ", ".join(checks), splits or "all", what) for (severity, splits, what), checks in checks_of.items()
    ]
    columns = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:3]]
    lines = []
    for *cells, what in rows:
        left = "".join(f"{cell:{size}}  " for cell, size in zip(cells, columns, strict=True))
        lines += _wrapped(what, max(width, len(left) + 40), left, " " * len(left))
    for (severity, cost), same in about.items():
        of = _named([f.split for f in same])
        lines += ["", f"{severity}: {_named([f.check for f in same])}" + (f" of {of}" if of else "")]
        lines += _wrapped(cost, width, "    ", "    ")
    return "\n".join([*lines, "", summary(findings)])


def _named(names: Sequence[str]) -> str:
    first, *others = dict.fromkeys(names)
    return ", ".join([first, *others]) if len(others) < 3 else f"{first} and {len(others)} others"


def _wrapped(text: str, width: int, first: str, rest: str) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def summary(findings: Sequence[Finding]) -> str:
    counts = Counter(found.severity for found in findings)
    return f"{len(findings)} findings: " + ", ".join(f"{counts[s]} {s}" for s in WORST_FIRST if counts[s])


def as_json(uri: str, findings: Sequence[Finding]) -> dict[str, Any]:
    """Everything, the tables by class included, in types that JSON has."""
    counts = Counter(found.severity for found in findings)
    return {
        "data": uri,
        "counts": {severity: counts[severity] for severity in WORST_FIRST},
        "findings": [_plain(vars(found)) for found in findings],
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | np.ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
