"""Checks of what the data set says about itself: classes, feature settings, index, sample weights and failures."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ast_core.features import KALDI128
from ast_core.labels import audioset_labels
from ast_core.published_inputs import AUDIOSET
from pipeline import dataset
from pipeline.inspect import explanations
from pipeline.inspect.checks.check import A_FEW, finding
from pipeline.inspect.dataset_summary import DatasetSummary
from pipeline.inspect.explanations import published_for
from pipeline.inspect.findings import Finding, Severity
from pipeline.prepare.clip import Reason
from pipeline.prepare.output.shards import label_text
from pipeline.weights import sample_weights


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
    yield finding("vocabulary", "", severity, [what], [cost], {"classes": len(ours), "of_audioset": common})


def check_features(summary: DatasetSummary) -> Iterator[Finding]:
    """The feature settings, compared with those of the reference implementation."""
    other = summary.features.differences(KALDI128)
    what = [other or "kaldi128, as published weights and norms need them"]
    costs, figures = [explanations.OTHER_FEATURES], {"settings": summary.features.to_dict()}
    yield finding("features", "", "note" if other else "ok", what, costs, figures)


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
        yield finding("index", split, severity, what, costs, figures | {"fingerprint_differs": stale})


def _place(rows: pa.Table) -> pa.ChunkedArray:
    return pc.binary_join_element_wise(rows["shard"], rows["row"].cast(pa.string()), ":")


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
        yield finding("weights", split, severity, [what], [explanations.STALE_WEIGHTS], {"stale": stale.sum()})


def check_failures(summary: DatasetSummary) -> Iterator[Finding]:
    """Clips that could not be prepared, and how many of them another run may still get."""
    for split in summary.splits:
        is_repeated = pc.equal(split.failures["reason"], str(Reason.DUPLICATE))  # a row whose clip is there
        failed = split.failures.filter(pc.invert(is_repeated))
        reasons, again = Counter(failed["reason"].to_pylist()), int(pc.sum(failed["retry"]).as_py() or 0)
        asked = len(split.clips) + sum(reasons.values())
        severity: Severity = "warning" if again > A_FEW * asked else "note" if reasons else "ok"
        what = f"{sum(reasons.values()):,} of {asked:,} clips failed"
        if reasons:
            what += f" ({', '.join(f'{n:,} {reason}' for reason, n in reasons.most_common())})"
        costs = [explanations.RUN_AGAIN] if again else []
        costs += [words for reason, words in explanations.FAILED.items() if reasons[reason]]
        figures = {"by_reason": dict(reasons), "worth_another_run": again}
        parts = [what, f"{again:,} of them worth another run" if again else ""]
        yield finding("failures", split, severity, parts, costs, figures)
