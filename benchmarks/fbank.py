"""Measure fbanks of 10 s clips on one CPU core: torchaudio's, ours clip by clip, and ours in a batch.

python -m benchmarks.fbank
"""

import sys
import time
from collections.abc import Callable

import torch
import torchaudio
from torch import Tensor

from ast_core.fbank import fbank
from ast_core.features import KALDI128

NUM_CLIPS, CLIP_S = 32, 10
REPEATS = 40


def main() -> int:
    torch.set_num_threads(1)
    clips = torch.randn(NUM_CLIPS, CLIP_S * KALDI128.sample_rate_hz) * 0.1
    work: dict[str, Callable[[], object]] = {
        "torchaudio, clip by clip": lambda: [len(kaldi(clip)) for clip in clips],
        "ours, clip by clip": lambda: [len(fbank(clip)) for clip in clips],
        f"ours, a batch of {NUM_CLIPS}": lambda: len(fbank(clips)),
    }
    took_ms = {name: cpu_ms / NUM_CLIPS for name, cpu_ms in fastest_ms(work).items()}
    reference_ms = took_ms["torchaudio, clip by clip"]
    print("| | ms a clip | of torchaudio's |\n|---|---|---|")
    for name, cpu_ms in took_ms.items():
        print(f"| {name} | {cpu_ms:.2f} | {cpu_ms / reference_ms:.2f} |")
    return 0


def kaldi(clip: Tensor) -> Tensor:
    """The fbank as the reference implementation calls it."""
    return torchaudio.compliance.kaldi.fbank(
        clip.unsqueeze(0),
        sample_frequency=KALDI128.sample_rate_hz,
        num_mel_bins=128,
        frame_shift=10,
        htk_compat=True,
        use_energy=False,
        window_type="hanning",
        dither=0.0,
    )


def fastest_ms(work: dict[str, Callable[[], object]]) -> dict[str, float]:
    """CPU milliseconds of the fastest call of each. They take turns, after one warm-up call."""
    fastest = dict.fromkeys(work, float("inf"))
    for repeat in range(1 + REPEATS):
        for name, call in work.items():
            began_s = time.process_time()
            call()
            if repeat:
                fastest[name] = min(fastest[name], (time.process_time() - began_s) * 1000)
    return fastest


if __name__ == "__main__":
    sys.exit(main())
