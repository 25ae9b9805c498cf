"""Recordings of any length from a sandbox: the samples of a preparation, in blocks, around damage."""

import functools
import math
import tempfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.demo.media_server import serve
from pipeline.prepare import stream
from pipeline.prepare.audio.blocks import Block
from pipeline.prepare.audio.decode import decode_media
from pipeline.prepare.clip import ClipError, Reason
from pipeline.prepare.stream import RecordingReader, Source
from tests import fakes

LENGTH_S = 200.0


@pytest.fixture(scope="module")
def reader() -> Iterator[RecordingReader]:
    reader = RecordingReader()
    yield reader
    reader.stop()


@pytest.fixture(scope="module")
def waveform() -> np.ndarray:
    return fakes.noise(LENGTH_S)


@pytest.fixture(scope="module")
def recordings(waveform: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("long")
    return {name: fakes.write_media(folder / f"a.{name}", waveform) for name in ("flac", "m4a", "ogg", "wav")}


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


def samples(blocks: list[Block]) -> np.ndarray:
    return np.concatenate([block.samples for block in blocks])


def offset_s(block: Block, waveform: np.ndarray) -> float:
    """How much later the second second of a block is in the recording than its time says; NaN if it is not there."""
    assert block.begin_s is not None
    begin = round(block.begin_s * 16_000) + 16_000
    heard, there = block.samples[16_000:32_000], waveform[begin - 8_000 : begin + 24_000]
    products = np.fft.irfft(np.fft.rfft(there) * np.conj(np.fft.rfft(heard, len(there))))[:16_000]
    best = int(np.argmax(products))
    return float(best - 8_000) / 16_000 if products[best] > 0.5 * np.dot(heard, heard) else float("nan")


@pytest.mark.parametrize("name", ["flac", "m4a", "ogg", "wav"])
def test_all_blocks_together_are_the_samples_of_a_preparation(
    name: str, recordings: dict[str, Path], reader: RecordingReader
):
    blocks = list(reader.blocks(Source(str(recordings[name])), 16_000))
    expected, _ = decode_media(str(recordings[name]), None, 0.0, None)
    np.testing.assert_array_equal(samples(blocks), expected)
    assert [block.begin_s for block in blocks] == [0.0, *[None] * (len(blocks) - 1)]
    assert len(blocks) >= 4
    assert max(len(block.samples) for block in blocks) < 62 * 16_000
    assert not any(block.lost for block in blocks)


def test_a_section_is_read_at_its_time(recordings: dict[str, Path], reader: RecordingReader):
    path = str(recordings["flac"])
    blocks = list(reader.blocks(Source(path, None, 70.0, 190.0), 16_000))
    expected, _ = decode_media(path, None, 70.0, 120.0)
    np.testing.assert_array_equal(samples(blocks)[: len(expected)], expected)
    assert blocks[0].begin_s == 70.0
    assert abs(len(samples(blocks)) - 120 * 16_000) <= 16


@pytest.mark.parametrize("name", ["flac", "m4a", "ogg"])
def test_around_damage_the_rest_is_read_at_its_time(
    name: str, recordings: dict[str, Path], reader: RecordingReader, tmp_path: Path, waveform: np.ndarray
):
    data = bytearray(recordings[name].read_bytes())
    data[len(data) // 4 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 4)
    damaged = tmp_path / recordings[name].name
    damaged.write_bytes(data)
    blocks = list(reader.blocks(Source(str(damaged)), 16_000))
    (lost,) = [part for block in blocks for part in block.lost]
    assert lost.reason is Reason.TRUNCATED
    assert lost.begin_s == pytest.approx(LENGTH_S / 4, abs=3)
    assert lost.end_s is not None
    assert lost.end_s <= LENGTH_S / 2 + 62  # a file that FFmpeg cannot read on is opened again in steps of a minute
    after = next(block for block in blocks[1:] if block.begin_s is not None)
    assert after.begin_s == pytest.approx(lost.end_s, abs=0.01)
    assert abs(offset_s(after, waveform)) < 0.05  # an AAC packet has 23 ms
    assert len(samples(blocks)) / 16_000 > LENGTH_S / 2


def test_a_file_that_was_cut_says_what_is_missing(recordings: dict[str, Path], reader: RecordingReader, tmp_path: Path):
    cut = tmp_path / "cut.wav"
    cut.write_bytes(recordings["wav"].read_bytes()[: recordings["wav"].stat().st_size // 2])
    blocks = list(reader.blocks(Source(str(cut)), 16_000))
    (lost,) = [part for block in blocks for part in block.lost]
    assert (round(lost.begin_s), lost.end_s) == (100, 200.0)
    assert "by its header" in lost.message


def test_what_cannot_be_read_at_all_raises_its_reason(reader: RecordingReader, tmp_path: Path):
    (tmp_path / "text.wav").write_text("not audio")
    for path, reason in ((tmp_path / "text.wav", Reason.NOT_AUDIO), (tmp_path / "none.wav", Reason.MISSING_FILE)):
        with pytest.raises(ClipError) as raised:
            list(reader.blocks(Source(str(path)), 16_000))
        assert raised.value.reason is reason


def test_after_a_crash_of_the_decoder_the_rest_is_read(recordings: dict[str, Path]):
    """The process that decodes is ended after two blocks, at 120 s; reading goes on a minute later."""
    reader = RecordingReader()
    try:
        blocks = []
        for block in reader.blocks(Source(str(recordings["flac"])), 16_000):
            blocks.append(block)
            if len(blocks) == 2:
                reader.stop()
    finally:
        reader.stop()
    (lost,) = [part for block in blocks for part in block.lost]
    assert (round(lost.begin_s), round(lost.end_s or 0)) == (120, 180)
    assert lost.reason is Reason.CRASHED
    assert blocks[-1].begin_s == pytest.approx(180, abs=0.1)
    assert len(samples(blocks)) / 16_000 == pytest.approx(140, abs=0.2)


def test_a_fetch_whose_process_is_killed_leaves_no_file(
    recordings: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    reader = RecordingReader()
    with serve(recordings["ogg"].parent) as url:
        own = (("127.0.0.1", int(url.rpartition(":")[2])),)
        blocks = reader.blocks(Source(f"{url}/a.ogg", own_hosts=own), 16_000)
        next(blocks)
        assert list(tmp_path.iterdir())
        reader.stop()
        blocks.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("media", "limit_s", "expected_s"),
    [("http://host/a", math.inf, [3600, 120, 120]), ("http://host/a", 60, [60] * 3), ("/a.wav", math.inf, [120] * 3)],
)
def test_only_the_first_block_of_a_url_may_take_long(media: str, limit_s: float, expected_s: list[float]):
    """A recording in pieces is fetched whole before."""
    given = []

    def sandbox(key: int, number: int, what: Any, *, deadline_s: float, folder: str) -> list[Any] | None:
        given.append((deadline_s, bool(folder)))
        return [None, np.zeros(10, np.float32), 1.0, [], False] if number < 2 else None

    reader = RecordingReader(limit_s=limit_s)
    reader._sandbox = sandbox
    assert len(list(reader.blocks(Source(media), 16_000))) == 2
    deadlines_s, has_folder = zip(*given, strict=True)
    assert list(deadlines_s) == pytest.approx(expected_s, abs=30)
    assert has_folder == (media.startswith("http"),) * 3


def test_samples_that_are_no_sound_are_left_out():
    good, bad = np.full(1600, 0.1, np.float32), np.full(1600, np.nan, np.float32)
    made = iter([Block(0.0, good, 1.0), Block(None, bad, 1.0), Block(None, good, 1.0)])
    first, second, third = stream._checked(made, 16_000)
    assert (first.begin_s, len(second.samples), third.begin_s) == (0.0, 0, 0.2)
    assert [(part.begin_s, part.end_s, part.reason) for part in second.lost] == [(0.1, 0.2, Reason.NOT_AUDIO)]


def test_a_recording_at_a_url_is_read_or_says_why(recordings: dict[str, Path], reader: RecordingReader):
    folder = recordings["ogg"].parent
    handler = functools.partial(QuietHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        own = (("127.0.0.1", server.server_port),)
        blocks = list(reader.blocks(Source(f"{url}/a.ogg", own_hosts=own), 16_000))
        expected = samples(list(reader.blocks(Source(str(recordings["ogg"])), 16_000)))
        np.testing.assert_array_equal(samples(blocks), expected)
        for source, reason in (
            (Source(f"{url}/none.ogg", own_hosts=own), Reason.UNAVAILABLE),
            (Source(f"{url}/a.ogg"), Reason.PRIVATE_HOST),
        ):
            with pytest.raises(ClipError) as raised:
                list(reader.blocks(source, 16_000))
            assert raised.value.reason is reason
        server.shutdown()
