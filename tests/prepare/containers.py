"""A recording in every container that the ffmpeg program writes and a fetch reads, for tests of sections."""

import subprocess
from functools import cache
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from tests import fakes

RATE_HZ = 16_000
DURATION_S = 30.0

CONTAINERS: dict[str, tuple[str, ...]] = {
    "webm": ("-c:a", "libopus"),
    "mka": ("-c:a", "pcm_s16le"),
    "m4a": ("-c:a", "aac"),
    "mp4": ("-c:a", "alac"),
    "faststart.m4a": ("-c:a", "aac", "-movflags", "+faststart"),
    "fragmented.m4a": ("-c:a", "aac", "-movflags", "frag_keyframe+empty_moov", "-frag_duration", "2000000"),
    "mov": ("-c:a", "pcm_s16le"),
    "ogg": ("-c:a", "libvorbis"),
    "opus": ("-c:a", "libopus"),
    "flac": (),
    "wav": ("-ar", "44100"),
    "float.wav": ("-c:a", "pcm_f32le"),
    "rf64.wav": ("-rf64", "always"),
    "adpcm.wav": ("-c:a", "adpcm_ms"),
    "w64": (),
    "au": ("-ar", "22050"),
    "aiff": ("-ar", "44100"),
    "caf": ("-ar", "44100"),
    "voc": (),
    "wv": (),
    "tta": (),
    "mp3": ("-b:a", "128k"),
    "cbr.mp3": ("-b:a", "128k", "-write_xing", "0"),
    "aac": ("-c:a", "aac"),
    "ac3": ("-ar", "48000"),
    "eac3": ("-ar", "48000"),
    "ts": ("-c:a", "aac"),
    "mpg": ("-c:a", "mp2"),
    "avi": ("-c:a", "libmp3lame"),
    "pcm.avi": ("-c:a", "pcm_s16le"),
    "flv": ("-c:a", "aac"),
    "wma": ("-c:a", "wmav2", "-ar", "44100"),
    "nut": ("-c:a", "pcm_s16le"),
}
"""ffmpeg's arguments by file extension. A word before the extension tells apart containers with the same one."""


@cache
def _ffmpeg() -> str:
    return str(imageio_ffmpeg.get_ffmpeg_exe())


def write_container(folder: Path, kind: str, duration_s: float = DURATION_S) -> Path:
    """Write noise that does not repeat into the container."""
    source = folder / f"source-{duration_s:g}.wav"
    if not source.exists():
        fakes.write_media(source, fakes.noise(duration_s))
    path = folder / f"sound.{kind}"
    command = [_ffmpeg(), "-v", "error", "-y", "-i", str(source), "-map_metadata", "-1", *CONTAINERS[kind], str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return path


def by_the_program(path: Path) -> np.ndarray:
    """float32 `[samples]`: the whole file as the ffmpeg program decodes it, mono, 16 kHz."""
    command = [_ffmpeg(), "-v", "error", "-i", str(path), "-ac", "1", "-ar", str(RATE_HZ), "-f", "f32le", "-"]
    return np.frombuffer(
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True).stdout, "f4"
    )
