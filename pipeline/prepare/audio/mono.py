"""Converts decoded frames of any sample format to one mono float32 waveform, the mean of the channels."""

import math

import av
import numpy as np
import soxr

from pipeline.prepare.clip import ClipError, Reason

DTYPES: dict[str, type[np.generic]] = {
    "u8": np.uint8,
    "s16": np.int16,
    "s32": np.int32,
    "s64": np.int64,
    "flt": np.float32,
    "dbl": np.float64,
}
"""Sample formats (FFmpeg's names), without the `p` of planar formats, which have one plane per channel."""

VALUES_AT_ONCE = 1 << 17
"""Number of values of all channels that are collected as frames before they are converted: 512 KB of float32, which
stay in the processor's cache. With 4 MB the conversion takes a quarter longer."""

CANCELLED_SHARE = 0.05
"""If the mean of the channels has a lower share of their level, they cancel each other (correlation below -0.995)."""

BLOCK_S = 0.05
"""The channels are compared in blocks of this length or a little more: a period of the lowest audible tone."""

SILENT_LEVEL = 2.0**-15
"""A block whose channels have a lower RMS is silent: it is less than one step of 16-bit PCM."""

ROUNDING = 1e-5
"""So is one whose variance is a smaller share of its squares: beside a constant part, that may be rounding."""

FAINT_LEVEL = 0.01
"""A block whose channels have a lower share of the level of the loudest block (-40 dB) is no sound beside it: what the
mean loses there is hardly audible."""


class Mono:
    """Collects frames and returns one waveform.

    A frame has about 20 ms, and converting each one alone takes longer than decoding it, so frames of the same format
    are converted together.
    """

    def __init__(self) -> None:
        self._pieces: list[tuple[int, np.ndarray]] = []
        self._waiting: list[tuple[av.AudioFrame, int, int]] = []
        self._kind: tuple[str, int, int] = ("", 0, 0)
        self._values_waiting = 0
        self._variance = 0.0
        self._channel_variance = 0.0
        self._sounding: list[np.ndarray] = []
        """Of the blocks with sound, float64 `[3, blocks]`: the channels' power, whether they cancel, and seconds."""

    def add(self, frame: av.AudioFrame, begin: int, end: int) -> None:
        """Add samples `begin` to `end` of a frame."""
        kind = (frame.format.name, frame.layout.nb_channels, frame.rate)
        if kind != self._kind or self._values_waiting >= VALUES_AT_ONCE:
            self._flush()
            self._kind = kind
        self._waiting.append((frame, begin, end))
        self._values_waiting += frame.samples * kind[1]

    def add_silence(self, num_samples: int, rate_hz: int) -> None:
        self._flush()
        self._pieces.append((rate_hz, np.zeros(num_samples, np.float32)))

    def waveform(self, sample_rate_hz: int) -> np.ndarray:
        """float32 `[samples]` at this rate. If a recording's own rate changes, each part is resampled separately."""
        self._flush()
        parts: list[list[np.ndarray]] = []
        rates: list[int] = []
        for rate_hz, samples in self._pieces:
            if not rates or rates[-1] != rate_hz:
                rates.append(rate_hz)
                parts.append([])
            parts[-1].append(samples)
        resampled = [
            _resample(np.concatenate(part), rate_hz, sample_rate_hz) for part, rate_hz in zip(parts, rates, strict=True)
        ]
        return np.concatenate([np.empty(0, np.float32), *resampled])

    def drain(self) -> list[tuple[int, np.ndarray]]:
        """The pieces since the last call, each with its rate, not resampled. The shares start again with them."""
        self._flush()
        pieces, self._pieces = self._pieces, []
        self._variance = self._channel_variance = 0.0
        self._sounding.clear()
        return pieces

    def level_share(self) -> float:
        """RMS of the mean of the channels over the RMS of the channels, without constant parts.

        It is 1 if all channels are equal or silent. At a few per cent or less the channels cancel each other.
        """
        self._flush()
        return math.sqrt(self._variance / self._channel_variance) if self._channel_variance else 1.0

    def cancelled_share(self) -> float:
        """Share of the time with sound in the channels in which these cancel each other.

        The level of the loudest block decides what is sound, so this is known only at the end.
        """
        self._flush()
        if not self._sounding:
            return 0.0
        power, is_cancelled, length_s = np.concatenate(self._sounding, axis=1)
        sound_s = length_s * (power >= FAINT_LEVEL**2 * power.max())
        return float(is_cancelled @ sound_s / sound_s.sum())

    def _flush(self) -> None:
        if not self._waiting:
            return
        (name, num_channels, rate_hz), planar = self._kind, self._kind[0].endswith("p")
        if (dtype := DTYPES.get(name.removesuffix("p"))) is None:
            raise ClipError(Reason.NOT_AUDIO, f"samples of the kind {name}")
        step = 1 if planar else num_channels
        parts: list[list[np.ndarray]] = [[] for _ in range(num_channels if planar else 1)]
        for frame, begin, end in self._waiting:
            for of_plane, plane in zip(parts, frame.planes, strict=False):  # FFmpeg may give planes without a channel
                values = np.frombuffer(memoryview(plane), dtype, frame.samples * step)
                of_plane.append(values[begin * step : end * step])
        planes = [_as_float(np.concatenate(of_plane)) for of_plane in parts]
        channels = planes if planar else [planes[0][i::num_channels] for i in range(num_channels)]
        mono = channels[0]
        if num_channels > 1:
            mono = channels[0] + channels[1]
            for channel in channels[2:]:
                mono += channel
            mono /= num_channels
            self._compare(mono, channels, rate_hz)
        mono = mono.astype(np.float32, copy=False)
        self._pieces.append((rate_hz, mono))
        self._waiting, self._values_waiting = [], 0

    def _compare(self, mono: np.ndarray, channels: list[np.ndarray], rate_hz: int) -> None:
        """Add up the variances of the mean and of the channels, and keep those of blocks with sound."""
        num_blocks = max(1, int(len(mono) / (BLOCK_S * rate_hz)))
        block_samples = len(mono) // num_blocks  # the few samples after the last block do not count
        if not block_samples:
            return
        end = num_blocks * block_samples
        blocks = [samples[:end].reshape(num_blocks, block_samples) for samples in (mono, *channels)]
        with np.errstate(invalid="ignore", over="ignore"):
            squares = np.array([np.vecdot(of_blocks, of_blocks) for of_blocks in blocks], np.float64)
            sums = np.array([of_blocks.sum(axis=1) for of_blocks in blocks], np.float64)
            variances = squares - sums**2 / block_samples
        variances = np.where(np.isfinite(variances), np.maximum(variances, 0.0), 0.0)  # others are refused later
        variance, channel_variance = variances[0], variances[1:].mean(axis=0)
        least = np.maximum(SILENT_LEVEL**2 * block_samples, ROUNDING * squares[1:].mean(axis=0))
        has_sound = channel_variance > least
        is_cancelled = has_sound & (variance < CANCELLED_SHARE**2 * channel_variance)
        self._variance += float(variance.sum())
        self._channel_variance += float(channel_variance.sum())
        if has_sound.any():
            lengths_s = np.full(num_blocks, block_samples / rate_hz)
            self._sounding.append(np.stack([channel_variance / block_samples, is_cancelled, lengths_s])[:, has_sound])


class Resampler:
    """Resamples a stream of pieces. All of its output together equals `Mono.waveform` of all pieces, to the bit."""

    def __init__(self, sample_rate_hz: int) -> None:
        self.sample_rate_hz = sample_rate_hz
        self._rate_hz = 0
        self._stream: soxr.ResampleStream | None = None

    def add(self, rate_hz: int, samples: np.ndarray) -> np.ndarray:
        """float32 `[samples]`: what is ready after this piece. The end of what was added before may be held back."""
        rest = self.finish() if rate_hz != self._rate_hz else _NOTHING
        if rate_hz == self.sample_rate_hz:
            return np.concatenate([rest, samples])
        if self._stream is None:
            self._rate_hz = rate_hz
            self._stream = soxr.ResampleStream(rate_hz, self.sample_rate_hz, 1, dtype="float32")
        return np.concatenate([rest, self._stream.resample_chunk(samples, last=False)])

    def finish(self) -> np.ndarray:
        """What was held back. The next piece begins a new stream."""
        if self._stream is None:
            return _NOTHING
        rest: np.ndarray = self._stream.resample_chunk(_NOTHING, last=True)
        self._stream, self._rate_hz = None, 0
        return rest


_NOTHING = np.empty(0, np.float32)


def _as_float(values: np.ndarray) -> np.ndarray:
    """Samples of any format as floats in [-1, 1]."""
    if values.dtype == np.uint8:
        return (values.astype(np.float32) - 128) / 128
    if np.issubdtype(values.dtype, np.integer):
        return values.astype(np.float32) / np.float32(2.0 ** (8 * values.itemsize - 1))
    return values


def _resample(samples: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    return samples if from_hz == to_hz else soxr.resample(samples, from_hz, to_hz)
