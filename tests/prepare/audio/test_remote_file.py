"""Reads of a file in object storage: the same bytes, by few requests that fetch little more than the section."""

import io
from pathlib import Path

import numpy as np
import pytest

from pipeline.prepare.audio.decode import decode_section
from pipeline.prepare.audio.remote_file import JUMP_BYTES, SMALL_BYTES, RemoteFile
from tests import fakes

RECORDING_S, CLIP_S = 300.0, 10.0


class Storage(io.RawIOBase):
    """Counts reads, each of which object storage answers as one request."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.file, self.reads = io.BytesIO(data), list[tuple[int, int]]()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.file.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        begin = self.file.tell()
        data = self.file.read(size)
        if data:
            self.reads.append((begin, len(data)))
        return data

    @property
    def num_bytes(self) -> int:
        return sum(length for _, length in self.reads)


def opened(data: bytes) -> tuple[RemoteFile, Storage]:
    stored = Storage(data)
    return RemoteFile(stored, len(data)), stored  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(20))
def test_reads_anywhere_give_the_bytes_of_the_file(seed: int):
    rng = np.random.default_rng(seed)
    data = rng.bytes(int(rng.integers(1, 3 * SMALL_BYTES)))
    remote, _ = opened(data)
    plain = io.BytesIO(data)
    for _ in range(100):
        if rng.random() < 0.2:
            remote.expect(float(rng.random()))
        if rng.random() < 0.5:
            place, whence = int(rng.integers(0, len(data) + 10)), int(rng.integers(0, 3))
            place -= {io.SEEK_SET: 0, io.SEEK_CUR: plain.tell(), io.SEEK_END: len(data)}[whence]
            assert remote.seek(place, whence) == plain.seek(place, whence)
        size = int(rng.choice([0, 1, 8, JUMP_BYTES, 100_000, -1], p=[0.1, 0.2, 0.3, 0.3, 0.09, 0.01]))
        assert remote.read(size) == plain.read(size)
        assert remote.tell() == plain.tell()


def test_a_file_that_became_shorter_ends_there():
    stored = Storage(bytes(1000))
    remote = RemoteFile(stored, 1 << 20)  # type: ignore[arg-type]
    assert remote.read(5000) == bytes(1000)
    assert remote.read(5000) == b""
    with pytest.raises(ValueError, match="no place -1"):
        remote.seek(-1)


def test_a_small_file_is_one_request():
    data = bytes(range(256)) * 1000
    remote, stored = opened(data)
    while remote.read(JUMP_BYTES):
        pass
    assert stored.reads == [(0, len(data))]


def test_reading_on_asks_for_more_each_time():
    remote, stored = opened(bytes(20 << 20))
    while remote.read(JUMP_BYTES):
        pass
    assert stored.num_bytes == 20 << 20
    assert len(stored.reads) <= 14


KINDS = ("webm", "m4a", "ogg", "flac", "wav")


@pytest.mark.parametrize("kind", KINDS)
def test_a_section_costs_fewer_requests_than_ffmpegs_reads_and_few_more_bytes(kind: str, tmp_path: Path):
    sound = np.tile(fakes.noise(CLIP_S), int(RECORDING_S / CLIP_S))
    path = fakes.write_media(tmp_path / f"a.{kind}", sound, channels=2)
    data = path.read_bytes()
    for start_s in (0.0, 17.3, 123.456, 285.0):
        (remote, stored), plain = opened(data), Storage(data)
        waveform = decode_section(remote, start_s, CLIP_S)  # type: ignore[arg-type]
        np.testing.assert_array_equal(waveform, decode_section(plain, start_s, CLIP_S))  # type: ignore[arg-type]
        assert stored.num_bytes <= 1.3 * plain.num_bytes, stored.reads
        assert len(stored.reads) <= 0.9 * len(plain.reads), stored.reads


@pytest.mark.parametrize("kind", [*KINDS, "mp3"])
@pytest.mark.parametrize("sound_s", [10.0, 30.0])
def test_a_whole_file_is_a_few_requests(kind: str, sound_s: float, tmp_path: Path):
    path = fakes.write_media(tmp_path / f"a.{kind}", fakes.noise(sound_s), channels=2)
    remote, stored = opened(path.read_bytes())
    waveform = decode_section(remote, 0.0, None)  # type: ignore[arg-type]
    np.testing.assert_array_equal(waveform, decode_section(f"file:{path}", 0.0, None))
    if path.stat().st_size <= SMALL_BYTES:
        assert stored.reads == [(0, path.stat().st_size)]
    elif kind != "ogg":  # FFmpeg looks for its end, and we for joined streams
        assert stored.num_bytes <= 1.1 * path.stat().st_size
        assert len(stored.reads) <= 7, stored.reads
