"""The data's way, on one page: a list of clips → audio → waveform (→ kept) → fbank → shards on disk.

Only this file says how the stages are chained and what each may use. One chunk of the list becomes one shard, so no
task waits for clips of another. In memory, a task holds `CLIPS_AT_ONCE` waveforms and a chunk's fbanks, and a download
worker the audio of one chunk, until its shard is written: `MAX_CLIPS` a CPU, or `MAX_FETCHED_CLIPS` a download worker.
"""

import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset

from pipeline import dataset, storage
from pipeline.locks import exclusive
from pipeline.os_errors import in_spite_of_errors
from pipeline.prepare.audio.decode import Decode
from pipeline.prepare.audio.features import features
from pipeline.prepare.clip import FAILED_AT, Reason
from pipeline.prepare.fetch.download import URL_SCHEMES, Download, FetchSettings
from pipeline.prepare.fetch.rate_limit_actor import ClusterTurns, cluster_turns
from pipeline.prepare.fetch.ytdlp import check_tools
from pipeline.prepare.output import failures_table
from pipeline.prepare.output.audio_store import AudioStore, keep_audio
from pipeline.prepare.output.failures_table import note_media
from pipeline.prepare.output.membership import listed_in
from pipeline.prepare.output.order import shuffled
from pipeline.prepare.output.same_clips import check_same_clips, newer_media_lines
from pipeline.prepare.output.samples import KeepSamples
from pipeline.prepare.output.shards import (
    PUBLISHED,
    SplitState,
    WriteShards,
    check_output,
    load_split,
    publish,
    start_output,
    tidy,
)
from pipeline.prepare.output.work_list import read_chunks, work_list, write_todo
from pipeline.prepare.progress import Progress, SplitReport
from pipeline.prepare.sources import ClipList
from pipeline.ray_errors import user_errors_from_tasks

CLIPS_AT_ONCE = 8
MIN_CLIPS, MAX_CLIPS = 16, 128
"""Of a chunk, and so of a shard: about 3 and 27 MB at 10 s. A short list has small ones, so that all CPUs have some."""

MIN_FETCHED_CLIPS, MAX_FETCHED_CLIPS = 4, 32
"""The same where clips are fetched: what a kill may cost is fetched again."""

DOWNLOAD_CPUS, STAGE_CPUS = 0.02, 0.95
"""Of all download workers of a job together, and of a task. A fetch mostly waits, and its worker stays for the whole
job: what it holds no task ever gets, and one CPU has to do for two jobs that fetch and the tasks of a third. Without
any, download workers would go to a head that is to do no work."""

LEAST_CPUS = 1e-4
"""Ray counts no finer."""

MAX_DEATHS = 3
"""Of the task of a chunk, by a crash of its process, by Ray's memory monitor or with its node."""

SHARDS_ARE_WHOLE = "the preparation stopped, all shards written so far are whole"

Stage = Callable[[pa.Table], pa.Table]


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    output: str
    keep_silent: bool = False
    download_workers: int = 4
    own_addresses: bool = False
    """Each node reaches the hosts by an address of its own; else all share one."""
    fetch: FetchSettings = field(default_factory=FetchSettings)
    retry: frozenset[Reason] = frozenset()
    """Reasons for which clips that failed for good are tried again."""
    keep_audio: str | None = None
    """URI of a store for what was decoded."""


@dataclass(frozen=True)
class Todo:
    clips: pa.Table
    num_listed: int
    failed: dict[str, int]
    """Clips that stay failed, by reason."""
    num_changed: int
    """Clips that had failed for good, and whose file has changed since."""
    notes: list[str] = field(default_factory=list)
    """What the user should know of the clips that are prepared, a line each."""

    @property
    def num_done(self) -> int:
        return self.num_listed - len(self.clips)

    def line(self) -> str:
        """What an earlier run has done, empty if there was none."""
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
        return _num_urls(self.clips)


def what_is_left(listed: ClipList, settings: PrepareSettings) -> Todo:
    """Clips that are neither prepared nor failed for good. Nothing is written.

    Raises:
        DataError: where the output holds something else.
    """
    check_output(settings.output, listed.vocabulary)
    return _left(listed, {split: load_split(settings.output, split) for split in listed.splits}, settings)


@dataclass(frozen=True)
class Prepared:
    splits: list[SplitReport]
    stored: ray.ObjectRef
    """What the shards hold, `{split: SCANNED}`, in Ray's object store: the report need not open them again."""


def prepare(listed: ClipList, settings: PrepareSettings, say: Callable[[str], None] = print) -> Prepared:
    """Prepare all clips that are not prepared yet, and publish the data set. Safe to run again after any end.

    Raises:
        DataError: before any work, where the output holds something else, or another job is at work on it.
    """
    splits = listed.splits
    with exclusive("prepare", settings.output):
        store, states = _open_output(listed, settings, say)
        todo = _left(listed, states, settings)
        known = ray.put({split: state.prepared for split, state in states.items()})  # not in the driver's memory
        del states
        for line in filter(None, [todo.line(), *todo.notes]):
            say(line)
        if len(todo.clips):
            _work_off(todo, settings, store, say)
        refused = {split: listed.refused.filter(pc.equal(listed.refused["split"], split)) for split in splits}
        with user_errors_from_tasks(SHARDS_ARE_WHOLE):
            named = {split: listed_in(listed, split) for split in splits}
            published = _publish.remote(settings.output, listed.vocabulary, refused, named, known)
            (info, lines), stored = ray.get(published[0]), published[1]
        with in_spite_of_errors(PUBLISHED):
            for line in [*lines, *_left_over(settings.output, splits)]:
                say(line)
            if store is not None:
                for split in splits:
                    index = dataset.index_file(settings.output, split)
                    store.settle(split, dataset.read_table(index, ["clip_id", "shard"]))
    return Prepared([SplitReport(split, info["splits"][split]) for split in splits], stored)


def _left_over(output: str, splits: Iterable[str]) -> list[str]:
    """A line where storage forbids deleting, by what publishing removes; the next run does not use what is left."""
    work = dataset.work_dir(output)
    if not any(storage.exists(dataset.unpublished_file(output, split)) for split in splits):
        return []
    return [f"warning: the data set is whole, but {work} could not be removed: give this key s3:DeleteObject there"]


def _work_off(todo: Todo, settings: PrepareSettings, store: AudioStore | None, say: Callable[[str], None]) -> None:
    pace, own_addresses = settings.fetch.pace, settings.own_addresses
    fetching = cluster_turns(pace, own_addresses=own_addresses) if todo.num_fetches else nullcontext()
    with (
        work_list(settings.output) as folder,
        fetching as turns,
        Progress(len(todo.clips), say, turns.fetching if turns else None) as progress,
        closing(_written(_stages(todo, folder, settings, turns, store))) as outcomes,
    ):
        for written in outcomes:
            progress.add(written["reason"], written["clips"])


def _open_output(
    listed: ClipList, settings: PrepareSettings, say: Callable[[str], None]
) -> tuple[AudioStore | None, dict[str, SplitState]]:
    """Claim the output, and the store if audio is to be kept; tidy what a kill left there, and read back the rest."""
    if start_output(settings.output, listed.vocabulary):
        labels_csv = dataset.labels_csv(settings.output)
        say(f"no clip was prepared with the labels in {labels_csv}: the labels of this list take their place")
    store = AudioStore(settings.keep_audio, listed.vocabulary) if settings.keep_audio else None
    if store is not None:
        store.claim()
    states = {}
    for split in listed.splits:
        states[split] = tidy(settings.output, split)
        if store is not None:
            prepared = states[split].prepared["clip_id"]
            is_listed = pc.is_in(prepared, value_set=listed_in(listed, split).may_stay)
            store.check_has(split, prepared.filter(is_listed))
    return store, states


@ray.remote(num_cpus=STAGE_CPUS, num_returns=2)
def _publish(*args: Any) -> tuple[Any, dict[str, pa.Table]]:
    """`publish` in a task, since with two million clips it takes more memory than a driver should.

    Returns:
        The content of dataset.json with lines for the user, and what is stored, which the driver does not fetch.
    """
    info, lines, stored = publish(*args)
    return (info, lines), stored


def _stages(
    todo: Todo, folder: str, settings: PrepareSettings, turns: ClusterTurns | None, store: AudioStore | None
) -> Dataset:
    _leave_the_terminal_to_us()
    DataContext.get_current().raise_original_map_exception = True  # Ray's own in its place would not name the cause
    clips_per_chunk = _clips_per_chunk(todo, settings)
    chunks = write_todo(folder, todo.clips, clips_per_chunk)
    data: Dataset = ray.data.from_items(list(chunks), override_num_blocks=len(chunks))
    per_clip: list[Stage] = [Decode(keep_silent=settings.keep_silent), note_media]
    per_clip.append(KeepSamples(settings.output, todo.num_listed))
    if store is not None:
        per_clip.append(keep_audio)
    write = WriteShards(settings.output, keep=store.write if store else None)
    prepare_chunk = (give_up, AFewAtOnce(Stages((*per_clip, features))), shuffled, write)
    if turns is None:
        return _map(data, Stages((read_chunks, *prepare_chunk)), batch_size=1, num_cpus=STAGE_CPUS)
    check_tools()
    num_workers = min(settings.download_workers, len(chunks))
    return _map(
        data,
        FetchAndPrepare,
        batch_size=1,
        num_cpus=max(LEAST_CPUS, DOWNLOAD_CPUS / num_workers),
        compute=ActorPoolStrategy(size=num_workers, max_tasks_in_flight_per_actor=1),
        fn_constructor_args=(Download(settings.fetch, turns), Stages(prepare_chunk)),
    )


@dataclass(frozen=True)
class Stages:
    """One after another, in one task. Ray fuses stages too; what it cannot fuse it reads ahead, to the list's end."""

    stages: tuple[Stage, ...]

    def __call__(self, rows: pa.Table) -> pa.Table:
        with in_spite_of_errors(SHARDS_ARE_WHOLE):  # here, as Ray Data puts advice in the place of an error's path
            for stage in self.stages:
                rows = stage(rows)
        return rows


@dataclass(frozen=True)
class AFewAtOnce:
    """A stage for `CLIPS_AT_ONCE` rows after the others, so that few waveforms are in memory."""

    stage: Stage

    def __call__(self, rows: pa.Table) -> pa.Table:
        pieces = (rows.slice(begin, CLIPS_AT_ONCE) for begin in range(0, len(rows), CLIPS_AT_ONCE))
        return pa.concat_tables(map(self.stage, pieces))


def give_up(rows: pa.Table) -> pa.Table:
    """A stage: rows under way in and out, all of them failed if the task that reads them has died too often.

    Ray runs a task again whatever ended it, for ever. What kills each of them is one of its clips, or all of them
    together: too little memory, most often. The job goes on with the other chunks.
    """
    worker: Any = ray._private.worker.global_worker  # Ray tells a task's number of attempts nowhere else
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
    """What a download worker does with a chunk: it fetches the clips, and has a task prepare them where a CPU is free.

    It waits for that. As a stage that follows, Ray would let fetched chunks pile up, limited by their bytes alone.
    """

    def __init__(self, download: Download, prepare_chunk: Stages) -> None:
        self._download, self._prepare_chunk = download, ray.put(prepare_chunk)

    def __call__(self, chunks: pa.Table) -> pa.Table:
        with in_spite_of_errors(SHARDS_ARE_WHOLE):
            fetched = self._download(read_chunks(chunks))
        written: pa.Table = ray.get(_prepare_fetched.remote(self._prepare_chunk, fetched))
        return written


@ray.remote(num_cpus=STAGE_CPUS, max_retries=-1)
def _prepare_fetched(stages: Stages, fetched: pa.Table) -> pa.Table:
    return stages(fetched)


def _clips_per_chunk(todo: Todo, settings: PrepareSettings) -> int:
    fetched = todo.num_fetches > 0
    num_tasks = 4 * (settings.download_workers if fetched else _num_cpus())
    least, most = (MIN_FETCHED_CLIPS, MAX_FETCHED_CLIPS) if fetched else (MIN_CLIPS, MAX_CLIPS)
    return min(most, max(least, -(-len(todo.clips) // num_tasks)))


def _num_cpus() -> int:
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _map(data: Dataset, stage: Callable[..., pa.Table], **options: Any) -> Dataset:
    return data.map_batches(stage, batch_format="pyarrow", zero_copy_batch=True, **options)


def _written(data: Dataset) -> Generator[dict[str, Any]]:
    """Counts by outcome, as they come.

    Whatever ends the loop over them, the Dataset's executor has ended too: its thread would start another Ray when this
    one is shut down. Ray ends it by itself only while it waits for a row, or when the iterator is collected as garbage.
    """
    rows = data.iter_rows()
    try:
        with user_errors_from_tasks():
            yield from rows
    finally:
        executor = data._current_executor
        if executor is not None:
            executor.shutdown(force=True)


def _leave_the_terminal_to_us() -> None:
    """Our progress counts clips and failures, and the job shows an error that is raised: as one line where that does,
    while Ray prints the traceback of each. Ray's warnings still come through, and its log files keep everything.
    """
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.issue_detectors_config.high_memory_detector_config.detection_time_interval_s = -1  # a chunk is the bound
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # warns that the bars are off
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.WARNING)
            handler.addFilter(_is_not_a_raised_error)


def _is_not_a_raised_error(record: logging.LogRecord) -> bool:
    return not record.exc_info and record.name != "ray.data.exceptions"


def _num_urls(clips: pa.Table) -> int:
    return sum(pc.sum(pc.starts_with(clips["media"], scheme)).as_py() or 0 for scheme in URL_SCHEMES)


def _left(listed: ClipList, states: dict[str, SplitState], settings: PrepareSettings) -> Todo:
    clips = listed.clips
    todo, failed, num_changed, notes = [], Counter[str](), 0, list[str]()
    for split, state in states.items():
        of_split = clips if len(states) == 1 else clips.filter(pc.equal(clips["split"], split))
        if len(state.prepared):
            check_same_clips(split, of_split, listed, state.prepared)
            notes += newer_media_lines(settings.output, split, of_split, state.prepared)
        final = failures_table.final(state.failures, settings.retry)
        final = final.filter(pc.is_in(final["clip_id"], value_set=of_split["clip_id"].combine_chunks()))
        has_changed = failures_table.has_changed(final, of_split)
        num_changed += int(has_changed.sum())
        final = final.filter(pa.array(~has_changed))
        failed.update(failures_table.by_reason(final))
        done = pa.concat_arrays([*state.prepared["clip_id"].chunks, *final["clip_id"].chunks])
        # Two million clips of one new split are not copied.
        is_left = pc.invert(pc.is_in(of_split["clip_id"], value_set=done)) if len(done) else None
        todo.append(of_split if is_left is None else of_split.filter(is_left))
    return Todo(pa.concat_tables(todo), len(clips), dict(failed.most_common()), num_changed, notes)
