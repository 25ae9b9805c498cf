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
    """Equal audio or video in two splits, and clips of one id that are one recording.

    Ids such as 001 occur in unrelated recordings. Equal ids with different sound are a note, unless they name a video.
    """
    none_shared = True
    for one, two in combinations(summary.splits, 2):
        shared = {
            "audio": (_sound_hashes(one), _sound_hashes(two)),
            "video": (video_ids(one), video_ids(two)),
        }
        found = {kind: (_is_in(first, second), _is_in(second, first)) for kind, (first, second) in shared.items()}
        found["clip_id"] = _is_same_clip(one, two), _is_same_clip(two, one)
        is_in_both = [np.any([masks[side] for masks in found.values()], axis=0) for side in range(2)]
        in_one, in_two = (_ids(split, mask) for split, mask in zip((one, two), is_in_both, strict=True))
        other_sound = _ids(two, _is_in(two.clips["clip_id"], one.clips["clip_id"]) & ~is_in_both[1])
        if not in_two and not other_sound:
            continue
        none_shared = False
        together = role(one.name) == role(two.name) != "either"
        what, costs = [], []
        if in_two:
            what += [
                f"{len(in_two):,} clips of {two.name} are in {one.name} too ({some(in_two, 2)})",
                ", ".join(f"{found[kind][1].sum():,} by {kind}" for kind in ("audio", "clip_id", "video")),
            ]
            costs.append(explanations.COUNTED_TWICE if together else explanations.LEAKAGE)
        if other_sound:
            what.append(f"{len(other_sound):,} clip ids occur in both with different sound ({some(other_sound, 2)})")
            costs.append(explanations.SAME_IDS)
        figures = {f"by_{kind}": masks[1].sum() for kind, masks in found.items()}
        figures |= {"clips": {one.name: in_one, two.name: in_two}, "ids_with_different_sound": other_sound}
        severity: Severity = "serious" if in_two and not together else "note"
        yield finding("leakage", f"{one.name} + {two.name}", severity, what, costs, figures)
    if none_shared:
        yield finding("leakage", "", "ok", ["no audio, clip_id or video is in two splits"], [], {})


def _sound_hashes(split: SplitSummary) -> pa.ChunkedArray:
    """The `fbank_hash` of each clip; null for a silent clip."""
    return pc.if_else(pa.array(silent_clips(split)), None, split.clips["fbank_hash"])


def _ids(split: SplitSummary, is_wanted: np.ndarray) -> list[str]:
    ids: list[str] = split.clips["clip_id"].filter(pa.array(is_wanted)).to_pylist()
    return ids


def _is_same_clip(split: SplitSummary, other: SplitSummary) -> np.ndarray:
    """For each clip, whether `other` has its id for the same recording: the sound is equal, or the id names a video.

    It does if the video is known in one of the splits. If it is known in both, the video itself is compared.
    """
    at = pc.index_in(split.clips["clip_id"], value_set=other.clips["clip_id"].combine_chunks())
    has_equal_sound = pc.fill_null(pc.equal(_sound_hashes(split), _sound_hashes(other).take(at)), False)
    names_a_video = pc.xor(pc.is_valid(video_ids(split)), pc.is_valid(video_ids(other).take(at)))
    is_same: np.ndarray = pc.and_(pc.is_valid(at), pc.or_(has_equal_sound, names_a_video)).to_numpy()
    return is_same


def _is_in(ids: pa.ChunkedArray, others: pa.ChunkedArray) -> np.ndarray:
    """Whether each id is in `others`. A null never is."""
    return pc.is_in(ids, value_set=others.combine_chunks().drop_null()).to_numpy()


def video_ids(split: SplitSummary) -> pa.ChunkedArray:
    """The video id of each clip, from the official list if the shards have none."""
    if split.official is None:
        return split.clips["video_id"]
    row = pa.array(split.position, mask=split.position < 0)
    return pc.coalesce(split.clips["video_id"], split.official.clips["video_id"].combine_chunks().take(row))
