"""Weights of 8 bits for an ONNX network."""

import itertools
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ast_core.checkpoints.onnx import check_packages, unfinished

if TYPE_CHECKING:
    import onnx

CHANNEL_AXIS = {"Conv": 0, "GRU": 1}
"""The axis of a weight's output channels, by operator."""
WEIGHT_INPUTS = {"Conv": (1,), "GRU": (1, 2)}
LEAST_VALUES = 1024
"""Smaller weights stay as they are: their scales would take as much."""


def save_int8(file: str | os.PathLike[str], network: str | os.PathLike[str]) -> None:
    """Write a network that `save_onnx` wrote with weights of 8 bits, one scale per output channel. No clips are needed.

    Matrix products compute in 8 bits: ONNX Runtime quantises their inputs as they come (dynamic quantisation). Their
    weights use 7 of the 8 bits: x86 processors without VNNI add two products of 8 bits in 16 bits, where larger weights
    saturate, and the scores would depend on the processor. Convolutions and GRUs compute in float32 from their stored
    weights, which a session multiplies by their scales when it starts: ONNX Runtime has no GRU of 8 bits, and its
    convolutions of 8 bits are slower and less exact than these (`benchmarks/int8.py` compares both).

    Raises:
        ConfigError: the ONNX packages are not installed.
    """
    check_packages()
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with unfinished(file) as part, tempfile.TemporaryDirectory(prefix="ast-onnx-") as folder:
        folded = Path(folder) / "folded.onnx"  # the exporter leaves weights of a GRU in slices
        quant_pre_process(os.fspath(network), os.fspath(folded), skip_symbolic_shape=True)
        quantize_dynamic(
            folded,
            part,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
        )
        model = onnx.load(part)
        _store_as_int8(model.graph)
        onnx.helper.set_model_props(model, {prop.key: prop.value for prop in onnx.load(network).metadata_props})
        onnx.checker.check_model(model)
        onnx.save(model, part)


def _store_as_int8(graph: "onnx.GraphProto") -> None:
    """Replace the weights of convolutions and GRUs by int8 values, their scales, and nodes that multiply both.

    A DequantizeLinear would do both, but ONNX Runtime does not fold it, and then cannot rearrange a weight for speed.
    """
    from onnx import TensorProto, helper, numpy_helper

    weights = {weight.name: weight for weight in graph.initializer}
    made: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for place in WEIGHT_INPUTS.get(node.op_type, ()):
            weight = weights.get(node.input[place])
            if weight is None or np.prod(weight.dims) < LEAST_VALUES:
                continue
            name = weight.name
            if name not in made:
                values, scales = _quantised(numpy_helper.to_array(weight), CHANNEL_AXIS[node.op_type])
                graph.initializer.append(numpy_helper.from_array(values, f"{name}_int8"))
                graph.initializer.append(numpy_helper.from_array(scales, f"{name}_scale"))
                made[name] = [
                    helper.make_node("Cast", [f"{name}_int8"], [f"{name}_steps"], to=TensorProto.FLOAT),
                    helper.make_node("Mul", [f"{name}_steps", f"{name}_scale"], [f"{name}_float"]),
                ]
            node.input[place] = f"{name}_float"
    kept = [weight for weight in graph.initializer if weight.name not in made]
    nodes = [*itertools.chain(*made.values()), *graph.node]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend(nodes)


def _quantised(weight: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 values of the weight's shape, and float32 scales, one for each index of `axis`, in as many dimensions."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scale = np.maximum(np.abs(weight).max(axis=others, keepdims=True), np.finfo(np.float32).tiny) / 127
    values = np.clip(np.round(weight / scale), -127, 127).astype(np.int8)
    return values, scale.astype(np.float32)
