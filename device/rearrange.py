"""An ONNX graph, rearranged so that ONNX Runtime's int8 kernels take whole layers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

MOVES = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "MaxPool"}
"""What runs on int8 as it is."""
CARRIERS = MOVES | {"Relu", "Clip"}
ARITHMETIC = {"Cast", "Mul", "Add", "Slice", "Gather", "Split"}
"""What may stand, with moves, between the images and the first layer."""
INT8_KERNELS = {"Conv", "Add", "Mul", "GlobalAveragePool", "AveragePool", "Sigmoid", "LeakyRelu", "Concat"}
"""What runs on int8 when its inputs and its output are."""
FLOAT_GIVERS = {"Gemm", "MatMul"}
"""What runs on int8 when its inputs are, and can give float."""
GATES = {"Sigmoid": (0.0, 0.0), "HardSigmoid": (0.2, 0.5), "HardSwish": (1 / 6, 0.5)}
"""What ends in 0 to 1, or multiplies by that; with the slope and middle that ONNX gives a hard one."""

RANGES = {"uint8": (0, 255), "int8": (-128, 127), "uint16": (0, 65535), "int16": (-32768, 32767)}


def rearrange(graph: "GraphProto", *, int8: bool) -> None:
    """Rearrange a graph whose shapes are inferred, in place."""
    _widen_normalization(_Graph(graph))
    _pool_means(_Graph(graph))
    if int8:
        _quantize_gates(_Graph(graph))
        while _quantize_first(_Graph(graph)):
            pass
        while _drop_idle_pair(_Graph(graph)):
            pass
    _Graph(graph).drop_unused()


class _Graph:
    """An ONNX graph, with who makes and who takes each value as it was when this was made."""

    def __init__(self, graph: "GraphProto") -> None:
        from onnx import helper, numpy_helper  # noqa: PLC0415 - only the engineer's machine has it

        self.graph, self._node, self._numpy = graph, helper.make_node, numpy_helper
        self.nodes = list(graph.node)
        self.maker = {output: node for node in graph.node for output in node.output}
        self.takers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for value in node.input:
                self.takers.setdefault(value, []).append(node)
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        values = (*graph.input, *graph.value_info, *graph.output)
        self.shapes = {v.name: [size.dim_value for size in v.type.tensor_type.shape.dim] for v in values}

    def array(self, constant: str) -> NDArray[np.generic]:
        return cast(NDArray[np.generic], self._numpy.to_array(self.constants[constant]))

    def constant(self, name: str, value: NDArray[np.generic] | np.generic) -> str:
        self.graph.initializer.append(self._numpy.from_array(np.asarray(value), name))
        return name

    def insert(self, before: "NodeProto", kind: str, inputs: Sequence[str], output: str) -> str:
        made = self._node(kind, inputs, [output], name=output)
        self.graph.node.insert(list(self.graph.node).index(before), made)
        return output

    def replace(self, old: str, new: str) -> None:
        """Make everything that takes `old` take `new`; a result of the graph keeps its name."""
        for node in self.takers.get(old, []):
            node.input[:] = [new if value == old else value for value in node.input]
        if any(old == result.name for result in self.graph.output):
            self.maker[old].output[0], self.maker[new].output[0] = f"{old}/idle", old
            self.replace(new, old)

    def drop_unused(self) -> None:
        wanted = {result.name for result in self.graph.output}
        for node in reversed(self.nodes):
            if wanted.isdisjoint(node.output):
                self.graph.node.remove(node)
            else:
                wanted.update(node.input)
        for tensor in [tensor for tensor in self.graph.initializer if tensor.name not in wanted]:
            self.graph.initializer.remove(tensor)

    def runs_on_int8(self, node: "NodeProto") -> bool:
        """Say whether ONNX Runtime has an int8 kernel for a node, quantized around it as it is."""
        gives = {user.op_type for user in self.users(node.output[0])} == {"QuantizeLinear"}
        return self.has_int8(node) and (node.op_type in FLOAT_GIVERS or gives)

    def has_int8(self, node: "NodeProto") -> bool:
        """Say whether a node has an int8 kernel and takes int8."""
        data = node.input[:2] if node.op_type in ("Conv", "Gemm") else node.input
        makers = [self.source(value, MOVES) for value in data]
        inputs = all(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers)
        return inputs and node.op_type in INT8_KERNELS | FLOAT_GIVERS

    def users(self, value: str) -> "list[NodeProto]":
        """Give what takes a value, be it after a ReLU or a move."""
        takers = self.takers.get(value, [])
        return [user for n in takers for user in (self.users(n.output[0]) if n.op_type in CARRIERS else [n])]

    def source(self, value: str, over: set[str]) -> "NodeProto | None":
        """Go back to what made a value, before operators of the kinds `over`."""
        node = self.maker.get(value)
        while node is not None and node.op_type in over:
            node = self.maker.get(node.input[0])
        return node


def _widen_normalization(graph: _Graph) -> None:
    """Give the constants of the normalization the size of an image.

    ONNX Runtime transposes after it, not before, and multiplies N×H×W×3 by three numbers at the pace of several
    convolutions; as many numbers as an image has take hardly any time.
    """
    reached = {graph.graph.input[0].name}
    for node in graph.nodes:
        if node.op_type not in MOVES | ARITHMETIC or not set(node.input).difference(graph.constants) <= reached:
            continue
        reached.update(node.output)
        sizes = graph.shapes.get(node.output[0], [0])[1:]
        for place, value in enumerate(node.input):
            narrow = value in graph.constants and np.prod(graph.constants[value].dims) > 1
            if narrow and node.op_type in ("Mul", "Add") and all(sizes):
                shape = graph.constant(f"{node.name}/size", np.array([1, *sizes]))
                node.input[place] = graph.insert(node, "Expand", [value, shape], f"{node.name}/wide")


def _pool_means(graph: _Graph) -> None:
    """Make a mean over height and width a global average pooling, which has an int8 kernel."""
    for node in [node for node in graph.nodes if node.op_type == "ReduceMean"]:
        rank = len(graph.shapes.get(node.input[0], []))
        axes = [int(axis) for value in node.input[1:] if value in graph.constants for axis in graph.array(value)]
        if rank != 4 or sorted(axis % 4 for axis in axes) != [2, 3]:
            continue
        node.op_type = "GlobalAveragePool" if _attribute(node, "keepdims", 1) else "Flatten"
        del node.input[1:], node.attribute[:]
        if node.op_type == "Flatten":
            node.input[0] = graph.insert(node, "GlobalAveragePool", node.input[:1], f"{node.output[0]}/pooled")


def _quantize_gates(graph: _Graph) -> None:
    """Run sigmoids, hard sigmoids and hard-swishes of uint8 values on int8: a gate's range needs no calibration.

    A hard one becomes an addition, whose int8 kernel cuts off at both ends. The model's own answer is not rounded.
    """
    for node in graph.nodes:
        data = graph.maker.get(node.input[0]) if node.op_type in GATES and node.output[0] in graph.takers else None
        if data is None or data.op_type != "DequantizeLinear" or graph.array(data.input[2]).dtype != np.uint8:
            continue
        values, name = node.input[0], node.output[0]
        zero = graph.constant(f"{name}/zero", np.uint8(0))
        unit = step = graph.constant(f"{name}/unit", np.float32(1 / 255))
        slope, middle = GATES[node.op_type]
        if slope:
            slope, middle = _attribute(node, "alpha", slope), _attribute(node, "beta", middle)
            full = graph.constant(f"{name}/full", np.uint8(255))
            step = graph.constant(f"{name}/step", np.float32(1 / slope / 255))
            shift = graph.constant(f"{name}/shift", np.float32(middle / slope / 255))
            constant = graph.insert(node, "DequantizeLinear", [full, shift, zero], f"{name}/constant")
        inner = graph.insert(node, *(("Add", [values, constant]) if slope else ("Sigmoid", [values])), f"{name}/inner")
        inner = graph.insert(node, "QuantizeLinear", [inner, step, zero], f"{name}/int8")
        gate = graph.insert(node, "DequantizeLinear", [inner, unit, zero], f"{name}/gate")
        if node.op_type == "HardSwish":
            node.op_type, node.input[:] = "Mul", [values, gate]
            continue
        for pair in (taker for taker in graph.takers[name] if taker.op_type == "QuantizeLinear"):  # calibrated
            for taker in graph.takers[pair.output[0]]:
                graph.replace(taker.output[0], gate)
        graph.replace(name, gate)


def _quantize_first(graph: _Graph) -> bool:
    """Quantize once before what moves or cuts off what an int8 kernel gives; say whether there was such a place.

    Rounding and cutting off may change places: both keep the order of values. A kernel's output must be quantized at
    once, and ONNX Runtime takes a ReLU or clip away between the two only where the range of the quantization ends
    within the clip's: of −1 to 1, which 255 steps cannot halve, never.
    """
    for node in graph.nodes:
        before = graph.maker.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
        if before is None or before.op_type not in CARRIERS or len(graph.takers[before.output[0]]) > 1:
            continue
        source = graph.source(node.input[0], CARRIERS)
        if source is None or not graph.has_int8(source):
            continue
        if before.op_type in ("Relu", "Clip") and _cuts_nothing(graph, before, node):
            graph.replace(before.output[0], before.input[0])
            graph.graph.node.remove(before)
            return True
        if _quantized(graph, before.input[0], node):
            continue
        name, grid = f"{before.output[0]}/first", list(node.input[1:])
        inside = graph.insert(before, "QuantizeLinear", [before.input[0], *grid], f"{name}/int8")
        before.input[0] = graph.insert(before, "DequantizeLinear", [inside, *grid], name)
        return True
    return False


def _cuts_nothing(graph: _Graph, cut: "NodeProto", quantize: "NodeProto") -> bool:
    """Say whether a quantization alone cuts off all that a ReLU or clip before it does."""
    named = [*cut.input[1:], "", ""][:2]
    if {*named, *quantize.input[1:3]} - {""} - set(graph.constants) or len(quantize.input) < 3:
        return False
    scale, zero = graph.array(quantize.input[1]).astype(np.float64), graph.array(quantize.input[2])
    low, high = (float(graph.array(bound)) if bound else None for bound in named)
    low = 0.0 if cut.op_type == "Relu" else low
    least, most = (limit - int(zero) for limit in RANGES[zero.dtype.name])
    fits = (low is None or np.rint(low / scale) <= least) and (high is None or np.rint(high / scale) >= most)
    return scale.ndim == 0 and bool(fits)


def _quantized(graph: _Graph, value: str, like: "NodeProto") -> bool:
    """Say whether a value was quantized on the same grid just before."""
    made = graph.maker.get(value)
    return made is not None and made.op_type == "DequantizeLinear" and list(made.input[1:]) == list(like.input[1:])


def _attribute(node: "NodeProto", name: str, default: float) -> float:
    found = next((one for one in node.attribute if one.name == name), None)
    return default if found is None else found.f if found.type == found.FLOAT else found.i


def _drop_idle_pair(graph: _Graph) -> bool:
    """Drop one quantization that no int8 kernel gives or takes, which would only round; say whether there was one."""
    for node in graph.nodes:
        pairs = graph.takers.get(node.output[0], [])
        if node.op_type != "QuantizeLinear" or any(pair.op_type != "DequantizeLinear" for pair in pairs):
            continue
        source = graph.source(node.input[0], CARRIERS)
        given = source is not None and source.op_type not in FLOAT_GIVERS and graph.runs_on_int8(source)
        if not given and not any(graph.runs_on_int8(user) for pair in pairs for user in graph.users(pair.output[0])):
            for pair in pairs:
                graph.replace(pair.output[0], node.input[0])
                graph.graph.node.remove(pair)
            graph.graph.node.remove(node)
            return True
    return False
