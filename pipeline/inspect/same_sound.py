"""Whether two clips are copies of one recording, from their stored log-mel.

T frames, M mel bins.
"""

import numpy as np
import pyarrow as pa

from pipeline import parquet

RANGE_NATS = 6.9
"""Frames further below the loudest one, 30 dB, are left out: padding and background, which many recordings share."""

MIN_OVERLAP = 0.5
"""Share of the loud frames of one clip, the one with fewer, that have to meet loud frames of the other one."""

SMALLEST_ENERGY = 1e-9
"""Sums of squares that are smaller are rounding."""

DAMAGED = "{} is damaged ({}); run the preparation again"


def log_mel_correlation(first_TM: np.ndarray, second_TM: np.ndarray, nats_per_unit: float) -> float:
    """The highest correlation of two clips' log-mel over all shifts in time, from -1 to 1.

    Only frames that are loud in both count. A value counts as its difference from the mean of its bin over the clip,
    and then of its frame. So a gain or a filter changes nothing, and neither the colour of a steady sound nor the
    envelope of a bang makes clips alike. What has to agree is the fine structure, which two recordings do not share.

    Args:
        nats_per_unit: of the log-mel (`FeatureSettings.log_scale`).

    Returns:
        -1 for clips without fine structure.
    """
    (first, loud_in_first), (second, loud_in_second) = (_fine(fbank, nats_per_unit) for fbank in (first_TM, second_TM))
    size = 1 << (len(first) + len(second) - 1).bit_length()

    def at_each_shift(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The sum over frames of `a` times the shifted `b`, both `[T]` or `[T, M]`, for each of `size` shifts."""
        spectrum = np.fft.rfft(a, size, axis=0) * np.fft.rfft(b, size, axis=0).conj()
        return np.fft.irfft(spectrum if a.ndim == 1 else spectrum.sum(axis=1), size)

    num_common = at_each_shift(loud_in_first, loud_in_second)
    energies = (
        at_each_shift((first**2).sum(axis=1), loud_in_second),
        at_each_shift(loud_in_first, (second**2).sum(axis=1)),
    )
    is_enough = num_common >= MIN_OVERLAP * min(loud_in_first.sum(), loud_in_second.sum())
    is_enough &= np.minimum(*energies) > SMALLEST_ENERGY * max(float(np.max(energies)), 1.0)
    if not is_enough.any():
        return -1.0
    products, energy = at_each_shift(first, second)[is_enough], (energies[0] * energies[1])[is_enough]
    return float((products / np.sqrt(energy)).max())


def _fine(fbank_TM: np.ndarray, nats_per_unit: float) -> tuple[np.ndarray, np.ndarray]:
    """The fine structure of a clip, 0 in frames that are not loud, and `[T]`: 1 for loud frames, else 0."""
    fbank = fbank_TM.astype(np.float64)
    level = fbank.max(axis=1)
    is_loud = level >= level.max() - RANGE_NATS / nats_per_unit
    fine = fbank - fbank[is_loud].mean(axis=0)
    fine -= fine.mean(axis=1, keepdims=True)
    fine[~is_loud] = 0
    return fine, is_loud.astype(np.float64)


def read_fbank(shard: str, row: int) -> np.ndarray:
    """The stored log-mel of a clip, float16 `[T, M]`.

    Raises:
        DataError: the shard is missing or damaged.
    """
    return parquet.parse_file(shard, lambda file: _read(file, row), damaged=DAMAGED.format(shard, "{}"))


def _read(source: pa.NativeFile, row: int) -> np.ndarray:
    with parquet.open_checked(source) as file:
        group = 0
        while row >= (rows := file.metadata.row_group(group).num_rows):
            row, group = row - rows, group + 1
        frames = file.read_row_group(group, columns=["fbank"])["fbank"][row].values
        values: np.ndarray = frames.flatten().to_numpy().reshape(len(frames), -1)
        return values
