"""What quantization does to each layer's output: the float and the int8 program side by side, one pass each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx

from bitferry.device.arrays import Images
from bitferry.pipeline.artifacts import Program, QuantizedOnnx, TorchProgram
from bitferry.pipeline.capture import captured, fixed_batch, float_counterpart, layer_name
from bitferry.pipeline.onnx_in import looked
from bitferry.pipeline.statistics import decibels
from bitferry.pipeline.verdict import LayerError

aten = torch.ops.aten
LAYERS = {aten.conv1d.default, aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default, aten.linear.default}
PIXELS = 400_000
"""Images of this many pixels together go through at once: every layer's float output of theirs is held in memory."""


@dataclass
class Power:
    """Sums of squares over all images: the float layer's output, and its difference from the quantized one's."""

    signal: float = 0.0
    noise: float = 0.0
    own_noise: float = 0.0


@dataclass
class Capture(fx.Interpreter):
    """Run a program and keep the outputs of the nodes named, copied before an in-place operation changes them."""

    program: fx.GraphModule
    wanted: frozenset[str]
    found: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(self.program)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.wanted:
            self.found[n.name] = result.clone()
        return result


class Compare(fx.Interpreter):
    """Run the int8 program and set every layer against what the float program computed.

    A layer is computed twice: on the input that the int8 program gives it, and on the float program's, quantized as
    the layer asks. The second is the layer's own error.
    """

    def __init__(self, program: fx.GraphModule, counterparts: dict[str, str], floats: dict[str, Tensor]) -> None:
        super().__init__(program)
        self.counterparts, self.floats = counterparts, floats
        self.powers: dict[str, Power] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        reference = self.floats.get(self.counterparts.get(n.name, ""))
        if n.target in LAYERS and reference is not None and reference.shape == result.shape:
            own = self._alone(n)
            self.powers[n.name] = Power(_square(reference), _square(reference - result), _square(reference - own))
        return result

    def _alone(self, n: fx.Node) -> Tensor:
        """Compute the layer on the float program's activation; where that is not known, on its own."""
        with fx.traceback.preserve_node_meta(), torch.no_grad():
            arguments = [
                self._float_value(cast(fx.Node, a)) if i == 0 else self._value(a) for i, a in enumerate(n.args)
            ]
            result: Tensor = getattr(self, n.op)(n.target, tuple(arguments), dict(n.kwargs))
        return result

    def _value(self, argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda node: self.env[node])

    def _float_value(self, node: fx.Node) -> Any:
        """Follow the quantize and dequantize steps back to a node of the float program, and apply them to it."""
        counterpart = self.floats.get(self.counterparts.get(node.name, ""))
        if counterpart is not None:
            return counterpart
        if not rounds(node):
            return self.env[node]
        arguments = [self._float_value(cast(fx.Node, a)) if i == 0 else self._value(a) for i, a in enumerate(node.args)]
        return getattr(self, node.op)(node.target, tuple(arguments), dict(node.kwargs))


def compare(program: Program, images: Images) -> tuple[LayerError, ...]:
    """Give every quantized layer's SQNR, in the order they run; images N×H×W×3."""
    if isinstance(program, QuantizedOnnx):
        return looked.compare(program, images.copy())
    program = cast(TorchProgram, program)
    quantized, exported = graphs(program)
    batches = batches_of(quantized, images)
    with torch.no_grad():
        pairs = counterparts(exported, quantized)
        totals: dict[str, Power] = {}
        for batch in batches:
            floats = Capture(exported, frozenset(pairs.values()))
            floats.run(batch)
            compared = Compare(quantized, pairs, floats.found)
            compared.run(batch)
            _add(totals, compared.powers)
    names = {node.name: layer_name(node) for node in quantized.graph.nodes}
    return tuple(
        LayerError(names[node], decibels(power.signal, power.noise), decibels(power.signal, power.own_noise))
        for node, power in totals.items()
    )


def graphs(program: TorchProgram) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Return the graphs of a program and of its float counterpart."""
    found = (captured(program).module(), float_counterpart(program).module())
    return cast(tuple[fx.GraphModule, fx.GraphModule], found)


def batches_of(graph: fx.GraphModule, images: Images) -> Sequence[Tensor]:
    """Split images into as many at once as memory, or the graph, allows."""
    most = fixed_batch(graph) or max(1, PIXELS // (images[0].size // 3))
    return torch.split(torch.from_numpy(images.copy()), most)


def counterparts(exported: fx.GraphModule, quantized: fx.GraphModule) -> dict[str, str]:
    """Pair each layer of the int8 program, and what its input was made from, with the float node of its name.

    `exported` is its float counterpart, which differs from it in the quantize and dequantize steps alone.
    """
    floats = {node.name for node in exported.graph.nodes if node.op == "call_function"}
    return {name: name for name in _sources(quantized) if name in floats}


def _sources(program: fx.GraphModule) -> Iterator[str]:
    """Name the layers, and what their quantized inputs were made from."""
    for node in program.graph.nodes:
        if node.target in LAYERS:
            yield node.name
            source = node.args[0]
            while rounds(source):
                source = source.args[0]
            yield source.name


def rounds(node: fx.Node) -> bool:
    """Say whether a node quantizes or dequantizes."""
    return "quantize_per" in str(node.target)


def _add(totals: dict[str, Power], more: dict[str, Power]) -> None:
    for name, power in more.items():
        total = totals.setdefault(name, Power())
        total.signal += power.signal
        total.noise += power.noise
        total.own_noise += power.own_noise


def _square(values: Tensor) -> float:
    return float(values.double().square().sum())
