"""The stages of tagging: recordings → blocks of waveform → windows → features → scores → events → parts on disk.

This file alone decides which process does what. A *worker* has the models on its device and tags chunk after chunk.
The *readers* of a chunk decode its recordings and compute features: threads of the worker, each with a sandbox, or
tasks on any CPU of the cluster (`on_ray.remote_pieces`), which is how a GPU gets enough windows. A worker has
`WINDOWS_AHEAD` windows a reader in memory, row groups of prepared clips up to `GROUPS_BYTES`, and the scores of the
recordings that it has begun.
"""

import uuid
from collections.abc import Callable, Sequence

from pipeline.locks import exclusive
from pipeline.os_errors import in_spite_of_errors
from pipeline.prepare.fetch.rate_limiter import Permits
from pipeline.redaction import without_secrets
from pipeline.tag import output as tags
from pipeline.tag.changed import changed_lines, changed_since, other_lines
from pipeline.tag.inputs import Inputs
from pipeline.tag.output import Summary, WriteParts
from pipeline.tag.pieces import Chunk, chunks_of
from pipeline.tag.predictor import Member, labels_of
from pipeline.tag.progress import LocalTally, Progress
from pipeline.tag.report import write_report
from pipeline.tag.work import MAX_CHUNK, Job, TagSettings, Worker, Workers, own_hosts

PARTS_ARE_WHOLE = "tagging stopped, all parts written so far are whole"

RunChunks = Callable[[Job, Sequence[Chunk], int, Callable[[str], None]], None]
"""Tags chunks with this many recordings that are left, and shows the progress."""


def tag(
    inputs: Inputs,
    members: Sequence[Member],
    settings: TagSettings,
    output: str,
    workers: Workers,
    *,
    run_chunks: RunChunks | None = None,
    permits: Permits | None = None,
    inputs_given: Sequence[str] = (),
    retry_failed: bool = False,
    say: Callable[[str], None] = print,
) -> Summary:
    """Tag all recordings that are not tagged yet, and publish the results. It can be run again after any failure.

    Args:
        run_chunks: `on_ray.run_chunks`; None tags in this process, without Ray.
        permits: of the rate limiter, for recordings at URLs; None fetches them at once.

    Raises:
        DataError: before any work, if the output contains something else or another job is writing to it.
    """
    identity = settings.to_dict(members)
    with exclusive("tag", output) as held:
        tags.start_output(output, identity)
        earlier = tags.read_done(output)
        changed = changed_since(inputs, earlier)
        done = earlier.final(retry=earlier.names_of_failed() if retry_failed else changed)
        most = _recordings_per_chunk(inputs, workers)
        left = chunks_of(inputs, done.__contains__, most=most, own_hosts=own_hosts(inputs))
        chunks = list(left)
        num_left = sum(len(chunk.names) - len(chunk.done) for chunk in chunks)
        if done:
            say(f"{len(done):,} recordings are done by an earlier run and are not read again, {num_left:,} to do")
            for line in [*other_lines(inputs, earlier.tagged), *changed_lines(changed, earlier.tagged)]:
                say(line)
        write = WriteParts(output, labels_of(members), settings.top, settings.label_format, settings.embeddings, held)
        if chunks:
            run = uuid.uuid4().hex
            job = Job(members, settings, workers, write, run, permits)
            (run_chunks or run_here)(job, chunks, num_left, say)
        held.check()
        with in_spite_of_errors(PARTS_ARE_WHOLE):
            summary = tags.finish(output, inputs.refused, inputs.lists)
            write_report(output, summary, inputs.recordings, settings.windows.features)
            facts = {
                "checkpoints": [without_secrets(member.uri) for member in members],
                "labels": [{"mid": m, "display_name": n} for m, n in _classes(members)],
                "inputs": [without_secrets(uri) for uri in inputs_given],
            }
            held.check()
            tags.write_tags(output, identity, facts, summary)
    return summary


def run_here(job: Job, chunks: Sequence[Chunk], num_recordings: int, say: Callable[[str], None]) -> None:
    """Tag chunks in this process."""
    tally, worker = LocalTally(), Worker(job)
    try:
        with Progress(num_recordings, say, tally.total, job.permits):
            for chunk in chunks:
                worker.tag_chunk(chunk, tally)
    finally:
        worker.stop()


def _recordings_per_chunk(inputs: Inputs, workers: Workers) -> int:
    """Four chunks a worker or more, so that all of them have work until the end."""
    num_clips = sum(data.info["splits"][split]["clips"] for data, splits in inputs.datasets for split in splits)
    number = len(inputs.recordings) + num_clips
    return min(MAX_CHUNK, max(1, -(-number // (4 * max(1, workers.number)))))


def _classes(members: Sequence[Member]) -> list[tuple[str, str]]:
    labels = labels_of(members)
    return list(zip(labels.mids, labels.names, strict=True))
