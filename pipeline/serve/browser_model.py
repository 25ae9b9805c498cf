"""The model as a file for browsers."""

import json
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ast_core.checkpoints.huggingface import distinct_names
from ast_core.checkpoints.onnx import PACKAGES, metadata_in
from ast_core.errors import DataError
from pipeline import storage
from pipeline.serve.page import PageModel
from pipeline.tag.predictor import Member, labels_of
from pipeline.tag.work import TagSettings
from pipeline.train.onnx_export import OnnxForm, write_onnx

ASKS_SERVER = "the page asks the server for scores"


def page_model(name: str, members: Sequence[Member], settings: TagSettings) -> PageModel:
    """What the page says about the model or the ensemble."""
    windows = settings.windows
    return PageModel(
        name=name,
        labels=distinct_names(labels_of(members)),
        mids=labels_of(members).mids,
        thresholds=[round(float(value), 6) for value in settings.thresholds],
        rate_hz=windows.features.sample_rate_hz,
        window_s=windows.window_s,
        hop_s=windows.hop_s,
        window_samples=windows.window_samples,
        frame_samples=windows.features.frame_length_samples,
    )


_OF_A_MODEL = {
    "labels": "classes",
    "features": "features",
    "norm": "mean and std",
    "is_calibrated": "calibration",
}
"""What a file for browsers has to have in common with the checkpoint."""


def given_model(uri: str, member: Member) -> bytes:
    """The file that the user gives for browsers.

    Raises:
        DataError: it takes no waveform, or has other classes than the model.
        ConfigError: the ONNX packages are not installed.
    """
    content = storage.read_bytes(uri)
    metadata = metadata_in(content, origin=uri)
    if "thresholds" not in metadata:
        raise DataError(f"{uri} takes no waveform; make the model for browsers with export.py --format onnx-waveform")
    own: dict[str, Any] = member.config.to_dict() | {"is_calibrated": member.calibration is not None}
    for key, what in _OF_A_MODEL.items():
        if key in own and metadata.get(key) != json.loads(json.dumps(own[key])):
            raise DataError(f"{uri} has other {what} than the checkpoint; give an export of the same model")
    num_frames = metadata.get("recipe", {}).get("input_tdim")
    if num_frames != member.config.recipe.input_tdim:
        raise DataError(
            f"{uri} takes {num_frames} frames, not those of the checkpoint; give an export of the same model"
        )
    return content


def browser_model(members: Sequence[Member]) -> tuple[bytes | None, str]:
    """The file, and a line about it. There is none for an ensemble, and without the packages that ONNX needs."""
    if len(members) > 1:
        return None, f"{ASKS_SERVER}: several models are no file for browsers"
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        return (
            None,
            f"{ASKS_SERVER}: {', '.join(missing)} are missing; in the project's folder, pip install -e '.[export]'",
        )
    (member,) = members
    with tempfile.TemporaryDirectory(prefix="ast-browser-") as folder:
        file = Path(folder) / "model.onnx"
        write_onnx(file, member.uri, member.model, member.config, OnnxForm(True, calibration=member.calibration))
        content = file.read_bytes()
    return content, f"the page has the model for browsers, {len(content) / 1e6:.1f} MB"
