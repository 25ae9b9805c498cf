"""Waveform → raw log-mel as stored: neither padded nor normalised nor augmented."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa

from ast_core.frames import NUM_MEL_BINS, num_frames_of
from pipeline.dataset import FBANK


def features(rows: pa.Table) -> pa.Table:
    """Stage that replaces `waveform` by `num_frames` and `fbank`. Failed rows get no frames."""
    waveforms = rows["waveform"].combine_chunks()
    flat, offsets = waveforms.values.to_numpy(), waveforms.offsets.to_numpy()
    fbanks = [clip_fbank(flat[begin:end]) for begin, end in pairwise(offsets)]
    num_frames = pa.array([len(fbank) for fbank in fbanks], pa.int32())
    rows = rows.drop_columns(["waveform"])
    return rows.append_column("num_frames", num_frames).append_column("fbank", fbank_column(fbanks))


def fbank_column(fbanks: Sequence[np.ndarray]) -> pa.ListArray:
    """Build the shards' fbank column from float16 `[frames, mel bins]` of one or more clips."""
    ends = np.cumsum([0, *map(len, fbanks)]).astype(np.int32)
    frames = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(fbanks).reshape(-1)), type=FBANK.value_type)
    return pa.ListArray.from_arrays(ends, frames, type=FBANK)


def clip_fbank(waveform: np.ndarray) -> np.ndarray:
    """float16 `[frames, mel bins]` of one clip. Its mean is subtracted first, as in the reference implementation."""
    if num_frames_of(len(waveform)) == 0:
        return np.empty((0, NUM_MEL_BINS), np.float16)
    import torch  # here, because it takes half a gigabyte and two seconds, and the driver does not need it

    from ast_core.fbank import fbank

    samples = torch.from_numpy(waveform - waveform.mean())
    return fbank(samples).half().numpy()
