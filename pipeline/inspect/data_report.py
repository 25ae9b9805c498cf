"""OUT/report.html: what a data set holds, what is missing and why, to read and to listen to.

Everything is computed from what is on disk, so the page can be made anew at any time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from ast_core.frames import FRAME_SHIFT_MS, LOW_FREQ_HZ, NUM_MEL_BINS, SAMPLE_RATE_HZ, STORED_FLOOR
from pipeline import dataset, storage
from pipeline.dataset import PreparedDataset
from pipeline.html import page
from pipeline.html.page import Cell, Column, Series, Table
from pipeline.inspect import findings as shown
from pipeline.inspect.checks import examine_facts
from pipeline.inspect.dataset_summary import Facts, SplitFacts, gather
from pipeline.prepare.clip import Reason
from pipeline.prepare.output.samples import MAX_SAMPLE_S, read_samples
from pipeline.redaction import without_secrets
from pipeline.versions import VERSION

NUM_SAMPLES = 10
NUM_BINS = 40
"""Of a histogram."""
BRIGHTEST = 6.0
"""Log-mel of the brightest colour; darkest is digital silence. The same for all clips, so that they compare."""

MEANING = {
    Reason.BAD_ID: "The list’s row has an id that no recording has.",
    Reason.BAD_TIME: "The list’s row has a start or end that cannot be.",
    Reason.NO_LABEL: "The list’s row has no label.",
    Reason.UNKNOWN_LABEL: "The list’s row has a label that the vocabulary lacks.",
    Reason.DUPLICATE: "The clip stands in the list before; nothing is missing.",
    Reason.MISSING_FILE: "There was no such file, or it could not be opened.",
    Reason.UNAVAILABLE: "Gone from its host: private, removed, account closed.",
    Reason.RESTRICTED: "There, but not for everyone: region, age, membership.",
    Reason.PRIVATE_HOST: "The URL, or a redirect from it, leads to an address that is not public.",
    Reason.THROTTLED: "The host limits this address.",
    Reason.SETUP: "The fetch could not work here: JavaScript runtime, client, refusal.",
    Reason.NETWORK: "No answer in time, or a broken transfer.",
    Reason.TIMEOUT: "The attempt was not done by its deadline.",
    Reason.TOO_LARGE: "More bytes or memory than a clip may take.",
    Reason.NOT_AUDIO: "What came holds no audio that FFmpeg reads.",
    Reason.TRUNCATED: "More than 5 % of the section or of the file is missing.",
    Reason.SILENT: "Digital silence throughout.",
    Reason.OUT_OF_PHASE: "The channels cancel each other: their mean is next to nothing.",
    Reason.OUT_OF_RANGE: "Floating-point samples of the size of integers.",
    Reason.TOO_SHORT: "Less than one frame of 25 ms.",
    Reason.TOO_LONG: "Longer than a clip may be.",
    Reason.CRASHED: "Fetching or decoding it ended the process that did, twice.",
    Reason.UNFORESEEN: "Something nobody thought of; the message names the error.",
}


def write_report(
    output: str,
    listed: Mapping[str, int] | None = None,
    stored: Mapping[str, pa.Table] | None = None,
    official: Mapping[str, str] | None = None,
) -> str:
    """Write OUT/report.html of a finished data set and return its URI.

    Args:
        listed: rows of the last run's list, by split.
        stored: the shards' small columns, by split, where they have been read already (`scan_shards`).
        official: as `pipeline.inspect.checks.examine` takes it.

    Raises:
        DataError: there is no finished data set, or a file of it is missing or damaged.
    """
    data = PreparedDataset.open(output)
    uri = storage.join(data.uri, "report.html")
    storage.write_bytes(uri, _page(gather(data, official, stored), listed or {}).encode())
    return uri


def _page(facts: Facts, listed: Mapping[str, int]) -> str:
    found = examine_facts(facts)
    tallies = [_Tally.of(split, listed.get(split.name)) for split in facts.splits]
    asked, got = sum(tally.asked for tally in tallies), sum(tally.got for tally in tallies)
    with_clips = [split for split in facts.splits if len(split.clips)]
    hours = sum(float(_durations_s(split).sum()) for split in with_clips) / 3600
    now = datetime.now(UTC)
    return page.render(
        "data_report.html",
        uri=without_secrets(facts.uri),
        made=f"Made {now:%Y-%m-%d %H:%M} UTC by ast-ray {VERSION} from the files of the data set.",
        num_asked=asked,
        num_got=got,
        key_figures=[
            ("clips asked for", page.count(asked)),
            ("clips got", page.count(got)),
            ("missing", page.percent(_share(asked - got, asked))),
            ("of audio", f"{hours:,.1f} h"),
            ("classes", page.count(len(facts.labels))),
        ],
        serious="; ".join(dict.fromkeys(one.what for one in found if one.severity == "serious")),
        by_split=_by_split(tallies),
        split_notes=list(_split_notes(tallies)),
        charts=[*_over_time(facts.uri, with_clips), _durations(with_clips), _levels(with_clips)] if with_clips else [],
        silence=_silence(with_clips),
        clipping=_clipping(with_clips),
        chart_note=_chart_note(with_clips),
        by_reason=_by_reason(facts.splits, asked - got),
        again=_again(facts.splits),
        by_class=_by_class(facts),
        class_notes=list(_class_notes(facts)),
        samples=list(_samples(facts)),
        sample_note=(
            f"Clips whose names have the lowest hashes: no choice of anybody’s. Up to {MAX_SAMPLE_S:.0f} s of each. "
            f"Colours go from −{-STORED_FLOOR:.0f}, digital silence, dark, to {BRIGHTEST:.0f}, bright: natural logs of "
            "mel power."
        ),
        findings=found,
        findings_summary=shown.summary(found),
    )


# --- by split, reason and class


@dataclass(frozen=True)
class _Tally:
    """Rows of this run's list and of earlier ones: asked = got + missing, and beside them rows that repeat a clip."""

    split: str
    got: int
    missing: int
    repeated: int
    again: int
    """Missing clips that a next run tries again."""
    listed: int | None
    """Rows of the last run's list, where it is known."""

    @classmethod
    def of(cls, split: SplitFacts, listed: int | None) -> "_Tally":
        missing = _missing(split)
        again = int(pc.sum(missing["retry"]).as_py() or 0)
        return cls(split.name, len(split.clips), len(missing), len(split.failures) - len(missing), again, listed)

    @property
    def asked(self) -> int:
        return self.got + self.missing


def _missing(split: SplitFacts) -> pa.Table:
    return split.failures.filter(pc.not_equal(split.failures["reason"], str(Reason.DUPLICATE)))


def _by_split(tallies: Sequence[_Tally]) -> Table:
    def row(name: str, of: Sequence[_Tally]) -> list[Cell]:
        asked, got, missing = (sum(getattr(one, what) for one in of) for what in ("asked", "got", "missing"))
        share = _share(missing, asked)
        again = sum(one.again for one in of)
        figures = [*map(_count, (asked, got, missing)), Cell(page.percent(share), share, share), _count(again)]
        return [Cell(name), *figures]

    names = ("asked for", "got", "missing", "share missing", "tried again by a next run")
    return Table(
        caption="Clips of each split",
        columns=[Column("split", is_number=False), *map(Column, names)],
        rows=[row(one.split, [one]) for one in tallies],
        total=row("all", tallies) if len(tallies) > 1 else (),
    )


def _split_notes(tallies: Sequence[_Tally]) -> Iterator[str]:
    if repeated := sum(one.repeated for one in tallies):
        yield f"Rows of the lists that repeat a clip that stands before them: {repeated:,}, counted nowhere above."
    for one in tallies:
        there = one.asked + one.repeated
        if one.listed is not None and one.listed != there:
            why = "; the others are of earlier lists" if there > one.listed else ""
            yield f"{one.split}: the last run’s list has {one.listed:,} rows, the data set accounts for {there:,}{why}."


def _by_reason(splits: Sequence[SplitFacts], num_missing: int) -> Table:
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
            next_run = "if the list is mended" if row["of_list_all"] else f"only with --retry {reason}"
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


def _all_failures(splits: Sequence[SplitFacts]) -> pa.Table:
    columns = ["stage", "reason", "message", "retry"]
    return pa.concat_tables([split.failures.select(columns) for split in splits])


def _again(splits: Sequence[SplitFacts]) -> str:
    again = int(pc.sum(_all_failures(splits)["retry"]).as_py() or 0)
    return f"{again:,} are worth another try by the same command." if again else "Another run would get none of them."


def _failed_by_class(split: SplitFacts) -> tuple[np.ndarray, int]:
    """`[C]`: missing clips with each label; and how many of the missing have no labels on record."""
    missing = _missing(split)
    if "labels" not in missing.column_names:
        return np.zeros(split.num_classes, np.int64), len(missing)
    labelled = missing.filter(pc.greater(pc.fill_null(pc.list_value_length(missing["labels"]), 0), 0))
    return split.class_counts(labelled), len(missing) - len(labelled)


def _knows_asked(facts: Facts) -> bool:
    """Whether missing clips can be told by class: there are none, or their labels are on record."""
    return all(len(_missing(split)) == 0 or _failed_by_class(split)[0].any() for split in facts.splits)


def _by_class(facts: Facts) -> Table:
    """Worst hit first; without labels of the missing, smallest first."""
    got = np.stack([split.class_counts(split.clips) for split in facts.splits])
    missing = np.stack([_failed_by_class(split)[0] for split in facts.splits])
    asked = got + missing
    share = missing.sum(axis=0) / np.maximum(asked.sum(axis=0), 1)
    knows = _knows_asked(facts)
    order = np.lexsort((got.sum(axis=0), -missing.sum(axis=0), -share) if knows else (got.sum(axis=0),))
    several = len(facts.splits) > 1
    rows = []
    for c in order:
        cells = [Cell(facts.labels.names[c], facts.labels.names[c])]
        if knows:
            known_share = _share(missing[:, c].sum(), asked[:, c].sum())
            cells += [_count(asked[:, c].sum()), _count(got[:, c].sum()), _count(missing[:, c].sum())]
            cells.append(Cell(page.percent(known_share), known_share, known_share))
            if several:
                cells += [_of(missing[s, c], asked[s, c]) for s in range(len(facts.splits))]
        else:
            cells.append(_count(got[:, c].sum()))
            cells += [_count(got[s, c]) for s in range(len(facts.splits))] if several else []
        rows.append(cells)
    in_splits = [split.name for split in facts.splits] if several else []
    if knows:
        columns = [*map(Column, ("asked for", "got", "missing")), Column("share missing", is_sorted=True)]
        columns += [Column(f"missing in {name}") for name in in_splits]
    else:
        columns = [Column("got"), *(Column(f"got in {name}") for name in in_splits)]
    caption = "Clips of each class" + (", worst hit first" if knows else ", fewest first")
    return Table(caption, [Column("class", is_number=False), *columns], rows, id="classes")


def _class_notes(facts: Facts) -> Iterator[str]:
    counts = sum(split.class_counts(split.clips) for split in facts.splits)
    without = int((np.asarray(counts) == 0).sum())
    yield f"A clip counts in each of its classes. {without:,} of {len(facts.labels):,} classes have no clip."
    unlabelled = sum(_failed_by_class(split)[1] for split in facts.splits)
    if not _knows_asked(facts):
        yield "Labels of missing clips are not on record: what was asked for is not known by class, only what was got."
    elif unlabelled:
        yield f"Missing clips without labels on record, which are in no class here: {unlabelled:,}."


# --- over time, durations, levels


def _over_time(uri: str, splits: Sequence[SplitFacts]) -> Iterator[Markup]:
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
    yield page.chart(series, title="Clips prepared", x_label=f"{unit} since {began}", y_label="clips")


def _written(uri: str, split: SplitFacts) -> tuple[np.ndarray, np.ndarray]:
    """When each shard was written, in order, and how many clips it brought; NaN where the file system does not know."""
    shard = split.clips["shard"].combine_chunks().dictionary_encode()
    clips = np.bincount(shard.indices.to_numpy(), minlength=len(shard.dictionary))
    modified_s = storage.modified_s(dataset.shards_dir(uri, split.name), suffix=".parquet")
    times = np.array([modified_s.get(name, np.nan) for name in shard.dictionary.to_pylist()])
    order = np.argsort(times, kind="stable")
    return times[order], clips[order]


def _time_unit(span_s: float) -> tuple[float, str]:
    units = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
    return next((size, name) for size, name in units if span_s >= 3 * size or size == 1)


def _durations_s(split: SplitFacts) -> np.ndarray:
    return split.column("end_s") - split.column("start_s")


def _durations(splits: Sequence[SplitFacts]) -> Markup:
    values = [_durations_s(split) for split in splits]
    edges = np.linspace(0, max(1.0, *(float(v.max()) for v in values)), NUM_BINS + 1)
    series = [Series(split.name, edges, np.histogram(v, edges)[0]) for split, v in zip(splits, values, strict=True)]
    return page.chart(
        series, title="Durations", x_label="seconds", y_label="clips (log scale)", log_y_from=page.BELOW_ONE
    )


def _mean_levels(split: SplitFacts) -> np.ndarray:
    """`[clips]`: mean log-mel; NaN and infinity are the doctor's to report."""
    mean = split.column("fbank_sum") / (np.maximum(split.column("num_frames").astype(np.float64), 1) * NUM_MEL_BINS)
    return mean[np.isfinite(mean)]


def _levels(splits: Sequence[SplitFacts]) -> Markup:
    values = [_mean_levels(split) for split in splits]
    every = np.concatenate([*values, [STORED_FLOOR]]) if not any(map(len, values)) else np.concatenate(values)
    edges = np.linspace(np.floor(every.min()), np.floor(every.max()) + 1, NUM_BINS + 1)
    series = [
        Series(split.name, edges, 100 * np.histogram(v, edges)[0] / max(len(v), 1))
        for split, v in zip(splits, values, strict=True)
    ]
    return page.chart(
        series, title="Mean level of a clip", x_label="mean log-mel, nats", y_label="% of the split’s clips"
    )


def _silence(splits: Sequence[SplitFacts]) -> Table:
    def share(split: SplitFacts) -> np.ndarray:
        return split.column("num_silent_frames") / np.maximum(split.column("num_frames"), 1)

    above = {"none": 0.0, "0–10\u00a0%": 0.1, "10–50\u00a0%": 0.5, "50–100\u00a0%": np.nextafter(1, 0), "all": np.inf}
    return _grouped("Clips by their share of digitally silent frames", splits, share, above)


def _clipping(splits: Sequence[SplitFacts]) -> Table:
    up_to = {"none": 0, "1–10": 10, "11–100": 100, "101–1,000": 1000, "more": np.inf}
    caption = "Clips by their number of samples beyond full scale, which were set to ±1"
    return _grouped(caption, splits, lambda split: split.column("num_clipped"), up_to)


def _grouped(caption: str, splits: Sequence[SplitFacts], values: Any, up_to: Mapping[str, float]) -> Table:
    """Clips of each split in groups, each up to and with its bound."""
    rows = []
    for split in splits:
        group = np.searchsorted(list(up_to.values()), values(split))
        counts = np.bincount(group, minlength=len(up_to))
        rows.append([Cell(split.name), *(_count(n, share=n / len(split.clips)) for n in counts)])
    return Table(caption, [Column("split", is_number=False), *map(Column, up_to)], rows)


def _chart_note(splits: Sequence[SplitFacts]) -> str:
    broken = sum(len(split.clips) - len(_mean_levels(split)) for split in splits)
    note = (
        "Time is that of the shards’ files: where a data set was copied, of the copy. Levels are natural logs of mel "
        "power; digital silence is −15.9."
    )
    return note + (f" {broken:,} clips hold NaN or infinity and have no level." if broken else "")


# --- samples


def _samples(facts: Facts) -> Iterator[dict[str, Any]]:
    """The first of those whose clip is in the data set."""
    samples = read_samples(facts.uri)
    splits = {split.name: split for split in facts.splits}
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
        names = [facts.labels.names[c] for c in clip["labels"] if c < len(facts.labels)]
        yield {
            "clip_id": clip["clip_id"],
            "picture": page.picture(
                fbank.T,
                low=STORED_FLOOR,
                high=BRIGHTEST,
                title=", ".join(names) or "no label",
                x_max=len(fbank) * FRAME_SHIFT_MS / 1000,
                x_label="seconds",
                y_ticks=[(_share_of_mel(hz), f"{hz / 1000:g}") for hz in (250, 1000, 2000, 4000, 8000)],
                y_label="kHz, mel scale",
            ),
            "audio": page.data_uri(sample["audio"], "audio/flac"),
            "about": f"{clip['clip_id']}, {split.name}, {clip['end_s'] - clip['start_s']:.2f} s",
        }
        num_shown += 1
        if num_shown == NUM_SAMPLES:
            return


def _share_of_mel(freq_hz: float) -> float:
    """Where a frequency is between the lowest mel bin's lower edge and the highest one's upper edge."""
    low, high, at = (np.log1p(hz / 700) for hz in (LOW_FREQ_HZ, SAMPLE_RATE_HZ / 2, freq_hz))
    return float((at - low) / (high - low))


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def _count(number: int, share: float | None = None) -> Cell:
    return Cell(page.count(number), int(number), share)


def _of(part: int, whole: int) -> Cell:
    share = _share(part, whole)
    return Cell(f"{part:,} of {whole:,}" if whole else "–", share, share)
