"""A stranger's ONNX file → one float32 graph of a known opset: looked over before anything opens it."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper, version_converter

from bitferry.device import onnx_file
from bitferry.device.errors import InputError, first_line

OLDEST = 7
"""Opset, of what ONNX Runtime still runs."""
USUAL = 18
"""Opset that an older file is converted to, for the targets to get what they get from PyTorch."""
FIRST_PLAIN = 4
"""Version of the format from which on weights need not be inputs as well."""
REMEDY = "save it as one plain file, weights inside, functions inlined: onnx.save(onnx.load(FILE), 'whole.onnx')"
WIDTHS: dict[int, int] = {TensorProto.FLOAT16: 16, TensorProto.BFLOAT16: 16, TensorProto.DOUBLE: 64}
"""Of floats that are made 32 bits wide."""
INTEGERS = ("QLinear", "QGemm", "QAttention", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
TYPED = {"Cast": "to", "EyeLike": "dtype", "RandomNormal": "dtype", "RandomUniform": "dtype"}
"""Operators with an attribute that says what they give."""


def read(path: Path) -> ModelProto:
    """Read a file as it is, every node under a name of its own.

    Raises InputError for a file that is missing, is no whole ONNX model, or is quantized already.
    """
    if not path.exists():
        raise InputError(f"the model {path} does not exist")
    onnx_file.check(path, opsets=range(OLDEST, onnx_file.OPSETS.stop), remedy=REMEDY)
    model = onnx.load(path, load_external_data=False)
    _plain(model)
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # the checker's errors have no base of their own
        raise InputError(f"{path} is no valid ONNX model: {first_line(error)}") from error
    kinds = Counter(node.op_type for graph in graphs(model.graph) for node in graph.node)
    integers = [f"{count} {kind}" for kind, count in kinds.items() if kind.startswith(INTEGERS) or "Integer" in kind]
    if integers:
        raise InputError(
            f"{path} is quantized already ({', '.join(integers)}); give the float model that it was made of: it is "
            "what int8 is judged against, and each target wants its int8 in another form"
        )
    _refuse_random(model, path)
    _name(model.graph)
    return model


def _plain(model: ModelProto) -> None:
    """Write in the form of today what has several: weights that are inputs as well, constants in nodes, open sizes."""
    graph = model.graph
    nodes = [(node, _constant(node)) for node in graph.node]
    graph.initializer.extend(tensor for _, tensor in nodes if tensor is not None)
    kept = [node for node, tensor in nodes if tensor is None]
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    for field, values in ((graph.node, kept), (graph.input, inputs)):
        copies = [type(value).FromString(value.SerializeToString()) for value in values]
        del field[:]
        field.extend(copies)
    del graph.value_info[:]
    model.ir_version = max(model.ir_version, FIRST_PLAIN)
    for value in (*graph.input, *graph.output):
        for place, size in enumerate(value.type.tensor_type.shape.dim):
            if size.HasField("dim_value") and size.dim_value <= 0:  # as Paddle and old exporters write what is open
                size.dim_param = f"{value.name}_{place}" if place else "N"


def _constant(node: NodeProto) -> TensorProto | None:
    """Give what a node holds that is nothing but a constant; None for another, or one of a kind that is no tensor."""
    if node.op_type != "Constant" or len(node.attribute) != 1:
        return None
    attribute = node.attribute[0]
    if attribute.name == "value":
        made = TensorProto()
        made.CopyFrom(attribute.t)
        made.name = node.output[0]
        return made
    kind = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    if attribute.name not in kind:
        return None
    value = np.asarray(helper.get_attribute_value(attribute), kind[attribute.name])
    return numpy_helper.from_array(value, node.output[0])


def _refuse_random(model: ModelProto, path: Path) -> None:
    """Raise InputError for nodes that draw random numbers, or that were left in training mode."""
    true = {tensor.name for tensor in model.graph.initializer if _is_true(tensor)}
    for node in (node for graph in graphs(model.graph) for node in graph.node):
        settings = {attribute.name: attribute.i for attribute in node.attribute}
        dropping = node.op_type == "Dropout" and len(node.input) > 2 and node.input[2] in true
        batch = node.op_type == "BatchNormalization" and (settings.get("training_mode") or len(node.output) > 1)
        if dropping or batch:
            raise InputError(
                f"{path}: the {node.op_type} '{node.name or node.output[0]}' is in training mode, so an answer depends "
                f"on {'chance' if dropping else 'the others in its batch'}; export the model in evaluation mode"
            )
        if node.op_type.startswith("Random") or node.op_type in ("Bernoulli", "Multinomial"):
            raise InputError(
                f"{path}: the {node.op_type} '{node.name or node.output[0]}' draws random numbers, so no answer is the "
                "model's; leave it out when the model is exported"
            )


def _is_true(tensor: TensorProto) -> bool:
    return tensor.data_type == TensorProto.BOOL and bool(numpy_helper.to_array(tensor).any())


def opset(model: ModelProto) -> int:
    """Give the version of ONNX's own operators."""
    return int(next((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), 0))


def converted(model: ModelProto, version: int = USUAL) -> ModelProto:
    """Give the model in a later opset; raises what onnx's converter raises where it cannot."""
    made = version_converter.convert_version(model, version)
    _name(made.graph)
    return made


def widths(model: ModelProto) -> set[int]:
    """List the widths in bits, other than 32, of the floats that a model computes in."""
    weights = {tensor.data_type for graph in graphs(model.graph) for tensor in _tensors(graph)}
    values = {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
    return {WIDTHS[kind] for kind in (weights | values) & WIDTHS.keys()}


def widened(model: ModelProto) -> ModelProto:
    """Give the model with every float 32 bits wide."""
    made = ModelProto()
    made.CopyFrom(model)
    for graph in graphs(made.graph):
        for tensor in _tensors(graph):
            if tensor.data_type in WIDTHS:
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
        for value in (*graph.input, *graph.output):
            if value.type.tensor_type.elem_type in WIDTHS:
                value.type.tensor_type.elem_type = TensorProto.FLOAT
        for attribute in (a for node in graph.node for a in node.attribute if TYPED.get(node.op_type) == a.name):
            attribute.i = TensorProto.FLOAT if attribute.i in WIDTHS else attribute.i
        del graph.value_info[:]
    return made


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """Give a graph and those inside its nodes."""
    yield graph
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        for inner in (*([attribute.g] if attribute.type == AttributeProto.GRAPH else []), *attribute.graphs):
            yield from graphs(inner)


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Give the constants of a graph, those in attributes as well."""
    yield from graph.initializer
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield from (attribute.t,) if attribute.type == AttributeProto.TENSOR else attribute.tensors


def _name(graph: GraphProto) -> None:
    """Name the nodes that have no name, or another's, as `Conv_3` by their kind and place."""
    counts = Counter(node.name for node in graph.node)
    taken = {name for name, count in counts.items() if name}
    for place, node in enumerate(graph.node):
        if node.name and counts[node.name] == 1:
            continue
        node.name = f"{node.op_type}_{place}"
        while node.name in taken:
            node.name += "_"
        taken.add(node.name)
