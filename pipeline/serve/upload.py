"""A request for tags."""

from dataclasses import dataclass

PCM_DTYPES = {"s16le": "<i2", "f32le": "<f4"}
"""Formats of raw samples, and their NumPy types."""


@dataclass(frozen=True)
class Pcm:
    """What raw samples are: mono, of a format of `PCM_DTYPES`."""

    format: str
    rate_hz: int


@dataclass(frozen=True)
class Upload:
    """A request for tags."""

    body: bytes
    pcm: Pcm | None = None
    """None: the body is a file."""
    top: int = 10
    window_scores: bool = False
    threshold: float | None = None
    """None: those of the settings."""
