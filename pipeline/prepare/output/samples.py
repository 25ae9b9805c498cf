"""A few clips that one can listen to: their audio, kept while a data set is prepared, below OUT/_report.

Which clips they are is settled by their names alone, so that tasks choose without knowing each other and a run that was
killed chooses as an undisturbed one does.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ast_core.frames import SAMPLE_RATE_HZ
from pipeline import dataset, parquet, storage
from pipeline.prepare.output.audio_store import flac_bytes

NUM_CANDIDATES = 20
"""Clips of a list to keep, on average: some will fail, and the page shows ten."""

MAX_SAMPLE_S = 10.0
"""Of longer clips the beginning is kept, so that a page of ten has a size that browsers like."""

SAMPLES = pa.schema(
    [
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("audio", pa.binary(), nullable=False),  # FLAC, 16 bit, mono, 16 kHz
    ]
)


@dataclass(frozen=True)
class KeepSamples:
    """Rows with `waveform` in, the same rows out. The audio of those that are `wanted` is on disk by then."""

    output: str
    num_listed: int
    """Clips of the whole list, those that are prepared already among them."""

    def __call__(self, rows: pa.Table) -> pa.Table:
        chosen = pa.array(wanted(rows["clip_id"].to_pylist(), self.num_listed), pa.bool_())
        kept = rows.filter(pc.and_(chosen, pc.is_null(rows["reason"])))
        if len(kept):
            beginning = round(MAX_SAMPLE_S * SAMPLE_RATE_HZ)
            audio = [flac_bytes(clip.values.to_numpy()[:beginning]) for clip in kept["waveform"]]
            write_samples(self.output, pa.table([kept["clip_id"], kept["split"], audio], schema=SAMPLES))
        return rows


def wanted(clip_ids: Sequence[str], num_listed: int) -> list[bool]:
    """Whether a clip is among the candidates of a list of so many: about `NUM_CANDIDATES` of the whole list are."""
    below = (1 << 64) * NUM_CANDIDATES // max(num_listed, 1)
    return [rank(clip_id) < below for clip_id in clip_ids]


def rank(clip_id: str) -> int:
    """The clips of lowest rank are shown. 64 bits, as good as drawn, the same everywhere."""
    return int.from_bytes(hashlib.blake2b(clip_id.encode(), digest_size=8).digest(), "big")


def write_samples(output: str, samples: pa.Table) -> None:
    """One file of `SAMPLES`, named after the clips in it: a task that is run twice writes the same file twice."""
    names = pc.binary_join_element_wise(samples["split"], samples["clip_id"], "/").to_pylist()
    name = hashlib.sha256("\n".join(names).encode()).hexdigest()[:20]
    dataset.write_table(storage.join(samples_dir(output), f"samples-{name}.parquet"), samples)


def read_samples(output: str) -> pa.Table:
    """All samples on disk, lowest rank first, each clip once."""
    uris = storage.list_files(samples_dir(output), suffix=".parquet")
    samples = pa.concat_tables([SAMPLES.empty_table(), *map(dataset.read_table, uris)])
    clip_ids = samples["clip_id"].to_pylist()
    row_of = {clip_id: row for row, clip_id in enumerate(clip_ids)}
    return samples.take(pa.array([row_of[clip_id] for clip_id in sorted(row_of, key=rank)], pa.int64()))


def read_fbank(shard_uri: str, row: int) -> np.ndarray:
    """float16 `[frames, mel bins]` of one clip: the row group that it lies in is read, not the shard.

    Raises:
        DataError: the shard is missing or damaged, or the values are not those of their hash.
    """

    def parse(source: pa.NativeFile) -> np.ndarray:
        shard = parquet.opened(source)
        group, begin = 0, 0
        while begin + shard.metadata.row_group(group).num_rows <= row:
            begin += shard.metadata.row_group(group).num_rows
            group += 1
        rows = shard.read_row_group(group, columns=["fbank", "fbank_hash"], use_threads=False)
        fbank = rows["fbank"][row - begin].values
        values: np.ndarray = fbank.flatten().to_numpy().astype(np.float16).reshape(len(fbank), -1)
        if dataset.hash_of(values) != rows["fbank_hash"][row - begin].as_py():
            raise ValueError(f"the values of row {row} are not those of their hash")
        return values

    return parquet.parsed(shard_uri, parse, damaged=f"{shard_uri} is damaged ({{}}); restore it, or prepare it again")


def samples_dir(output: str) -> str:
    return storage.join(output, "_report")
