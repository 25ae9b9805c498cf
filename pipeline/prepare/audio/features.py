"""Waveform → raw log-mel as stored: neither padded nor normalised nor augmented."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa

from ast_core.features import KALDI128, FeatureSettings, log_mel
from pipeline.dataset import fbank_type


def features(rows: pa.Table, settings: FeatureSettings = KALDI128) -> pa.Table:
    """Stage that replaces `waveform` by `num_frames` and `fbank`. Failed rows get no frames."""
    waveforms = rows["waveform"].combine_chunks()
    flat, offsets = waveforms.values.to_numpy(), waveforms.offsets.to_numpy()
    fbanks = [clip_fbank(flat[begin:end], settings) for begin, end in pairwise(offsets)]
    num_frames = pa.array([len(fbank) for fbank in fbanks], pa.int32())
    rows = rows.drop_columns(["waveform"])
    return rows.append_column("num_frames", num_frames).append_column("fbank", fbank_column(fbanks))


def fbank_column(fbanks: Sequence[np.ndarray]) -> pa.ListArray:
    """Build the shards' fbank column from float16 `[frames, mel bins]` of one or more clips."""
    ends = np.cumsum([0, *map(len, fbanks)]).astype(np.int32)
    column = fbank_type(fbanks[0].shape[1])
    frames = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(fbanks).reshape(-1)), type=column.value_type)
    return pa.ListArray.from_arrays(ends, frames, type=column)


def clip_fbank(waveform: np.ndarray, settings: FeatureSettings = KALDI128) -> np.ndarray:
    """float16 `[frames, mel bins]` of one clip. Its mean is subtracted first, as in the reference implementation."""
    if settings.num_frames(len(waveform)) == 0:
        return np.empty((0, settings.num_mel_bins), np.float16)
    import torch  # here, because it takes half a gigabyte and two seconds, and the driver does not need it

    samples = torch.from_numpy(waveform - waveform.mean())
    return log_mel(samples, settings).half().numpy()
