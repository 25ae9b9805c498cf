"""The windows of recordings and prepared clips, piece by piece, and chunks of work."""

import hashlib
import queue
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, TypeVar

from pipeline.dataset import Clips, PreparedDataset, shards_dir
from pipeline.prepare.audio.blocks import Block, Lost
from pipeline.prepare.clip import ClipError, printable
from pipeline.prepare.fetch.rate_limiter import Permits, wait_for_permit
from pipeline.prepare.sources.locate import host_of
from pipeline.prepare.stream import URL_SCHEMES, RecordingReader, Source
from pipeline.recording_names import clip_name_prefix
from pipeline.redaction import without_secrets_of
from pipeline.tag.inputs import Inputs
from pipeline.tag.windows import Window, Windower, WindowSettings, fbank_windows
from pipeline.train.data.fbank_reader import FbankReader

T = TypeVar("T")

PIECE_WINDOWS = 32
"""Windows that travel together: 8 MB of features of 10 s."""

WINDOWS_AHEAD = 4 * PIECE_WINDOWS
"""Windows of a reader that wait for the network: several batches, whether recordings are short or long."""

GROUPS_BYTES = 1 << 30
"""Memory for row groups of prepared clips: as many as a chunk of clips of 10 s is in, wherever they lie."""


@dataclass(frozen=True)
class Piece:
    """Some windows of a recording, and what could not be read."""

    recording: int
    """Its number within a chunk."""
    windows: Sequence[Window] = ()
    lost: Sequence[Lost] = ()
    is_last: bool = False


@dataclass(frozen=True)
class Chunk:
    """Recordings that one worker tags, one part of its results after the other."""

    names: Sequence[str]
    sources: Sequence[Source] = ()
    """Where the recordings are; empty for prepared clips."""
    clips: Clips | None = None
    done: frozenset[str] = frozenset()
    """Prepared clips among them whose results are there. They are scored again, because batches stay whole."""

    @cached_property
    def name(self) -> str:
        """The beginning of its files' names, a function of its recordings."""
        return hashlib.sha256("\n".join(self.names).encode()).hexdigest()[:20]

    def without(self, done: Container[str]) -> "Chunk":
        """What is left to do. The recordings keep their numbers only in a chunk of prepared clips."""
        if self.clips is not None:
            return replace(self, done=self.done | {name for name in self.names if name in done})
        left = [i for i, name in enumerate(self.names) if name not in done]
        return Chunk([self.names[i] for i in left], [self.sources[i] for i in left])

    def lane(self, number: int, num_lanes: int) -> tuple[list[int], list[Source]]:
        """The recordings, with their numbers, that one of several readers reads."""
        numbers = list(range(number, len(self.names), num_lanes))
        return numbers, [self.sources[i] for i in numbers]


def chunks_of(inputs: Inputs, is_done: Callable[[str], bool], *, most: int, own_hosts: Any) -> Iterator[Chunk]:
    """The work that is left, in chunks of at most `most` recordings.

    Chunks of prepared clips are cut at multiples of a batch, so that their batches are those of evaluation.
    """
    rows = [row for row in inputs.recordings.to_pylist() if not is_done(row["recording"])]
    for some in in_groups(rows, most):
        sources = [
            Source(row["media"], row["member"], row["start_s"], row["end_s"], own_hosts if row["is_own"] else ())
            for row in some
        ]
        yield Chunk([row["recording"] for row in some], sources)
    step = PIECE_WINDOWS * max(1, most // PIECE_WINDOWS)
    for data, splits in inputs.datasets:
        clips = data.clips(splits)
        names = clip_names(data, splits, clips)
        for begin in range(0, len(clips), step):
            end = min(begin + step, len(clips))
            done = frozenset(filter(is_done, names[begin:end]))
            if len(done) < end - begin:
                yield Chunk(names[begin:end], clips=clips.part(begin, end), done=done)


def clip_names(data: PreparedDataset, splits: Sequence[str], clips: Clips) -> list[str]:
    """The names of prepared clips as recordings."""
    prefix_of = {shards_dir(data.shards_uri, split): clip_name_prefix(data.uri, split) for split in splits}
    prefix_of_shard = [prefix_of[shard.rpartition("/")[0]] for shard in clips.shards]
    ids = clips.clip_id.to_pylist()
    return [f"{prefix_of_shard[shard]}{clip_id}" for shard, clip_id in zip(clips.shard_of.tolist(), ids, strict=True)]


class Readers:
    """The readers of this process, for several threads. Each has a process that decodes, which takes half a second to
    start and so goes on with the next recordings.
    """

    def __init__(self, permits: Permits | None = None) -> None:
        """Args:
        permits: of the rate limiter, for recordings at URLs; None fetches them at once.
        """
        self.permits = permits
        self._idle: queue.SimpleQueue[RecordingReader] = queue.SimpleQueue()

    def pieces(self, numbers: Sequence[int], sources: Sequence[Source], settings: WindowSettings) -> Iterator[Piece]:
        """The pieces of recordings, one after the other. A recording that fails has a last piece that says why."""
        try:
            reader = self._idle.get_nowait()
        except queue.Empty:
            reader = RecordingReader()
        try:
            for number, source in zip(numbers, sources, strict=True):
                blocks = reader.blocks(source, settings.features.sample_rate_hz)  # it reads with the first block
                pieces = pieces_of(number, source, settings, blocks)
                is_paced = self.permits is not None and source.media.startswith(URL_SCHEMES)
                yield from self._paced(pieces, host_of(source.media)) if is_paced else pieces
        finally:
            self._idle.put(reader)

    def _paced(self, pieces: Iterator[Piece], host: str) -> Iterator[Piece]:
        """Wait for a permit, and report how the fetch ended."""
        assert self.permits is not None
        address, reason = wait_for_permit(self.permits, host), None
        try:
            for number, piece in enumerate(pieces):
                if number == 0 and piece.is_last and piece.lost:
                    reason = piece.lost[0].reason
                yield piece
        finally:
            self.permits.report(address, host, reason)

    def stop(self) -> None:
        """End the processes that decode."""
        while not self._idle.empty():
            self._idle.get().stop()


def pieces_of(number: int, source: Source, settings: WindowSettings, blocks: Iterator[Block]) -> Iterator[Piece]:
    """The pieces of a recording, whose blocks a `RecordingReader` reads. If it fails, the last piece says why."""
    windower = Windower(settings)
    try:
        for some in in_groups(windower.windows(blocks), PIECE_WINDOWS):
            yield Piece(number, some)
        lost = windower.lost
    except ClipError as err:
        lost = [*windower.lost, Lost(source.start_s, None, err.reason, err.message)]
    shown = [replace(part, message=printable(without_secrets_of(source.media, part.message))) for part in lost]
    yield Piece(number, lost=shown, is_last=True)


def clip_pieces(clips: Clips, settings: WindowSettings) -> Iterator[Piece]:
    """The pieces of prepared clips. The first windows of all clips come first, in the order of evaluation.

    A clip with more windows is read again for the others: those of a chunk of long clips may have gigabytes.
    """
    of_group = clips.row_group_clips * int(clips.num_frames.max()) * clips.num_mel_bins * 2
    with FbankReader(clips, max(1, GROUPS_BYTES // of_group)) as reader:
        longer: list[int] = []
        for number in range(len(clips)):
            first, *others = fbank_windows(reader[number], settings)
            # Copies, because a view keeps all of its row group in memory.
            yield Piece(number, [replace(first, fbank_TM=first.fbank_TM.copy())], is_last=not others)
            longer += [number] if others else []
        for number in longer:
            yield Piece(number, fbank_windows(reader[number].copy(), settings)[1:], is_last=True)


def in_groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items; the last one may be shorter. (`itertools.batched` of Python 3.12)"""
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


class _WindowQueue(queue.Queue["Piece | BaseException | None"]):
    """A queue whose size is a number of windows: a few pieces of short recordings are less than a batch."""

    def _init(self, maxsize: int) -> None:
        super()._init(maxsize)
        self._size = 0

    def _qsize(self) -> int:
        return self._size

    def _put(self, item: "Piece | BaseException | None") -> None:
        super()._put(item)
        self._size += _size(item)

    def _get(self) -> "Piece | BaseException | None":
        item = super()._get()
        self._size -= _size(item)
        return item


def _size(item: "Piece | BaseException | None") -> int:
    return max(1, len(item.windows)) if isinstance(item, Piece) else 1


def merged(lanes: Sequence[Callable[[], Iterator[Piece]]]) -> Iterator[Piece]:
    """The pieces of several readers, as they come. Each reader has a thread, and errors are raised here."""
    ready = _WindowQueue(WINDOWS_AHEAD * len(lanes))
    is_over = threading.Event()

    def put(item: Piece | BaseException | None) -> None:
        while not is_over.is_set():
            try:
                return ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def read(lane: Callable[[], Iterator[Piece]]) -> None:
        pieces = lane()
        try:
            for piece in pieces:
                put(piece)
                if is_over.is_set():
                    break
            put(None)
        except BaseException as err:
            put(err)
        finally:
            pieces.close()  # type: ignore[attr-defined]  # ends the process that decodes

    threads = [threading.Thread(target=read, args=(lane,), name="tag-read", daemon=True) for lane in lanes]
    for thread in threads:
        thread.start()
    try:
        num_left = len(threads)
        while num_left:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                num_left -= 1
            else:
                yield item
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
