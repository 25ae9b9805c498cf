"""The data's way, on one page: a list of clips → audio → waveform (→ kept) → fbank → shards on disk.

Only this file says how the stages are chained and what each may use. Memory: a task holds one batch, `CLIPS_PER_TASK`
clips until they are features and a shard's clips when they are written.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import DataContext, TaskPoolStrategy

from ast_core.errors import DataError
from pipeline import dataset
from pipeline.prepare.archives import in_reading_order
from pipeline.prepare.clip import under_way
from pipeline.prepare.decode import Decode
from pipeline.prepare.download import Download, is_url
from pipeline.prepare.features import features
from pipeline.prepare.keep import AudioStore, keep_audio
from pipeline.prepare.report import Progress, SplitReport
from pipeline.prepare.shards import SplitState, WriteShards, load_split, publish, start_output
from pipeline.prepare.sources import ClipList

CLIPS_PER_TASK = 8
MIN_SHARD_CLIPS, MAX_SHARD_CLIPS = 16, 128
"""About 3 and 27 MB at 10 s. A short list has small shards, so that all CPUs have some to make."""

MAX_BLOCKS = 10_000
"""Ray keeps a record of each; a longer list has longer blocks, which are still worked on in batches."""

DOWNLOAD_CPUS = 0.25
"""A fetch mostly waits."""


@dataclass(frozen=True, kw_only=True)
class PrepareSettings:
    output: str
    download_workers: int
    timeout_s: float
    keep_silent: bool
    keep_audio: str | None = None
    """URI of a store for what was decoded."""


def prepare(listed: ClipList, settings: PrepareSettings, say: Callable[[str], None] = print) -> list[SplitReport]:
    """Prepare all clips that are not prepared yet, and publish the data set. Safe to run again after any end.

    Raises:
        DataError: before any work, where the output holds something else.
    """
    output = settings.output
    start_output(output, listed.vocabulary)
    store = AudioStore(settings.keep_audio, listed.vocabulary) if settings.keep_audio else None
    if store is not None:
        store.claim()
    splits = pc.unique(pa.chunked_array([*listed.clips["split"].chunks, *listed.refused["split"].chunks])).to_pylist()
    states = {split: load_split(output, split) for split in splits}
    if store is not None:
        for split, state in states.items():
            store.check_has(split, state.prepared["clip_id"])
    todo = _not_yet_done(listed.clips, listed.refused, states)
    progress = Progress(len(todo), say)
    if len(listed.clips) > len(todo):
        say(f"{len(listed.clips) - len(todo)} clips are done by an earlier run, {len(todo)} to do")
    if len(todo):
        for written in _stages(todo, settings, store).iter_rows():
            progress.add(written["reason"], written["clips"])
    refused = {split: listed.refused.filter(pc.equal(listed.refused["split"], split)) for split in splits}
    info = publish(output, listed.vocabulary, refused)
    if store is not None:
        for split in splits:
            store.settle(split, dataset.read_table(dataset.index_file(output, split), ["clip_id", "shard"]))
    listed_clips = {split: _num_listed(listed, split) for split in splits}
    return [SplitReport(split, listed_clips[split], info["splits"][split]) for split in splits]


def _stages(todo: pa.Table, settings: PrepareSettings, store: AudioStore | None) -> ray.data.Dataset:
    _leave_the_terminal_to_us()
    rows = under_way(in_reading_order(todo))
    clips_per_block = max(CLIPS_PER_TASK, -(-len(rows) // MAX_BLOCKS))
    blocks = [rows.slice(i, clips_per_block) for i in range(0, len(rows), clips_per_block)]
    data: ray.data.Dataset = ray.data.from_arrow(blocks)
    if any(map(is_url, todo["media"].to_pylist())):
        compute = TaskPoolStrategy(size=settings.download_workers)
        data = _map(data, Download(timeout_s=settings.timeout_s), num_cpus=DOWNLOAD_CPUS, compute=compute)
    data = _map(data, Decode(keep_silent=settings.keep_silent))
    if store is not None:
        data = _map(data, keep_audio)
    data = _map(data, features)
    # Ray fuses these stages into tasks of a shard each.
    write = WriteShards(settings.output, keep=store.write if store else None)
    return _map(data, write, batch_size=_clips_per_shard(len(rows)))


def _clips_per_shard(num_clips: int) -> int:
    num_tasks = 4 * int(ray.cluster_resources().get("CPU", 1))
    return min(MAX_SHARD_CLIPS, max(MIN_SHARD_CLIPS, -(-num_clips // num_tasks)))


def _leave_the_terminal_to_us() -> None:
    """Our progress counts clips and failures. Ray's warnings still come through, and its log files keep everything."""
    DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # warns that the bars are off
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.WARNING)


def _map(
    data: ray.data.Dataset,
    stage: Callable[[pa.Table], pa.Table],
    *,
    batch_size: int = CLIPS_PER_TASK,
    num_cpus: float = 1,
    compute: TaskPoolStrategy | None = None,
) -> ray.data.Dataset:
    return data.map_batches(
        stage,
        batch_size=batch_size,
        batch_format="pyarrow",
        zero_copy_batch=True,
        num_cpus=num_cpus,
        compute=compute or TaskPoolStrategy(),
    )


def _not_yet_done(clips: pa.Table, refused: pa.Table, states: dict[str, SplitState]) -> pa.Table:
    """Clips that are neither prepared nor failed for good."""
    todo = []
    for split, state in states.items():
        of_split = clips.filter(pc.equal(clips["split"], split))
        _check_same_clips(split, of_split, refused.filter(pc.equal(refused["split"], split)), state.prepared)
        final = state.failures.filter(pc.invert(state.failures["retry"]))
        done = pa.concat_arrays([*state.prepared["clip_id"].chunks, *final["clip_id"].chunks])
        todo.append(of_split.filter(pc.invert(pc.is_in(of_split["clip_id"], value_set=done))))
    return pa.concat_tables(todo).combine_chunks()


def _check_same_clips(split: str, listed: pa.Table, refused: pa.Table, prepared: pa.Table) -> None:
    """A split may grow; it may not turn into another one, nor may labels change under a prepared clip."""
    position = pc.index_in(prepared["clip_id"], value_set=listed["clip_id"].combine_chunks())
    known = prepared.filter(pc.is_valid(position))
    named = pc.is_in(prepared["clip_id"], value_set=refused["clip_id"].combine_chunks())  # no file in this folder, say
    if len(prepared) and not len(known) and not pc.any(named).as_py():
        raise DataError(
            f"split {split!r} there holds {len(prepared)} clips, none of them in this list; give another --split"
        )
    asked = listed["labels"].take(position.drop_null())
    differs = sum(a != b for a, b in zip(known["labels"].to_pylist(), asked.to_pylist(), strict=True))
    if differs:
        raise DataError(f"{differs} clips of split {split!r} are prepared with other labels; give another --output")


def _num_listed(listed: ClipList, split: str) -> int:
    return sum(pc.sum(pc.equal(table["split"], split)).as_py() or 0 for table in (listed.clips, listed.refused))
