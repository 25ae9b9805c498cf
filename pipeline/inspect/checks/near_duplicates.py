"""A check for clips of two splits that sound nearly the same, by embeddings: copies that were coded again or cut."""

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.embeddings.nearest import Nearest, unit_vectors
from pipeline.embeddings.stored import StoredEmbeddings
from pipeline.inspect import explanations
from pipeline.inspect.checks.check import A_FEW, finding, grade, role, some
from pipeline.inspect.dataset_summary import DatasetSummary, SplitSummary
from pipeline.inspect.findings import Finding
from pipeline.recording_names import clip_name_prefix

NEAR = 0.98
"""Cosine of embeddings, around their mean, from which two clips are said to sound nearly the same."""

MAX_PAIRS = 1000
"""Pairs in the JSON output."""


def check_near_duplicates(summary: DatasetSummary) -> Iterator[Finding]:
    """Nearly equal sounds in two splits, if the doctor has embeddings of the clips.

    Equal audio, and clips of one id or video, are left out: `check_leakage` reports them.
    """
    if summary.embeddings is None:
        return
    splits = [split for split in summary.splits if len(split.clips)]
    centre = _mean(summary.embeddings)
    for one, two in combinations(splits, 2):
        yield _compared(summary, summary.embeddings, centre, one, two)


def _compared(
    summary: DatasetSummary, embeddings: StoredEmbeddings, centre_D: np.ndarray, one: SplitSummary, two: SplitSummary
) -> Finding:
    first, second = sorted((one, two), key=lambda split: len(split.clips))  # the smaller one is held in memory
    names = _names(summary.uri, first)
    queries = unit_vectors(embeddings.means(names), centre_D)
    others, nearest = _names(summary.uri, second), Nearest(queries, 1)
    for part in embeddings.parts():
        clip = pc.index_in(part.rows["recording"], value_set=others).fill_null(-1).to_numpy()
        nearest.add(unit_vectors(part.vectors_WD[clip >= 0], centre_D), clip[clip >= 0])
    similarity, clip = (array[:, 0] for array in nearest.found())
    near = np.flatnonzero((similarity >= NEAR) & (clip >= 0))
    near = near[_is_other_sound(first.clips.take(near), second.clips.take(clip[near]))]
    near = near[np.argsort(-similarity[near], kind="stable")]
    ids = [split.clips["clip_id"].take(at).to_pylist() for split, at in ((first, near), (second, clip[near]))]
    pairs = [list(pair) for pair in zip(*ids, similarity[near].round(4).tolist(), strict=True)][:MAX_PAIRS]
    what = [f"no clip of {first.name} sounds nearly like one of {second.name}"]
    if len(near):
        shown = some([f"{a} ≈ {b} ({value:.3f})" for a, b, value in pairs], 3)
        what = [f"{len(near):,} clips of {first.name} sound nearly like one of {second.name}: {shown}"]
    cost = explanations.COUNTED_TWICE if role(one.name) == role(two.name) != "either" else explanations.NEARLY_EQUAL
    figures = {"near": len(near), "pairs": pairs, "from_similarity": NEAR, "model_sha256": embeddings.model_sha256}
    severity = grade(len(near) / len(first.clips), note=0.0, warning=A_FEW)
    return finding("near duplicates", f"{one.name} + {two.name}", severity, what, [cost], figures)


def _names(uri: str, split: SplitSummary) -> pa.Array:
    """The names of a split's clips in tags."""
    ids = split.clips["clip_id"].combine_chunks()
    return pc.binary_join_element_wise(clip_name_prefix(uri, split.name), ids, "")


def _mean(embeddings: StoredEmbeddings) -> np.ndarray:
    """The mean of all embeddings, `[D]`. They lie around it, so that cosines from 0 say little."""
    total, number = np.zeros(1), 0
    for part in embeddings.parts():
        total = total + part.vectors_WD.sum(axis=0, dtype=np.float64)
        number += len(part.rows)
    return (total / number).astype(np.float32)


def _is_other_sound(clips: pa.Table, others: pa.Table) -> np.ndarray:
    """For each pair, whether `check_leakage` does not report it. Silent clips are left out."""
    same = pc.or_(
        pc.equal(clips["fbank_hash"], others["fbank_hash"]),
        pc.or_(
            pc.equal(clips["clip_id"], others["clip_id"]),
            pc.equal(clips["video_id"], others["video_id"]).combine_chunks().fill_null(False),
        ),
    )
    is_silent = clips["num_silent_frames"].to_numpy() == clips["num_frames"].to_numpy()
    return ~same.to_numpy() & ~is_silent
