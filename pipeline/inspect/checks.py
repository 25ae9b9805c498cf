"""The doctor's checks: they compare a prepared data set with the paper's data and say what each difference costs.

Each check is a pure function from `DatasetSummary` to findings. `CHECKS` lists them. Thresholds are constants with
their reasons.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from itertools import combinations
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ast_core.frames import FRAME_SHIFT_MS, NUM_MEL_BINS, SAMPLE_RATE_HZ, STORED_FLOOR, num_frames_of
from ast_core.labels import audioset_labels
from ast_core.published_inputs import AUDIOSET, PublishedInput
from pipeline import dataset
from pipeline.dataset import PreparedDataset
from pipeline.inspect import explanations
from pipeline.inspect.dataset_summary import DatasetSummary, OfficialList, SplitSummary, summarize
from pipeline.inspect.explanations import published_for
from pipeline.inspect.findings import WORST_FIRST, Finding, Severity, worse
from pipeline.prepare.clip import Reason
from pipeline.prepare.output.shards import label_text
from pipeline.weights import sample_weights

MISSING_OK = 0.06
"""The paper's own training copy lacked 5.4 %: 1,953,082 of 2,063,949 clips (YuanGongND/whisper-at#13)."""
MISSING_WARNING = 0.10
"""d′ did not change while AudioSet lost a tenth of its clips (audioset/ontology#8)."""
MOST = 0.5
"""If more than half is missing, the cause is an unfinished run or the wrong folder, not videos lost on YouTube."""

MIN_CLASS_CLIPS = 20
"""With fewer clips than this a class's share is not reliable."""
CLASS_Z, CLASS_MISSING, CLASS_RATIO = 4.0, 0.10, 1.5
"""By chance one table of 527 classes in 60 has such a z. A class that keeps nine tenths of its clips passes."""

A_FEW = 0.01
"""A hundredth of the clips: the difference between revisions of a list, and enough to make another run worthwhile."""

TV_OK, TV_WARNING, TV_CHANCE = 0.02, 0.05, 1.5
"""Total variation is the share of all labels that would have to change class. Random loss of clips changes it too."""

NORM_OK = 0.5
"""Two published norms of one public copy differ by this: (-3.38, 3.89), (-3.54, 3.42), YuanGongND/ast#85 and #108."""
NORM_SERIOUS = 2.5
"""11 dB. No selection of clips shifts a mean so far; a wrong scale or format does."""
CAUSE_WITHIN = 1.0
"""A fault is named if it explains the norm to within this."""

SILENT_CLIPS_OK, SILENT_CLIPS_WARNING = 0.001, 0.01
"""The preparation drops silent clips without --keep-silent. A hundredth of the clips is no accident."""
SILENT_FRAMES_OK, SILENT_FRAMES_WARNING = 0.02, 0.10
"""Recordings have some silent frames. One frame in ten means padding or partly empty sound tracks.

Used only for AudioSet: other data sets pad by design, as ESC-50 does.
"""

CLIPPED_OK, CLIPPED_MOST = 0.001, 0.05
"""Shares of all samples. A resampler's overshoot stays far below the first; above the second the scale is wrong."""

SHORT, SHORT_OK, SHORT_WARNING = 0.95, 0.01, 0.10
"""A section below this share of its listed length is refused as truncated. Other sources have no such check."""
CUT_WARNING = 0.05
"""If one clip in twenty is too long, these are other files than the recipe expects."""


def examine(data: PreparedDataset, official: Mapping[str, str] | None = None) -> list[Finding]:
    """All findings, worst first.

    Args:
        official: Path or URL of the official segment list, by split, for splits without an official name.

    Raises:
        DataError: `official` names a split that does not exist, or a file of the data set is missing or damaged.
    """
    return examine_summary(summarize(data, official))


def examine_summary(summary: DatasetSummary) -> list[Finding]:
    findings = [found for check in CHECKS for found in check(summary)]
    return sorted(findings, key=lambda found: WORST_FIRST.index(found.severity))


Check = Callable[[DatasetSummary], Iterator[Finding]]
SplitCheck = Callable[[DatasetSummary, SplitSummary], Finding]
ListCheck = Callable[[DatasetSummary, SplitSummary, OfficialList], Finding]


def for_each_split(check: SplitCheck) -> Check:
    """Decorator: run a check on each split that has clips. Other checks report splits without clips."""

    @wraps(check)
    def over_splits(summary: DatasetSummary) -> Iterator[Finding]:
        return (check(summary, split) for split in summary.splits if len(split.clips))

    return over_splits


def compared_with_list(name: str) -> Callable[[ListCheck], Check]:
    """Decorator for a check that needs the official list. If the list is not available, the finding is `unknown`."""

    def decorate(check: ListCheck) -> Check:
        @wraps(check)
        def over_splits(summary: DatasetSummary) -> Iterator[Finding]:
            for split in filter(lambda split: len(split.clips), summary.splits):
                if split.official:
                    yield check(summary, split, split.official)
                elif split.no_list:
                    yield Finding(name, split.name, "unknown", f"not compared: {split.no_list}", explanations.NO_LIST)

        return over_splits

    return decorate


# --- comparison with the official lists


@compared_with_list("clips")
def check_clips(summary: DatasetSummary, split: SplitSummary, official: OfficialList) -> Finding:
    """The share of listed clips that exist, overall and by class, and the number of clips not in the list."""
    listed = official.clips
    present = np.unique(split.position[split.position >= 0])
    extra = int((split.position < 0).sum())
    missing = 1 - len(present) / len(listed)
    clips_of, present_of = split.class_counts(listed), split.class_counts(listed.take(present))
    lost = 1 - present_of / np.maximum(clips_of, 1)
    z = (lost - missing) * np.sqrt(clips_of / max(missing * (1 - missing), 1e-9))
    counted = clips_of >= MIN_CLASS_CLIPS
    hit = (counted & (z > CLASS_Z) & (lost > max(CLASS_MISSING, CLASS_RATIO * missing))) | (
        (clips_of > 0) & (present_of == 0)
    )
    names = summary.labels.names
    worst = [c for c in np.argsort(-lost, kind="stable") if counted[c] and lost[c] > 0]
    severity = worse(
        _grade(missing, note=MISSING_OK, warning=MISSING_WARNING, serious=MOST),
        _grade(extra / len(split.clips), note=0.0, warning=A_FEW),
    )
    if hit.any():
        severity = worse(severity, "warning")
    costs = []
    if missing > MOST:
        costs.append(explanations.MISSING_MOST)
    elif missing > MISSING_OK:
        costs.append(explanations.MISSING_TO_EVALUATE if role(split.name) == "eval" else explanations.MISSING_TO_TRAIN)
    if hit.any():
        named = [names[c] for c in worst if hit[c]] + [names[c] for c in np.flatnonzero(hit & ~counted)]
        costs.append(explanations.MISSING_BY_CLASS.format(classes=_some(named, 5)))
    costs += [explanations.NOT_IN_LIST] if extra else []
    return _finding(
        "clips",
        split,
        severity,
        [
            f"{len(present):,} of {len(listed):,} listed clips, {_percent(missing)} missing",
            f"most of {_some([f'{names[c]} ({clips_of[c] - present_of[c]} of {clips_of[c]})' for c in worst], 3)}"
            if worst
            else "",
            f"{extra:,} that are not in the list" if extra else "",
        ],
        costs,
        {
            "list": official.origin,
            "list_rows_refused": official.num_refused,
            "listed": len(listed),
            "present": len(present),
            "missing_share": missing,
            "not_in_list": extra,
            "classes_hit": [names[c] for c in np.flatnonzero(hit)],
            "per_class": [
                {
                    "index": c,
                    "mid": summary.labels.mids[c],
                    "name": names[c],
                    "listed": clips_of[c],
                    "present": present_of[c],
                    "missing_share": lost[c],
                    "z": z[c],
                }
                for c in np.flatnonzero(clips_of)
            ],
        },
    )


@compared_with_list("labels")
def check_labels(summary: DatasetSummary, split: SplitSummary, official: OfficialList) -> Finding:
    """Whether clips have the labels of the official list."""
    found = split.position >= 0
    asked = label_text(official.clips.take(split.position[found]))
    given = label_text(split.clips.filter(pa.array(found)))
    compared, other = int(found.sum()), int(pc.sum(pc.not_equal(asked, given)).as_py() or 0)
    figures = {"compared": compared, "labelled_otherwise": other}
    if other:
        what = f"{other:,} of {compared:,} clips have other labels than in the list"
        severity: Severity = "serious" if other > A_FEW * compared else "warning"
        return _finding("labels", split, severity, [what], [explanations.OTHER_LABELS], figures)
    if not compared:
        return _finding("labels", split, "unknown", ["no clip is in the list"], [explanations.NOT_IN_LIST], figures)
    severity = "note" if split.name == "balanced_train" else "ok"
    what = f"{compared:,} clips have the official labels"
    return _finding("labels", split, severity, [what], [explanations.OFFICIAL_LABELS_ON_BALANCED], figures)


@compared_with_list("marginals")
def check_marginals(summary: DatasetSummary, split: SplitSummary, official: OfficialList) -> Finding:
    """Each class's share of all labels, compared with the official list."""
    listed, here = split.class_counts(official.clips), split.class_counts(split.clips)
    total_listed, total = max(int(listed.sum()), 1), max(int(here.sum()), 1)
    share_listed, share = listed / total_listed, here / total
    distance = float(np.abs(share - share_listed).sum() / 2)
    # If labels are lost at random, the number left in class c is binomial. The mean of |N(0, s)| is s √(2/π).
    kept = min(total / total_listed, 1.0)
    chance = float(np.sqrt(2 / math.pi * listed * (1 - kept) / kept).sum() / total_listed / 2)
    ratio = share / np.where(listed, share_listed, math.nan)
    far = [c for c in np.argsort(-np.abs(np.log(ratio + 1e-9)), kind="stable") if listed[c] >= MIN_CLASS_CLIPS][:3]
    severity: Severity = "ok"
    if distance > max(TV_OK, TV_CHANCE * chance):
        severity = _grade(distance - chance, note=0.0, warning=TV_WARNING)
    return _finding(
        "marginals",
        split,
        severity,
        [
            f"label shares differ from the list's by {distance:.3f} in total variation ({chance:.3f} by chance)",
            f"most {', '.join(f'{summary.labels.names[c]} ×{ratio[c]:.2f}' for c in far)}" if far and distance else "",
        ],
        [explanations.MARGINALS],
        {
            "total_variation": distance,
            "total_variation_by_chance": chance,
            "per_class": [
                {
                    "index": c,
                    "name": summary.labels.names[c],
                    "share": share[c],
                    "listed": share_listed[c],
                    "ratio": ratio[c],
                }
                for c in np.flatnonzero(listed + here)
            ],
        },
    )


@for_each_split
def check_durations(summary: DatasetSummary, split: SplitSummary) -> Finding:
    """Frames of each clip, compared with the official list's times and with the recipe's input length."""
    frames = split.column("num_frames").astype(np.int64)
    low, middle, high = np.percentile(frames, (5, 50, 95), method="nearest")
    what, costs = [f"median {middle} frames, 5 to 95 % of the clips {low} to {high}"], []
    figures: dict[str, Any] = {"frames_5_50_95": [low, middle, high], "frames_min_max": [frames.min(), frames.max()]}
    severity: Severity = "ok"
    if split.official and (found := split.position >= 0).any():
        times = split.official.clips.take(split.position[found])
        asked_s, clip = np.unique(pc.subtract(times["end_s"], times["start_s"]).to_numpy(), return_inverse=True)
        asked = np.array([num_frames_of(round(s * SAMPLE_RATE_HZ)) for s in asked_s])[clip]
        figures["short_share"] = short = float((frames[found] < SHORT * asked).mean())
        severity = _grade(short, note=SHORT_OK, warning=SHORT_WARNING, serious=MOST)
        what.append(f"{_percent(short)} below {_percent(SHORT)} of the listed length")
        costs += [explanations.SHORT] if severity != "ok" else []
    if published := published_for(summary.labels):
        figures["cut_share"] = cut = float((frames > published.num_frames).mean())
        if cut:
            severity = worse(severity, _grade(cut, note=0.0, warning=CUT_WARNING))
            what.append(f"{_percent(cut)} longer than the recipe's {published.num_frames} frames")
            costs.append(explanations.CUT.format(frames=published.num_frames))
    return _finding("durations", split, severity, what, costs, figures)


# --- checks of the data set alone


def check_failures(summary: DatasetSummary) -> Iterator[Finding]:
    """Clips that could not be prepared, and how many of them another run may still get."""
    for split in summary.splits:
        reasons = Counter(split.failures["reason"].to_pylist())
        again = sum(n for reason, n in reasons.items() if Reason(reason).retry)
        asked = len(split.clips) + sum(reasons.values())
        severity: Severity = "warning" if again > A_FEW * asked else "note" if reasons else "ok"
        what = f"{sum(reasons.values()):,} of {asked:,} clips failed"
        if reasons:
            what += f" ({', '.join(f'{n:,} {reason}' for reason, n in reasons.most_common())})"
        costs = [explanations.RUN_AGAIN] if again else []
        costs += [words for reason, words in explanations.FAILED.items() if reasons[reason]]
        figures = {"by_reason": dict(reasons), "worth_another_run": again}
        parts = [what, f"{again:,} of them worth another run" if again else ""]
        yield _finding("failures", split, severity, parts, costs, figures)


def check_norm(summary: DatasetSummary) -> Iterator[Finding]:
    """Mean and standard deviation of raw log-mel, compared with the published norm."""
    published = published_for(summary.labels)
    for split in summary.splits:
        figures = norm_figures(split, published)
        if figures is None:
            continue  # no clip, or none with finite values: other checks report that
        what = [f"mean and std {figures['mean']:.2f}, {figures['std']:.2f}"]
        if published is None:
            yield _finding("norm", split, "ok", [*what, "none published for these classes"], [], figures)
            continue
        counted = figures["as_the_original_counts"]
        what.append(f"{counted['mean']:.2f}, {counted['std']:.2f} with padding and masks, as the reference counts")
        what.append(f"published {published.mean:.2f}, {published.std:.2f} ({published.name})")
        severity = _grade(figures["off_by"], warning=NORM_OK, serious=NORM_SERIOUS)
        costs = [explanations.OTHER_NORM, *_norm_causes(figures, published)]
        yield _finding("norm", split, severity, what, costs, figures)


def norm_figures(split: SplitSummary, published: PublishedInput | None) -> dict[str, Any] | None:
    """The norm of all frames, of the frames that are not silent, and as the reference script counts.

    That script averages over its training loader (src/get_norm_stats.py of YuanGongND/ast, and issue #16 there), so the
    zeros of padding and masks count. Here they count with their expected share; the script's mixup is ignored.

    Returns None if no clip has finite values.
    """
    rows = np.stack(
        [
            split.column(name).astype(np.float64)
            for name in ("fbank_sum", "fbank_sum_sq", "num_frames", "num_silent_frames")
        ]
    )
    rows = rows[:, np.isfinite(rows).all(axis=0) & (rows[2] > 0)]
    if not rows.shape[1]:
        return None
    total, squares, frames, silent = rows.sum(axis=1)
    figures: dict[str, Any] = _mean_std(total, squares, frames * NUM_MEL_BINS)
    if silent < frames:
        at_floor = silent * NUM_MEL_BINS
        figures["without_silent_frames"] = _mean_std(
            total - at_floor * STORED_FLOOR, squares - at_floor * STORED_FLOOR**2, frames * NUM_MEL_BINS - at_floor
        )
    if published:
        filled = np.minimum(rows[2] / published.num_frames, 1).mean()
        # The largest mask width is below freqm, then cut to whole bins; see ast_core.augment.draw.
        masked_bins, masked_frames = (published.freqm - 1) / 2, (published.timem - 1) / 2
        kept = filled * (1 - masked_bins / NUM_MEL_BINS) * (1 - masked_frames / published.num_frames)
        counted = _mean_std(total, squares, frames * NUM_MEL_BINS / kept)
        standard_error = (rows[0] / rows[2]).std() / NUM_MEL_BINS / math.sqrt(rows.shape[1])
        nearest = min(_distance(figures, published), _distance(counted, published))
        figures |= {
            "as_the_original_counts": counted,
            "published": {"mean": published.mean, "std": published.std},
            "standard_error": standard_error,
            "off_by": max(0.0, nearest - 2 * standard_error),  # with few clips the mean is uncertain
        }
    return figures


def _mean_std(total: float, squares: float, count: float) -> dict[str, float]:
    mean = float(total / count)
    return {"mean": mean, "std": math.sqrt(max(float(squares / count) - mean**2, 0.0))}


def _distance(figures: Mapping[str, float], published: PublishedInput) -> float:
    return max(abs(figures["mean"] - published.mean), abs(figures["std"] - published.std))


_LN10 = math.log(10)
_SCALE_FAULTS: dict[str, Callable[[float, float], tuple[float, float]]] = {
    "16-bit integers instead of [-1, 1], which adds 2 ln 32768 = 20.8": lambda m, s: (m + 2 * math.log(2**15), s),
    "decibels instead of natural logarithms": lambda m, s: (m * 10 / _LN10, s * 10 / _LN10),
    "base-10 logarithms instead of natural ones": lambda m, s: (m / _LN10, s / _LN10),
    "magnitudes instead of powers": lambda m, s: (m / 2, s / 2),
    "values that are normalised already, by twice the std": lambda m, s: (0.0, 0.5),
    "values that are normalised already": lambda m, s: (0.0, 1.0),
    "hardly any sound: a scale that is divided twice, or empty sound tracks": lambda m, s: (STORED_FLOOR, 0.0),
}
"""Faults, and how each would change the published mean and std."""


def _norm_causes(figures: Mapping[str, Any], published: PublishedInput) -> Iterator[str]:
    sound = figures.get("without_silent_frames", figures)
    mean, std, off = sound["mean"], sound["std"], _distance(sound, published)
    if off < _distance(figures, published) - NORM_OK / 2:
        yield f"Digital silence is part of it: without it they would be {mean:.2f}, {std:.2f}."
    if off <= NORM_OK:
        return
    if off > NORM_SERIOUS:
        made = {fault: change(published.mean, published.std) for fault, change in _SCALE_FAULTS.items()}
        misses = {fault: max(abs(mean - m), abs(std - s)) for fault, (m, s) in made.items()}
        likely = min(misses, key=lambda fault: misses[fault])
        yield explanations.FORMAT_FAULT
        if misses[likely] < CAUSE_WITHIN:
            yield f"The figures point to {likely}."
    elif abs(std - published.std) <= NORM_OK:
        louder = "louder" if mean > published.mean else "quieter"
        level_db = abs(mean - published.mean) * 10 / _LN10
        yield f"The spread is the paper's and the level {level_db:.0f} dB {louder}, as if files were normalised."
    else:
        yield explanations.LOWER_SPREAD if std < published.std else explanations.LARGER_SPREAD


@for_each_split
def check_values(summary: DatasetSummary, split: SplitSummary) -> Finding:
    """NaN or infinity among the stored values."""
    broken = ~np.isfinite(split.column("fbank_sum") + split.column("fbank_sum_sq"))
    ids = split.clips["clip_id"].filter(pa.array(broken)).to_pylist()
    what = f"{len(ids):,} clips contain NaN or infinity: {_some(ids, 3)}" if ids else "all values are finite"
    return _finding("values", split, "serious" if ids else "ok", [what], [explanations.NOT_FINITE], {"clips": ids})


@for_each_split
def check_silence(summary: DatasetSummary, split: SplitSummary) -> Finding:
    """Clips and frames of digital silence."""
    clips = float(_silent(split).mean())
    frames = float(
        split.column("num_silent_frames").sum(dtype=np.int64) / split.column("num_frames").sum(dtype=np.int64)
    )
    severity = _grade(clips, note=SILENT_CLIPS_OK, warning=SILENT_CLIPS_WARNING)
    if published_for(summary.labels) is AUDIOSET:
        severity = worse(severity, _grade(frames, note=SILENT_FRAMES_OK, warning=SILENT_FRAMES_WARNING))
    what = (
        f"{_silent(split).sum():,} clips are silent throughout, {_percent(clips)}, and {_percent(frames)} of the frames"
    )
    figures = {"silent_clips_share": clips, "silent_frames_share": frames}
    return _finding("silence", split, severity, [what], [explanations.SILENCE], figures)


@for_each_split
def check_clipping(summary: DatasetSummary, split: SplitSummary) -> Finding:
    """Samples beyond full scale, which the preparation set to ±1."""
    clipped = split.column("num_clipped")
    seconds = float(split.column("num_frames").sum(dtype=np.int64)) * FRAME_SHIFT_MS / 1000
    clips, samples = float((clipped > 0).mean()), float(clipped.sum(dtype=np.int64) / (seconds * SAMPLE_RATE_HZ))
    severity = _grade(samples, note=CLIPPED_OK, serious=CLIPPED_MOST)
    cost = explanations.CLIPPED_THROUGHOUT if severity == "serious" else explanations.CLIPPING
    what = f"{_percent(clips)} of the clips have clipped samples, {_percent(samples)} of all samples"
    return _finding("clipping", split, severity, [what], [cost], {"clips_share": clips, "samples_share": samples})


@for_each_split
def check_duplicates(summary: DatasetSummary, split: SplitSummary) -> Finding:
    """Equal audio under several clip_ids of a split."""
    _, group, times = np.unique(split.column("fbank_hash"), return_inverse=True, return_counts=True)
    repeated = (times[group] > 1) & ~_silent(split)
    rows = split.clips.filter(pa.array(repeated))
    members: dict[int, list[tuple[str, str]]] = {}
    for number, *member in zip(group[repeated], rows["clip_id"].to_pylist(), label_text(rows).to_pylist(), strict=True):
        members.setdefault(number, []).append((member[0], member[1]))
    groups = [[clip_id for clip_id, _ in same] for same in members.values()]
    at_odds = sum(len({labels for _, labels in same}) > 1 for same in members.values())
    copies = sum(map(len, groups)) - len(groups)
    what = ["no audio has two clip_ids"]
    if copies:
        what = [f"{copies:,} clips have the audio of another one ({_some([' = '.join(ids[:3]) for ids in groups], 2)})"]
        what += [f"{at_odds:,} of these groups have different labels"] if at_odds else []
    figures = {"copies": copies, "groups": groups, "groups_with_different_labels": at_odds}
    severity = _grade(copies / len(split.clips), note=0.0, warning=A_FEW)
    return _finding("duplicates", split, severity, what, [explanations.DUPLICATES], figures)


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
            f"{len(in_two):,} clips of {two.name} are in {one.name} too ({_some(in_two, 2)})",
            ", ".join(f"{masks[1].sum():,} by {kind}" for kind, masks in found.items()),
        ]
        figures = {f"by_{kind}": masks[1].sum() for kind, masks in found.items()}
        cost = explanations.COUNTED_TWICE if together else explanations.LEAKAGE
        figures |= {"clips": {one.name: in_one, two.name: in_two}}
        severity: Severity = "note" if together else "serious"
        yield _finding("leakage", f"{one.name} + {two.name}", severity, what, [cost], figures)
    if none_shared:
        yield _finding("leakage", "", "ok", ["no audio, clip_id or video is in two splits"], [], {})


def role(split: str) -> Literal["train", "eval", "either"]:
    """The use of a split, by its name. Folds are used for both."""
    if "train" in split:
        return "train"
    return "eval" if re.search("eval|test|valid", split) else "either"


def check_index(summary: DatasetSummary) -> Iterator[Finding]:
    """Whether index and dataset.json describe the clips in the shards."""
    for split in summary.splits:
        index = split.index
        at = pc.index_in(_place(index), value_set=_place(split.stored).combine_chunks()).fill_null(-1).to_numpy()
        pointed, indexed = split.stored.take(at[at >= 0]), index.filter(pa.array(at >= 0))
        same_clip = pc.equal(indexed["clip_id"], pointed["clip_id"])
        agrees = pc.and_(same_clip, pc.equal(label_text(indexed), label_text(pointed)))
        if "fbank_hash" in indexed.column_names:
            agrees = pc.and_(agrees, pc.equal(indexed["fbank_hash"], pointed["fbank_hash"]))
        nowhere, wrong = int((at < 0).sum()), len(indexed) - int(pc.sum(agrees).as_py() or 0)
        unlisted = split.num_lost
        stale = dataset.fingerprint(index["clip_id"], index["labels"]) != split.info["fingerprint"]
        problems = [
            f"{nowhere:,} rows point to no stored clip" if nowhere else "",
            f"{wrong:,} rows have the id, labels or values of another clip" if wrong else "",
            "dataset.json describes other clips or labels" if stale else "",
            f"{unlisted:,} stored clips have no row" if unlisted else "",
        ]
        severity: Severity = "serious" if nowhere or wrong or stale else "warning" if unlisted else "ok"
        what = [f"the index has {len(index):,} rows", *problems]
        figures = {
            "rows": len(index),
            "point_nowhere": nowhere,
            "of_another_clip": wrong,
            "clips_without_a_row": unlisted,
        }
        costs = [explanations.STALE_INDEX]
        yield _finding("index", split, severity, what, costs, figures | {"fingerprint_differs": stale})


def check_weights(summary: DatasetSummary) -> Iterator[Finding]:
    """Whether the stored sample weights match the labels in the same index."""
    for split in summary.splits:
        stored = split.index["sample_weight"].to_numpy()
        right = sample_weights(split.index["labels"].combine_chunks(), split.num_classes)
        stale = ~np.isclose(stored, right, rtol=1e-6)
        what = "sample weights match these clips"
        if stale.any():
            ratio = np.median(stored[stale] / right[stale])
            what = f"{stale.sum():,} of {len(stale):,} sample weights do not match these labels (median ×{ratio:.3g})"
        severity: Severity = "warning" if stale.any() else "ok"
        yield _finding("weights", split, severity, [what], [explanations.STALE_WEIGHTS], {"stale": stale.sum()})


def check_vocabulary(summary: DatasetSummary) -> Iterator[Finding]:
    """The classes and their order, compared with AudioSet's 527."""
    ours, audioset = summary.labels.mids, audioset_labels().mids
    common = len(set(ours) & set(audioset))
    severity: Severity
    if ours == audioset:
        severity, what, cost = "ok", "AudioSet's 527 classes in their order", ""
    elif common == len(audioset) == len(ours):
        moved = sum(a != b for a, b in zip(ours, audioset, strict=True))
        severity, what = "serious", f"AudioSet's 527 classes in another order: {moved} have another index"
        cost = explanations.OTHER_ORDER
    elif published_for(summary.labels) is AUDIOSET:
        severity, what = "warning", f"{common} of AudioSet's 527 classes, {len(ours)} in all"
        cost = explanations.OTHER_CLASSES
    else:
        severity, what, cost = "ok", f"{len(ours)} classes of its own", ""
    yield _finding("vocabulary", "", severity, [what], [cost], {"classes": len(ours), "of_audioset": common})


def check_features(summary: DatasetSummary) -> Iterator[Finding]:
    """The settings of the fbanks, compared with those that the recipes need."""
    stored, needed = summary.info["features"], dataset.FEATURES
    other = [key for key in needed | stored if stored.get(key) != needed.get(key)]
    what = [f"{key} is {stored.get(key)!r}, the recipes take {needed.get(key)!r}" for key in other]
    severity: Severity = "serious" if other else "ok"
    figures = {"other": {key: stored.get(key) for key in other}}
    yield _finding(
        "features", "", severity, what or ["as the recipes take them"], [explanations.OTHER_FEATURES], figures
    )


CHECKS: tuple[Check, ...] = (
    check_vocabulary,
    check_features,
    check_index,
    check_weights,
    check_values,
    check_leakage,
    check_clips,
    check_labels,
    check_marginals,
    check_durations,
    check_failures,
    check_norm,
    check_silence,
    check_clipping,
    check_duplicates,
)


def _finding(
    check: str,
    split: SplitSummary | str,
    severity: Severity,
    what: list[str],
    costs: list[str],
    figures: Mapping[str, Any],
) -> Finding:
    """A finding without the empty parts of `what`, and without costs if its severity is `ok`."""
    name = split if isinstance(split, str) else split.name
    return Finding(
        check, name, severity, "; ".join(filter(None, what)), "" if severity == "ok" else " ".join(costs), figures
    )


def _grade(value: float, *, note: float = math.inf, warning: float = math.inf, serious: float = math.inf) -> Severity:
    """The worst severity whose threshold `value` exceeds."""
    return "serious" if value > serious else "warning" if value > warning else "note" if value > note else "ok"


def _percent(share: float) -> str:
    if 0 < share < 0.0001:
        return "under 0.01 %"
    return f"{100 * share:.{2 if share < 0.1 else 3}g} %"


def _some(items: list[str], at_most: int) -> str:
    return ", ".join(items[:at_most]) + (", …" if len(items) > at_most else "")


def _silent(split: SplitSummary) -> np.ndarray:
    """`[clips]`: whether every frame is silent. All silent clips have equal audio, so they are no duplicates."""
    return split.column("num_silent_frames") == split.column("num_frames")


def _place(rows: pa.Table) -> pa.ChunkedArray:
    return pc.binary_join_element_wise(rows["shard"], rows["row"].cast(pa.string()), ":")


def _sound_hashes(split: SplitSummary) -> pa.ChunkedArray:
    """The `fbank_hash` of each clip; null for a silent clip."""
    return pc.if_else(pa.array(_silent(split)), None, split.clips["fbank_hash"])


def _is_in(ids: pa.ChunkedArray, others: pa.ChunkedArray) -> np.ndarray:
    """Whether each id is in `others`. A null never is."""
    return pc.is_in(ids, value_set=others.combine_chunks().drop_null()).to_numpy()


def _video_ids(split: SplitSummary) -> pa.ChunkedArray:
    """The video id of each clip, from the official list if the shards have none."""
    if split.official is None:
        return split.clips["video_id"]
    row = pa.array(split.position, mask=split.position < 0)
    return pc.coalesce(split.clips["video_id"], split.official.clips["video_id"].combine_chunks().take(row))
