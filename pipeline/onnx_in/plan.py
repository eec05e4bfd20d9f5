"""A target's scheme → what ONNX Runtime's quantizer is asked for: which nodes, and which of their outputs."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from onnx import GraphProto, ModelProto, NodeProto, numpy_helper

from bitferry.device.errors import InputError
from bitferry.targets import Scheme

WEIGHTED = ("Conv", "Gemm", "MatMul")
"""Layers; a transposed convolution stays float, as it does on PyTorch's way."""
MEANS = ("GlobalAveragePool", "ReduceMean")
JOINS = ("Mul", "Concat", "AveragePool")
"""What runs on int8 as well, where layers give it."""
CARRIERS = ("Relu", "Clip", "MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze")
"""What is fused, or moves values as they are."""


@dataclass(frozen=True)
class Plan:
    """The nodes to quantize, and the kinds of them whose outputs stay float unless another takes them as int8."""

    nodes: tuple[str, ...]
    layers: tuple[str, ...]
    """Of those nodes, convolutions and matrix products."""
    kinds: tuple[str, ...]
    silent: tuple[str, ...]
    skips: tuple[tuple[str, str], ...] = ()
    """Additions of which one input is quantized, each with that value."""


class Wiring:
    """Who makes and who takes each value of a graph, and what is constant in it."""

    def __init__(self, graph: GraphProto) -> None:
        self.graph = graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.constants |= {n.output[0]: a.t for n in graph.node if n.op_type == "Constant" for a in n.attribute[:1]}
        self.maker = {output: node for node in graph.node for output in node.output}
        self.takers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for value in node.input:
                self.takers.setdefault(value, []).append(node)
        values = (*graph.input, *graph.value_info, *graph.output)
        self.ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in values}

    def is_layer(self, node: NodeProto) -> bool:
        """Say whether a node is a convolution or matrix product with a constant weight."""
        return node.op_type in WEIGHTED and node.input[1] in self.constants and node.input[0] not in self.constants

    def is_mean(self, node: NodeProto) -> bool:
        """Say whether a node is the mean over height and width."""
        if node.op_type != "ReduceMean":
            return node.op_type == "GlobalAveragePool"
        axes = [int(axis) for a in node.attribute if a.name == "axes" for axis in a.ints]
        axes += [
            int(axis)
            for value in node.input[1:]
            if value in self.constants
            for axis in numpy_helper.to_array(self.constants[value])
        ]
        return self.ranks.get(node.input[0]) == 4 and sorted(axis % 4 for axis in axes) == [2, 3]

    def joins_maps(self, node: NodeProto) -> bool:
        """Say whether a node takes nothing but maps N×C×H×W that the graph computes."""
        return all(value not in self.constants and self.ranks.get(value) == 4 for value in node.input)


def plan(model: ModelProto, scheme: Scheme, keep: Collection[str]) -> Plan:
    """Choose what a scheme wants on int8; raise InputError for a name in `keep` that is no layer."""
    wiring = Wiring(model.graph)
    layers = [node for node in model.graph.node if wiring.is_layer(node)]
    _refuse_unknown([node.name for node in layers], keep)
    chosen = [node for node in layers if node.name not in keep]
    if not chosen:
        return Plan((), (), (), ())
    reached = _behind(chosen, model.graph)
    others = [n for n in model.graph.node if n.name in reached and n not in chosen and _also(n, wiring, scheme)]
    pools = [n for n in model.graph.node if n.op_type == "MaxPool" and _taken(n, [*chosen, *others], wiring)]
    carriers = [n for n in model.graph.node if n.op_type in CARRIERS and n.name in reached]
    nodes = [*chosen, *others, *(carriers if scheme.outputs == "int8" else pools)]
    kinds = dict.fromkeys(node.op_type for node in nodes)
    silent = tuple(kind for kind in kinds if kind != "MaxPool") if scheme.outputs == "float32" else ()
    skips = _skips(chosen, [n for n in model.graph.node if n.name in reached], wiring, scheme)
    return Plan(tuple(n.name for n in nodes), tuple(n.name for n in chosen), tuple(kinds), silent, skips)


def exact_elsewhere(int8: ModelProto, plan: Plan) -> None:
    """Let what is not quantized take values as they were; the quantizer gives the rounded ones to all who take them."""
    wiring, allowed = Wiring(int8.graph), dict(plan.skips)
    for node in int8.graph.node:
        if node.name in plan.nodes or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        for place, value in enumerate(node.input):
            back = wiring.maker.get(value)
            rounded = wiring.maker.get(back.input[0]) if back and back.op_type == "DequantizeLinear" else None
            if rounded and allowed.get(node.name) != rounded.input[0]:
                node.input[place] = rounded.input[0]


def _skips(
    layers: Sequence[NodeProto], reached: Sequence[NodeProto], wiring: Wiring, scheme: Scheme
) -> tuple[tuple[str, str], ...]:
    """Choose of each residual addition the input that no layer gives directly, for the other to fuse with its layer."""
    found, names = [], {node.name for node in layers}
    for node in reached:
        if scheme.additions == "skip" and node.op_type == "Add" and wiring.joins_maps(node):
            direct = [v for v in node.input if wiring.maker[v].name in names and len(wiring.takers[v]) == 1]
            found.append((node.name, next(v for v in node.input if v != (direct or node.input)[0])))
    return tuple(found)


def _also(node: NodeProto, wiring: Wiring, scheme: Scheme) -> bool:
    """Say whether a node that is no layer runs on int8 as well."""
    if node.op_type == "Add":
        return scheme.additions == "both" and wiring.joins_maps(node)
    if node.op_type in MEANS:
        return wiring.is_mean(node)
    return node.op_type in JOINS and scheme.outputs == "int8" and wiring.joins_maps(node)


def _behind(layers: Sequence[NodeProto], graph: GraphProto) -> set[str]:
    """Name the nodes that take what a layer gives, directly or not: nothing in front of the first is quantized."""
    values = {output for node in layers for output in node.output}
    found: set[str] = set()
    for node in graph.node:
        if values.intersection(node.input):
            found.add(node.name)
            values.update(node.output)
    return found


def _taken(pool: NodeProto, chosen: Sequence[NodeProto], wiring: Wiring) -> bool:
    names = {node.name for node in chosen}
    takers = wiring.takers.get(pool.output[0], [])
    return bool(takers) and all(taker.name in names for taker in takers)


def _refuse_unknown(names: Sequence[str], keep: Collection[str]) -> None:
    for name in sorted(set(keep) - set(names)):
        close = get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"did you mean '{close[0]}'?" if close else f"it has {', '.join(names[:5])}, …"
        raise InputError(
            f"quantization.keep names '{name}', which is no convolution or matrix product of the ONNX file; {hint}"
        )
