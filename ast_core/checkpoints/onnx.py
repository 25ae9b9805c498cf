"""Export a trained model as one ONNX file, which is compared with PyTorch before it gets its final name."""

import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ast_core.checkpoints import ModelConfig
from ast_core.errors import ConfigError, DataError
from ast_core.models.tagger import Tagger

if TYPE_CHECKING:
    import onnxruntime

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
OPSET = 20
"""The version of ONNX's operators, which ONNX Runtime and its build for browsers have had since 2023."""
TOLERANCE = 1e-4
"""Largest accepted difference, relative to the spread of the logits. Float32 rounding makes about 1e-6."""
SMALLEST_SPREAD = 1e-3
"""Lower bound of the spread, which is 0 for a model that gives the same logits for each clip."""
TRACED_BATCH, CHECKED_BATCHES = 2, (1, 3)


def save_onnx(file: str | os.PathLike[str], model: Tagger, config: ModelConfig) -> float:
    """Write `fbank` [batch, frames, mel bins] → `logits` [batch, classes], for any batch size, with the weights.

    `fbank` is *normalised* log-mel, as models take it: padded with 0, then `(log-mel - mean) / (divisor *
    std)`. The file's metadata contains the settings of the log-mel (`features`), mean, std and divisor (`norm`), the
    classes (`labels`) and the model's shape (`recipe`) as JSON. `model` is in evaluation mode, on the CPU.

    Returns:
        The largest difference between the logits of ONNX Runtime and PyTorch, divided by the spread of the latter.

    Raises:
        ConfigError: the ONNX packages are not installed.
        DataError: ONNX Runtime computes different logits. No file is written.
    """
    check_packages()
    batch = {0: torch.export.Dim("batch")}
    program = traced(model, (_noise(model, TRACED_BATCH),), ["fbank"], ["logits"], dynamic_shapes=(batch,))
    program.model.metadata_props.update(metadata_of(config))
    with unfinished(file) as part:
        program.save(part, external_data=False)
        deviation = _deviation(part, model)
        if not deviation <= TOLERANCE:
            raise DataError(f"the ONNX model's logits are off by {deviation:.1e} of their spread; it was not kept")
    return deviation


def check_packages() -> None:
    """Raises ConfigError if a package that ONNX needs is not installed."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ConfigError(
            f"ONNX needs packages that are not installed ({', '.join(missing)}); "
            "in the project's folder, pip install -e '.[export]'"
        )


def traced(
    module: nn.Module, args: tuple[Any, ...], input_names: Sequence[str], output_names: Sequence[str], **options: Any
) -> torch.onnx.ONNXProgram:
    """The ONNX program of a module in evaluation mode, traced with `args`. `options` are those of torch.onnx.export."""
    # It warns about operations that it does not fold.
    logging.getLogger("onnxscript.optimizer._constant_folding").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # raised by PyTorch's exporter about its own tree specs
        program = torch.onnx.export(
            module,
            args,
            input_names=input_names,
            output_names=output_names,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
            **options,
        )
    assert program is not None  # with dynamo=True it is never None
    return program


@contextmanager
def unfinished(file: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write `file` to. It gets its name when the block ends, and is deleted if the block fails."""
    part = Path(f"{os.fspath(file)}.unfinished")
    try:
        yield part
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def session(file: str | os.PathLike[str], num_threads: int = 0) -> "onnxruntime.InferenceSession":
    """ONNX Runtime with a file, on the CPU. 0 threads: as many as there are cores."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    return onnxruntime.InferenceSession(os.fspath(file), options, providers=["CPUExecutionProvider"])


def metadata_of(config: ModelConfig, **more: Any) -> Mapping[str, str]:
    """The metadata of a file: JSON by key."""
    shape = {key: value for key, value in config.recipe.model_args().items() if key != "name"}
    value = config.to_dict() | {"recipe": {"model": config.recipe.model} | shape} | more
    return {key: json.dumps(part, ensure_ascii=False) for key, part in value.items()}


def metadata_in(content: bytes, *, origin: object) -> dict[str, Any]:
    """The metadata of a file that `save_onnx` or `save_onnx_waveform` wrote.

    Raises:
        ConfigError: the ONNX packages are not installed.
        DataError: `content` is no such file.
    """
    check_packages()
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        found = {prop.key: json.loads(prop.value) for prop in onnx.load_model_from_string(content).metadata_props}
    except (DecodeError, ValueError) as err:
        raise DataError(f"{origin} is no ONNX file of jobs/export.py ({type(err).__name__})") from err
    if "labels" not in found:
        raise DataError(f"{origin} is no ONNX file of jobs/export.py: its metadata have no labels")
    return found


def _noise(model: Tagger, num_clips: int) -> torch.Tensor:
    """Random clips with about the spread of normalised log-mel."""
    return 0.5 * torch.randn(num_clips, *model.input_shape, generator=torch.Generator().manual_seed(num_clips))


def _deviation(file: Path, model: Tagger) -> float:
    run = session(file).run
    batches = [_noise(model, num_clips) for num_clips in CHECKED_BATCHES]
    with torch.inference_mode():
        ours = torch.cat([model(batch) for batch in batches])
    theirs = torch.cat([torch.from_numpy(run(["logits"], {"fbank": batch.numpy()})[0]) for batch in batches])
    return float((theirs - ours).abs().max() / ours.std().clamp_min(SMALLEST_SPREAD))
