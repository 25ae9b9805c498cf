"""Sample clips for the report, with audio and features, written to OUT/_report during the preparation.

Only a clip's id decides whether it is a sample. So tasks need not coordinate, and an interrupted run selects the same
clips as an uninterrupted one. The report shows them without opening a shard.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from ast_core.features import KALDI128, FeatureSettings
from pipeline import dataset, storage
from pipeline.prepare.audio.features import clip_fbank, fbank_column
from pipeline.prepare.output.audio_store import flac_bytes

NUM_CANDIDATES = 20
"""Average number of clips of a list to store. Some will fail, and the page shows ten."""

MAX_SAMPLE_S = 10.0
"""Only the beginning of a longer clip is stored, to limit the size of the page."""


def samples_schema(num_mel_bins: int) -> pa.Schema:
    return pa.schema(
        [
            pa.field("clip_id", pa.string(), nullable=False),
            pa.field("split", pa.string(), nullable=False),
            pa.field("audio", pa.binary(), nullable=False),  # FLAC, 16 bit, mono
            pa.field("fbank", dataset.fbank_type(num_mel_bins), nullable=False),  # of the same part
        ]
    )


@dataclass(frozen=True)
class KeepSamples:
    """Stage that stores the samples among rows with `waveform`, and returns the rows unchanged."""

    output: str
    num_listed: int
    """Number of clips of the whole list, including those already prepared."""
    features: FeatureSettings = KALDI128

    def __call__(self, rows: pa.Table) -> pa.Table:
        chosen = wanted(rows["clip_id"].to_pylist(), self.num_listed)
        if not any(chosen):
            return rows
        samples = rows.filter(pc.and_(pa.array(chosen), pc.is_null(rows["reason"])))
        if len(samples):
            rate_hz, schema = self.features.sample_rate_hz, samples_schema(self.features.num_mel_bins)
            num_samples, num_frames = round(MAX_SAMPLE_S * rate_hz), round(MAX_SAMPLE_S / self.features.seconds(1))
            waveforms = [clip.values.to_numpy() for clip in samples["waveform"]]
            audio = [flac_bytes(waveform[:num_samples], rate_hz) for waveform in waveforms]
            fbanks = fbank_column([clip_fbank(waveform, self.features)[:num_frames] for waveform in waveforms])
            write_samples(self.output, pa.table([samples["clip_id"], samples["split"], audio, fbanks], schema=schema))
        return rows


def wanted(clip_ids: Sequence[str], num_listed: int) -> list[bool]:
    """Whether each clip is a candidate. About `NUM_CANDIDATES` of a list of `num_listed` clips are."""
    below = (1 << 64) * NUM_CANDIDATES // max(num_listed, 1)
    return [sort_key(clip_id) < below for clip_id in clip_ids]


def sort_key(clip_id: str) -> int:
    """64-bit hash of the id, the same on every machine. The clips with the lowest values are shown."""
    return int.from_bytes(hashlib.blake2b(clip_id.encode(), digest_size=8).digest(), "big")


def write_samples(output: str, samples: pa.Table) -> None:
    """Write one file of samples, named after its clips, so that a repeated task overwrites its own file."""
    names = pc.binary_join_element_wise(samples["split"], samples["clip_id"], "/").to_pylist()
    name = hashlib.sha256("\n".join(names).encode()).hexdigest()[:20]
    dataset.write_table(storage.join(samples_dir(output), f"samples-{name}.parquet"), samples)


def read_samples(output: str, num_mel_bins: int = KALDI128.num_mel_bins) -> pa.Table:
    """All samples on disk in the order of `sort_key`, each clip once, without those of an old version (no `fbank`)."""
    files = map(dataset.read_table, storage.list_files(samples_dir(output), suffix=".parquet"))
    samples = pa.concat_tables(
        [samples_schema(num_mel_bins).empty_table(), *(file for file in files if "fbank" in file.column_names)]
    )
    clip_ids = samples["clip_id"].to_pylist()
    row_of = {clip_id: row for row, clip_id in enumerate(clip_ids)}
    return samples.take(pa.array([row_of[clip_id] for clip_id in sorted(row_of, key=sort_key)], pa.int64()))


def samples_dir(output: str) -> str:
    return storage.join(output, "_report")
