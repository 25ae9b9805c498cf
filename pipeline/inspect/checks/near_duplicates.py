"""A check for copies of a recording in two splits: coded again, cut elsewhere, made louder.

Embeddings find candidates among all pairs of clips, which are too many to compare: for each clip the nearest ones of
the other split. Embeddings of a trained model also lie close together for two recordings of one class, so the stored
log-mel of the candidates decides.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import combinations
from threading import Lock

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ast_core.errors import DataError
from pipeline.dataset import shards_dir
from pipeline.embeddings.nearest import Nearest, unit_vectors
from pipeline.embeddings.stored import StoredEmbeddings
from pipeline.inspect import explanations
from pipeline.inspect.checks.check import A_FEW, finding, grade, role, some
from pipeline.inspect.checks.repeats import video_ids
from pipeline.inspect.dataset_summary import DatasetSummary, SplitSummary
from pipeline.inspect.findings import Finding
from pipeline.inspect.same_sound import log_mel_correlation, read_fbank
from pipeline.progress_lines import ProgressLines
from pipeline.recording_names import clip_name_prefix

NEIGHBOURS = 5
"""Clips of the other split that are candidates for a clip."""

CANDIDATE = 0.8
"""Cosine of embeddings, around their mean, from which a pair is a candidate. `benchmarks.near_duplicates`: nearly all
copies are as near, and one in fifteen pairs of different recordings of ten classes."""

MAX_COMPARED = 5000
"""Candidates whose log-mel is compared, the nearest ones. A pair takes about 10 ms."""

SAME = 0.6
"""Correlation of log-mel from which two clips are said to be copies. `benchmarks.near_duplicates`: copies have 0.67 or
more, other recordings of a class 0.57 or less."""

MAX_PAIRS = 1000
"""Pairs in the JSON output."""

READERS = 16
"""Threads that read log-mel. On object storage a reader waits most of the time."""

CACHED_CLIPS = 64
"""Clips whose log-mel is kept, because a clip is in several pairs. One of 10 s takes 0.26 MB, the longest 8 MB."""


def check_near_duplicates(summary: DatasetSummary) -> Iterator[Finding]:
    """Copies of a recording in two splits, if the doctor has embeddings of the clips.

    Pairs that `check_leakage` reports are left out.

    Raises:
        DataError: a clip has no embedding, or a shard is damaged.
    """
    if summary.embeddings is None:
        return
    splits = [split for split in summary.splits if len(split.clips)]
    centre = _mean(summary.embeddings)
    for one, two in combinations(splits, 2):
        first, second = sorted((one, two), key=lambda split: len(split.clips))  # the smaller one is held in memory
        pairs = _candidates(summary, summary.embeddings, centre, first, second)
        yield _found(summary, one, two, first, second, pairs)


Pairs = list[tuple[int, int]]
"""Rows of the clips of two splits."""


def _candidates(
    summary: DatasetSummary,
    embeddings: StoredEmbeddings,
    centre_D: np.ndarray,
    first: SplitSummary,
    second: SplitSummary,
) -> Pairs:
    """Pairs of clips of two splits whose embeddings are near, the nearest first.

    Raises:
        DataError: a clip has no embedding.
    """
    queries = unit_vectors(embeddings.means(_names(summary.uri, first)), centre_D)
    others, nearest = _names(summary.uri, second), Nearest(queries, NEIGHBOURS)
    has_embedding = np.zeros(len(others), bool)
    for part in embeddings.parts():
        clip = pc.index_in(part.rows["recording"], value_set=others).fill_null(-1).to_numpy()
        nearest.add(unit_vectors(part.vectors_WD[clip >= 0], centre_D), clip[clip >= 0])
        has_embedding[clip[clip >= 0]] = True
    if len(missing := np.flatnonzero(~has_embedding)):
        raise DataError(
            f"{embeddings.uri} has no embedding of {len(missing):,} of {len(others):,} recordings, first of "
            f"{others[int(missing[0])]}; tag them into it with --embeddings"
        )
    similarity_QK, clip_QK = nearest.found()
    of_first, k = np.nonzero((similarity_QK >= CANDIDATE) & (clip_QK >= 0))
    of_second, similarity = clip_QK[of_first, k], similarity_QK[of_first, k]
    is_other = _is_other_sound(_with_videos(first).take(of_first), _with_videos(second).take(of_second))
    order = np.flatnonzero(is_other)[np.argsort(-similarity[is_other], kind="stable")]
    pairs = zip(of_first[order].tolist(), of_second[order].tolist(), strict=True)
    return list(dict.fromkeys(pairs))  # a clip may be near by several of its windows


def _found(
    summary: DatasetSummary,
    one: SplitSummary,
    two: SplitSummary,
    first: SplitSummary,
    second: SplitSummary,
    pairs: Pairs,
) -> Finding:
    best: dict[int, tuple[float, int]] = {}
    compared = sorted(pairs[:MAX_COMPARED])  # the pairs of a clip one after the other, while it is in the cache
    for (a, b), alike in zip(compared, _correlations(summary, first, second, compared), strict=True):
        if alike >= SAME:
            best[a] = max(best.get(a, (0.0, 0)), (alike, b))
    ids_of_first, ids_of_second = (split.clips["clip_id"] for split in (first, second))
    copies = sorted(((alike, a, b) for a, (alike, b) in best.items()), reverse=True)
    named = [[ids_of_first[a].as_py(), ids_of_second[b].as_py(), round(alike, 4)] for alike, a, b in copies]
    what = [f"no clip of {first.name} is a copy of one of {second.name}"]
    if named:
        shown = some([f"{a} ≈ {b} ({value:.2f})" for a, b, value in named], 3)
        what = [f"{len(named):,} clips of {first.name} are copies of one of {second.name}: {shown}"]
    if len(pairs) > MAX_COMPARED:
        what.append(f"only the nearest {MAX_COMPARED:,} of {len(pairs):,} candidates were compared")
    cost = explanations.COUNTED_TWICE if role(one.name) == role(two.name) != "either" else explanations.NEARLY_EQUAL
    figures = {"near": len(named), "pairs": named[:MAX_PAIRS], "candidates": len(pairs), "from_correlation": SAME}
    severity = grade(len(named) / len(first.clips), note=0.0, warning=A_FEW)
    return finding("near_duplicates", f"{one.name} + {two.name}", severity, what, [cost], figures)


def _correlations(summary: DatasetSummary, first: SplitSummary, second: SplitSummary, pairs: Pairs) -> Sequence[float]:
    """The `log_mel_correlation` of each pair of clips. Prints a line every few seconds."""
    read, one_at_a_time, num_done = lru_cache(CACHED_CLIPS)(read_fbank), Lock(), 0

    def correlation(pair: tuple[int, int]) -> float:
        nonlocal num_done
        one, other = (
            read(*_place(summary.uri, split, clip)) for split, clip in zip((first, second), pair, strict=True)
        )
        with one_at_a_time:  # for two clips of minutes it takes hundreds of MB
            num_done += 1
            return log_mel_correlation(one, other, summary.features.log_scale.nats_per_unit)

    def say_line(_: float) -> None:
        print(f"{first.name} + {second.name}: {num_done:,} of {len(pairs):,} candidates compared", flush=True)

    with ProgressLines(say_line), ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(correlation, pairs))


def _place(uri: str, split: SplitSummary, clip: int) -> tuple[str, int]:
    """The shard of a clip, and its row there."""
    return f"{shards_dir(uri, split.name)}/{split.clips['shard'][clip]}", split.clips["row"][clip].as_py()


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


def _with_videos(split: SplitSummary) -> pa.Table:
    return split.clips.set_column(split.clips.column_names.index("video_id"), "video_id", video_ids(split))


def _is_other_sound(clips: pa.Table, others: pa.Table) -> np.ndarray:
    """For each pair, whether `check_leakage` does not report it. Silent clips are left out."""
    names_a_video = pc.xor(pc.is_valid(clips["video_id"]), pc.is_valid(others["video_id"]))
    same = pc.or_(
        pc.equal(clips["fbank_hash"], others["fbank_hash"]),
        pc.or_(
            pc.and_(pc.equal(clips["clip_id"], others["clip_id"]), names_a_video),
            pc.fill_null(pc.equal(clips["video_id"], others["video_id"]), False),
        ),
    )
    is_silent = clips["num_silent_frames"].to_numpy() == clips["num_frames"].to_numpy()
    return ~same.to_numpy() & ~is_silent
