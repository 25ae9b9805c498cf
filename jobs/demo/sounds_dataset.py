"""The demo's synthesised recordings, and the segment lists in AudioSet's format that name their clips.

A recording lasts at least 30 s and contains several labelled clips. Between them are sounds of other classes, so a
section that is cut at the wrong place becomes a wrong example. Four more recordings, the *faults*, have a clip that
cannot be prepared.
"""

import hashlib
import json
import multiprocessing
import shutil
import string
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import av
import numpy as np

from jobs.demo import sounds

CLIP_S = 1.3
CLIPS_PER_RECORDING = 8
MIN_RECORDING_S = 30.0
MARKER = "sounds.json"

_NUM_LABELS = (1, 2, 3)
_NUM_LABELS_SHARE = (0.65, 0.25, 0.1)
_GAP_DS = (12, 36)  # between two clips, in tenths of a second
_ID_CHARACTERS = string.ascii_letters + string.digits + "-_"
_ID_LENGTH = 11
_BIT_RATE = 64_000
_WEB_PAGE = "<!DOCTYPE html><html><head><title>Video unavailable</title></head><body>Gone.</body></html>\n"


class Fault(StrEnum):
    """Why the clip of a faulty recording cannot be prepared."""

    MISSING = "missing"
    """The list names it, but the file does not exist."""
    TRUNCATED = "truncated"
    """The file ends before the clip begins."""
    SILENT = "silent"
    """Every sample is zero."""
    NOT_AUDIO = "not_audio"
    """The file is a web page with the name of an audio file."""


@dataclass(frozen=True, kw_only=True)
class SoundsDataset:
    train_list: Path
    eval_list: Path
    media_dir: Path
    """Contains VIDEO_ID.webm, VIDEO_ID.m4a or VIDEO_ID.ogg for every recording that exists."""
    faults: Mapping[str, Fault]
    """Video id → fault of the recording. Each has one clip, in one of the two lists."""


@dataclass(frozen=True)
class _Codec:
    suffix: str
    encoder: str
    sample_rate_hz: int


_WEBM = _Codec(".webm", "libopus", 48_000)
_M4A = _Codec(".m4a", "aac", 44_100)
_OGG = _Codec(".ogg", "libopus", 48_000)
_CODECS = (_WEBM, _M4A, _OGG)

# Fault → the split whose list names the recording, and the recording's codec.
_FAULTS = {
    Fault.MISSING: ("train", _WEBM),
    Fault.TRUNCATED: ("train", _WEBM),
    Fault.SILENT: ("eval", _OGG),
    Fault.NOT_AUDIO: ("train", _M4A),
}


@dataclass(frozen=True)
class _Section:
    """A span of a recording with one mixture of sounds. Only the labelled ones are clips and in a list."""

    start_s: float
    end_s: float
    mids: tuple[str, ...]
    labelled: bool


@dataclass(frozen=True)
class _Recording:
    video_id: str
    codec: _Codec
    sections: tuple[_Section, ...]
    seed: tuple[int, ...]
    fault: Fault | None = None


def build_dataset(folder: Path, *, num_train: int, num_eval: int, seed: int, num_workers: int = 2) -> SoundsDataset:
    """Write the lists and the media below `folder`, unless an earlier call has completed them.

    `num_train` and `num_eval` do not count the clips of the faults. The same arguments give the same bytes.
    `num_workers` spawned processes encode the media.
    """
    dataset = SoundsDataset(
        train_list=folder / "train_segments.csv",
        eval_list=folder / "eval_segments.csv",
        media_dir=folder / "media",
        faults={_video_id(seed, 2, i): fault for i, fault in enumerate(_FAULTS)},
    )
    source = Path(__file__).read_bytes() + Path(sounds.__file__).read_bytes()
    contents = {
        "num_train": num_train,
        "num_eval": num_eval,
        "seed": seed,
        "source_sha256": hashlib.sha256(source).hexdigest(),
    }
    marker = folder / MARKER
    if marker.exists():
        if json.loads(marker.read_text()) == contents:
            return dataset
        marker.unlink()
        shutil.rmtree(dataset.media_dir, ignore_errors=True)
    dataset.media_dir.mkdir(parents=True, exist_ok=True)

    recordings = {"train": _plan(seed, 0, num_train), "eval": _plan(seed, 1, num_eval)}
    for index, (video_id, fault) in enumerate(dataset.faults.items()):
        split, codec = _FAULTS[fault]
        recordings[split].append(_plan_fault(video_id, fault, codec, (seed, 2, index)))
    to_encode = recordings["train"] + recordings["eval"]
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_write_recording, to_encode, [dataset.media_dir] * len(to_encode), chunksize=4))
    dataset.train_list.write_text(_segment_list(recordings["train"]))
    dataset.eval_list.write_text(_segment_list(recordings["eval"]))
    marker.write_text(json.dumps(contents, indent=1) + "\n")
    return dataset


# ---- the plan: ids, places and labels ----


def _video_id(seed: int, stream: int, index: int) -> str:
    """Eleven characters, as in YouTube's ids. The first id of each stream begins with '-' and contains '_'."""
    characters = np.random.default_rng([seed, stream, index]).choice(list(_ID_CHARACTERS), _ID_LENGTH)
    video_id = "".join(characters)
    return "-" + video_id[1:5] + "_" + video_id[6:] if index == 0 else video_id


def _label_sets(rng: np.random.Generator) -> Iterator[tuple[str, ...]]:
    """One to three different classes per clip. Drawn from shuffled lists of all classes, for equal frequency."""
    deck: list[str] = []
    while True:
        count = rng.choice(_NUM_LABELS, p=_NUM_LABELS_SHARE)
        drawn: list[str] = []
        while len(drawn) < count:
            if not set(deck) - set(drawn):
                deck = [*deck, *rng.permutation(list(sounds.GENERATORS)).tolist()]
            drawn.append(deck.pop(next(i for i, mid in enumerate(deck) if mid not in drawn)))
        yield tuple(drawn)


def _plan(seed: int, stream: int, num_clips: int) -> list[_Recording]:
    rng = np.random.default_rng([seed, stream])
    label_sets = _label_sets(rng)
    recordings = []
    for index, first in enumerate(range(0, num_clips, CLIPS_PER_RECORDING)):
        labels = [next(label_sets) for _ in range(min(CLIPS_PER_RECORDING, num_clips - first))]
        recordings.append(
            _Recording(
                video_id=_video_id(seed, stream, index),
                codec=_CODECS[index % len(_CODECS)],
                sections=_place_clips(rng, labels),
                seed=(seed, stream, index),
            )
        )
    return recordings


def _place_clips(rng: np.random.Generator, labels: Sequence[tuple[str, ...]]) -> tuple[_Section, ...]:
    """Place the clips at irregular times. Between them are sounds of classes that neighbouring clips do not have."""
    sections: list[_Section] = []
    end_s = 0.0
    for i, mids in enumerate(labels):
        start_s = round(end_s + rng.integers(*_GAP_DS) / 10, 3)
        sections.append(_Section(end_s, start_s, _other_classes(rng, labels[max(0, i - 1) : i + 1]), False))
        end_s = round(start_s + CLIP_S, 3)
        sections.append(_Section(start_s, end_s, mids, True))
    last_s = max(MIN_RECORDING_S, end_s + rng.integers(*_GAP_DS) / 10)
    return (*sections, _Section(end_s, round(last_s, 3), _other_classes(rng, labels[-1:]), False))


def _other_classes(rng: np.random.Generator, neighbours: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    taken = {mid for mids in neighbours for mid in mids}
    return tuple(rng.choice([mid for mid in sounds.GENERATORS if mid not in taken], 2, replace=False).tolist())


def _plan_fault(video_id: str, fault: Fault, codec: _Codec, seed: tuple[int, ...]) -> _Recording:
    """A recording with one clip near its end, so that a truncated file lacks it."""
    mids = tuple(sounds.GENERATORS)
    start_s = MIN_RECORDING_S - 2 * CLIP_S
    sections = (
        _Section(0.0, start_s, mids[:2], False),
        _Section(start_s, start_s + CLIP_S, mids[2:3], True),
        _Section(start_s + CLIP_S, MIN_RECORDING_S, mids[3:5], False),
    )
    return _Recording(video_id, codec, sections, seed, fault)


def _segment_list(recordings: Sequence[_Recording]) -> str:
    """The text of a segment list: three comment lines, then one line per clip, sorted by video id."""
    rows = sorted(
        (recording.video_id, section.start_s, section.end_s, section.mids)
        for recording in recordings
        for section in recording.sections
        if section.labelled
    )
    labels = [mid for _, _, _, mids in rows for mid in mids]
    head = [
        "# Segments csv created for the demo",
        f"# num_ytids={len(recordings)}, num_segs={len(rows)}, num_unique_labels={len(set(labels))}, "
        f"num_positive_labels={len(labels)}",
        "# YTID, start_seconds, end_seconds, positive_labels",
    ]
    body = [f'{video_id}, {start:.3f}, {end:.3f}, "{",".join(sorted(mids))}"' for video_id, start, end, mids in rows]
    return "\n".join([*head, *body]) + "\n"


# ---- the media ----


def _write_recording(recording: _Recording, media_dir: Path) -> None:
    path = media_dir / (recording.video_id + recording.codec.suffix)
    match recording.fault:
        case Fault.MISSING:
            return
        case Fault.NOT_AUDIO:
            path.write_text(_WEB_PAGE)
        case Fault.SILENT:
            _encode(np.zeros_like(_synthesise(recording)), recording.codec, path)
        case Fault.TRUNCATED:
            _encode(_synthesise(recording), recording.codec, path)
            whole = path.read_bytes()
            path.write_bytes(whole[: len(whole) // 2])
        case None:
            _encode(_synthesise(recording), recording.codec, path)


def _synthesise(recording: _Recording) -> sounds.Waveform:
    rng = np.random.default_rng(recording.seed)
    rate_hz = recording.codec.sample_rate_hz
    waveform = np.zeros(round(recording.sections[-1].end_s * rate_hz), dtype=np.float32)
    for section in recording.sections:
        first = round(section.start_s * rate_hz)
        part = sounds.mixture(rng, section.mids, section.end_s - section.start_s, rate_hz)[: len(waveform) - first]
        waveform[first : first + len(part)] = part
    return waveform


def _encode(waveform: sounds.Waveform, codec: _Codec, path: Path) -> None:
    """Write a mono file. `bitexact` avoids random serial numbers in it."""
    with av.open(path, "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codec.encoder, rate=codec.sample_rate_hz, layout="mono")
        assert isinstance(stream, av.AudioStream)
        stream.bit_rate = _BIT_RATE
        frame = av.AudioFrame.from_ndarray(waveform[np.newaxis], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = codec.sample_rate_hz, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
