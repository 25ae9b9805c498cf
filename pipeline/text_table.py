"""Tables and durations for people."""

from collections.abc import Iterable, Sequence

from tabulate import tabulate


def text_table(columns: Sequence[str], rows: Iterable[Sequence[str]], align: str) -> str:
    """Aligned lines, the first with the names of the columns. `align` has an `l` or `r` for each column.

    Cells are shown as they are: a class may be called `1e5`.
    """
    sides = [{"l": "left", "r": "right"}[side] for side in align]
    return tabulate(list(rows), columns, tablefmt="plain", disable_numparse=True, colalign=sides)


def duration(seconds: float) -> str:
    """A duration in its two largest units: `40 s`, `12 min 30 s`, `3 h 20 min`, `290 d 2 h`."""
    units = (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1))
    parts: list[str] = []
    left = round(seconds)
    for name, size in units:
        if left >= size or parts or size == 1:
            parts.append(f"{left // size} {name}")
            left %= size
    return " ".join(part for part in parts[:2] if len(parts) == 1 or not part.startswith("0 "))
