"""Lines for the user on columns of a list that are not read, and that may be meant as others."""

import difflib
from collections.abc import Sequence

from ast_core.text_files import UNNAMED
from pipeline.prepare.sources.checks import show

_MEANT = {
    "split": ("subset", "set", "partition", "fold", "phase"),
    "start_s": ("start_time", "onset", "begin", "begin_time", "from"),
    "end_s": ("end_time", "offset", "stop", "to", "duration", "duration_s"),
}
"""What other lists call these columns."""


def unread_column_lines(
    uri: str, names: Sequence[str], read: Sequence[str], *, all_others: bool = True, what: str = "column"
) -> list[str]:
    """A line for each column that is probably one of `read` under another name, and one that names all others.

    Args:
        names: of the list's columns, in lower case.
        what: what the list calls them.
        all_others: whether to name the columns that have nothing to do with `read`.
    """
    lines, others = [], []
    for name in names:
        if not name or name in read or UNNAMED.fullmatch(name):
            continue
        # `offset` is the start beside a duration (NeMo, lhotse), and the end beside an onset (DESED).
        is_start = name == "offset" and not {"duration", "duration_s"}.isdisjoint(names)
        near = [column for column, called in _MEANT.items() if name in called and column in read]
        near = ["start_s"] if is_start and "start_s" in read else near
        near = near or difflib.get_close_matches(name, read, n=1, cutoff=0.7)
        if near and near[0] not in names:
            how = f"give {near[0]} in seconds" if near[0] in ("start_s", "end_s") else "rename it"
            lines.append(f"the {what} {show(name)} of {uri} is not read; if {near[0]} is meant, {how}")
        else:
            others.append(name)
    if others and all_others:
        lines.append(f"{what}s of {uri} that are not read: {show(', '.join(others))}")
    return lines
