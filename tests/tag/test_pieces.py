"""How far readers go ahead of the network, and what waits in memory."""

import threading
import weakref
from collections.abc import Iterator

import numpy as np
import pytest

from ast_core.features import KALDI128
from pipeline.dataset import Clips
from pipeline.tag.pieces import GROUPS_BYTES, PIECE_WINDOWS, WINDOWS_AHEAD, Piece, clip_pieces, merged
from pipeline.tag.windows import WindowSettings
from tests.train.made import clips_of


@pytest.mark.parametrize("windows_per_piece", [1, PIECE_WINDOWS])
def test_a_reader_goes_ahead_by_windows_however_many_a_piece_has(windows_per_piece: int):
    most = WINDOWS_AHEAD // windows_per_piece + 2  # the one that was taken, and the one that waits to be put
    num_read, has_read_most = 0, threading.Event()

    def lane() -> Iterator[Piece]:
        nonlocal num_read
        while True:
            num_read += 1
            if num_read == most:
                has_read_most.set()
            yield Piece(num_read, [None] * windows_per_piece)  # type: ignore[list-item]

    pieces = merged([lane])
    next(pieces)
    assert has_read_most.wait(60)
    pieces.close()  # type: ignore[attr-defined]
    assert num_read == most


def test_the_pieces_of_all_readers_arrive_and_an_error_is_raised():
    def lane(recordings: range) -> Iterator[Piece]:
        yield from map(Piece, recordings)

    def broken() -> Iterator[Piece]:
        yield Piece(-1)
        raise OSError("no such disk")

    pieces = merged([lambda: lane(range(200)), lambda: lane(range(200, 300))])
    assert sorted(piece.recording for piece in pieces) == list(range(300))
    with pytest.raises(OSError, match="no such disk"):
        list(merged([broken]))


def test_long_prepared_clips_wait_on_disk_for_their_other_windows(monkeypatch: pytest.MonkeyPatch):
    """The first windows come first, and nothing that waits keeps the row group of a clip in memory."""
    num_clips, frames = 8, 1000
    groups: list[weakref.ref[np.ndarray]] = []

    class Reader:
        def __init__(self, clips: Clips, groups_in_memory: int) -> None:
            assert groups_in_memory == GROUPS_BYTES // (16 * frames * 128 * 2)

        def __enter__(self) -> "Reader":
            return self

        def __exit__(self, *ending: object) -> None:
            pass

        def __getitem__(self, clip: int) -> np.ndarray:
            group = np.zeros((16 * frames, 128), np.float16)
            group[:frames] = np.arange(frames)[:, None] + clip
            groups.append(weakref.ref(group))
            return group[: 100 if clip == 3 else frames]

    monkeypatch.setattr("pipeline.tag.pieces.FbankReader", Reader)
    clips = clips_of(["shard"] * num_clips, range(num_clips), [np.zeros((frames, 128), np.float16)] * num_clips)
    waiting = []
    for piece in clip_pieces(clips, WindowSettings.of(KALDI128, 100, None, 0.5)):
        waiting.append(piece)
        assert sum(group() is not None for group in groups) <= 1
    longer = [clip for clip in range(num_clips) if clip != 3]
    firsts, others = [(clip, 1, clip == 3) for clip in range(num_clips)], [(clip, 18, True) for clip in longer]
    assert [(piece.recording, len(piece.windows), piece.is_last) for piece in waiting] == firsts + others
    for i, piece in enumerate(waiting):
        for number, window in enumerate(piece.windows, int(i >= num_clips)):
            np.testing.assert_array_equal(window.fbank_TM[:, 0], np.arange(100) + 50 * number + piece.recording)
