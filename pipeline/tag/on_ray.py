"""Tagging on Ray: workers as an actor pool of Ray Data, readers as streaming tasks."""

import pickle
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property, partial
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError

from ast_core.errors import ConfigError
from pipeline.cluster import on_this_node, resources_of_nodes
from pipeline.os_errors import in_spite_of_errors
from pipeline.prepare.fetch.rate_limiter import Permits
from pipeline.prepare.stream import Source
from pipeline.ray_datasets import rows_of, silence_ray
from pipeline.tag.pieces import Chunk, Piece, Readers
from pipeline.tag.plan import PARTS_ARE_WHOLE
from pipeline.tag.progress import LocalTally, Progress, RemoteTally
from pipeline.tag.windows import WindowSettings
from pipeline.tag.work import Job, Worker, Workers

READER_CPUS = 1.0
PIECES_AHEAD = 4
"""Pieces of a reader's task that wait on Ray."""

GPU_READERS = 8
"""Readers of a worker with a GPU: an H200 takes 450 windows of 10 s a second, a core decodes 40 of them."""

DEATHS = (WorkerCrashedError, NodeDiedError, OutOfMemoryError, ObjectLostError)
"""Errors of a reader whose process or node has ended."""


class TagChunks:
    """A worker: a stage from rows with a chunk to rows with its number of recordings."""

    def __init__(self, job: Any, tally: RemoteTally) -> None:
        import torch

        self._job: Job = ray.get(job)
        torch.set_num_threads(max(1, int(self._job.workers.cpus)))
        self._tally = tally

    @cached_property
    def _worker(self) -> Worker:
        """Made with the first chunk: of an error in the constructor, Ray would only say that the actor died."""
        return Worker(self._job)

    def __call__(self, rows: pa.Table) -> pa.Table:
        chunks: list[Chunk] = [pickle.loads(row) for row in rows["chunk"].to_pylist()]
        with in_spite_of_errors(PARTS_ARE_WHOLE):
            for chunk in chunks:
                self._tag(chunk)
        self._tally.send()
        return pa.table({"recordings": [len(chunk.names) for chunk in chunks]})

    def _tag(self, chunk: Chunk) -> None:
        """Tag a chunk, and begin it again if a reader died with its node. The third time the chunk fails."""
        while True:
            try:
                return self._worker.tag_chunk(chunk, self._tally)
            except DEATHS:
                continue


def run_chunks(job: Job, chunks: Sequence[Chunk], num_recordings: int, say: Callable[[str], None]) -> None:
    """Tag chunks by workers of a pool.

    Raises:
        UserError: a fault of a machine or of storage.
    """
    silence_ray()
    DataContext.get_current().raise_original_map_exception = True  # otherwise Ray's own error hides the cause
    tally_actor: Any = ray.remote(LocalTally).options(**on_this_node()).remote()
    items = [{"chunk": pickle.dumps(chunk)} for chunk in chunks]
    data: Dataset = ray.data.from_items(items, override_num_blocks=len(items))
    workers = job.workers
    data = data.map_batches(
        TagChunks,
        fn_constructor_args=(ray.put(job), RemoteTally(tally_actor)),
        batch_format="pyarrow",
        batch_size=1,
        zero_copy_batch=True,
        num_cpus=workers.cpus,
        num_gpus=workers.gpus or None,
        compute=ActorPoolStrategy(size=min(workers.number, len(chunks)), max_tasks_in_flight_per_actor=1),
    )
    with Progress(num_recordings, say, partial(_total, tally_actor), job.permits):
        for _ in rows_of(data, PARTS_ARE_WHOLE):
            pass


def _total(tally: Any) -> tuple[dict[str, int], float]:
    outcomes, seconds = ray.get(tally.total.remote())
    return outcomes, seconds


def remote_pieces(
    numbers: Sequence[int], sources: Sequence[Source], settings: WindowSettings, *, permits: Permits | None
) -> Iterator[Piece]:
    """`Readers.pieces` by a task on any node, at most `PIECES_AHEAD` pieces ahead."""
    read: Any = ray.remote(_read).options(
        num_cpus=READER_CPUS,
        max_retries=0,  # the pieces before its death are scored already: the worker begins its chunk again
        num_returns="streaming",
        _generator_backpressure_num_objects=PIECES_AHEAD,
    )
    for piece in read.remote(numbers, sources, settings, permits):
        yield ray.get(piece)


def _read(
    numbers: Sequence[int], sources: Sequence[Source], settings: WindowSettings, permits: Permits | None
) -> Iterator[Piece]:
    readers = _readers_of_process()
    readers.permits = permits
    yield from readers.pieces(numbers, sources, settings)


@cache
def _readers_of_process() -> Readers:
    """The readers of a process of Ray, which runs a task for each chunk of the same job."""
    return Readers()


def workers_of_cluster(
    *,
    wanted: str,
    is_local: bool,
    number: int | None,
    cpus: int,
    gpus: float,
    readers: int | None,
    batch_windows: int,
) -> Workers:
    """Workers for the resources that the cluster has now.

    Args:
        wanted: the device: auto, cpu or cuda.
        is_local: Ray runs on this machine only.
        number: of workers; None takes as many as there is room for.

    Raises:
        ConfigError: a GPU is wanted, and this machine has none.
    """
    nodes = resources_of_nodes()
    num_gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if wanted == "cuda" and not num_gpus and is_local:
        raise ConfigError("--device cuda needs a GPU, this machine has none; use cpu")
    if wanted == "cuda" or (wanted == "auto" and num_gpus):
        return Workers(
            number=number or max(1, num_gpus * int(1 / gpus)),
            device="cuda",
            cpus=0,
            gpus=gpus,
            num_readers=readers or GPU_READERS,
            read=remote_pieces,
            batch_windows=batch_windows,
        )
    cpus_of_nodes = [int(node.get("CPU", 0)) for node in nodes]
    cpus = min(cpus, max([1, *cpus_of_nodes]))  # a worker is on one node
    return Workers(
        number=number or max(1, sum(n // cpus for n in cpus_of_nodes)),
        device="cpu",
        cpus=cpus,
        num_readers=readers or 1,
        batch_windows=batch_windows,
    )
