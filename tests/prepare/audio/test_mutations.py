"""Damaged or forged media are decoded or give a row with a reason, without a crash, a hang or a lack of memory."""

import io
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from ast_core.features import KALDI128
from jobs.prepare_audioset import main
from pipeline.dataset import PreparedDataset
from pipeline.prepare.audio.decode import FORMATS, decode_section
from pipeline.prepare.clip import MAX_CLIP_S, ClipError, Reason
from tests import fakes

NUM_MUTATED = 1000
MAX_CHILD_BYTES = 300 << 20
"""The libraries without any media need 110 MB."""

ORDERLY = {
    Reason.NOT_AUDIO, Reason.TRUNCATED, Reason.TOO_SHORT, Reason.TOO_LONG, Reason.SILENT, Reason.OUT_OF_RANGE,
}  # fmt: skip
"""Allowed reasons for damaged media. `network` is not among them, because the file can be read."""

Mutation = Callable[[np.random.Generator, bytes, bytes], bytes]
"""Changes a file, with the help of another one of any format."""


def flip_bits(rng: np.random.Generator, media: bytes, other: bytes) -> bytes:
    damaged = np.frombuffer(media, np.uint8).copy()
    places = rng.integers(len(damaged), size=int(2 ** rng.uniform(0, 8)))
    np.bitwise_xor.at(damaged, places, (1 << rng.integers(8, size=len(places))).astype(np.uint8))
    return damaged.tobytes()


def flip_bits_of_the_header(rng: np.random.Generator, media: bytes, other: bytes) -> bytes:
    size = int(2 ** rng.uniform(4, 9))
    return flip_bits(rng, media[:size], other) + media[size:]


def cut(rng: np.random.Generator, media: bytes, other: bytes) -> bytes:
    return media[: rng.integers(len(media))]


def cut_out(rng: np.random.Generator, media: bytes, other: bytes) -> bytes:
    begin, end = sorted(rng.integers(len(media), size=2))
    return media[:begin] + media[end:]


def swap_header(rng: np.random.Generator, media: bytes, other: bytes) -> bytes:
    size = int(2 ** rng.uniform(2, 11))
    return other[:size] + media[size:]


def zero_a_block(rng: np.random.Generator, media: bytes, other: bytes) -> bytes:
    begin, size = rng.integers(len(media)), int(2 ** rng.uniform(2, 12))
    return media[:begin] + bytes(len(media[begin : begin + size])) + media[begin + size :]


def double_a_block(rng: np.random.Generator, media: bytes, other: bytes) -> bytes:
    begin, end = sorted(rng.integers(len(media), size=2))
    return media[:end] + media[begin:end] * int(rng.integers(1, 4)) + media[end:]


def append_rubbish(rng: np.random.Generator, media: bytes, other: bytes) -> bytes:
    return media + (rng.bytes(int(2 ** rng.uniform(0, 14))) if rng.random() < 0.5 else other)


def overwrite_four_bytes(rng: np.random.Generator, media: bytes, other: bytes) -> bytes:
    """Falsify lengths, rates and counts, mostly in headers."""
    place = int(rng.integers(min(len(media), 600)))
    lies = [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\1\0\0\0"]
    return media[:place] + lies[rng.integers(len(lies))] + media[place + 4 :]


MUTATIONS: list[Mutation] = [
    flip_bits,
    flip_bits_of_the_header,
    cut,
    cut_out,
    swap_header,
    zero_a_block,
    double_a_block,
    append_rubbish,
    overwrite_four_bytes,
]


class Mutated(NamedTuple):
    name: str
    media: bytes
    start_s: float | None
    end_s: float | None


def mutated(folder: Path) -> Iterator[Mutated]:
    good = {
        suffix: fakes.write_media(folder / f"good.{suffix}", fakes.noise(1, seed=i)).read_bytes()
        for i, suffix in enumerate(fakes.CODECS)
    }
    for i in range(NUM_MUTATED):
        rng = np.random.default_rng([4, i])
        suffix, other = (str(rng.choice(list(good))) for _ in range(2))
        damaged = MUTATIONS[i % len(MUTATIONS)](rng, good[suffix], good[other])
        yield Mutated(f"{i:03d}.{suffix}", damaged, *((None, None), (0.25, 0.75))[rng.integers(2)])


def as_files(folder: Path, clips: list[Mutated]) -> Path:
    lines = ["path,labels,start_s,end_s"]
    for name, media, start_s, end_s in clips:
        (folder / name).write_bytes(media)
        lines.append(f"{name},noise,{'' if start_s is None else start_s},{'' if end_s is None else end_s}")
    (folder / "list.csv").write_text("\n".join(lines))
    return folder / "list.csv"


def in_a_tar(folder: Path, clips: list[Mutated]) -> Path:
    members: dict[str, bytes | dict[str, object]] = {}
    for name, media, start_s, end_s in clips:
        said = {"labels": ["noise"], "start_s": start_s, "end_s": end_s}
        members |= {name: media, f"{Path(name).stem}.json": said}
    return Path(fakes.write_tar(folder / "clips.tar", members))


@contextmanager
def watching_decoders() -> Iterator[dict[int, int]]:
    """Measure the peak memory in bytes of each decoding process below this one; complete at the end."""
    peaks: dict[int, int] = {}
    over = threading.Event()

    def look() -> None:
        for pid in decoders():
            with suppress(OSError, ValueError):  # it may end meanwhile
                peaks[pid] = peak_bytes(pid)

    def look_again() -> None:
        while not over.wait(0.1):
            look()

    for pid in decoders():  # decoders that other tests started do not count
        with suppress(OSError):
            Path(f"/proc/{pid}/clear_refs").write_text("5")
    thread = threading.Thread(target=look_again)
    thread.start()
    try:
        yield peaks
    finally:
        over.set()
        thread.join()
        look()


def decoders() -> Iterator[int]:
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "pipeline.prepare.audio.decode:decode_media" in process.cmdline():
                yield process.pid


def peak_bytes(pid: int) -> int:
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) << 10


@pytest.mark.parametrize(
    ("pack", "part"),
    [
        pytest.param(as_files, slice(0, None, 12), id="some_files"),
        pytest.param(as_files, slice(0, None, 2), id="files", marks=pytest.mark.slow),
        pytest.param(in_a_tar, slice(1, None, 2), id="members_of_a_tar", marks=pytest.mark.slow),
    ],
)
def test_a_job_prepares_or_refuses_each_mutated_file_in_bounded_memory(
    local_ray: None, tmp_path: Path, pack: Callable[[Path, list[Mutated]], Path], part: slice
):
    clips = list(mutated(tmp_path))[part]
    source = pack(tmp_path, clips)
    with watching_decoders() as peaks:
        assert main(["--manifest", str(source), "--output", str(tmp_path / "data")]) == 0
    prepared = fakes.shard_rows(tmp_path / "data")
    failures = pq.read_table(tmp_path / "data" / "train" / "failures.parquet").to_pylist()
    indexed = PreparedDataset.open(str(tmp_path / "data")).index("train")["clip_id"].to_pylist()
    asked = {Path(clip.name).stem if clip.start_s is None else f"{Path(clip.name).stem}_0.250": clip for clip in clips}
    assert sorted([*indexed, *(row["clip_id"] for row in failures)]) == sorted(asked)
    for row in failures:
        assert row["reason"] in ORDERLY, row
    for name, row in prepared.items():
        start_s, length_s = asked[name].start_s, row["end_s"] - row["start_s"]
        assert np.isfinite(np.array(row["fbank"])).all()
        assert (row["start_s"], row["num_frames"]) == (
            start_s or 0.0,
            KALDI128.num_frames(round(length_s * KALDI128.sample_rate_hz)),
        )
        assert 0 < length_s <= MAX_CLIP_S if start_s is None else 0.95 * 0.5 <= length_s <= 0.5
    assert len(prepared) > 0.3 * len(clips)  # a decoder that refuses everything proves nothing
    assert len({row["reason"] for row in failures}) > 2
    assert peaks
    assert max(peaks.values()) < MAX_CHILD_BYTES


# Forged files


def refusal(file: Path | bytes, start_s: float = 0.0, duration_s: float | None = None) -> ClipError:
    with pytest.raises(ClipError) as caught:
        decode_section(io.BytesIO(file) if isinstance(file, bytes) else f"file:{file}", start_s, duration_s)
    return caught.value


def wav(samples: np.ndarray, *, rate_hz: int = 16_000, channels: int = 1, num_bytes: int | None = None) -> bytes:
    """A WAV file whose header may contain any values."""
    data, width = samples.tobytes(), samples.itemsize
    kind = 3 if samples.dtype.kind == "f" else 1
    byte_rate = min(rate_hz * channels * width, 2**32 - 1)
    form = struct.pack("<HHIIHH", kind, channels, rate_hz, byte_rate, channels * width & 0xFFFF, 8 * width)
    size = struct.pack("<I", len(data) if num_bytes is None else num_bytes)
    return (
        b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + size + data
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_numbers_are_not_audio(dtype: type, value: float):
    samples = np.full(22_050, 0.1, dtype)
    samples[5000] = value
    assert refusal(wav(samples, rate_hz=22_050)).reason is Reason.NOT_AUDIO
    assert refusal(wav(samples, channels=2)).reason is Reason.NOT_AUDIO


@pytest.mark.parametrize("rate_hz", [0, 1, 999, 768_001, 2**31 - 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("duration_s", [None, 300.0])
def test_an_impossible_sample_rate_is_refused(rate_hz: int, duration_s: float | None):
    samples = np.ones(32_000, np.int16)
    assert refusal(wav(samples, rate_hz=rate_hz), 0.0, duration_s).reason is Reason.NOT_AUDIO


@pytest.mark.parametrize("channels", [0, 513, 65_535])
def test_an_impossible_number_of_channels_is_refused(channels: int):
    assert refusal(wav(np.ones(200_000, np.int16), channels=channels)).reason is Reason.NOT_AUDIO


def test_a_file_shorter_than_its_declared_length_is_truncated():
    lies = wav(np.ones(160_000, np.int16), num_bytes=2**32 - 1)
    assert refusal(lies, 9.0, 5.0).reason is Reason.TRUNCATED
    assert refusal(lies, 30_000.0, 5.0).reason is Reason.TRUNCATED


@pytest.fixture(scope="module")
def hours_of_silence() -> bytes:
    """Four hours of FLAC in about 30 kB."""
    file = io.BytesIO()
    with av.open(file, "w", format="flac") as container:
        stream = container.add_stream("flac", rate=8000, layout="mono")
        stream.codec_context.format = "s16"
        stream.codec_context.options = {"frame_size": "65535"}
        stream.codec_context.open()
        size = stream.codec_context.frame_size
        frame = av.AudioFrame.from_ndarray(np.zeros((1, size), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        for begin in range(0, 4 * 3600 * 8000, size):
            frame.pts = begin
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


class Pipe(io.RawIOBase):
    """A file that can be read only once, from the beginning."""

    def __init__(self, content: bytes) -> None:
        self._file = io.BytesIO(content)

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False


def test_hours_in_kilobytes_cost_only_the_section(hours_of_silence: bytes):
    assert len(hours_of_silence) < 50_000
    assert refusal(hours_of_silence).reason is Reason.TOO_LONG
    assert refusal(hours_of_silence, 1e6, 10.0).reason is Reason.TRUNCATED
    for start_s in (13_999.0, 14_002.0, 14_005.0):  # the run-up begins at various positions in a packet of 8 s
        assert len(decode_section(io.BytesIO(hours_of_silence), start_s, 10.0)) == 160_000
    tracemalloc.start()
    try:
        assert len(decode_section(Pipe(hours_of_silence), 14_000.0, 10.0)) == 160_000  # decodes from the beginning
        assert tracemalloc.get_traced_memory()[1] < 16 << 20  # all of it would be 460 MB
    finally:
        tracemalloc.stop()


def forged(form: str, codec: str, rate_hz: int, stamp: Callable[[int, int], int]) -> bytes:
    """Two seconds of noise in packets with the timestamps `stamp(packet, true timestamp)`."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate_hz, layout="mono")
        frame = av.AudioFrame.from_ndarray(fakes.noise(2, rate_hz=rate_hz)[None], format="fltp", layout="mono")
        frame.rate, frame.pts, frame.time_base = rate_hz, 0, Fraction(1, rate_hz)
        for i, packet in enumerate([*stream.encode(frame), *stream.encode(None)]):
            packet.pts = packet.dts = stamp(i, packet.pts)
            container.mux(packet)
    return file.getvalue()


@pytest.mark.parametrize("form", ["nut", "matroska", "mp4"])
def test_jumping_timestamps_do_not_make_a_recording_of_silence(form: str):
    media = forged(form, "aac", 16_000, lambda i, true: true + 10**9 * (i > 15))
    error = refusal(media)
    assert (error.reason, "by its timestamps" in error.message) == (Reason.TRUNCATED, True)
    assert refusal(media, 2.0, 10.0).reason is Reason.TRUNCATED


def test_ffmpegs_own_errors_are_not_taken_for_file_errors(tmp_path: Path):
    stamped_before_zero = forged("ogg", "libopus", 48_000, lambda i, true: true - 2**40)
    cut_in_its_head = fakes.write_media(tmp_path / "a.webm", fakes.noise(1)).read_bytes()[:164]
    for media, name, reason in (
        (stamped_before_zero, "Invalid data", Reason.NOT_AUDIO),
        (cut_in_its_head, "Input/output", Reason.TRUNCATED),
    ):
        (tmp_path / "media").write_bytes(media)
        for file in (media, tmp_path / "media"):
            error = refusal(file, 3.0, 0.5)
            assert (error.reason, name in error.message) == (reason, True), error


class Failing(io.BytesIO):
    """A remote file whose host stops answering."""

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() > 40_000:
            raise OSError("connection reset")
        return super().read(size)


def test_a_remote_file_that_stops_answering_is_a_network_fault(tmp_path: Path):
    path = fakes.write_media(tmp_path / "a.flac", fakes.noise(10))
    for start_s in (0.0, 5.0):
        with pytest.raises(ClipError, match="connection reset") as caught:
            decode_section(Failing(path.read_bytes()), start_s, 5.0)
        assert caught.value.reason is Reason.NETWORK


# Text that would lead FFmpeg to other files


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, list[str]]]:
    """A folder with secret sound, a server that has it at any address, and the server's list of requests."""
    folder = tmp_path_factory.mktemp("elsewhere")
    sound = fakes.write_media(folder / "secret.m4a", fakes.noise(3)).read_bytes()
    fakes.write_media(folder / "secret.wav", fakes.noise(3))
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(sound)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{}\n#EXT-X-ENDLIST\n"
TRICKS = [
    *(
        PLAYLIST.format(item)
        for item in ("secret.m4a", "{folder}/secret.m4a", "file:{folder}/secret.m4a", "{url}/a.ts")
    ),
    PLAYLIST.format("concat:{folder}/secret.wav|{url}/a.ts"),
    *(f"ffconcat version 1.0\nfile {item}\n" for item in ("secret.wav", "'{folder}/secret.wav'", "'{url}/a.wav'")),
    "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 45678 RTP/AVP 0\n",
    ";FFMETADATA1\ntitle=x\n",
    "[Reference]\nRef1={url}/a.wav\n",
    '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT3S">'
    '<Period><AdaptationSet contentType="audio"><Representation id="0" mimeType="audio/mp4" codecs="mp4a.40.2" '
    'bandwidth="1"><BaseURL>{url}/secret.m4a</BaseURL></Representation></AdaptationSet></Period></MPD>',
]


@pytest.mark.parametrize("trick", TRICKS)
def test_text_that_names_other_files_or_hosts_opens_none_of_them(
    trick: str, elsewhere: tuple[Path, str, list[str]], monkeypatch: pytest.MonkeyPatch
):
    folder, url, asked = elsewhere
    text = trick.replace("{url}", url).replace("{folder}", str(folder)).encode()
    monkeypatch.chdir(folder)  # relative names would refer to it
    began_s = time.monotonic()
    for name in ("clip.wav", "clip.m3u8", "clip.mpd", "clip.sdp", "clip.ffconcat"):
        (folder / name).write_bytes(text)
        assert refusal(folder / name, 0.0, 2.0).reason is Reason.NOT_AUDIO
    assert refusal(text, 0.0, 2.0).reason is Reason.NOT_AUDIO
    assert asked == []
    assert time.monotonic() - began_s < 60  # it does not wait at a port


def test_ffmpeg_has_every_format_that_is_read():
    assert set(FORMATS.split(",")) <= {name for names in av.formats_available for name in names.split(",")}
