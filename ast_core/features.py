"""Feature settings: how a waveform becomes log-mel. A data set has one setting, and a model is trained on one.

Imports neither NumPy nor PyTorch, so that recipes are checked in milliseconds, nor pydantic, whose import would take a
quarter of a second in each process that decodes.
"""

import difflib
import json
import math
import struct
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ast_core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

MAX_MEL_BINS = 1024


MAX_PEAK = 10.0
"""Floating-point samples may exceed full scale (1.0) by 20 dB. Larger ones are integers or percentages."""


@dataclass(frozen=True)
class LogScale:
    """The logarithm that features are stored in."""

    name: str
    unit: str
    nats_per_unit: float
    """The power of a value is `exp(nats_per_unit · value)`."""


NATURAL = LogScale("natural", "nats", 1.0)
DECIBELS = LogScale("decibels", "dB", math.log(10) / 10)


def kaldi_mel(freq_hz: float) -> float:
    """HTK's mel scale, which Kaldi uses."""
    return 1127.0 * math.log(1.0 + freq_hz / 700.0)


def slaney_mel(freq_hz: float) -> float:
    """The mel scale of Slaney's Auditory Toolbox: linear up to 1 kHz, which is 15 mel, and logarithmic above."""
    return 15.0 * freq_hz / 1000.0 if freq_hz < 1000.0 else 15.0 + 27.0 * math.log(freq_hz / 1000.0, 6.4)


@dataclass(frozen=True)
class FeatureKind:
    """A way to compute log-mel. `docs/extending.md` shows how to add one."""

    function: str
    """`module:function`. It takes a waveform `[..., samples]`, float32 or float64, full scale at [-1, 1], and all
    fields of FeatureSettings except `kind` by name. It returns `[..., frames, mel bins]` in the same dtype."""
    num_frames: Callable[[int, int, int], int]
    """The number of frames of a number of samples, with a frame's length and shift, both in samples."""
    log_scale: LogScale
    power_floor: float
    """The smallest power, that of digital silence."""
    window: str
    mel: Callable[[float], float] = kaldi_mel
    """The mel scale: a frequency in Hz to mel."""


def whole_frames(num_samples: int, length: int, shift: int) -> int:
    """The number of frames that lie within the samples (Kaldi's `snip_edges`)."""
    return 0 if num_samples < length else 1 + (num_samples - length) // shift


def centred_frames(num_samples: int, length: int, shift: int) -> int:
    """The number of frames whose centres are multiples of the shift. 0 if there are fewer samples than in a frame."""
    return 0 if num_samples < length else 1 + num_samples // shift


KINDS: dict[str, FeatureKind] = {
    "kaldi_fbank": FeatureKind(
        "ast_core.fbank:fbank",
        whole_frames,
        NATURAL,
        power_floor=2.0**-23,  # float32's epsilon
        window="hanning",
    ),
    "mel_db": FeatureKind(
        "ast_core.mel_db:mel_db",
        centred_frames,
        DECIBELS,
        power_floor=1e-10,
        window="periodic hann",
        mel=slaney_mel,
    ),
}

EARLIER_NAME = "kaldi log-mel fbank"
"""The name of kaldi_fbank in the dataset.json of earlier versions."""


def _samples_of(sample_rate_hz: int, duration_ms: float) -> int:
    """Rounded down, in the same order of operations as torchaudio."""
    return int(sample_rate_hz * duration_ms * 0.001)


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """How features are computed. The defaults are the settings `kaldi128`, those of the reference implementation.

    Creating them raises ConfigError, in one line, for a value that is not allowed.
    """

    kind: str = "kaldi_fbank"
    """The function that computes them: one of `KINDS`."""
    sample_rate_hz: int = 16_000
    """Rate to which the audio is resampled."""
    num_mel_bins: int = 128
    frame_length_ms: float = 25.0
    frame_shift_ms: float = 10.0
    low_freq_hz: float = 20.0
    """Lower edge of the lowest mel band."""
    high_freq_hz: float | None = None
    """Upper edge of the highest mel band. null: half the sample rate."""

    def __post_init__(self) -> None:
        self._require(isinstance(self.kind, str) and self.kind in KINDS, "kind", " or ".join(KINDS))
        for key in ("sample_rate_hz", "num_mel_bins"):
            self._require(type(getattr(self, key)) is int, key, "a whole number")  # 1 is a number, True is not
        for key in ("frame_length_ms", "frame_shift_ms", "low_freq_hz", "high_freq_hz"):
            self._check_float(key)
        self._require(1_000 <= self.sample_rate_hz <= 192_000, "sample_rate_hz", "1000 to 192000")
        # Kaldi refuses three bins and fewer.
        self._require(4 <= self.num_mel_bins <= MAX_MEL_BINS, "num_mel_bins", f"4 to {MAX_MEL_BINS}")
        self._require(0 < self.frame_length_ms <= 1_000, "frame_length_ms", "more than 0, and 1000 or less")
        self._require(1 <= self.frame_shift_ms <= 1_000, "frame_shift_ms", "1 to 1000")
        self._require(self.frame_length_samples >= 2, "frame_length_ms", "two samples or more")
        self._require(
            self.frame_shift_ms <= self.frame_length_ms,
            "frame_shift_ms",
            f"frame_length_ms, {self.frame_length_ms:g}, or less",
        )
        half_hz = self.sample_rate_hz / 2
        self._require(
            0 <= self.low_freq_hz < half_hz, "low_freq_hz", f"0 to less than half the sample rate, {half_hz:g}"
        )
        self._require(
            self.low_freq_hz < self.upper_freq_hz <= half_hz,
            "high_freq_hz",
            f"more than low_freq_hz, {self.low_freq_hz:g}, to half the sample rate, {half_hz:g}",
        )

    def _check_float(self, key: str) -> None:
        value = getattr(self, key)
        if value is None and key == "high_freq_hz":
            return
        self._require(type(value) in (int, float), key, "a number")
        self._require(math.isfinite(value), key, "a finite number")
        object.__setattr__(self, key, float(value))

    def _require(self, holds: bool, key: str, allowed: str) -> None:
        if not holds:
            value = getattr(self, key)
            raise ConfigError(f"{key} is {value if key == 'kind' else repr(value)}; use {allowed}")

    @property
    def frame_length_samples(self) -> int:
        return _samples_of(self.sample_rate_hz, self.frame_length_ms)

    @property
    def frame_shift_samples(self) -> int:
        return _samples_of(self.sample_rate_hz, self.frame_shift_ms)

    @property
    def upper_freq_hz(self) -> float:
        return self.sample_rate_hz / 2 if self.high_freq_hz is None else self.high_freq_hz

    def mel(self, freq_hz: float) -> float:
        """A frequency on the mel scale of these features."""
        return KINDS[self.kind].mel(freq_hz)

    @property
    def log_scale(self) -> LogScale:
        return KINDS[self.kind].log_scale

    @property
    def floor(self) -> float:
        """The smallest value, digital silence, as float16 stores it: -15.94 for kaldi_fbank."""
        exact = math.log(KINDS[self.kind].power_floor) / self.log_scale.nats_per_unit
        (stored,) = struct.unpack("e", struct.pack("e", exact))
        return float(stored)

    def num_frames(self, num_samples: int) -> int:
        return KINDS[self.kind].num_frames(num_samples, self.frame_length_samples, self.frame_shift_samples)

    def num_samples(self, num_frames: int) -> int:
        """The least number of samples that have this many frames."""
        most = num_frames * self.frame_shift_samples + self.frame_length_samples
        return bisect_left(range(most), num_frames, key=self.num_frames)

    def seconds(self, num_frames: float) -> float:
        """The time from the start of one frame to that of the frame `num_frames` later."""
        return num_frames * self.frame_shift_samples / self.sample_rate_hz

    def to_dict(self) -> dict[str, Any]:
        """The settings with the facts that follow from the kind or hold for all data sets, as dataset.json has them."""
        return asdict(self) | {
            "log_scale": self.log_scale.name,
            "window": KINDS[self.kind].window,
            "waveform_scale": 1.0,
            "stored_as": "float16",
        }

    @classmethod
    def from_mapping(cls, value: Any, *, origin: object) -> "FeatureSettings":
        """The settings in `value`: what `to_dict` made, or the content of a YAML file. A missing key has its default.

        Raises:
            ConfigError: a key is unknown, or its value not allowed. The message is one line and names `origin`.
        """
        if not isinstance(value, Mapping):
            raise ConfigError(f"{origin}: features are a mapping from keys to values, not {type(value).__name__}")
        keys = [field.name for field in fields(cls)]
        given = dict(value)
        if given.get("kind") == EARLIER_NAME:
            given["kind"] = "kaldi_fbank"
        try:
            read = cls(**{key: given[key] for key in keys if key in given})
            facts = read.to_dict()
            for key, stated in given.items():
                if key not in facts:
                    near = difflib.get_close_matches(str(key), keys, n=1) or [", ".join(keys)]
                    raise ConfigError(f"no feature setting {key!r}; use {near[0]}")
                if stated != facts[key] and key not in keys:
                    raise ConfigError(f"{key} is {stated!r}; only {facts[key]!r} is supported")
        except ConfigError as err:
            raise ConfigError(f"{origin}: {err}") from err
        is_default = read.high_freq_hz == read.sample_rate_hz / 2
        return replace(read, high_freq_hz=None) if is_default else read  # so that equal features have equal settings

    @property
    def option(self) -> str:
        """The value of `--features` that gives these settings: their name, or what differs from the defaults."""
        for name, named in FEATURES.items():
            if named == self:
                return name
        other = {key: value for key, value in asdict(self).items() if value != getattr(KALDI128, key)}
        return f"'{json.dumps(other)}'"

    def differences(self, other: "FeatureSettings") -> str:
        """What is different here, as a part of a sentence: `num_mel_bins is 64, not 128`. Empty if both are equal."""
        theirs = asdict(other)
        return ", ".join(
            f"{key} is {value}, not {theirs[key]}" for key, value in asdict(self).items() if value != theirs[key]
        )


KALDI128 = FeatureSettings()
SMALL64 = FeatureSettings(kind="mel_db", num_mel_bins=64, frame_length_ms=64.0, frame_shift_ms=25.0, low_freq_hz=0.0)

FEATURES: dict[str, FeatureSettings] = {"kaldi128": KALDI128, "small64": SMALL64}
"""The settings that have a name. `small64` are the small features of `lijuncheng16/AudioTaggingDoneRight`, which has
their decibels doubled."""


def log_mel(waveform: "Tensor", features: FeatureSettings) -> "Tensor":
    """Raw log-mel `[..., frames, mel bins]` of a waveform `[..., samples]` at the features' sample rate.

    Subtract the mean of a clip first, as the preparation does.
    """
    module, _, function = KINDS[features.kind].function.partition(":")
    compute: Callable[..., Tensor] = getattr(import_module(module), function)
    return compute(waveform, **{key: value for key, value in asdict(features).items() if key != "kind"})
