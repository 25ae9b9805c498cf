"""Checks for clips that occur twice: within a split (duplicates) and across splits (leakage)."""

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.inspect import explanations
from pipeline.inspect.checks.check import A_FEW, finding, for_each_split, grade, role, silent_clips, some
from pipeline.inspect.dataset_summary import DatasetSummary, SplitSummary
from pipeline.inspect.findings import Finding, Severity
from pipeline.prepare.output.shards import label_text


@for_each_split
def check_duplicates(summary: DatasetSummary, split: SplitSummary) -> Finding:
    """Equal audio under several clip_ids of a split."""
    _, group, times = np.unique(split.column("fbank_hash"), return_inverse=True, return_counts=True)
    repeated = (times[group] > 1) & ~silent_clips(split)
    rows = split.clips.filter(pa.array(repeated))
    members: dict[int, list[tuple[str, str]]] = {}
    for number, *member in zip(group[repeated], rows["clip_id"].to_pylist(), label_text(rows).to_pylist(), strict=True):
        members.setdefault(number, []).append((member[0], member[1]))
    groups = [[clip_id for clip_id, _ in same] for same in members.values()]
    at_odds = sum(len({labels for _, labels in same}) > 1 for same in members.values())
    copies = sum(map(len, groups)) - len(groups)
    what = ["no audio has two clip_ids"]
    if copies:
        what = [f"{copies:,} clips have the audio of another one ({some([' = '.join(ids[:3]) for ids in groups], 2)})"]
        what += [f"{at_odds:,} of these groups have different labels"] if at_odds else []
    figures = {"copies": copies, "groups": groups, "groups_with_different_labels": at_odds}
    severity = grade(copies / len(split.clips), note=0.0, warning=A_FEW)
    return finding("duplicates", split, severity, what, [explanations.DUPLICATES], figures)


def check_leakage(summary: DatasetSummary) -> Iterator[Finding]:
    """Equal audio, clip_id or video in two splits."""
    none_shared = True
    for one, two in combinations(summary.splits, 2):
        shared = {
            "audio": (_sound_hashes(one), _sound_hashes(two)),
            "clip_id": (one.clips["clip_id"], two.clips["clip_id"]),
            "video": (_video_ids(one), _video_ids(two)),
        }
        found = {kind: (_is_in(first, second), _is_in(second, first)) for kind, (first, second) in shared.items()}
        in_one, in_two = (
            split.clips["clip_id"]
            .filter(pa.array(np.any([masks[side] for masks in found.values()], axis=0)))
            .to_pylist()
            for side, split in enumerate((one, two))
        )
        if not in_two:
            continue
        none_shared = False
        together = role(one.name) == role(two.name) != "either"
        what = [
            f"{len(in_two):,} clips of {two.name} are in {one.name} too ({some(in_two, 2)})",
            ", ".join(f"{masks[1].sum():,} by {kind}" for kind, masks in found.items()),
        ]
        figures = {f"by_{kind}": masks[1].sum() for kind, masks in found.items()}
        cost = explanations.COUNTED_TWICE if together else explanations.LEAKAGE
        figures |= {"clips": {one.name: in_one, two.name: in_two}}
        severity: Severity = "note" if together else "serious"
        yield finding("leakage", f"{one.name} + {two.name}", severity, what, [cost], figures)
    if none_shared:
        yield finding("leakage", "", "ok", ["no audio, clip_id or video is in two splits"], [], {})


def _sound_hashes(split: SplitSummary) -> pa.ChunkedArray:
    """The `fbank_hash` of each clip; null for a silent clip."""
    return pc.if_else(pa.array(silent_clips(split)), None, split.clips["fbank_hash"])


def _is_in(ids: pa.ChunkedArray, others: pa.ChunkedArray) -> np.ndarray:
    """Whether each id is in `others`. A null never is."""
    return pc.is_in(ids, value_set=others.combine_chunks().drop_null()).to_numpy()


def _video_ids(split: SplitSummary) -> pa.ChunkedArray:
    """The video id of each clip, from the official list if the shards have none."""
    if split.official is None:
        return split.clips["video_id"]
    row = pa.array(split.position, mask=split.position < 0)
    return pc.coalesce(split.clips["video_id"], split.official.clips["video_id"].combine_chunks().take(row))
