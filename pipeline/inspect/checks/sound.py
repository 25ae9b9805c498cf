"""Checks of the sound in each clip: length, finite values, silence and clipping."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ast_core.published_inputs import AUDIOSET
from pipeline.inspect import explanations
from pipeline.inspect.checks.check import MOST, finding, for_each_split, grade, percent, silent_clips, some
from pipeline.inspect.dataset_summary import DatasetSummary, SplitSummary
from pipeline.inspect.explanations import published_for
from pipeline.inspect.findings import Finding, Severity, worse

SHORT, SHORT_OK, SHORT_WARNING = 0.95, 0.01, 0.10
"""A section below this share of its listed length is refused as truncated. Other sources have no such check."""
CUT_WARNING = 0.05
"""If one clip in twenty is too long, these are other files than the recipe expects."""

SILENT_CLIPS_OK, SILENT_CLIPS_WARNING = 0.001, 0.01
"""The preparation drops silent clips without --keep-silent. A hundredth of the clips is no accident."""
SILENT_FRAMES_OK, SILENT_FRAMES_WARNING = 0.02, 0.10
"""Recordings have some silent frames. One frame in ten means padding or partly empty sound tracks.

Used only for AudioSet: other data sets pad by design, as ESC-50 does.
"""

CLIPPED_OK, CLIPPED_MOST = 0.001, 0.05
"""Shares of all samples. A resampler's overshoot stays far below the first; above the second the scale is wrong."""


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
        asked = np.array([split.features.num_frames(round(s * split.features.sample_rate_hz)) for s in asked_s])[clip]
        figures["short_share"] = short = float((frames[found] < SHORT * asked).mean())
        severity = grade(short, note=SHORT_OK, warning=SHORT_WARNING, serious=MOST)
        what.append(f"{percent(short)} below {percent(SHORT)} of the listed length")
        costs += [explanations.SHORT] if severity != "ok" else []
    if published := published_for(summary.labels, summary.features):
        figures["cut_share"] = cut = float((frames > published.num_frames).mean())
        if cut:
            severity = worse(severity, grade(cut, note=0.0, warning=CUT_WARNING))
            what.append(f"{percent(cut)} longer than the recipe's {published.num_frames} frames")
            costs.append(explanations.CUT.format(frames=published.num_frames))
    return finding("durations", split, severity, what, costs, figures)


@for_each_split
def check_values(summary: DatasetSummary, split: SplitSummary) -> Finding:
    """NaN or infinity among the stored values."""
    broken = ~np.isfinite(split.column("fbank_sum") + split.column("fbank_sum_sq"))
    ids = split.clips["clip_id"].filter(pa.array(broken)).to_pylist()
    what = f"{len(ids):,} clips contain NaN or infinity: {some(ids, 3)}" if ids else "all values are finite"
    return finding("values", split, "serious" if ids else "ok", [what], [explanations.NOT_FINITE], {"clips": ids})


@for_each_split
def check_silence(summary: DatasetSummary, split: SplitSummary) -> Finding:
    """Clips and frames of digital silence."""
    is_silent = silent_clips(split)
    clips = float(is_silent.mean())
    frames = float(
        split.column("num_silent_frames").sum(dtype=np.int64) / split.column("num_frames").sum(dtype=np.int64)
    )
    severity = grade(clips, note=SILENT_CLIPS_OK, warning=SILENT_CLIPS_WARNING)
    if published_for(summary.labels, summary.features) is AUDIOSET:
        severity = worse(severity, grade(frames, note=SILENT_FRAMES_OK, warning=SILENT_FRAMES_WARNING))
    what = f"{is_silent.sum():,} clips are silent throughout, {percent(clips)}, and {percent(frames)} of the frames"
    figures = {"silent_clips_share": clips, "silent_frames_share": frames}
    return finding("silence", split, severity, [what], [explanations.SILENCE], figures)


@for_each_split
def check_clipping(summary: DatasetSummary, split: SplitSummary) -> Finding:
    """Samples beyond full scale, which the preparation set to ±1."""
    clipped = split.column("num_clipped")
    num_samples = float(split.column("num_frames").sum(dtype=np.int64)) * split.features.frame_shift_samples
    clips, samples = float((clipped > 0).mean()), float(clipped.sum(dtype=np.int64) / num_samples)
    severity = grade(samples, note=CLIPPED_OK, serious=CLIPPED_MOST)
    cost = explanations.CLIPPED_THROUGHOUT if severity == "serious" else explanations.CLIPPING
    what = f"{percent(clips)} of the clips have clipped samples, {percent(samples)} of all samples"
    return finding("clipping", split, severity, [what], [cost], {"clips_share": clips, "samples_share": samples})
