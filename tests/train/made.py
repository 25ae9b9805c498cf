"""Shards of random fbanks for tests of the feed, and the clips in them."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipeline import dataset
from pipeline.dataset import Clips


def table_of(num_frames: Sequence[int], seed: int = 0) -> tuple[pa.Table, list[np.ndarray]]:
    """A shard's columns that a feed reads, and its fbanks."""
    rng = np.random.default_rng(seed)
    fbanks = [rng.normal(-4, 4, (n, 128)).astype(np.float16) for n in num_frames]
    values = pa.array(np.concatenate(fbanks).reshape(-1))
    frames = pa.FixedSizeListArray.from_arrays(values, type=dataset.fbank_type(128).value_type)
    offsets = np.cumsum([0, *num_frames]).astype(np.int32)
    columns = {
        "clip_id": pa.array([f"clip{i}" for i in range(len(fbanks))]),
        "num_frames": pa.array(num_frames, pa.int16()),
        "fbank_hash": pa.array(map(dataset.hash_fbank, fbanks), pa.int64()),
        "fbank": pa.ListArray.from_arrays(offsets, frames, type=dataset.fbank_type(128)),
    }
    return pa.table(columns), fbanks


def clips_of(shards: Sequence[str], rows: Sequence[int], fbanks: Sequence[np.ndarray] = ()) -> Clips:
    """Clips of which clip i is row `rows[i]` of the file `shards[i]` and has the fbank `fbanks[i]`."""
    names = list(dict.fromkeys(shards))
    return Clips(
        shards=names,
        shard_of=np.array([names.index(shard) for shard in shards]),
        row=np.array(rows),
        num_frames=np.array(list(map(len, fbanks)) or [0] * len(rows)),
        labels=pa.array([[0]] * len(rows), dataset.LABELS),
        clip_id=pa.array([f"clip{i}" for i in range(len(rows))]),
        num_mel_bins=128,
        weight=np.ones(len(rows)),
        fbank_hash=np.array(list(map(dataset.hash_fbank, fbanks)) or [0] * len(rows)),
    )
