"""Scores of windows by a model, or by the mean of several, on one device.

N windows, T frames, M mel bins, C classes, D dimensions, T' frames of the model's output.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from ast_core.batch import Batch, model_input
from ast_core.calibration import EventTuning, ModelCalibration
from ast_core.checkpoints import ModelConfig
from ast_core.errors import ConfigError, DataError, UserError
from ast_core.execution import autocast, for_device, set_attention
from ast_core.labels import LabelVocabulary
from ast_core.models.tagger import Tagger
from ast_core.step import predict
from pipeline.memory_errors import too_small_memory
from pipeline.redaction import without_secrets
from pipeline.train import models
from pipeline.train.models import class_order, differing


@dataclass(frozen=True)
class Member:
    """A model of an ensemble, or the only one."""

    uri: str
    model: Tagger
    config: ModelConfig
    columns: list[int]
    """The column of each class of the first member in this member's scores."""
    calibration: ModelCalibration | None
    sha256: str
    """Hash of its weights and config."""


@dataclass(frozen=True)
class Predicted:
    """The results for a batch of windows, with the classes in the order of the first member."""

    scores_NC: np.ndarray
    """float32; calibrated, if the models have a calibration."""
    embeddings_ND: np.ndarray | None
    frame_scores_NTC: np.ndarray | None


def read_members(uris: Sequence[str], *, calibrated: bool = True) -> list[Member]:
    """Read checkpoints that are used together, with their calibrations unless `calibrated` is false.

    Raises:
        DataError: a checkpoint cannot be read, or differs from the first one in its features or classes.
    """
    members: list[Member] = []
    for uri in map(models.find, uris):
        model, config = models.read(uri)
        first = members[0].config if members else config
        if other := first.features.differences(config.features):
            raise DataError(f"{uri} takes other features than {members[0].uri}: {other}; use them one by one")
        columns = class_order(config.labels, first.labels)
        if columns is None:
            raise DataError(f"{uri} has other classes than {members[0].uri}: {differing(config.labels, first.labels)}")
        calibration = models.read_calibration(uri, model, config) if calibrated else None
        members.append(Member(uri, model, config, columns, calibration, models.sha256(model, config)))
    if any((member.calibration is None) != (members[0].calibration is None) for member in members):
        without = next(member.uri for member in members if member.calibration is None)
        raise DataError(f"{without} has no calibration.json, and others have; calibrate it, or give --raw-scores")
    return members


def tuning_of(members: Sequence[Member]) -> EventTuning | None:
    """How the model finds events best, if that has been tuned. For an ensemble it has not."""
    calibration = members[0].calibration if len(members) == 1 else None
    return None if calibration is None else calibration.events


def tuning_lines(members: Sequence[Member], window_s: float, hop_s: float) -> list[str]:
    """A line if the settings of events were chosen with other windows than these."""
    facts = {} if (tuning := tuning_of(members)) is None else tuning.facts
    own = {"window_s": window_s, "hop_s": hop_s}
    if all(math.isclose(facts.get(name, value), value, abs_tol=1e-6) for name, value in own.items()):
        return []
    return [
        f"warning: the settings of events were chosen with windows of {facts['window_s']:g} s every "
        f"{facts['hop_s']:g} s, these have {window_s:g} s every {hop_s:g} s; give --window-s and --hop-s, or calibrate "
        "again"
    ]


def score_lines(
    members: Sequence[Member], threshold: float | None, default: float, *, raw_scores: bool = False
) -> list[str]:
    """What to know of scores without a calibration.

    Args:
        threshold: the given one.
        default: the threshold that is used if there is none.
        raw_scores: whether the user asked for scores without a calibration, and so knows of the threshold.
    """
    without = [member for member in members if member.calibration is None]
    lines = []
    if without and threshold is None and not raw_scores:
        lines.append(
            f"the threshold of every class is {default:g}, because {without[0].uri} has no calibration.json; run "
            "jobs/calibrate.py, or give --threshold"
        )
    if any(member.config.recipe.loss == "CE" for member in without):
        lines.append(
            "warning: the model was trained with --loss CE, so its scores compare the classes of a window, and one by "
            "itself says little; use calibrated scores, or train with --loss BCE"
        )
    return lines


def thresholds_of(members: Sequence[Member], given: float | None, default: float) -> np.ndarray:
    """`[C]`: the given threshold, or those tuned for events, or the mean of the members' own ones, or the default."""
    num_classes = len(members[0].config.labels)
    if given is not None:
        return np.full(num_classes, given)
    if (tuning := tuning_of(members)) is not None:
        return np.array(tuning.thresholds)
    own = [m.calibration.thresholds()[m.columns] for m in members if m.calibration is not None]
    return np.mean(own, axis=0) if own else np.full(num_classes, default)


def labels_of(members: Sequence[Member]) -> LabelVocabulary:
    return members[0].config.labels


def seconds_per_frame(members: Sequence[Member]) -> float | None:
    """Seconds between frame scores; None if a member has none, or they differ."""
    found = {member.model.seconds_per_frame(member.config.features) for member in members}
    return found.pop() if len(found) == 1 else None


class Predictor:
    """Computes scores of batches of windows, as evaluation computes those of clips."""

    def __init__(self, members: Sequence[Member], device: torch.device, *, embeddings: bool, frames: bool) -> None:
        if embeddings and len(members) > 1:
            raise ConfigError("--embeddings takes one checkpoint: those of an ensemble are in different spaces")
        self.members, self.device = list(members), device
        self.embeddings, self.frames = embeddings, frames and seconds_per_frame(members) is not None
        self._recipes = [for_device(member.config.recipe, device, trains=False) for member in members]
        for member, recipe in zip(members, self._recipes, strict=True):
            set_attention(member.model, device, recipe)
            with _enough_memory("the model"):
                member.model.to(device).eval()

    @property
    def input_frames(self) -> int:
        """Frames of the longest input of a member."""
        return max(member.config.recipe.input_tdim for member in self.members)

    def __call__(self, fbank_NTM: np.ndarray) -> Predicted:
        """The results for raw log-mel, float16, padded with 0 to `input_frames`.

        Raises:
            UserError: there is too little memory for so many windows, or the weights are damaged.
        """
        with _enough_memory(f"{len(fbank_NTM)} windows", "lower --batch-windows"):
            return self._predicted(fbank_NTM)

    @torch.no_grad()
    def _predicted(self, fbank_NTM: np.ndarray) -> Predicted:
        fbank = torch.from_numpy(fbank_NTM)
        if self.device.type == "cuda":
            fbank = fbank.pin_memory().to(self.device, non_blocking=True)
        scores, frame_scores, embeddings = [], [], None
        for member, recipe in zip(self.members, self._recipes, strict=True):
            batch = _batch(fbank[:, : recipe.input_tdim], len(member.config.labels))
            if not self.embeddings and not self.frames:
                own = predict(member.model, batch, recipe=recipe, norm=member.config.norm)
            else:
                with autocast(self.device, recipe):
                    outputs = member.model.outputs(model_input(batch, member.config.norm))
                own = outputs.logits_BC.float().sigmoid()
                embeddings = outputs.embedding_BD.float().cpu().numpy() if self.embeddings else None
                if self.frames:
                    assert outputs.frame_logits_BTC is not None
                    frame_scores.append(_scores(outputs.frame_logits_BTC.float().sigmoid().cpu().numpy(), member))
            scores.append(_scores(own.cpu().numpy(), member))
        # A member with a longer input has more frames, of which those behind the window are padding.
        num_frames = min((len(of_member[0]) for of_member in frame_scores), default=0)
        frame_scores = [of_member[:, :num_frames] for of_member in frame_scores]
        predicted = Predicted(_mean(scores), embeddings, _mean(frame_scores) if frame_scores else None)
        if not np.isfinite(predicted.scores_NC).all():
            uris = without_secrets(", ".join(member.uri for member in self.members))
            raise DataError(f"{uris} gives scores that are not numbers: its weights are damaged")
        return predicted


@contextmanager
def _enough_memory(needed: str, *remedies: str) -> Iterator[None]:
    """Raise an error for lack of memory as a line with what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as err:
        where = too_small_memory(err)
        if where is None:
            raise
        more = ("raise --gpus-per-worker", "use --device cpu") if where == "GPU" else ("lower --num-workers",)
        remedies = (*remedies, *more)
        raise UserError(f"the {where} has too little memory for {needed}; {', or '.join(remedies)}") from err


def _batch(fbank_NTM: torch.Tensor, num_classes: int) -> Batch:
    num_windows, num_frames, _ = fbank_NTM.shape
    frames = torch.full((num_windows,), num_frames)
    return Batch(fbank_NTM, frames, torch.zeros(num_windows, num_classes), torch.ones(num_windows))


def _scores(scores: np.ndarray, member: Member) -> np.ndarray:
    """Calibrated scores `[…, C]` with the classes in the common order."""
    calibrated = scores if member.calibration is None else member.calibration(scores)
    return calibrated[..., member.columns]


def _mean(scores: Sequence[np.ndarray]) -> np.ndarray:
    return scores[0] if len(scores) == 1 else np.mean(scores, axis=0)
