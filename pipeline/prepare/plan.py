"""The stages of a preparation: a list of clips → audio → waveform (→ audio store) → fbank → shards on disk.

This file alone decides how the stages are chained and which resources each one gets. One chunk of the work list becomes
one shard, so no task waits for the clips of another. Until its shard is written, a task has `CLIPS_AT_ONCE` waveforms
and the fbanks of a chunk in memory, and a download worker the audio of a chunk. A chunk has up to `MAX_CLIPS` clips, or
`MAX_FETCHED_CLIPS` fetched ones. If a list has both files and URLs, the files are prepared first, on all CPUs.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset

from ast_core.features import KALDI128, FeatureSettings
from ast_core.labels import LabelVocabulary
from pipeline import dataset, storage
from pipeline.cluster import NOT_ON_GPU_NODES
from pipeline.lease import Held
from pipeline.locks import exclusive
from pipeline.os_errors import in_spite_of_errors
from pipeline.prepare.audio.decode import Decode
from pipeline.prepare.audio.features import features
from pipeline.prepare.clip import FAILED_AT, URL_SCHEMES, Reason
from pipeline.prepare.fetch.download import Download, FetchSettings
from pipeline.prepare.fetch.rate_limit_actor import ClusterPermits, cluster_permits
from pipeline.prepare.fetch.ytdlp_settings import check_tools
from pipeline.prepare.output import failures_table
from pipeline.prepare.output.audio_store import AudioStore, check_kept_rates, keep_audio
from pipeline.prepare.output.failures_table import record_media_state
from pipeline.prepare.output.membership import Listed, listed_in
from pipeline.prepare.output.order import shuffled
from pipeline.prepare.output.publish import PUBLISHED, check_output, publish, start_output
from pipeline.prepare.output.same_clips import check_same_clips, other_id_lines, other_media_lines
from pipeline.prepare.output.samples import KeepSamples
from pipeline.prepare.output.shards import SCANNED_AT, WriteShards, scan_shards, scan_some, unknown_shards
from pipeline.prepare.output.split_state import SplitState, clean_up, load_split
from pipeline.prepare.output.work_list import read_chunks, work_list, write_chunks
from pipeline.prepare.progress import Progress, SplitReport
from pipeline.prepare.sources import ClipList
from pipeline.prepare.sources.locate import unread_start_lines
from pipeline.ray_datasets import rows_of, silence_ray
from pipeline.ray_errors import user_errors_from_tasks

CLIPS_AT_ONCE = 8
MIN_CLIPS, MAX_CLIPS = 16, 128
"""Clips per chunk, and so per shard: about 3 and 27 MB at 10 s. A short list gets small chunks, so that all CPUs
work."""

MIN_FETCHED_CLIPS, MAX_FETCHED_CLIPS = 4, 32
"""Clips per chunk of fetched clips. It is smaller because after a crash the whole chunk is fetched again."""

DOWNLOAD_CPUS, STAGE_CPUS = 0.02, 0.95
"""CPUs reserved by all download workers of a job together, and by one task. Download workers mostly wait and live as
long as the job, so they reserve almost nothing: 0.02 + 0.02 + 0.95 fit on one CPU, for two jobs that fetch and a third
one's tasks. The value is not 0, because Ray would then also place them on a head node without CPUs."""

SHARDS_AT_ONCE = 256
"""Shards whose small columns one task reads. From a bucket each takes ten requests, and a process makes few at once."""

LEAST_CPUS = 1e-4
"""The smallest share of a CPU that Ray distinguishes."""

MAX_DEATHS = 3
"""A chunk fails if its task died this often, by a crash, by Ray's memory monitor or together with its node."""

SHARDS_ARE_WHOLE = "the preparation stopped, all shards written so far are whole"

Stage = Callable[[pa.Table], pa.Table]


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    output: str
    keep_silent: bool = False
    download_workers: int = 4
    own_addresses: bool = False
    """Each node uses its own address to reach the hosts; otherwise all nodes share one."""
    fetch: FetchSettings = field(default_factory=FetchSettings)
    retry: frozenset[Reason] = frozenset()
    """Clips that failed for good with one of these reasons are tried again."""
    keep_audio: str | None = None
    """URI of the audio store."""
    features: FeatureSettings = KALDI128


@dataclass(frozen=True)
class RemainingWork:
    clips: pa.Table
    num_listed: int
    failed: dict[str, int]
    """Clips that are not tried again, by reason."""
    num_changed: int
    """Clips that failed for good, but whose file has changed since."""
    notes: list[str] = field(default_factory=list)
    """Lines for the user about the prepared clips."""

    @property
    def num_done(self) -> int:
        return self.num_listed - len(self.clips)

    def line(self) -> str:
        """One line on what earlier runs have done; empty if there was none."""
        if not self.num_done and not self.num_changed:
            return ""
        parts = [f"{self.num_done:,} clips are done by an earlier run, {len(self.clips):,} to do"]
        if self.num_changed:
            parts.append(f"{self.num_changed:,} of these had failed, and their files have changed since")
        if self.failed:
            why = ", ".join(f"{n:,} {reason}" for reason, n in self.failed.items())
            parts.append(
                f"{sum(self.failed.values()):,} of those done have failed ({why}): --retry REASON tries them again"
            )
        return "; ".join(parts)

    @property
    def num_fetches(self) -> int:
        return pc.sum(_are_urls(self.clips)).as_py() or 0

    def by_kind(self) -> tuple[pa.Table, pa.Table]:
        """The clips in files, and those that are fetched."""
        if self.num_fetches in (0, len(self.clips)):  # so that two million clips are not copied
            none = self.clips.slice(0, 0)
            return (none, self.clips) if self.num_fetches else (self.clips, none)
        are_urls = _are_urls(self.clips)
        return self.clips.filter(pc.invert(are_urls)), self.clips.filter(are_urls)


def remaining_work(listed: ClipList, settings: PrepareSettings, say: Callable[[str], None] = print) -> RemainingWork:
    """Return the clips that are neither prepared nor failed for good, without writing anything.

    Raises:
        DataError: the output contains something else.
    """
    check_kept_rates(listed.clips["media"], settings.features.sample_rate_hz)
    check_output(settings.output, listed.vocabulary, settings.features)
    states = {split: load_split(settings.output, split, settings.features) for split in listed.splits}
    return _find_remaining(listed, states, settings, say)


@dataclass(frozen=True)
class Prepared:
    splits: list[SplitReport]
    stored: ray.ObjectRef
    """The scanned columns of the shards, `{split: SCANNED}`, in Ray's object store; the report uses them."""


def prepare(listed: ClipList, settings: PrepareSettings, say: Callable[[str], None] = print) -> Prepared:
    """Prepare all clips that are not prepared yet, and publish the data set. It can be run again after any failure.

    Raises:
        DataError: before any work, if the output contains something else or another job is writing to it.
    """
    splits = listed.splits
    check_kept_rates(listed.clips["media"], settings.features.sample_rate_hz)
    with exclusive("prepare", settings.output) as held, _reserved(listed, settings, say) as store:
        states = {split: _clean_up(settings, split) for split in splits}
        remaining = _find_remaining(listed, states, settings, say)
        if store is not None:
            _check_store(store, listed, states, remaining, say)
        known = ray.put({split: state.prepared for split, state in states.items()})  # not in the driver's memory
        del states
        for line in filter(None, [remaining.line(), *remaining.notes]):
            say(line)
        if len(remaining.clips):
            _prepare_remaining(remaining, settings, store, held, say)
        refused = {split: listed.refused.filter(pc.equal(listed.refused["split"], split)) for split in splits}
        with user_errors_from_tasks(SHARDS_ARE_WHOLE):
            named = {split: listed_in(listed, split) for split in splits}
            published: Any = _publish.remote(
                settings.output, known, listed.vocabulary, refused, named, settings.features, held
            )
            (info, lines), stored = ray.get(published[0]), published[1]
        with in_spite_of_errors(PUBLISHED):
            for line in [*lines, *_leftover_warnings(settings.output, splits)]:
                say(line)
            if store is not None:
                for split in splits:
                    index = dataset.index_file(settings.output, split)
                    store.remove_duplicates(split, dataset.read_table(index, ["clip_id", "shard"]))
    return Prepared([SplitReport(split, info["splits"][split]) for split in splits], stored)


def _leftover_warnings(output: str, splits: Iterable[str]) -> list[str]:
    """Return a warning if the storage refused to delete the work folder. The next run ignores what is in it."""
    work = dataset.work_dir(output)
    if not any(storage.exists(dataset.unpublished_file(output, split)) for split in splits):
        return []
    return [f"warning: the data set is whole, but {work} could not be removed: give this key s3:DeleteObject there"]


def _prepare_remaining(
    remaining: RemainingWork,
    settings: PrepareSettings,
    store: AudioStore | None,
    held: Held,
    say: Callable[[str], None],
) -> None:
    rate_limit, own_addresses = settings.fetch.rate_limit, settings.own_addresses
    files, urls = remaining.by_kind()
    if len(urls):
        check_tools()
    fetching = cluster_permits(rate_limit, own_addresses=own_addresses) if len(urls) else nullcontext()
    with work_list(settings.output) as folder, fetching as permits:
        stages = _stages(remaining.num_listed, settings, store, held)
        for name, clips, permits_of_kind in (("files", files, None), ("urls", urls, permits)):
            if not len(clips):
                continue
            data = _outcomes(clips, storage.join(folder, name), stages, settings, permits_of_kind)
            # Each kind has a rate of its own, from which the time left follows.
            counts = Progress(len(clips), say, permits_of_kind.fetching if permits_of_kind else None)
            with counts as progress, closing(rows_of(data)) as outcomes:
                for written in outcomes:
                    progress.add(written["reason"], written["clips"])


@contextmanager
def _reserved(listed: ClipList, settings: PrepareSettings, say: Callable[[str], None]) -> Iterator[AudioStore | None]:
    """Reserve the output and the audio store, if there is one. The store is locked too, as several outputs may name it.

    Yields:
        The audio store.
    """
    if start_output(settings.output, listed.vocabulary, settings.features):
        labels_csv = dataset.labels_csv(settings.output)
        say(f"no clip was prepared with the labels in {labels_csv}: the labels of this list take their place")
    if settings.keep_audio is None:
        yield None
        return
    store = AudioStore(settings.keep_audio, listed.vocabulary, settings.features.sample_rate_hz)
    with nullcontext() if store.is_at(settings.output) else exclusive("prepare", store.uri):
        store.reserve()
        yield store


def _check_store(
    store: AudioStore,
    listed: ClipList,
    states: dict[str, SplitState],
    remaining: RemainingWork,
    say: Callable[[str], None],
) -> None:
    for split, state in states.items():
        prepared = state.prepared["clip_id"]
        is_listed = pc.is_in(prepared, value_set=listed_in(listed, split).may_stay)
        new = remaining.clips.filter(pc.equal(remaining.clips["split"], split))
        for line in store.check_clips(split, prepared.filter(is_listed), new):
            say(line)


def _clean_up(settings: PrepareSettings, split: str) -> SplitState:
    """Clean up after an interrupted run, and read what is already there."""
    known = scan_in_tasks(settings.output, split, features=settings.features)
    known = scan_shards(settings.output, split, known, settings.features)  # before any shard is written again
    return clean_up(settings.output, split, known, settings.features)


@ray.remote(num_cpus=STAGE_CPUS, num_returns=2, label_selector=NOT_ON_GPU_NODES)
def _publish(
    output: str,
    known: dict[str, pa.Table],
    labels: LabelVocabulary,
    refused: dict[str, pa.Table],
    listed: dict[str, Listed],
    features: FeatureSettings,
    held: Held,
) -> tuple[Any, dict[str, pa.Table]]:
    """Run `publish` in a task, because with two million clips it needs more memory than a driver should use.

    Returns:
        The content of dataset.json with lines for the user, and the scanned columns, which stay in the object store.
    """
    scanned = {split: scan_in_tasks(output, split, rows, features) for split, rows in known.items()}
    info, lines, stored = publish(output, labels, refused, listed, scanned, features, held)
    return (info, lines), stored


def scan_in_tasks(
    output: str, split: str, known: pa.Table | None = None, features: FeatureSettings | None = None
) -> pa.Table:
    """`known`, an earlier result of `scan_shards`, with all other shards if these are too many for one process."""
    if known is None:
        known = SCANNED_AT.empty_table()
    new = unknown_shards(output, split, known)
    if len(new) <= SHARDS_AT_ONCE:
        return known
    with user_errors_from_tasks():
        batches = (new[begin : begin + SHARDS_AT_ONCE] for begin in range(0, len(new), SHARDS_AT_ONCE))
        pieces = [_scan.remote(output, split, names, features) for names in batches]
        return pa.concat_tables([known.select(SCANNED_AT.names), *ray.get(pieces)])


@ray.remote(num_cpus=STAGE_CPUS, label_selector=NOT_ON_GPU_NODES)
def _scan(output: str, split: str, names: list[str], features: FeatureSettings | None) -> pa.Table:
    return scan_some(output, split, names, features)


def _stages(num_listed: int, settings: PrepareSettings, store: AudioStore | None, held: Held) -> "Stages":
    """The stages of a chunk whose clips are read or fetched."""
    per_clip: list[Stage] = [Decode(settings.keep_silent, settings.features), record_media_state]
    per_clip.append(KeepSamples(settings.output, num_listed, settings.features))
    if store is not None:
        per_clip.append(partial(keep_audio, sample_rate_hz=store.sample_rate_hz))
    per_clip.append(partial(features, settings=settings.features))
    write = WriteShards(settings.output, store.write if store else None, settings.features, held)
    return Stages((fail_after_deaths, InSmallBatches(Stages(tuple(per_clip))), shuffled, write))


def _outcomes(
    clips: pa.Table, folder: str, stages: "Stages", settings: PrepareSettings, permits: ClusterPermits | None
) -> Dataset:
    """Rows of WRITTEN for clips, which go through the stages as chunks below `folder`. With `permits` they are
    fetched."""
    silence_ray()
    DataContext.get_current().raise_original_map_exception = True  # otherwise Ray's own error hides the cause
    clips_per_chunk = _clips_per_chunk(len(clips), settings, are_fetched=permits is not None)
    chunks = write_chunks(folder, clips, clips_per_chunk)
    data: Dataset = ray.data.from_items(list(chunks), override_num_blocks=len(chunks))
    data.context.execution_options.label_selector = NOT_ON_GPU_NODES
    if permits is None:
        return _map(data, Stages((read_chunks, stages)), batch_size=1, num_cpus=STAGE_CPUS)
    num_workers = min(settings.download_workers, len(chunks))
    return _map(
        data,
        FetchAndPrepare,
        batch_size=1,
        num_cpus=max(LEAST_CPUS, DOWNLOAD_CPUS / num_workers),
        compute=ActorPoolStrategy(size=num_workers, max_tasks_in_flight_per_actor=1),
        fn_constructor_args=(Download(settings.fetch, permits, features=settings.features), stages),
    )


@dataclass(frozen=True)
class Stages:
    """Runs several stages in one task. Ray fuses stages too, but reads the whole list ahead of those it cannot fuse."""

    stages: tuple[Stage, ...]

    def __call__(self, rows: pa.Table) -> pa.Table:
        with in_spite_of_errors(SHARDS_ARE_WHOLE):  # inside the task: Ray Data replaces the path in an error by advice
            for stage in self.stages:
                rows = stage(rows)
        return rows


@dataclass(frozen=True)
class InSmallBatches:
    """Runs a stage on `CLIPS_AT_ONCE` rows at a time, so that few waveforms are in memory."""

    stage: Stage

    def __call__(self, rows: pa.Table) -> pa.Table:
        pieces = (rows.slice(begin, CLIPS_AT_ONCE) for begin in range(0, len(rows), CLIPS_AT_ONCE))
        return pa.concat_tables(map(self.stage, pieces))


def fail_after_deaths(rows: pa.Table) -> pa.Table:
    """Stage that fails all rows of a chunk if the task that reads them has died too often.

    Ray restarts a task that died without limit. Usually one clip kills it each time, or all clips together need too
    much memory. The job continues with the other chunks.
    """
    worker: Any = ray._private.worker.global_worker  # Ray has no public way to ask for a task's number of attempts
    num_deaths = worker.core_worker.get_current_task_attempt_number()
    if num_deaths < MAX_DEATHS:
        return rows
    message = (
        f"the task that prepared it and {len(rows) - 1} other clips ended {num_deaths} times, killed or out of memory"
    )
    why = {
        "stage": failures_table.CHUNK_STAGE,
        "reason": str(Reason.CRASHED),
        "message": message,
        "attempts": num_deaths,
    }
    is_well = pc.is_null(rows["reason"])
    for column in FAILED_AT:
        filled = pc.if_else(is_well, pa.scalar(why[column.name], column.type), rows[column.name])
        rows = rows.set_column(rows.column_names.index(column.name), column.with_nullable(True), filled)
    return rows


class FetchAndPrepare:
    """Work of a download worker: it fetches the clips of a chunk, and a task prepares them on a free CPU.

    The worker waits for that task. If the task were the next stage, Ray would let fetched chunks accumulate up to its
    limit in bytes.
    """

    def __init__(self, download: Download, prepare_chunk: Stages) -> None:
        self._download, self._prepare_chunk = download, ray.put(prepare_chunk)

    def __call__(self, chunks: pa.Table) -> pa.Table:
        with in_spite_of_errors(SHARDS_ARE_WHOLE):
            fetched = self._download(read_chunks(chunks))
        written: pa.Table = ray.get(_prepare_fetched.remote(self._prepare_chunk, fetched))
        return written


@ray.remote(num_cpus=STAGE_CPUS, max_retries=-1, label_selector=NOT_ON_GPU_NODES)
def _prepare_fetched(stages: Stages, fetched: pa.Table) -> pa.Table:
    return stages(fetched)


def _clips_per_chunk(num_clips: int, settings: PrepareSettings, *, are_fetched: bool) -> int:
    num_tasks = 4 * (settings.download_workers if are_fetched else _num_cpus())
    least, most = (MIN_FETCHED_CLIPS, MAX_FETCHED_CLIPS) if are_fetched else (MIN_CLIPS, MAX_CLIPS)
    return min(most, max(least, -(-num_clips // num_tasks)))


def _num_cpus() -> int:
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _map(data: Dataset, stage: Callable[..., pa.Table], **options: Any) -> Dataset:
    return data.map_batches(stage, batch_format="pyarrow", zero_copy_batch=True, **options)


def _are_urls(clips: pa.Table) -> pa.ChunkedArray:
    return pc.or_(*(pc.starts_with(clips["media"], scheme) for scheme in URL_SCHEMES))


def _find_remaining(
    listed: ClipList, states: dict[str, SplitState], settings: PrepareSettings, say: Callable[[str], None]
) -> RemainingWork:
    clips = listed.clips
    remaining, failed, num_changed, notes = [], Counter[str](), 0, list[str]()
    for split, state in states.items():
        of_split = clips if len(states) == 1 else clips.filter(pc.equal(clips["split"], split))
        if len(state.prepared):
            check_same_clips(split, of_split, listed, state.prepared)
            notes += other_id_lines(split, of_split, state.prepared)
            notes += other_media_lines(settings.output, split, of_split, state.prepared, say)
        final = failures_table.final(state.failures, settings.retry)
        final = final.filter(pc.is_in(final["clip_id"], value_set=of_split["clip_id"].combine_chunks()))
        has_changed = failures_table.has_changed(final, of_split)
        num_changed += int(has_changed.sum())
        final = final.filter(pa.array(~has_changed))
        failed.update(failures_table.by_reason(final))
        done = pa.concat_arrays([*state.prepared["clip_id"].chunks, *final["clip_id"].chunks])
        # For one new split, the two million clips are not copied.
        is_left = pc.invert(pc.is_in(of_split["clip_id"], value_set=done)) if len(done) else None
        remaining.append(of_split if is_left is None else of_split.filter(is_left))
    left = pa.concat_tables(remaining)
    notes += unread_start_lines(left)
    return RemainingWork(left, len(clips), dict(failed.most_common()), num_changed, notes)
