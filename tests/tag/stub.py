"""A tagger with known scores: a class is a band of frequencies, its score 0.95 if the band is loud, else 0.05."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ast_core.batch import Norm
from ast_core.checkpoints import ModelConfig
from ast_core.features import KALDI128
from ast_core.labels import LabelVocabulary
from ast_core.models.tagger import Outputs, Tagger
from ast_core.recipe import Recipe
from pipeline.tag.predictor import Member
from tests import fakes

FREQS_HZ = (500.0, 1500.0, 4000.0)
LABELS = LabelVocabulary.from_names(["low", "middle", "high"])
NORM = Norm(mean=0.0, std=0.5)
"""With which normalised features are the raw ones."""
LOUD = -2.0
"""Log-mel between those of noise of level 0.001 and of a tone."""


class BandTagger(Tagger):
    """A frame of 0.1 s has a class if its band is loud; a clip has it if a quarter of its frames have it."""

    head = "none"

    def __init__(self, num_frames: int = 100, *, has_frames: bool = False) -> None:
        super().__init__()
        self.label_dim, self.input_shape, self.has_frames = len(LABELS), (num_frames, 128), has_frames
        self.unused = torch.nn.Parameter(torch.zeros(1))
        low, high = KALDI128.mel(20.0), KALDI128.mel(8000.0)
        self.bins = [round((KALDI128.mel(hz) - low) / (high - low) * 128) for hz in FREQS_HZ]

    def forward(self, fbank_BTM: Tensor, patchout: Any = None) -> Tensor:
        return self.outputs(fbank_BTM).logits_BC

    def forward_features(self, fbank_BTM: Tensor) -> Tensor:
        return fbank_BTM.mean(dim=1)

    def outputs(self, fbank_BTM: Tensor) -> Outputs:
        padding_BT = (fbank_BTM == 0).all(dim=2)
        level_BTC = torch.stack([fbank_BTM[:, :, b - 2 : b + 3].amax(dim=2) for b in self.bins], dim=2)
        loud_BTC = (level_BTC > LOUD).float() * ~padding_BT[:, :, None]
        frames_BTC = loud_BTC.unflatten(1, (-1, 10)).mean(dim=2)
        is_heard_BC = loud_BTC.mean(dim=1) >= 0.25
        frame_logits = 3 * torch.where(frames_BTC >= 0.5, 1.0, -1.0) if self.has_frames else None
        return Outputs(3 * torch.where(is_heard_BC, 1.0, -1.0), self.forward_features(fbank_BTM), frame_logits)

    def seconds_per_frame(self, features: Any) -> float | None:
        return 0.1 if self.has_frames else None


def member(num_frames: int = 100, *, has_frames: bool = False) -> Member:
    recipe = Recipe(label_dim=len(LABELS), input_tdim=num_frames, precision="fp32", timem=0, freqm=0)
    config = ModelConfig(recipe, NORM, LABELS)
    return Member("stub", BandTagger(num_frames, has_frames=has_frames).eval(), config, [0, 1, 2], None, "stub")


def with_labels(names: Sequence[str]) -> Member:
    """The same with other names of its classes."""
    made = member()
    return replace(made, config=replace(made.config, labels=LabelVocabulary.from_names(names)))


Event = tuple[float, float, str]


def mixture(length_s: float, num_events: int, seed: int = 0) -> tuple[np.ndarray, list[Event]]:
    """Tones of the classes at random times in quiet noise, and the times. Events of a class do not touch."""
    rng = np.random.default_rng(seed)
    waveform = fakes.noise(length_s, seed) / 150
    truth: list[Event] = []
    while len(truth) < num_events:
        label, duration_s = int(rng.integers(len(FREQS_HZ))), float(rng.uniform(2, 9))
        start_s = float(rng.uniform(0, length_s - duration_s))
        near = [
            e for e in truth if e[2] == LABELS.names[label] and e[0] < start_s + duration_s + 3 and e[1] > start_s - 3
        ]
        if near:
            continue
        tone = fakes.tone(FREQS_HZ[label], duration_s) / 4
        begin = round(start_s * fakes.RATE_HZ)
        waveform[begin : begin + len(tone)] += tone
        truth.append((start_s, start_s + duration_s, LABELS.names[label]))
    return waveform, sorted(truth)


def event_f1(found: Sequence[Event], truth: Sequence[Event], collar_s: float) -> float:
    """Event-based F1: an event is found if its onset and offset are within the collar, each once.

    It equals sed_eval's for events of a class that are further apart than the collar; others are not matched optimally.
    """
    left, hits = list(found), 0
    for start_s, end_s, label in truth:
        for event in left:
            if event[2] == label and abs(event[0] - start_s) <= collar_s and abs(event[1] - end_s) <= collar_s:
                left.remove(event)
                hits += 1
                break
    return 2 * hits / (len(found) + len(truth))


def write_recordings(folder: Path, num: int, suffixes: Sequence[str] = ("wav", "flac", "ogg")) -> list[Path]:
    """Recordings of different lengths and containers, with tones."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        fakes.write_media(folder / f"r{i}.{suffixes[i % len(suffixes)]}", mixture(12.0 + i, 2, seed=i)[0])
        for i in range(num)
    ]
