"""Splits that folders and archives are called by: `train/a.flac`, `pets_valid-001.tar`, `bal_train/0.parquet`."""

import re
from collections.abc import Sequence
from functools import lru_cache

from pipeline.prepare.sources.rows import USUAL_SPLITS

_SPLIT = "|".join(sorted(USUAL_SPLITS, key=len, reverse=True))
_IN_A_NAME = re.compile(rf"(?:^|[-_.])({_SPLIT})(?:set)?(?=[-_.0-9]|$)", re.IGNORECASE)
_FOLD = re.compile(r"fold[-_ ]?\d+", re.IGNORECASE)


@lru_cache(maxsize=1 << 12)
def split_in(name: str) -> str | None:
    """The only split that a name has between its signs, also as `testset`; None if it has none or several."""
    found = {match[1].lower(): match[1] for match in _IN_A_NAME.finditer(name)}
    return next(iter(found.values())) if len(found) == 1 else None


def split_or_fold_of(path: str) -> str | None:
    """The split or fold that the nearest folder of a file is called by."""
    folders = path.replace("\\", "/").split("/")[:-1]
    return next(filter(None, map(_split_or_fold_in, reversed(folders))), None)


@lru_cache(maxsize=1 << 12)
def _split_or_fold_in(name: str) -> str | None:
    return split_in(name) or (name if _FOLD.fullmatch(name) else None)


def splits_of(paths: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """The split of each path, which is given by its names from the outermost folder on.

    A path has no split if none of its names has one. If names of one path have different splits, one of them may be
    that of a class: `test/train_horn/1.wav`. Then the splits are those of the folders at one depth, at which each path
    with a split has one; of several such depths, the deepest at which paths differ. If a folder there has nothing but
    folders of other splits (`dev/train`, `dev/val`), the deepest names count. If there is no such depth, such a path
    has several splits.
    """
    found = [{depth: split for depth, name in enumerate(path) if (split := split_in(name))} for path in paths]
    of_paths = [tuple({_kind(split): split for split in splits.values()}.values()) for splits in found]
    if all(len(splits) < 2 for splits in of_paths):
        return of_paths
    with_split = [splits for splits in found if splits]
    depths = set.intersection(*map(set, with_split))
    if len(depths) > 1:
        depths = {depth for depth in depths if len({_kind(splits[depth]) for splits in with_split}) > 1}
    if not depths:
        return of_paths
    depth = max(depths)
    if _is_of_splits(with_split, depth):
        return [(splits[max(splits)],) if splits else () for splits in found]
    return [(splits[depth],) if splits else () for splits in found]


def _is_of_splits(with_split: Sequence[dict[int, str]], depth: int) -> bool:
    """Whether a folder at this depth has nothing but folders of several splits, as `dev` has `dev/train`, `dev/val`."""
    below: dict[str, set[str]] = {}
    for splits in with_split:
        below.setdefault(_kind(splits[depth]), set()).add(_kind(splits[max(splits)]) if max(splits) > depth else "")
    return any(len(kinds) > 1 and "" not in kinds for kinds in below.values())


def _kind(split: str) -> str:
    """The same for `train` and `Training`, `val` and `validation`."""
    return split[:3].lower()
