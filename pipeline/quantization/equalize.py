"""Equalization: channels that use little of a tensor's range are made larger, and what takes them smaller by as much.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.1: a ReLU lets a
positive factor through, so W₁ → S·W₁ and W₂ → W₂·S⁻¹ leave the answers as they are; how much of a channel's range goes
over to the weights that take it is Xiao et al. 2022, "SmoothQuant": s = max|X|^α / max|W|^(1−α), α = ½. A
layer's own weights have a scale for each output channel, so a factor costs them nothing; nor does it those of a
depthwise convolution behind it, which therefore gives all (α = 1).

A clip, as ReLU6's, cannot be scaled per channel at no cost, so behind one a channel grows until it would be clipped and
never shrinks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx

from bitferry.pipeline.quantization.annotate import ADDITIONS, RELUS
from bitferry.pipeline.quantization.graph import Layer, batches, is_grid, layers

aten = torch.ops.aten
PLAIN_RELUS = {aten.relu.default, aten.relu_.default}
LETS_THROUGH = {*RELUS, *ADDITIONS, aten.dropout.default, aten.dropout_.default, aten.max_pool2d.default}
LARGEST, LEAST_RANGE = 64.0, 1e-4
"""Of a factor, and of a channel's share of the range."""


@dataclass
class Group:
    """Tensors whose channel c has one factor: what convolutions give, add and clip, to what convolutions take."""

    nodes: list[fx.Node] = field(default_factory=list)
    makers: list[Layer] = field(default_factory=list)
    takers: list[Layer] = field(default_factory=list)
    clips: list[fx.Node] = field(default_factory=list)


class Ranges(fx.Interpreter):
    """Find how large each channel of some nodes gets, image by image, N×C."""

    def __init__(self, model: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(model)
        self.wanted = wanted
        self.found: dict[fx.Node, list[Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.wanted:
            self.found.setdefault(n, []).append(result.abs().amax((2, 3)))
        return result


def equalize(model: fx.GraphModule, images: Tensor) -> int:
    """Change the weights and biases of a graph that lets everything through; give how many groups there were."""
    found = groups(model)
    ranges = Ranges(model, {node for group in found for node in group.nodes})
    with torch.no_grad():
        for batch in batches(model, images) if found else ():
            ranges.run(batch)
        per_channel = {node: torch.cat(parts) for node, parts in ranges.found.items()}
        for group in found:
            scale(group, factors(group, per_channel))
    return len(found)


def factors(group: Group, ranges: dict[fx.Node, Tensor]) -> Tensor:
    """Give each channel's factor; 1 for all that a clip has hold of."""
    means = [ranges[node].mean(0) for node in group.nodes]
    share = torch.stack([mean / mean.max().clamp(min=1e-12) for mean in means]).amax(0).clamp(min=LEAST_RANGE)
    if all(_depthwise(layer) for layer in group.takers):
        wanted = 1 / share
    else:
        weights = [_input_range(layer) for layer in group.takers if not _depthwise(layer)]
        taken = torch.stack([weight / weight.max().clamp(min=1e-12) for weight in weights]).amax(0)
        wanted = (taken.clamp(min=LEAST_RANGE) / share).sqrt()
    if not group.clips:
        return (wanted / wanted.median()).clamp(1 / LARGEST, LARGEST)
    top = torch.stack([ranges[node] for node in group.clips]).amax((0, 1))
    least_clip = min(_clip(node) for node in group.clips)
    clipped = top >= 0.999 * least_clip
    wanted = wanted / (wanted[clipped].median() if bool(clipped.any()) else wanted.min())
    wanted = torch.minimum(wanted.clamp(1.0, LARGEST), least_clip / top.clamp(min=1e-3))
    return torch.where(clipped, 1.0, wanted.clamp(min=1.0))


def scale(group: Group, factor: Tensor) -> None:
    """Multiply what makes the channels and divide what takes them."""
    for layer in group.makers:
        layer.weight.mul_(factor.view(-1, 1, 1, 1))
        if layer.bias is not None:
            layer.bias.mul_(factor)
    for layer in group.takers:
        layer.weight.div_(factor.view(-1, 1, 1, 1) if _depthwise(layer) else factor.view(1, -1, 1, 1))


def groups(model: fx.GraphModule) -> list[Group]:
    """Find every set of tensors that lies between convolutions alone."""
    convolutions = {layer.node: layer for layer in layers(model)}
    parents: dict[fx.Node, fx.Node] = {}
    nodes = [node for node in model.graph.nodes if node.op == "call_function" and _is_map(node)]
    for node in nodes:
        if node.target in LETS_THROUGH:
            for given in _inputs(model, node):
                if _is_map(given):
                    parents[_root(parents, node)] = _root(parents, given)
    members: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        members.setdefault(_root(parents, node), []).append(node)
    found = [_group(model, some, convolutions) for some in members.values()]
    return [group for group in found if group and group.makers and group.takers]


def _group(model: fx.GraphModule, nodes: list[fx.Node], layers_: dict[fx.Node, Layer]) -> Group | None:
    """Sort what makes, takes and clips a set of tensors; None where anything else has to do with them."""
    group, inside = Group(nodes), set(nodes)
    for node in nodes:
        layer = layers_.get(node)
        if layer and not layer.shared:
            group.makers.append(layer)
        elif layer or node.target not in LETS_THROUGH or not set(_inputs(model, node)) <= inside:
            return None
        if node.target in RELUS - PLAIN_RELUS:
            if _clip(node) <= 0:
                return None
            group.clips.append(node)
        for user in _users(model, node):
            taker = layers_.get(user)
            if taker and not taker.shared and _takes_each_channel(taker):
                group.takers.append(taker)
            elif user not in inside:
                return None
    return group


def _clip(node: fx.Node) -> float:
    """Give the upper bound of a ReLU6, hardtanh or clamp from 0; 0 for any other."""
    if "relu6" in str(node.target):
        return 6.0
    low, high = [*node.args[1:3], None, None][:2]
    plain = isinstance(low, int | float) and low == 0 and isinstance(high, int | float)
    return float(cast(float, high)) if plain else 0.0


def _root(parents: dict[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    while node in parents and parents[node] is not node:
        node = parents[node]
    return node


def _inputs(model: fx.GraphModule, node: fx.Node) -> Sequence[fx.Node]:
    """Give the nodes that a node takes, behind their grids."""
    return [cast(fx.Node, given.args[0]) if is_grid(model, given) else given for given in node.all_input_nodes]


def _users(model: fx.GraphModule, node: fx.Node) -> Sequence[fx.Node]:
    behind = [user for user in node.users if is_grid(model, user)]
    return [user for user in node.users if user not in behind] + [user for grid in behind for user in grid.users]


def _is_map(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point() and node.op == "call_function"


def _groups_of(layer: Layer) -> int:
    return int(cast(int, layer.node.args[6])) if len(layer.node.args) > 6 else 1


def _depthwise(layer: Layer) -> bool:
    return _groups_of(layer) == len(layer.weight) and layer.weight.shape[1] == 1


def _takes_each_channel(layer: Layer) -> bool:
    return layer.weight.ndim == 4 and (_groups_of(layer) == 1 or _depthwise(layer))


def _input_range(layer: Layer) -> Tensor:
    return layer.weight.abs().amax((0, 2, 3))
