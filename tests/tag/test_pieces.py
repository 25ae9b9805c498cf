"""How far readers go ahead of the network."""

import threading
from collections.abc import Iterator

import pytest

from pipeline.tag.pieces import PIECE_WINDOWS, WINDOWS_AHEAD, Piece, merged


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
