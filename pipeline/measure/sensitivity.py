"""How much of the scores' error each layer is to blame for: the int8 program with that layer alone in float."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx

from bitferry.device import pixels
from bitferry.device.arrays import Images, Outputs
from bitferry.pipeline import progress
from bitferry.pipeline.artifacts import Program, QuantizedOnnx, TorchProgram
from bitferry.pipeline.capture import captured, layer_name
from bitferry.pipeline.measure.layers import LAYERS, batches_of, counterparts, graphs, rounds
from bitferry.pipeline.onnx_in import looked
from bitferry.pipeline.statistics import noise_share
from bitferry.pipeline.verdict import Blame

Layer = Callable[[Tensor], Tensor]


class Spared(fx.Interpreter):
    """Run an int8 program with one layer computed by `layer`, of what its input was before it was rounded."""

    def __init__(self, program: fx.GraphModule, spared: str, layer: Layer) -> None:
        super().__init__(program, garbage_collect_values=False)
        self.spared, self.layer = spared, layer

    def run_node(self, n: fx.Node) -> Any:
        if n.name != self.spared:
            return super().run_node(n)
        return self.layer(self._exact(cast(fx.Node, n.args[0])))

    def _exact(self, node: fx.Node) -> Tensor:
        """Give a value as it was before it was rounded, before a max pooling as well."""
        while rounds(node):
            node = cast(fx.Node, node.args[0])
        if node.target is torch.ops.aten.max_pool2d.default and rounds(cast(fx.Node, node.args[0])):
            pooled: Tensor = node.target(self._exact(cast(fx.Node, node.args[0])), *node.args[1:], **node.kwargs)
            return pooled
        exact: Tensor = self.env[node]
        return exact


def blames(program: Program, images: Images) -> tuple[Blame, ...]:
    """Give what noise (a share of the scores' power) would go with each layer in float, the largest share first.

    `images` are N×H×W×3 uint8. A layer whose weight is computed from the images is left out.
    """
    if isinstance(program, QuantizedOnnx):
        return looked.blames(program, images)
    program = cast(TorchProgram, program)
    with torch.no_grad():
        quantized, exported = graphs(program)
        batches = batches_of(quantized, images)
        reference = _answers(exported, batches)
        before = noise_share(reference, _answers(quantized, batches))
        pairs = counterparts(exported, quantized)
        layers = [node for node in quantized.graph.nodes if node.target in LAYERS and node.name in pairs]
        layers = [node for node in layers if _is_constant(_layer(exported, pairs[node.name]))]
        found = []
        for node in progress.track(layers, "blame layers", total=len(layers)):
            spared = Spared(quantized, node.name, _float_layer(exported, pairs[node.name]))
            found.append(Blame(layer_name(node), before - noise_share(reference, _answers(spared.run, batches))))
    return _by_name(found)


def _by_name(found: Sequence[Blame]) -> tuple[Blame, ...]:
    """Add up the layers that go by one name, which are kept in float together."""
    names = dict.fromkeys(one.name for one in found)
    summed = [Blame(name, sum(one.noise for one in found if one.name == name)) for name in names]
    return tuple(sorted(summed, key=lambda blame: -blame.noise))


def layer_names(program: Program) -> set[str]:
    """Name the layers of an int8 program as `quantization.keep` knows them."""
    if isinstance(program, QuantizedOnnx):
        return looked.names(program)
    graph = captured(cast(TorchProgram, program)).graph
    return {layer_name(node) for node in graph.nodes if node.target in LAYERS and rounds(cast(fx.Node, node.args[1]))}


def _answers(model: Layer, batches: Sequence[Tensor]) -> Outputs:
    return np.concatenate([pixels.thin(model(batch).numpy()) for batch in batches])


def _float_layer(exported: fx.GraphModule, name: str) -> Layer:
    """Return a layer of the float program as a function of its input."""
    node = _layer(exported, name)
    rest = fx.node.map_arg(node.args[1:], lambda one: _constant(exported, one))
    options = fx.node.map_arg(dict(node.kwargs), lambda one: _constant(exported, one))
    return lambda value: cast(Callable[..., Tensor], node.target)(value, *rest, **options)


def _layer(exported: fx.GraphModule, name: str) -> fx.Node:
    return cast(fx.Node, next(node for node in exported.graph.nodes if node.name == name))


def _is_constant(node: fx.Node) -> bool:
    """Return whether a layer takes nothing but its input and constants: a weight may be computed from images, too."""
    return all(given.op == "get_attr" for given in node.all_input_nodes if given is not node.args[0])


def _constant(exported: fx.GraphModule, node: fx.Node) -> Any:
    value: Any = exported
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value
