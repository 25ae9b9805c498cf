"""Checks that compare a split with its official list: which clips exist, their labels, and the shares of classes."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.inspect import explanations
from pipeline.inspect.checks.check import A_FEW, MOST, compared_with_list, finding, grade, percent, role, some
from pipeline.inspect.dataset_summary import DatasetSummary, OfficialList, SplitSummary
from pipeline.inspect.findings import Finding, Severity, worse
from pipeline.prepare.output.shards import label_text

MISSING_OK = 0.06
"""The paper's own training copy lacked 5.4 %: 1,953,082 of 2,063,949 clips (YuanGongND/whisper-at#13)."""
MISSING_WARNING = 0.10
"""d′ did not change while AudioSet lost a tenth of its clips (audioset/ontology#8)."""

MIN_CLASS_CLIPS = 20
"""With fewer clips than this a class's share is not reliable."""
CLASS_Z, CLASS_MISSING, CLASS_RATIO = 4.0, 0.10, 1.5
"""By chance one table of 527 classes in 60 has such a z. A class that keeps nine tenths of its clips passes."""

TV_OK, TV_WARNING, TV_CHANCE = 0.02, 0.05, 1.5
"""Total variation is the share of all labels that would have to change class. Random loss of clips changes it too."""


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
        grade(missing, note=MISSING_OK, warning=MISSING_WARNING, serious=MOST),
        grade(extra / len(split.clips), note=0.0, warning=A_FEW),
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
        costs.append(explanations.MISSING_BY_CLASS.format(classes=some(named, 5)))
    costs += [explanations.NOT_IN_LIST] if extra else []
    return finding(
        "clips",
        split,
        severity,
        [
            f"{len(present):,} of {len(listed):,} listed clips, {percent(missing)} missing",
            f"most of {some([f'{names[c]} ({clips_of[c] - present_of[c]} of {clips_of[c]})' for c in worst], 3)}"
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
        return finding("labels", split, severity, [what], [explanations.OTHER_LABELS], figures)
    if not compared:
        return finding("labels", split, "unknown", ["no clip is in the list"], [explanations.NOT_IN_LIST], figures)
    severity = "note" if split.name == "balanced_train" else "ok"
    what = f"{compared:,} clips have the official labels"
    return finding("labels", split, severity, [what], [explanations.OFFICIAL_LABELS_ON_BALANCED], figures)


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
        severity = grade(distance - chance, note=0.0, warning=TV_WARNING)
    return finding(
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
