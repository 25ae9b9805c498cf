"""Weights of 8 bits for an ONNX network, by ONNX Runtime."""

import os
from pathlib import Path

from ast_core.checkpoints.onnx import check_packages, unfinished


def save_int8(file: str | os.PathLike[str], network: str | os.PathLike[str]) -> None:
    """Write a network that `save_onnx` wrote with the weights of its matrix products as int8, one scale per column.

    Their inputs are quantised to 8 bits as they come (dynamic quantisation), so no clips are needed. The weights use 7
    of the 8 bits: x86 processors without VNNI add two products of 8 bits in 16 bits, where larger weights saturate, and
    the scores would depend on the processor.

    Raises:
        ConfigError: the ONNX packages are not installed.
    """
    check_packages()
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with unfinished(file) as part:
        quantize_dynamic(
            Path(network),
            part,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
        )
        model = onnx.load(part)
        onnx.helper.set_model_props(model, {prop.key: prop.value for prop in onnx.load(network).metadata_props})
        onnx.save(model, part)
