"""Generated data and fake objects for tests. Ray's workers can import this module."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import av
import numpy as np
import pyarrow as pa

from ast_core.features import KALDI128, FeatureSettings
from ast_core.labels import LabelVocabulary
from pipeline import dataset, storage
from pipeline.prepare.audio.features import clip_fbank, features
from pipeline.prepare.clip import CLIPS, FAILURES, WAVEFORM, Reason, in_progress, ragged
from pipeline.prepare.fetch.rate_limiter import Fetching, Permit, RateLimit, RateLimiter
from pipeline.prepare.output.origins import record_origin
from pipeline.prepare.output.publish import publish, start_output
from pipeline.prepare.output.shards import WriteShards

RATE_HZ = 16_000
CODECS = {
    "webm": ("libopus", 48_000),
    "m4a": ("aac", 44_100),
    "ogg": ("libopus", 48_000),
    "flac": ("flac", 16_000),
    "wav": ("pcm_s16le", 22_050),
    "mp3": ("libmp3lame", 44_100),
}


def noise(duration_s: float, seed: int = 0, rate_hz: int = RATE_HZ) -> np.ndarray:
    """White noise below 8 kHz, in which each position is unique."""
    rng = np.random.default_rng(seed)
    return (0.15 * rng.standard_normal(round(duration_s * rate_hz))).astype(np.float32)


def tone(freq_hz: float, duration_s: float, rate_hz: int = RATE_HZ) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * freq_hz * np.arange(round(duration_s * rate_hz)) / rate_hz)).astype(np.float32)


def write_media(path: Path, waveform: np.ndarray, *, channels: int = 1) -> Path:
    """Encode a 16 kHz waveform with the codec of the file's suffix."""
    codec, rate_hz = CODECS[path.suffix[1:]]
    layout = "mono" if channels == 1 else "stereo"
    frame = av.AudioFrame.from_ndarray(np.tile(waveform[None], (channels, 1)), format="fltp", layout=layout)
    frame.rate = RATE_HZ
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate_hz, layout=layout)
        stream.codec_context.open()
        resampler = av.AudioResampler(
            format=stream.codec_context.format,
            layout=layout,
            rate=rate_hz,
            frame_size=stream.codec_context.frame_size or 1024,
        )
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))
    return path


def write_tar(path: Path, members: Mapping[str, bytes | dict[str, object]], **options: object) -> str:
    """Write a tar with members by name. A dictionary is written as JSON. `options` are those of tarfile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as file:
        for name, held in members.items():
            data = held if isinstance(held, bytes) else json.dumps(held).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return str(path)


def upload(path: Path, uri: str) -> str:
    """Upload a file, or a folder with all files below it."""
    if path.is_dir():
        for below in path.iterdir():
            upload(below, storage.join(uri, below.name))
    else:
        storage.write_bytes(uri, path.read_bytes())
    return uri


def shard_rows(output: str | Path) -> dict[str, dict[str, Any]]:
    """The rows of all shards of a data set, by clip."""
    shards = [uri for uri in storage.list_files(output, suffix=".parquet", recursive=True) if "/shards/" in uri]
    return {row["clip_id"]: row for shard in shards for row in dataset.read_table(shard).to_pylist()}


def clips(*rows: dict[str, object]) -> pa.Table:
    """Rows of CLIPS. Missing columns get default values."""
    usual = {
        "split": "train",
        "video_id": None,
        "member": None,
        "media_start_s": 0.0,
        "start_s": 0.0,
        "end_s": None,
        "labels": [0],
    }
    return pa.Table.from_pylist([usual | row for row in rows], schema=CLIPS)


SMALL_RECIPE = {
    "model_size": "tiny224",
    "imagenet_pretrain": "false",
    "fstride": "16",
    "tstride": "16",
    "input_tdim": "48",
    "freqm": "16",
    "timem": "8",
    "lr": "3e-4",
    "warmup": "false",
}
"""Recipe keys with which an AST on `write_data` learns in seconds."""

LINEAR_RECIPE = {
    "model": "linear",
    "hidden": "64",
    "n_layers": "1",
    "input_tdim": "48",
    "freqm": "16",
    "timem": "8",
    "lr": "3e-4",
    "warmup": "false",
}
"""The same with a linear model, which takes a fifth of the time: for tests to which the model does not matter."""


def write_data(
    output: str,
    *,
    splits: Sequence[tuple[str, int]] = (("train", 48), ("eval", 21)),
    num_classes: int = 4,
    labels: LabelVocabulary | None = None,
    clips_a_shard: int = 20,
    waveform: np.ndarray | None = None,
    settings: FeatureSettings = KALDI128,
) -> None:
    """Write a prepared data set of tones in noise, half a second each, with the real stages after decoding.

    If `waveform` is given, each clip has it. `settings` are those of the features, at a rate of 16 kHz. If `labels` are
    given, the clips have the first `num_classes` of them.
    """
    rng = np.random.default_rng(5)
    made = {}
    for split, num_clips in splits:
        classes = [int(rng.integers(num_classes)) for _ in range(num_clips)]
        waveforms = [tone(300.0 * 2**c, 0.5) + noise(0.5, seed=int(rng.integers(1 << 30))) for c in classes]
        if waveform is not None:
            waveforms = [waveform] * num_clips
        made[split] = list(zip(classes, waveforms, strict=True))
    labels = labels or LabelVocabulary.from_names([f"tone {i}" for i in range(num_classes)])
    write_waveforms(output, labels, made, clips_a_shard=clips_a_shard, settings=settings)


def write_waveforms(
    output: str,
    labels: LabelVocabulary,
    splits: Mapping[str, Sequence[tuple[int, np.ndarray]]],
    *,
    clips_a_shard: int = 20,
    settings: FeatureSettings = KALDI128,
) -> None:
    """Write a prepared data set of these classes and waveforms, with the real stages after decoding."""
    start_output(output, labels, settings)
    for split, made in splits.items():
        rows = record_origin(
            in_progress(
                clips(
                    *(
                        {"clip_id": f"{split}_{i:03d}", "split": split, "media": "made", "end_s": 0.5, "labels": [c]}
                        for i, (c, _) in enumerate(made)
                    )
                )
            )
        )
        rows = rows.append_column("num_clipped", pa.array([0] * len(made), pa.int32()))
        waveforms = ragged([waveform for _, waveform in made], WAVEFORM)
        rows = features(rows.append_column("waveform", waveforms), settings)
        for begin in range(0, len(made), clips_a_shard):  # several shards, with incomplete row groups
            WriteShards(output, features=settings)(rows.slice(begin, clips_a_shard))
    publish(output, labels, {split: FAILURES.empty_table() for split in splits}, features=settings)


def prepared_rows(*clip_ids: str, failed: tuple[str, ...] = (), split: str = "train") -> pa.Table:
    """Rows with different noise and level for each clip."""
    all_ids = (*clip_ids, *failed)
    given = clips(*({"clip_id": c, "split": split, "media": "x", "end_s": 0.5} for c in all_ids))
    rows = record_origin(in_progress(given))
    seeds = [crc32(c.encode()) for c in all_ids]
    fbanks = [clip_fbank((seed % 100 + 1) / 100 * noise(0.5, seed=seed)) for seed in seeds]
    for name, value in {"stage": "decode", "reason": "truncated", "message": "short", "attempts": 1}.items():
        place = rows.column_names.index(name)
        column = pa.array([None] * len(clip_ids) + [value] * len(failed), rows.schema.field(place).type)
        rows = rows.set_column(place, name, column)
    rows = rows.append_column("num_clipped", pa.array([0] * len(rows), pa.int32()))
    rows = rows.append_column("num_frames", pa.array(list(map(len, fbanks)), pa.int32()))
    return rows.append_column("fbank", pa.array([fbank.tolist() for fbank in fbanks], dataset.fbank_type(128)))


def stored_clips(clips: pa.Table, *, mean: float = -4.2677393, std: float = 4.5689974) -> pa.Table:
    """Rows of SCANNED for rows of CLIPS: complete, different clips with this mean and std."""
    rows = clips.to_pylist()
    values = [
        KALDI128.num_mel_bins * KALDI128.num_frames(round((row["end_s"] - row["start_s"]) * RATE_HZ)) for row in rows
    ]
    made = {
        "num_frames": [n // KALDI128.num_mel_bins for n in values],
        "num_clipped": [0] * len(rows),
        "num_silent_frames": [0] * len(rows),
        "fbank_sum": [n * mean for n in values],
        "fbank_sum_sq": [n * (std**2 + mean**2) for n in values],
        "fbank_hash": [crc32(f"{row['split']}/{row['clip_id']}".encode()) for row in rows],
    }
    schema = dataset.SCANNED
    return pa.table({name: made.get(name) or clips[name] for name in schema.names}, schema=schema)


def noise_shard(clips: pa.Table, num_frames: int) -> pa.Table:
    """A shard's rows for rows of CLIPS, with random values for fbanks: a file of a real one's size."""
    kind, num_bins = dataset.fbank_type(KALDI128.num_mel_bins), KALDI128.num_mel_bins
    values = np.random.default_rng(0).normal(size=len(clips) * num_frames * num_bins).astype(np.float16)
    frames = pa.FixedSizeListArray.from_arrays(pa.array(values), type=kind.value_type)
    ends = pa.array(np.arange(len(clips) + 1) * num_frames, pa.int32())
    fbank = pa.ListArray.from_arrays(ends, frames, type=kind)
    return stored_clips(clips).append_column(dataset.shard_schema(KALDI128).field("fbank"), fbank)


def write_stored(
    output: str,
    labels: LabelVocabulary,
    splits: Mapping[str, pa.Table],
    failures: Mapping[str, Sequence[Reason]] | None = None,
) -> None:
    """Write a data set of `stored_clips`, with empty fbanks, for tests that read no fbank."""
    start_output(output, labels)
    refused = {split: FAILURES.empty_table() for split in splits}
    for split, rows in splits.items():
        shard = rows.append_column(
            dataset.shard_schema(KALDI128).field("fbank"), pa.array([[]] * len(rows), dataset.fbank_type(128))
        )
        for begin in range(0, len(rows), 1000):
            uri = f"{dataset.shards_dir(output, split)}/{begin}.parquet"
            dataset.write_table(uri, shard.slice(begin, 1000).cast(dataset.shard_schema(KALDI128)))
    for split, reasons in (failures or {}).items():
        refused[split] = pa.Table.from_pylist(
            [
                {"clip_id": f"failed_{i}", "split": split, "stage": "download", "reason": reason.value}
                | {"message": "", "attempts": 1, "retry": reason.retry, "tool_versions": "", "labels": None}
                for i, reason in enumerate(reasons)
            ],
            schema=FAILURES,
        )
    publish(output, labels, refused)


class Permits:
    """A fake of a job's access to the rate limiter: its `RateLimiter` is in this process."""

    def __init__(self, rate_limit: RateLimit, limiter: RateLimiter | None = None) -> None:
        self.rate_limit, self.limiter = rate_limit, limiter or RateLimiter()

    def permit(self, host: str, egress_address: str = "here") -> Permit:
        return self.limiter.permit(self.rate_limit, egress_address, host)

    def report(self, address: str, host: str, reason: Reason | None) -> None:
        self.limiter.report(self.rate_limit, address, host, reason)

    def fetching(self) -> Fetching:
        return self.limiter.fetching()
