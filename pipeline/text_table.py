"""Tables for a terminal."""

from collections.abc import Iterable, Sequence

from tabulate import tabulate


def text_table(columns: Sequence[str], rows: Iterable[Sequence[str]], align: str) -> str:
    """Aligned lines, the first with the names of the columns. `align` has an `l` or `r` for each column.

    Cells are shown as they are: a class may be called `1e5`.
    """
    sides = [{"l": "left", "r": "right"}[side] for side in align]
    return tabulate(list(rows), columns, tablefmt="plain", disable_numparse=True, colalign=sides)
