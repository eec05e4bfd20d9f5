"""ONNX → ONNX with every type settled, for runtimes that compute in exactly the types a graph states."""

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT
KEPT = {("Resize", 1), ("Resize", 2), ("Upsample", 1)}
"""Operator and input that stay float32 whatever the rest is: they are shapes, not values."""
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
OPSET = 19  # the first whose quantizers take 16-bit scales and float8
MOST_INT8, MOST_FLOAT8 = 127, 448
LEAST_SCALE = 2**-24  # the smallest float16 above zero; a scale of zero is refused


def retype(content: bytes, kind: int, *, float8: bool = False, producer: str) -> bytes:
    """Make every float32 in the graph a `kind` (of onnx.TensorProto); the images stay uint8, the scores float32.

    The images are cast before anything else: a runtime may take uint8 and yet not move it. With `float8`, what was
    quantized to int8 becomes float8 E4M3 of the same range. `producer` is the first text in the file.
    """
    model = onnx.load_from_string(content)
    graph = model.graph
    del graph.value_info[:]
    if float8:
        _to_float8(graph)
    _retype_constants(graph, kind)
    for node in graph.node:
        _retype_attributes(node, kind)
    _cast_ends(graph, kind)
    for opset in model.opset_import:
        opset.version = max(opset.version, OPSET) if not opset.domain else opset.version
    model.producer_name = producer
    return bytes(model.SerializeToString())


def _retype_constants(graph: GraphProto, kind: int) -> None:
    inputs = [(node.op_type, index, name) for node in graph.node for index, name in enumerate(node.input)]
    kept = {name for operator, index, name in inputs if (operator, index) in KEPT}
    scales = {name for operator, index, name in inputs if operator in QUANTIZERS and index == 1}
    for constant in graph.initializer:
        if constant.data_type == FLOAT and constant.name not in kept:
            least = LEAST_SCALE if constant.name in scales else None
            constant.CopyFrom(_converted(constant, kind, least))


def _retype_attributes(node: NodeProto, kind: int) -> None:
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == FLOAT:
            attribute.i = kind
        if attribute.type == AttributeProto.TENSOR and attribute.t.data_type == FLOAT:
            attribute.t.CopyFrom(_converted(attribute.t, kind))


def _converted(constant: TensorProto, kind: int, least: float | None = None) -> TensorProto:
    values = np.maximum(numpy_helper.to_array(constant), -np.inf if least is None else least)
    if kind == TensorProto.FLOAT16:
        most = float(np.finfo(np.float16).max)
        values = np.clip(values, -most, most)
    return numpy_helper.from_array(values.astype(helper.tensor_dtype_to_np_dtype(kind)), constant.name)


def _to_float8(graph: GraphProto) -> None:
    """Give each scale the ratio of the two ranges, and each weight and zero point the new type."""
    constants = {constant.name: constant for constant in graph.initializer}
    quantizers = [node for node in graph.node if node.op_type in QUANTIZERS]
    for name in {node.input[1] for node in quantizers}:
        scale = numpy_helper.to_array(constants[name]) * np.float32(MOST_INT8 / MOST_FLOAT8)
        constants[name].CopyFrom(numpy_helper.from_array(scale, name))
    for name in {name for node in quantizers for name in (node.input[0], node.input[2])} & set(constants):
        values = numpy_helper.to_array(constants[name]).astype(np.float32) * MOST_FLOAT8 / MOST_INT8
        eight = values.astype(helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN))
        constants[name].CopyFrom(numpy_helper.from_array(eight, name))


def _cast_ends(graph: GraphProto, kind: int) -> None:
    """Cast the images on their way in and the scores on their way out."""
    images, scores = graph.input[0].name, graph.output[0].name
    inside = {images: f"{images}_cast", scores: f"{scores}_uncast"}
    for node in graph.node:
        node.input[:] = [inside.get(name, name) for name in node.input]
        node.output[:] = [inside.get(name, name) for name in node.output]
    graph.node.insert(0, helper.make_node("Cast", [images], [inside[images]], name="cast_images", to=kind))
    graph.node.append(helper.make_node("Cast", [inside[scores]], [scores], name="cast_scores", to=FLOAT))
