"""Waveform → raw log-mel, as it is stored: neither padded nor normalised nor augmented."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa

from ast_core.frames import NUM_MEL_BINS, num_frames_of
from pipeline.dataset import FBANK


def features(rows: pa.Table) -> pa.Table:
    """Rows with `waveform` in, rows with `num_frames` and `fbank` out, one for one; failed rows get no frames."""
    waveforms = rows["waveform"].combine_chunks()
    flat, offsets = waveforms.values.to_numpy(), waveforms.offsets.to_numpy()
    fbanks = [clip_fbank(flat[begin:end]) for begin, end in pairwise(offsets)]
    num_frames = pa.array([len(fbank) for fbank in fbanks], pa.int32())
    rows = rows.drop_columns(["waveform"])
    return rows.append_column("num_frames", num_frames).append_column("fbank", fbank_column(fbanks))


def fbank_column(fbanks: Sequence[np.ndarray]) -> pa.ListArray:
    """float16 `[frames, mel bins]` of each clip, one or more of them, as a column of the shards' type."""
    ends = np.cumsum([0, *map(len, fbanks)]).astype(np.int32)
    frames = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(fbanks).reshape(-1)), type=FBANK.value_type)
    return pa.ListArray.from_arrays(ends, frames, type=FBANK)


def clip_fbank(waveform: np.ndarray) -> np.ndarray:
    """float16 `[frames, mel bins]` of one clip, its mean taken off before as the original does."""
    if num_frames_of(len(waveform)) == 0:
        return np.empty((0, NUM_MEL_BINS), np.float16)
    import torch  # half a gigabyte and two seconds, which the driver's plan has no need of

    from ast_core.fbank import fbank

    samples = torch.from_numpy(waveform - waveform.mean())
    return fbank(samples).half().numpy()
