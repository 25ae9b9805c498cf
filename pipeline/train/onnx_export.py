"""A model as one ONNX file: the network or all of tagging, with weights of 32 or 8 bits."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ast_core.calibration import ModelCalibration
from ast_core.checkpoints import ModelConfig
from ast_core.checkpoints.onnx import save_onnx
from ast_core.checkpoints.onnx_int8 import save_int8
from ast_core.checkpoints.onnx_waveform import INT8_TOLERANCE, TOLERANCE, save_onnx_waveform
from ast_core.models.tagger import Tagger
from pipeline.train.evaluation.onnx_scores import loss_in_map

DEFAULT_THRESHOLD = 0.5
"""The threshold of all classes of a model without a calibration."""


@dataclass(frozen=True)
class OnnxForm:
    """What the file is to be."""

    from_waveform: bool = False
    """Whether it takes a waveform and gives scores; else it takes normalised log-mel and gives logits."""
    is_int8: bool = False
    calibration: ModelCalibration | None = None
    """Used with `from_waveform` only."""
    data: str | None = None
    """A prepared data set on whose `splits` the loss of int8 in mAP is measured."""
    splits: Sequence[str] = ()


def write_onnx(file: Path, checkpoint: str, model: Tagger, config: ModelConfig, form: OnnxForm) -> list[str]:
    """Write the file.

    Returns:
        Lines that say what quantisation saves and costs.

    Raises:
        ConfigError: the ONNX packages are not installed.
        DataError: ONNX Runtime computes other scores, or the data do not fit the model.
    """
    lines: list[str] = []
    with tempfile.TemporaryDirectory(prefix="ast-onnx-") as folder:
        network = Path(folder) / "network.onnx"
        save_onnx(network, model, config)
        if form.is_int8:
            quantised = Path(folder) / "int8.onnx"
            save_int8(quantised, network)
            lines = _lines(network, quantised, checkpoint, config, form)
            network = quantised
        if form.from_waveform:
            calibration = form.calibration
            thresholds = np.full(len(config.labels), DEFAULT_THRESHOLD)
            thresholds = thresholds if calibration is None else calibration.thresholds()
            tolerance = INT8_TOLERANCE if form.is_int8 else TOLERANCE
            save_onnx_waveform(file, network, config, calibration, thresholds=thresholds.tolist(), tolerance=tolerance)
        else:
            shutil.move(network, file)
    return lines


def _lines(network: Path, quantised: Path, checkpoint: str, config: ModelConfig, form: OnnxForm) -> list[str]:
    before, after = (path.stat().st_size / 1e6 for path in (network, quantised))
    size = f"int8: the network has {after:,.1f} MB instead of {before:,.1f}"
    if form.data is None:
        return [f"{size}; give --data and --split to measure its loss in mAP"]
    loss = loss_in_map(checkpoint, config, form.data, form.splits, before=network, after=quantised)
    change = loss.map_after - loss.map_before
    return [
        size,
        f"int8: mAP {loss.map_after:.4f}, with float32 {loss.map_before:.4f} ({change:+.4f}), "
        f"on {loss.num_clips:,} clips of {', '.join(form.splits)}",
    ]
