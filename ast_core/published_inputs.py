"""The input settings of the reference implementation's recipes. Imports no PyTorch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedInput:
    """The input settings of one recipe: https://github.com/YuanGongND/ast, `egs/*/run*.sh`."""

    name: str
    mean: float
    std: float
    num_frames: int
    """Frames to which a clip is padded or cut."""
    freqm: int
    """Mask widths under which the norm was computed: from `src/get_norm_stats.py` for AudioSet, else the recipe's."""
    timem: int


AUDIOSET = PublishedInput("AudioSet", -4.2677393, 4.5689974, num_frames=1024, freqm=24, timem=192)
ESC50 = PublishedInput("ESC-50", -6.6268077, 5.358466, num_frames=512, freqm=24, timem=96)
SPEECH_COMMANDS = PublishedInput("Speech Commands", -6.845978, 5.5654526, num_frames=128, freqm=48, timem=48)
