"""A known signal, files of it made by the ffmpeg program, and what the program decodes from a file."""

import functools
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import imageio_ffmpeg
import numpy as np

from ast_core.features import KALDI128

SINUSOIDS, HIGHEST_HZ, LEVEL = 240, 6200.0, 0.015


@functools.cache
def signal(length_s: float, rate_hz: int = KALDI128.sample_rate_hz, start_s: float = 0.0, seed: int = 0) -> np.ndarray:
    """float32 `[samples]`: sinusoids below 6.2 kHz and 0.4 of the rate; the same sound at any sufficient rate."""
    rng = np.random.default_rng(seed)
    turns_a_s = 2 * np.pi * rng.uniform(50, min(HIGHEST_HZ, 0.4 * rate_hz), SINUSOIDS)
    phase = rng.uniform(0, 2 * np.pi, SINUSOIDS)
    num_samples, block = round(length_s * rate_hz), 1024
    begins_s = start_s + np.arange(0, num_samples, block) / rate_hz
    at_begin = np.exp(1j * (np.outer(begins_s, turns_a_s) + phase))
    within = np.exp(1j * np.outer(turns_a_s, np.arange(block) / rate_hz))
    at_begin, within = at_begin.astype(np.complex64), within.astype(np.complex64)  # products of half the time
    total = (at_begin.real @ within.real - at_begin.imag @ within.imag).reshape(-1)[:num_samples]
    samples = (LEVEL * total).astype(np.float32)
    samples.setflags(write=False)
    return samples


def ffmpeg(*args: object, stdin: bytes | None = None, check: bool = True) -> bytes:
    """Run the ffmpeg program and return its standard output."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-loglevel", "error", "-y", *map(str, args)]
    ended = subprocess.run(command, input=stdin, capture_output=True, check=False)
    if check and ended.returncode:
        raise AssertionError(f"{command[4:]}: {ended.stderr.decode(errors='replace')[-400:]}")
    return ended.stdout


def write(path: Path, samples: np.ndarray, rate_hz: int, *options: object) -> Path:
    """Encode float32 `[samples]` or `[channels, samples]` in the format of the path and the options."""
    planes = np.atleast_2d(samples)
    raw = ("-f", "f32le", "-ar", rate_hz, "-ac", len(planes), "-i", "-")
    ffmpeg(*raw, *options, path, stdin=planes.T.astype("<f4").tobytes())
    return path


class Cut(NamedTuple):
    start_s: float | None = None
    duration_s: float | None = None


def program(
    path: Path,
    start_s: float | None = None,
    duration_s: float | None = None,
    *,
    channels: int = 1,
    resampler: str | None = None,
) -> np.ndarray:
    """float32 `[samples]`: the program's output, the mean of the channels at 16 kHz.

    `resampler`: "soxr" is the one that we use, in another build; None is the program's own.
    """
    return programs(path, Cut(start_s, duration_s), channels=channels, resampler=resampler)[0]


def programs(path: Path, *cuts: Cut, channels: int = 1, resampler: str | None = None) -> list[np.ndarray]:
    """`program` for several sections in one run."""
    outputs: list[object] = []
    with tempfile.TemporaryDirectory() as folder:
        for i, (start_s, duration_s) in enumerate(cuts):
            filters = []
            if start_s is not None:  # like -ss and -t, but at the file's rate
                end = "" if duration_s is None else f":end={start_s + duration_s}"
                filters.append(f"atrim=start={start_s}{end}")
            filters.append("aformat=sample_fmts=flt")  # after the cut, because the rate may change here
            if channels > 1:
                filters.append(f"pan=mono|c0={'+'.join(f'{1 / channels}*c{c}' for c in range(channels))}")
            if resampler is not None:
                filters.append(f"aresample={KALDI128.sample_rate_hz}:resampler={resampler}")
            outputs += [
                "-ac",
                1,
                "-ar",
                KALDI128.sample_rate_hz,
                "-af",
                ",".join(filters),
                "-f",
                "f32le",
                f"{folder}/{i}",
            ]
        ffmpeg("-i", path, *outputs, check=False)
        files = [Path(folder, str(i)) for i in range(len(cuts))]
        return [np.fromfile(file, "<f4") if file.exists() else np.empty(0, np.float32) for file in files]


def lag(waveform: np.ndarray, original: np.ndarray) -> tuple[int, float]:
    """By how many samples `waveform` is later than `original`, and the correlation of their common part."""
    size = 1 << (len(waveform) + len(original)).bit_length()
    products = np.fft.irfft(np.fft.rfft(waveform, size) * np.conj(np.fft.rfft(original, size)))
    late = int(np.argmax(products))
    late = late if late < size // 2 else late - size
    ours, theirs = waveform[max(0, late) :], original[max(0, -late) :]
    shared = min(len(ours), len(theirs))
    return late, float(np.corrcoef(ours[:shared], theirs[:shared])[0, 1])


def error_level(waveform: np.ndarray, expected: np.ndarray) -> float:
    """RMS of the difference over that of what is expected, over the common samples."""
    shared = min(len(waveform), len(expected))
    difference = waveform[:shared].astype(np.float64) - expected[:shared]
    return float(np.sqrt((difference**2).mean() / max((expected[:shared].astype(np.float64) ** 2).mean(), 1e-12)))
