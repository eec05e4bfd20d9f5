"""Why a layer computes in float although int8 was asked for, read from the quantized program that the target took."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx
from onnx import NodeProto

from bitferry.pipeline.artifacts import Program, Quantized, QuantizedOnnx
from bitferry.pipeline.onnx_in.plan import Wiring
from bitferry.targets import Kind, Layer, Precision

QUANTIZE, DEQUANTIZE = "quantize", "dequantize"
CONVOLUTIONS = {"conv1d", "conv2d", "conv3d", "convolution"}
TRANSPOSED = {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
PRODUCTS = {"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention"}
FLOATS = {"float32", "bfloat16", "float16"}
FUSED = {"relu", "relu6", "hardtanh", "clamp"}
ONNX_NAMES = {
    "Conv": "convolution", "ConvTranspose": "conv_transpose2d", "Gemm": "linear", "MatMul": "matmul",
    "QuantizeLinear": QUANTIZE, "DequantizeLinear": DEQUANTIZE, "Relu": "relu", "Clip": "clamp",
}  # fmt: skip


@dataclass(frozen=True)
class Node:
    """One operator of a quantized program, as far as a reason needs it."""

    name: str
    layer: str
    """The module that it is of."""
    operator: str
    inputs: tuple["Node | None", ...]
    """What made each tensor that it takes; None for a constant."""
    takers: tuple["Node", ...] = ()

    @property
    def kind(self) -> Kind | None:
        if self.operator in CONVOLUTIONS | TRANSPOSED:
            return "convolution"
        return "matrix product" if self.operator in PRODUCTS else None


def explained(program: Program, layers: Sequence[Layer], precision: Precision, runtime: str) -> tuple[Layer, ...]:
    """Give each layer that ran in float, where int8 was asked for, its reason; `runtime` is what ran it."""
    wrong = [layer for layer in layers if layer.precision in FLOATS and layer.reason is None]
    if precision != "int8" or not wrong or not isinstance(program, Quantized | QuantizedOnnx):
        return tuple(layers)
    nodes = list(_of_torch(program) if isinstance(program, Quantized) else _of_onnx(program))
    return tuple(
        replace(one, reason=_reason(one, nodes, program.kept, runtime)) if one in wrong else one for one in layers
    )


def _reason(layer: Layer, nodes: Sequence[Node], kept: Collection[str], runtime: str) -> str:
    module = layer.name.partition("/")[0]
    if layer.name in kept or module in kept:
        return "kept in float, as asked"
    alike = [node for node in nodes if node.kind == layer.kind]
    own = layer.name.rpartition("/")[2].removeprefix("node_")
    found = [node for node in alike if node.name == own] or [n for n in alike if n.layer in (layer.name, module)]
    told = [told for node in found if (told := _not_quantized(node))]
    if not found:
        return f"{runtime} made it of something else than a layer of the model"
    if told:
        return told[0]
    outside = [taker.operator for taker in _beyond(found[0]) if taker.operator != QUANTIZE]
    after = f"; what it gives goes to {outside[0]} in float" if outside else ""
    return f"it is quantized, but {runtime} chose a float kernel{after}"


def _not_quantized(node: Node) -> str | None:
    """Say what of a layer's inputs is not int8; None where all are."""
    given, weight = (*node.inputs, None, None)[:2]
    if node.operator in TRANSPOSED:
        return "a transposed convolution is not quantized"
    if node.operator == "scaled_dot_product_attention" or (node.operator != "linear" and node.kind == "matrix product"):
        constant = any(one is None for one in node.inputs[:2])
        return "a product with a constant that no linear layer holds" if constant else "a product of two activations"
    if weight is None:
        return "its weight was not quantized"
    if weight.operator != DEQUANTIZE:
        return "its weight is computed at each call, not constant"
    if given is None or given.operator != DEQUANTIZE:
        return "what it takes is not quantized"
    return None


def _beyond(node: Node) -> Iterator[Node]:
    """Give what takes a layer's output, after what every runtime fuses into the layer."""
    for taker in node.takers:
        if taker.operator in FUSED:
            yield from _beyond(taker)
        else:
            yield taker


def _of_torch(program: Quantized) -> Iterator[Node]:
    from bitferry.pipeline.capture import layer_name, read  # noqa: PLC0415 - torch, which a run that finds all cached is spared

    exported = read(program.path)
    given = {*exported.graph_signature.user_inputs}
    nodes = [node for node in exported.graph.nodes if node.op in ("call_function", "output") or node.name in given]
    made = {node: Node(node.name, layer_name(node), _operator(node), ()) for node in nodes}
    for node in nodes:
        if node.op == "call_function":
            yield _joined(node, made)


def _joined(node: Any, made: dict[Any, Node]) -> Node:
    """Put a node together with those around it."""
    return replace(_forward(node, made, whole=True), inputs=tuple(map(made.get, node.all_input_nodes)))


def _forward(node: Any, made: dict[Any, Node], *, whole: bool = False) -> Node:
    plain = made[node]
    if not whole and plain.operator not in FUSED:
        return plain
    return replace(plain, takers=tuple(_forward(one, made) for one in node.users))


def _operator(node: Any) -> str:
    name = (
        getattr(node.target, "__name__", str(node.target)).removeprefix("aten.").removeprefix("quantized_decomposed.")
    )
    name = name.partition(".")[0].rstrip("_")
    return next((verb for verb in (DEQUANTIZE, QUANTIZE) if name.startswith(f"{verb}_per")), name)


def _of_onnx(program: QuantizedOnnx) -> Iterator[Node]:
    wiring = Wiring(onnx.load(program.path).graph)
    for node in wiring.graph.node:
        yield _onnx(node, wiring, around=True)


def _onnx(node: NodeProto, wiring: Wiring, *, around: bool = False) -> Node:
    plain = Node(node.name, node.name, ONNX_NAMES.get(node.op_type, node.op_type), ())
    if not around and plain.operator not in FUSED:
        return plain
    takers = tuple(_onnx(one, wiring) for one in wiring.takers.get(node.output[0], ()))
    makers = [None if value in wiring.constants else wiring.maker.get(value, node) for value in node.input if value]
    inputs = tuple(None if one is None else _onnx(one, wiring) for one in makers) if around else ()
    return replace(plain, inputs=inputs, takers=takers)
