"""One ONNX file from a waveform to scores: features, network, sigmoid and calibration.

The file cuts the waveform into windows of the model's input length, as `jobs/tag.py` does by default, and scores one
after the other, so that its memory does not grow with the waveform. Its graph is a loop; the body is three parts, each
traced from the code that computes the same elsewhere: `ast_core.features.log_mel`, the model, `ModelCalibration`.

N samples of a window, W windows, T frames, M mel bins, C classes, P points of an isotonic calibration.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ast_core.batch import normalise
from ast_core.calibration import CLIP, ModelCalibration
from ast_core.checkpoints import ModelConfig
from ast_core.checkpoints.onnx import check_packages, metadata_of, session, traced, unfinished
from ast_core.errors import DataError
from ast_core.features import log_mel

if TYPE_CHECKING:
    import onnx

TOLERANCE = 1e-3
"""Largest accepted difference of a score. The same parts of the file in two sessions differ by rounding, about 1e-6."""
INT8_TOLERANCE = 0.05
"""The same for weights of 8 bits, with which a small difference may round an input to another step."""
CHECKED_WINDOWS = (0.4, 1.7)
"""Lengths of the waveforms that are compared, in windows."""

_OUTER = """
<ir_version: 10, opset_import: ["": {opset}]>
tagger (float[samples] waveform) => (float[windows, {num_classes}] scores, float[windows] start_s, float[windows] end_s)
{{
    window = Constant <value_int = {window}> ()
    hop = Constant <value_int = {hop}> ()
    frame = Constant <value_int = {frame}> ()
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    rate_hz = Constant <value_float = {rate_hz}.0> ()
    axis = Constant <value_ints = [0]> ()
    yes = Constant <value = bool {{1}}> ()
    length = Size (waveform)
    beyond = Sub (length, window)
    last_start = Max (beyond, zero)
    whole_hops = Div (last_start, hop)
    covered = Mul (whole_hops, hop)
    tail = Sub (beyond, covered)
    has_tail = GreaterOrEqual (tail, frame)
    num_tails = Cast <to = 7> (has_tail)
    num_after_first = Add (whole_hops, num_tails)
    num_if_any = Add (num_after_first, one)
    is_too_short = Less (length, frame)
    num_windows = Where (is_too_short, zero, num_if_any)
    scores, start_s, end_s = Loop (num_windows, yes) <body = one_window (int64 number, bool goes_on)
        => (bool goes_on_too, float[{num_classes}] window_scores, float window_start_s, float window_end_s)
    {{
        goes_on_too = Identity (goes_on)
        wanted_start = Mul (number, hop)
        start = Min (wanted_start, last_start)
        next_start = Add (start, hop)
        end = Min (next_start, length)
        start_float = Cast <to = 1> (start)
        end_float = Cast <to = 1> (end)
        window_start_s = Div (start_float, rate_hz)
        window_end_s = Div (end_float, rate_hz)
        reach = Add (start, window)
        reach_inside = Min (reach, length)
        slice_start = Unsqueeze (start, axis)
        slice_end = Unsqueeze (reach_inside, axis)
        samples_inside = Slice (waveform, slice_start, slice_end, axis)
        num_samples = Sub (reach_inside, start)
        num_missing = Sub (window, num_samples)
        num_missing_1 = Unsqueeze (num_missing, axis)
        pads = Concat <axis = 0> (axis, num_missing_1)
        samples = Pad (samples_inside, pads)
    }}>
}}
"""
"""The cutting into windows of `pipeline.tag.windows.window_starts`. The body gets the nodes from `samples` and
`num_samples` to `window_scores`. (`axis` is [0], also the number of samples that `Pad` adds in front.)"""


def save_onnx_waveform(
    file: str | os.PathLike[str],
    network: str | os.PathLike[str],
    config: ModelConfig,
    calibration: ModelCalibration | None = None,
    *,
    thresholds: Sequence[float],
    tolerance: float = TOLERANCE,
) -> float:
    """Write `waveform` [samples] → `scores` [windows, classes], `start_s` [windows], `end_s` [windows].

    `waveform` is mono, in [-1, 1], at the features' sample rate, of any length. Scores are sigmoids, or calibrated ones
    with a `calibration`. A waveform that is shorter than a frame has no window. The metadata has what `save_onnx`
    writes, the `thresholds` of the scores, and whether they are calibrated (`is_calibrated`), as JSON.

    Args:
        network: the file that `save_onnx` wrote for the model, or a quantised one.

    Returns:
        The largest difference of a score from that of the network with features by PyTorch.

    Raises:
        ConfigError: the ONNX packages are not installed.
        DataError: the difference is larger than `tolerance`. No file is written.
    """
    check_packages()
    import onnx

    model = _over_windows(_window_model(network, config, calibration), config)
    more = {"thresholds": [round(float(value), 6) for value in thresholds], "is_calibrated": calibration is not None}
    onnx.helper.set_model_props(model, dict(metadata_of(config, **more)))
    with unfinished(file) as part:
        onnx.save(model, part)
        deviation = _deviation(part, network, config, calibration)
        if not deviation <= tolerance:
            raise DataError(f"the ONNX file's scores are off by {deviation:.1e}; it was not kept")
    return deviation


def _window_model(
    network: str | os.PathLike[str], config: ModelConfig, calibration: ModelCalibration | None
) -> "onnx.ModelProto":
    """`samples` [N] and `num_samples` [] → `window_scores` [C]."""
    import onnx
    from onnx import compose

    features = Features(config).eval()
    window = (torch.zeros(features.window_samples), torch.tensor(features.window_samples))
    features(*window)  # fills the caches of the feature code, in which tracing would leave tensors without data
    logits = torch.zeros(1, len(config.labels))
    first = traced(features, window, ["samples", "num_samples"], ["fbank"]).model_proto
    last = traced(Scores(calibration, len(config.labels)).eval(), (logits,), ["logits"], ["window_scores"]).model_proto
    middle = onnx.load(network)
    del middle.metadata_props[:]
    for model in (first, middle, last):
        model.ir_version = first.ir_version
    first = compose.add_prefix(first, "features/", rename_inputs=False, rename_outputs=False)
    middle = compose.add_prefix(middle, "network/", rename_inputs=False, rename_outputs=False)
    last = compose.add_prefix(last, "scores/", rename_inputs=False, rename_outputs=False)
    return compose.merge_models(compose.merge_models(first, middle, [("fbank", "fbank")]), last, [("logits", "logits")])


def _over_windows(one_window: "onnx.ModelProto", config: ModelConfig) -> "onnx.ModelProto":
    """The model of a window in a loop over the windows of a waveform."""
    import onnx

    features, num_frames = config.features, config.recipe.input_tdim
    opset = next(opset.version for opset in one_window.opset_import if opset.domain in ("", "ai.onnx"))
    text = _OUTER.format(
        opset=opset,
        num_classes=len(config.labels),
        window=features.num_samples(num_frames),
        hop=num_frames * features.frame_shift_samples,
        frame=features.frame_length_samples,
        rate_hz=features.sample_rate_hz,
    )
    model = onnx.parser.parse_model(text)
    model.ir_version = one_window.ir_version
    known = {opset.domain for opset in model.opset_import}
    model.opset_import.extend(opset for opset in one_window.opset_import if opset.domain not in {*known, "ai.onnx"})
    (loop,) = (node for node in model.graph.node if node.op_type == "Loop")
    body = loop.attribute[0].g
    body.node.extend(one_window.graph.node)
    body.initializer.extend(one_window.graph.initializer)
    model.functions.extend(one_window.functions)
    return model


class Features(nn.Module):
    """The network's input `[1, T, M]` for a window: what `ast_core.tagging.model_input_of` computes, in one shape."""

    needed_T: Tensor
    """Samples that a window needs to have each frame."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.settings, self.norm, self.num_frames = config.features, config.norm, config.recipe.input_tdim
        self.window_samples = self.settings.num_samples(self.num_frames)
        needed = [self.settings.num_samples(number + 1) for number in range(self.num_frames)]
        self.register_buffer("needed_T", torch.tensor(needed))

    def forward(self, samples_N: Tensor, num_samples: Tensor) -> Tensor:
        """`samples_N` is padded with anything from `num_samples` on."""
        is_sound_N = torch.arange(self.window_samples) < num_samples
        samples_N = torch.where(is_sound_N, samples_N.clamp(-1, 1), 0.0)
        samples_N = torch.where(is_sound_N, samples_N - samples_N.sum() / num_samples, 0.0)
        # float64, because ONNX Runtime's float32 FFT has a larger error than PyTorch's
        fbank_TM = log_mel(samples_N.double(), self.settings)[: self.num_frames].float()
        has_frame_T = num_samples >= self.needed_T
        fbank_TM = torch.where(has_frame_T[:, None], fbank_TM, 0.0)
        return normalise(fbank_TM[None], self.norm.mean, self.norm.std, self.norm.divisor)


class Scores(nn.Module):
    """Logits `[1, C]` → scores `[C]`: sigmoids, calibrated as by `ModelCalibration`."""

    slope_C: Tensor
    intercept_C: Tensor
    x_CP: Tensor
    y_CP: Tensor
    is_logistic_C: Tensor
    is_isotonic_C: Tensor

    def __init__(self, calibration: ModelCalibration | None, num_classes: int) -> None:
        super().__init__()
        maps = [] if calibration is None else [of_class.map for of_class in calibration.classes]
        self.methods = {one.method for one in maps}
        slope_C, intercept_C = np.ones(num_classes), np.zeros(num_classes)
        points = [np.zeros((2, 1))] * num_classes
        for c, one in enumerate(maps):
            if one.method == "temperature":
                slope_C[c] = 1 / one.parameters[0]
            elif one.method == "platt":
                slope_C[c], intercept_C[c] = one.parameters
            elif one.method == "isotonic":
                points[c] = np.array(one.parameters).reshape(2, -1)
        longest = max(of_class.shape[1] for of_class in points)
        x_CP, y_CP = np.stack([np.pad(p, ((0, 0), (0, longest - p.shape[1])), mode="edge") for p in points], axis=1)
        has = {name: [one.method in methods for one in maps] for name, methods in _GROUPS.items()}
        for name, value in {"slope_C": slope_C, "intercept_C": intercept_C, "x_CP": x_CP, "y_CP": y_CP}.items():
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32))
        for name, is_of_C in has.items():
            self.register_buffer(name, torch.tensor(is_of_C or [False] * num_classes))

    def forward(self, logits_BC: Tensor) -> Tensor:
        scores_C = raw_C = logits_BC.sigmoid()[0]
        if self.methods & _GROUPS["is_logistic_C"]:
            clipped_C = raw_C.clamp(CLIP, 1 - CLIP)
            logit_C = clipped_C.log() - (1 - clipped_C).log()
            scores_C = torch.where(self.is_logistic_C, (self.slope_C * logit_C + self.intercept_C).sigmoid(), scores_C)
        if self.methods & _GROUPS["is_isotonic_C"]:
            scores_C = torch.where(self.is_isotonic_C, self._interpolated(raw_C), scores_C)
        return scores_C

    def _interpolated(self, scores_C: Tensor) -> Tensor:
        """Linear between the points of each class, constant beyond them: `numpy.interp`."""
        above_C1 = (scores_C[:, None] >= self.x_CP).sum(dim=1, keepdim=True)
        low_C1, high_C1 = (above_C1 - 1).clamp_min(0), above_C1.clamp_max(self.x_CP.shape[1] - 1)
        x0, x1 = self.x_CP.gather(1, low_C1)[:, 0], self.x_CP.gather(1, high_C1)[:, 0]
        y0, y1 = self.y_CP.gather(1, low_C1)[:, 0], self.y_CP.gather(1, high_C1)[:, 0]
        share_C = (scores_C - x0) / (x1 - x0).clamp_min(torch.finfo(torch.float32).tiny)
        return y0 + share_C.clamp(0, 1) * (y1 - y0)


_GROUPS: Mapping[str, set[str]] = {"is_logistic_C": {"temperature", "platt"}, "is_isotonic_C": {"isotonic"}}
"""Methods of calibration that are computed in the same way."""


def _deviation(
    file: Path, network: str | os.PathLike[str], config: ModelConfig, calibration: ModelCalibration | None
) -> float:
    """The largest difference of a score of noise from the network's, with features and calibration by Python."""
    features = Features(config)
    window, hop = features.window_samples, config.recipe.input_tdim * config.features.frame_shift_samples
    tag, score = session(file).run, session(network).run
    worst = 0.0
    for windows in CHECKED_WINDOWS:
        waveform = _noise(round(windows * window))
        found, _, _ = tag(None, {"waveform": waveform})
        for number, of_window in enumerate(found):
            start = min(number * hop, max(0, len(waveform) - window))
            samples = torch.from_numpy(waveform[start : start + window])
            padded = nn.functional.pad(samples, (0, window - len(samples)))
            with torch.inference_mode():
                fbank = features(padded, torch.tensor(len(samples)))
            (logits,) = score(["logits"], {"fbank": fbank.numpy()})
            raw = 1 / (1 + np.exp(-logits[0].astype(np.float64)))
            expected = raw if calibration is None else calibration(raw)
            difference = np.abs(of_window - expected).max()
            worst = max(worst, math.inf if np.isnan(difference) else float(difference))
    return worst


def _noise(num_samples: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Noise whose level rises, so that windows differ."""
    noise = np.random.default_rng(0).standard_normal(num_samples)
    return (0.2 * np.linspace(0.01, 1, num_samples) * noise).astype(np.float32)
