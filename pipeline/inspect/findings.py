"""Findings of the doctor, and their output as a table or as JSON."""

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
    """The split; two splits are joined by ` + `; empty for the whole data set."""
    severity: Severity
    what: str
    """One line, with the figures."""
    cost: str = ""
    """The effect on a training run, with published evidence; empty if the severity is `ok`."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """The figures for programs; they are in the JSON output."""


def worse(one: Severity, two: Severity) -> Severity:
    return min(one, two, key=WORST_FIRST.index)


def table(findings: Sequence[Finding], *, width: int = 110) -> str:
    """The findings as text: a table, then the costs of those that are not `ok`, then a summary line.

    Findings with the same text for several splits or checks are one line; equal costs are one paragraph.
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
        named_splits = _named([f.split for f in same])
        lines += [
            "",
            f"{severity}: {_named([f.check for f in same])}" + (f" of {named_splits}" if named_splits else ""),
        ]
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
    """All findings with their figures, in types that JSON has."""
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
