"""OUT/report.html: the content of a data set, what is missing and why, and samples to listen to.

Everything is computed from the files on disk, so the page can be written again at any time. The module is long because
the page has many parts, each of which is one short function.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from ast_core.features import FeatureSettings
from pipeline import dataset, storage
from pipeline.dataset import PreparedDataset
from pipeline.html import charts, page
from pipeline.html.charts import Series
from pipeline.html.page import Cell, Column, Table
from pipeline.inspect import findings as shown
from pipeline.inspect.checks import examine_summary
from pipeline.inspect.dataset_summary import DatasetSummary, SplitSummary, summarize
from pipeline.prepare.clip import Reason
from pipeline.prepare.output.samples import MAX_SAMPLE_S, read_samples
from pipeline.redaction import without_secrets
from pipeline.versions import VERSION

NUM_SAMPLES = 10
NUM_BINS = 40
"""Bins of a histogram."""
BRIGHTEST = 6.0
"""Natural logarithm of the power of the brightest colour; the darkest is digital silence. All samples use the same
scale."""

MEANING = {
    Reason.BAD_ID: "The list’s row has an id that no recording has.",
    Reason.BAD_TIME: "The list’s row has an impossible start or end.",
    Reason.NO_LABEL: "The list’s row has no label.",
    Reason.UNKNOWN_LABEL: "The list’s row has a label that the vocabulary lacks.",
    Reason.DUPLICATE: "The clip is in an earlier row of the list; nothing is missing.",
    Reason.MISSING_FILE: "The file does not exist, or could not be opened.",
    Reason.UNAVAILABLE: "The host no longer has it: private, removed, account closed.",
    Reason.RESTRICTED: "The host restricts it by region, age or membership.",
    Reason.PRIVATE_HOST: "The URL, or a redirect from it, leads to an address that is not public.",
    Reason.THROTTLED: "The host limits this address.",
    Reason.SETUP: "The fetch cannot work on this machine: JavaScript runtime, client, or the host refuses it.",
    Reason.NETWORK: "No answer in time, or a broken transfer.",
    Reason.TIMEOUT: "The attempt did not finish by its deadline.",
    Reason.TOO_LARGE: "It needs more bytes or memory than a clip may take.",
    Reason.NOT_AUDIO: "It contains no audio that FFmpeg can read.",
    Reason.TRUNCATED: "More than 5 % of the section or of the file is missing.",
    Reason.SILENT: "Digital silence throughout.",
    Reason.OUT_OF_PHASE: "The channels cancel each other: their mean is almost silent.",
    Reason.OUT_OF_RANGE: "Floating-point samples with the range of integers.",
    Reason.TOO_SHORT: "Less than one frame of 25 ms.",
    Reason.TOO_LONG: "Longer than a clip may be.",
    Reason.CRASHED: "Fetching or decoding it crashed the process twice.",
    Reason.UNFORESEEN: "An unexpected error; the message names it.",
}


def write_report(
    output: str,
    listed: Mapping[str, int] | None = None,
    stored: Mapping[str, pa.Table] | None = None,
    official: Mapping[str, str] | None = None,
) -> str:
    """Write OUT/report.html of a finished data set and return its URI.

    Args:
        listed: Rows of the last run's list, by split.
        stored: The shards' small columns (`scan_shards`), by split, of shards that were read already.
        official: Official lists, by split, as in `pipeline.inspect.checks.examine`.

    Raises:
        DataError: there is no finished data set, or a file of it is missing or damaged.
    """
    data = PreparedDataset.open(output)
    uri = storage.join(data.uri, "report.html")
    storage.write_bytes(uri, _page(summarize(data, official, stored), listed or {}).encode())
    return uri


def _page(summary: DatasetSummary, listed: Mapping[str, int]) -> str:
    found = examine_summary(summary)
    tallies = [_Tally.of(split, listed.get(split.name)) for split in summary.splits]
    asked, got = sum(tally.asked for tally in tallies), sum(tally.got for tally in tallies)
    with_clips = [split for split in summary.splits if len(split.clips)]
    hours = sum(float(_durations_s(split).sum()) for split in with_clips) / 3600
    now, scale = datetime.now(UTC), summary.features.log_scale
    return page.render(
        "data_report.html",
        uri=without_secrets(summary.uri),
        made=f"Made {now:%Y-%m-%d %H:%M} UTC by ast-ray {VERSION} from the files of the data set.",
        num_asked=asked,
        num_got=got,
        key_figures=[
            ("clips asked for", page.count(asked)),
            ("clips got", page.count(got)),
            ("missing", page.percent(_share(asked - got, asked))),
            ("of audio", f"{hours:,.1f} h"),
            ("classes", page.count(len(summary.labels))),
        ],
        serious="; ".join(dict.fromkeys(one.what for one in found if one.severity == "serious")),
        by_split=_by_split(tallies),
        split_notes=list(_split_notes(tallies)),
        charts=[*_over_time(summary.uri, with_clips), _durations(with_clips), _levels(with_clips)]
        if with_clips
        else [],
        silence=_silence(with_clips),
        clipping=_clipping(with_clips),
        chart_note=_chart_note(with_clips),
        by_reason=_by_reason(summary.splits, asked - got),
        again=_again(summary.splits),
        by_class=_by_class(summary),
        class_notes=list(_class_notes(summary)),
        samples=list(_samples(summary)),
        sample_note=(
            f"A random sample: the clips whose names have the lowest hashes, up to {MAX_SAMPLE_S:.0f} s of each. "
            f"Colours show log-mel in {scale.unit}, from −{-summary.features.floor:.0f} (digital silence, dark) to "
            f"{BRIGHTEST / scale.nats_per_unit:.0f} (bright)."
        ),
        findings=found,
        findings_summary=shown.summary(found),
    )


# --- by split, reason and class


@dataclass(frozen=True)
class _Tally:
    """Counts of the rows of this run's list and of earlier ones. Rows that repeat a clip are counted separately."""

    split: str
    got: int
    missing: int
    repeated: int
    again: int
    """Missing clips that the next run will try again."""
    listed: int | None
    """Rows of the last run's list, if it is known."""

    @classmethod
    def of(cls, split: SplitSummary, listed: int | None) -> "_Tally":
        missing = _missing(split)
        again = int(pc.sum(missing["retry"]).as_py() or 0)
        return cls(split.name, len(split.clips), len(missing), len(split.failures) - len(missing), again, listed)

    @property
    def asked(self) -> int:
        return self.got + self.missing


def _missing(split: SplitSummary) -> pa.Table:
    return split.failures.filter(pc.not_equal(split.failures["reason"], str(Reason.DUPLICATE)))


def _by_split(tallies: Sequence[_Tally]) -> Table:
    def row(name: str, of: Sequence[_Tally]) -> list[Cell]:
        asked, got, missing = (sum(getattr(one, what) for one in of) for what in ("asked", "got", "missing"))
        share = _share(missing, asked)
        again = sum(one.again for one in of)
        figures = [*map(_count, (asked, got, missing)), Cell(page.percent(share), share, share), _count(again)]
        return [Cell(name), *figures]

    names = ("asked for", "got", "missing", "share missing", "tried again by the next run")
    return Table(
        caption="Clips of each split",
        columns=[Column("split", is_number=False), *map(Column, names)],
        rows=[row(one.split, [one]) for one in tallies],
        total=row("all", tallies) if len(tallies) > 1 else (),
    )


def _split_notes(tallies: Sequence[_Tally]) -> Iterator[str]:
    if repeated := sum(one.repeated for one in tallies):
        yield f"Rows of the lists that repeat a clip of an earlier row: {repeated:,}, not counted above."
    for one in tallies:
        accounted = one.asked + one.repeated
        if one.listed is not None and one.listed != accounted:
            why = "; the others are from earlier lists" if accounted > one.listed else ""
            yield (f"{one.split}: the last run’s list has {one.listed:,} rows, the data set has {accounted:,}{why}.")


def _by_reason(splits: Sequence[SplitSummary], num_missing: int) -> Table:
    failures = _all_failures(splits)
    messages = failures.group_by(["reason", "message"]).aggregate([([], "count_all")])
    messages = messages.sort_by([("count_all", "descending"), ("message", "ascending")])
    example = dict(zip(*(messages[name].to_pylist()[::-1] for name in ("reason", "message")), strict=True))
    failures = failures.append_column("of_list", pc.equal(failures["stage"], "source"))
    tallies = failures.group_by("reason").aggregate([([], "count_all"), ("retry", "any"), ("of_list", "all")])
    rows = []
    for row in tallies.sort_by([("count_all", "descending"), ("reason", "ascending")]).to_pylist():
        reason, clips = row["reason"], row["count_all"]
        share = None if reason == Reason.DUPLICATE else _share(clips, num_missing)
        if reason == Reason.DUPLICATE:
            next_run = "–"
        elif row["retry_any"]:
            next_run = "tries again"
        else:
            next_run = "if the list is fixed" if row["of_list_all"] else f"only with --retry {reason}"
        named = Cell(reason, note=MEANING[Reason(reason)])
        share_cell = Cell(page.percent(share), share, share)
        rows.append([named, _count(clips), share_cell, Cell(next_run), Cell("", note=example[reason])])
    return Table(
        caption="Clips that could not be prepared",
        columns=[
            Column("reason", is_number=False),
            Column("clips"),
            Column("share of missing"),
            Column("next run", is_number=False),
            Column("its most frequent message", is_number=False),
        ],
        rows=rows,
    )


def _all_failures(splits: Sequence[SplitSummary]) -> pa.Table:
    columns = ["stage", "reason", "message", "retry"]
    return pa.concat_tables([split.failures.select(columns) for split in splits])


def _again(splits: Sequence[SplitSummary]) -> str:
    again = int(pc.sum(_all_failures(splits)["retry"]).as_py() or 0)
    return f"The same command will try {again:,} of them again." if again else "Another run would get none of them."


def _failed_by_class(split: SplitSummary) -> tuple[np.ndarray, int]:
    """`[C]`: the number of missing clips with each class; and the number of missing clips without recorded labels."""
    missing = _missing(split)
    if "labels" not in missing.column_names:
        return np.zeros(split.num_classes, np.int64), len(missing)
    labelled = missing.filter(pc.greater(pc.fill_null(pc.list_value_length(missing["labels"]), 0), 0))
    return split.class_counts(labelled), len(missing) - len(labelled)


def _knows_asked(summary: DatasetSummary) -> bool:
    """Whether missing clips can be counted by class: there are none, or their labels are recorded."""
    return all(len(_missing(split)) == 0 or _failed_by_class(split)[0].any() for split in summary.splits)


def _by_class(summary: DatasetSummary) -> Table:
    """A table of classes: highest missing share first, or fewest clips first if missing clips have no labels."""
    got = np.stack([split.class_counts(split.clips) for split in summary.splits])
    missing = np.stack([_failed_by_class(split)[0] for split in summary.splits])
    asked = got + missing
    share = missing.sum(axis=0) / np.maximum(asked.sum(axis=0), 1)
    knows = _knows_asked(summary)
    order = np.lexsort((got.sum(axis=0), -missing.sum(axis=0), -share) if knows else (got.sum(axis=0),))
    several = len(summary.splits) > 1
    rows = []
    for c in order:
        cells = [Cell(summary.labels.names[c], summary.labels.names[c])]
        if knows:
            known_share = _share(missing[:, c].sum(), asked[:, c].sum())
            cells += [_count(asked[:, c].sum()), _count(got[:, c].sum()), _count(missing[:, c].sum())]
            cells.append(Cell(page.percent(known_share), known_share, known_share))
            if several:
                cells += [_of(missing[s, c], asked[s, c]) for s in range(len(summary.splits))]
        else:
            cells.append(_count(got[:, c].sum()))
            cells += [_count(got[s, c]) for s in range(len(summary.splits))] if several else []
        rows.append(cells)
    in_splits = [split.name for split in summary.splits] if several else []
    if knows:
        columns = [*map(Column, ("asked for", "got", "missing")), Column("share missing", is_sorted=True)]
        columns += [Column(f"missing in {name}") for name in in_splits]
    else:
        columns = [Column("got"), *(Column(f"got in {name}") for name in in_splits)]
    caption = "Clips of each class" + (", worst hit first" if knows else ", fewest first")
    return Table(caption, [Column("class", is_number=False), *columns], rows, id="classes")


def _class_notes(summary: DatasetSummary) -> Iterator[str]:
    counts = sum(split.class_counts(split.clips) for split in summary.splits)
    without = int((np.asarray(counts) == 0).sum())
    yield f"A clip counts in each of its classes. {without:,} of {len(summary.labels):,} classes have no clip."
    unlabelled = sum(_failed_by_class(split)[1] for split in summary.splits)
    if not _knows_asked(summary):
        yield "Labels of missing clips were not recorded: by class only the clips that were got are known."
    elif unlabelled:
        yield f"Missing clips without recorded labels, which are in no class here: {unlabelled:,}."


# --- over time, durations, levels


def _over_time(uri: str, splits: Sequence[SplitSummary]) -> Iterator[Markup]:
    written = {split.name: _written(uri, split) for split in splits}
    every_s = np.concatenate([times for times, _ in written.values()])
    if np.isnan(every_s).any():
        return
    first_s, last_s = float(every_s.min()), float(every_s.max())
    unit_s, unit = _time_unit(last_s - first_s)
    series = []
    for name, (times, clips) in written.items():
        x = (np.concatenate([[first_s, times[0]], times, [last_s]]) - first_s) / unit_s
        series.append(Series(name, x, np.concatenate([[0, 0], np.cumsum(clips), [clips.sum()]])))
    began = f"{datetime.fromtimestamp(first_s, UTC):%Y-%m-%d %H:%M} UTC"
    yield charts.chart(series, title="Clips prepared", x_label=f"{unit} since {began}", y_label="clips")


def _written(uri: str, split: SplitSummary) -> tuple[np.ndarray, np.ndarray]:
    """The sorted modification times of the shards (NaN if the file system has none), and the clips of each."""
    shard = split.clips["shard"].combine_chunks().dictionary_encode()
    clips = np.bincount(shard.indices.to_numpy(), minlength=len(shard.dictionary))
    modified_s = storage.modified_s(dataset.shards_dir(uri, split.name), suffix=".parquet")
    times = np.array([modified_s.get(name, np.nan) for name in shard.dictionary.to_pylist()])
    order = np.argsort(times, kind="stable")
    return times[order], clips[order]


def _time_unit(span_s: float) -> tuple[float, str]:
    units = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
    return next((size, name) for size, name in units if span_s >= 3 * size or size == 1)


def _durations_s(split: SplitSummary) -> np.ndarray:
    return split.column("end_s") - split.column("start_s")


def _durations(splits: Sequence[SplitSummary]) -> Markup:
    values = [_durations_s(split) for split in splits]
    edges = np.linspace(0, max(1.0, *(float(v.max()) for v in values)), NUM_BINS + 1)
    series = [Series(split.name, edges, np.histogram(v, edges)[0]) for split, v in zip(splits, values, strict=True)]
    return charts.chart(
        series, title="Durations", x_label="seconds", y_label="clips (log scale)", log_y_from=charts.BELOW_ONE
    )


def _mean_levels(split: SplitSummary) -> np.ndarray:
    """`[clips]`: mean log-mel, without NaN and infinity, which the doctor reports."""
    num_values = np.maximum(split.column("num_frames").astype(np.float64), 1) * split.features.num_mel_bins
    mean = split.column("fbank_sum") / num_values
    return mean[np.isfinite(mean)]


def _levels(splits: Sequence[SplitSummary]) -> Markup:
    values = [_mean_levels(split) for split in splits]
    features = splits[0].features
    every = np.concatenate(values) if any(map(len, values)) else np.array([features.floor])
    edges = np.linspace(np.floor(every.min()), np.floor(every.max()) + 1, NUM_BINS + 1)
    series = [
        Series(split.name, edges, 100 * np.histogram(v, edges)[0] / max(len(v), 1))
        for split, v in zip(splits, values, strict=True)
    ]
    return charts.chart(
        series,
        title="Mean level of a clip",
        x_label=f"mean log-mel, {features.log_scale.unit}",
        y_label="% of the split’s clips",
    )


def _silence(splits: Sequence[SplitSummary]) -> Table:
    def share(split: SplitSummary) -> np.ndarray:
        return split.column("num_silent_frames") / np.maximum(split.column("num_frames"), 1)

    above = {"none": 0.0, "0–10\u00a0%": 0.1, "10–50\u00a0%": 0.5, "50–100\u00a0%": np.nextafter(1, 0), "all": np.inf}
    return _grouped("Clips by their share of digitally silent frames", splits, share, above)


def _clipping(splits: Sequence[SplitSummary]) -> Table:
    up_to = {"none": 0, "1–10": 10, "11–100": 100, "101–1,000": 1000, "more": np.inf}
    caption = "Clips by their number of samples beyond full scale, which were set to ±1"
    return _grouped(caption, splits, lambda split: split.column("num_clipped"), up_to)


def _grouped(caption: str, splits: Sequence[SplitSummary], values: Any, up_to: Mapping[str, float]) -> Table:
    """A table of each split's clips in groups. A group includes its upper bound."""
    rows = []
    for split in splits:
        group = np.searchsorted(list(up_to.values()), values(split))
        counts = np.bincount(group, minlength=len(up_to))
        rows.append([Cell(split.name), *(_count(n, share=n / len(split.clips)) for n in counts)])
    return Table(caption, [Column("split", is_number=False), *map(Column, up_to)], rows)


def _chart_note(splits: Sequence[SplitSummary]) -> str:
    if not splits:
        return ""
    broken = sum(len(split.clips) - len(_mean_levels(split)) for split in splits)
    features = splits[0].features
    note = (
        "Times are modification times of the shards; in a copied data set, those of the copy. Levels are means of "
        f"log-mel in {features.log_scale.unit}; digital silence is −{-features.floor:.1f}."
    )
    return note + (f" {broken:,} clips contain NaN or infinity and have no level." if broken else "")


# --- samples


def _samples(summary: DatasetSummary) -> Iterator[dict[str, Any]]:
    """The first NUM_SAMPLES samples whose clip is in the data set."""
    features = summary.features
    ticks_hz = [hz for hz in (250, 1000, 2000, 4000, 8000, 16_000) if hz <= features.upper_freq_hz]
    samples = read_samples(summary.uri, features.num_mel_bins)
    splits = {split.name: split for split in summary.splits}
    num_shown = 0
    for sample in samples.to_pylist():
        if sample["split"] not in splits:
            continue
        split = splits[sample["split"]]
        row = pc.index(split.clips["clip_id"], sample["clip_id"]).as_py()
        if row < 0:
            continue
        clip = split.clips.slice(row, 1).to_pylist()[0]
        fbank = np.array(sample["fbank"], np.float16)
        names = [summary.labels.names[c] for c in clip["labels"] if c < len(summary.labels)]
        yield {
            "clip_id": clip["clip_id"],
            "picture": charts.picture(
                fbank.T,
                low=features.floor,
                high=BRIGHTEST / features.log_scale.nats_per_unit,
                title=", ".join(names) or "no label",
                x_max=features.seconds(len(fbank)),
                x_label="seconds",
                y_ticks=[(_share_of_mel(hz, features), f"{hz / 1000:g}") for hz in ticks_hz],
                y_label="kHz, mel scale",
            ),
            "audio": page.data_uri(sample["audio"], "audio/flac"),
            "about": f"{clip['clip_id']}, {split.name}, {clip['end_s'] - clip['start_s']:.2f} s",
        }
        num_shown += 1
        if num_shown == NUM_SAMPLES:
            return


def _share_of_mel(freq_hz: float, features: FeatureSettings) -> float:
    """Position of a frequency on the mel scale: 0 at the lowest bin's lower edge, 1 at the highest bin's upper edge."""
    low, high, at = map(features.mel, (features.low_freq_hz, features.upper_freq_hz, freq_hz))
    return (at - low) / (high - low)


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def _count(number: int, share: float | None = None) -> Cell:
    return Cell(page.count(number), int(number), share)


def _of(part: int, whole: int) -> Cell:
    share = _share(part, whole)
    return Cell(f"{part:,} of {whole:,}" if whole else "–", share, share)
