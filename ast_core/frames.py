"""Constants and frame counts of the fbank. Does not import PyTorch, which takes half a gigabyte and seconds."""

import math

import numpy as np

SAMPLE_RATE_HZ = 16_000
NUM_MEL_BINS = 128
FRAME_LENGTH_MS = 25.0
FRAME_SHIFT_MS = 10.0
LOW_FREQ_HZ = 20.0
POWER_FLOOR = float(np.finfo(np.float32).eps)
"""The smallest power: log-mel values are at least `log(POWER_FLOOR)` = -15.94, which is digital silence."""
STORED_FLOOR = float(np.float16(math.log(POWER_FLOOR)))
"""`log(POWER_FLOOR)` as float16 stores it."""


def num_frames_of(
    num_samples: int,
    *,
    sample_rate_hz: int = SAMPLE_RATE_HZ,
    frame_length_ms: float = FRAME_LENGTH_MS,
    frame_shift_ms: float = FRAME_SHIFT_MS,
) -> int:
    """The number of whole frames in `num_samples` (Kaldi's `snip_edges`): 998 for 10 s."""
    length, shift = samples_of(sample_rate_hz, frame_length_ms), samples_of(sample_rate_hz, frame_shift_ms)
    return 0 if num_samples < length else 1 + (num_samples - length) // shift


def samples_of(sample_rate_hz: int, duration_ms: float) -> int:
    return int(sample_rate_hz * duration_ms * 0.001)
