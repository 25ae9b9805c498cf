"""Exporting a model to the Hugging Face hub: the files of a format, with a model card."""

import tempfile
from pathlib import Path

from pipeline.train import export, hub, models
from pipeline.train.export import Checkpoint, OnnxForm
from pipeline.train.model_card import CARD_FILE, model_card, read_trained

FILE_NAME = "tagger"
"""Name, without suffix, of a format that is one file."""

LIBRARIES = {"ours": "ast-ray", "huggingface": "transformers"}
"""The library that loads a format that is a folder."""

CALIBRATED_BY = {
    "ours": "`calibration.json` has the maps and thresholds, and ast-ray applies them.",
    "onnx-waveform": "The file gives calibrated scores, and its metadata have the thresholds.",
}
"""How a format that carries the calibration applies it."""

USE = {
    "ours": """\
from ast_core.checkpoints import load_model
from ast_core.tagging import tag
from huggingface_hub import snapshot_download

model, config = load_model(snapshot_download("{name}"))
scores = tag(model, config, waveform)  # float32 [samples], mono, {rate} Hz, in [-1, 1]""",
    "huggingface": """\
from transformers import pipeline

classify = pipeline("audio-classification", model="{name}")
classify(waveform)  # float32 [samples], mono, {rate} Hz, in [-1, 1]""",
    "onnx-waveform": """\
import onnxruntime
from huggingface_hub import hf_hub_download

session = onnxruntime.InferenceSession(hf_hub_download("{name}", "{file}"))
scores, start_s, end_s = session.run(["scores", "start_s", "end_s"], {{"waveform": waveform}})
# waveform: float32 [samples], mono, {rate} Hz, in [-1, 1], of any length""",
}
FILE_USE = """\
from huggingface_hub import hf_hub_download

file = hf_hub_download("{name}", "{file}")"""


def export_to_hub(
    checkpoint: Checkpoint, output_format: str, onnx: OnnxForm, *, name: str, public: bool, output: str | None
) -> list[str]:
    """Write a model with its card, and upload both. Returns lines about the result.

    Args:
        checkpoint: Its run and its calibration go into the card.
        onnx: settings of the two ONNX formats.
        name: `OWNER/NAME`, as `hub.check_access` returned it.
        output: where the files are written too; None: only on the hub.

    Raises:
        ConfigError, UserError: as `hub.push`.
        DataError: a file of the run is damaged, or the model does not fit the format.
    """
    suffix, calibration, config = export.SUFFIXES.get(output_format), checkpoint.calibration, checkpoint.config
    with tempfile.TemporaryDirectory(prefix="ast-hub-") as temporary:
        folder = Path(temporary) / "files"
        made = folder if suffix is None else folder / f"{FILE_NAME}{suffix}"
        lines = export.write(str(made), output_format, checkpoint, onnx)
        card = model_card(
            name,
            checkpoint.model,
            config,
            read_trained(checkpoint.uri),
            calibration,
            use=USE.get(output_format, FILE_USE).format(
                name=name, file=made.name, rate=f"{config.features.sample_rate_hz:,}"
            ),
            library=LIBRARIES.get(output_format),
            calibrated_by=CALIBRATED_BY.get(output_format, ""),
        )
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        url = hub.push(folder, name, public=public)
        if output is not None:
            models.publish(made, output)
    return [*lines, f"uploaded to {url}"]
