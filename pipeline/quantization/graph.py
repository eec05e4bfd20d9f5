"""The layers of a prepared graph, with their grids; running it on images."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, fx

from bitferry.pipeline.capture import fixed_batch
from bitferry.pipeline.quantization.annotate import MOST_BIAS, WEIGHTED
from bitferry.pipeline.quantization.grid import Grid, Mode
from bitferry.pipeline.statistics import decibels

aten = torch.ops.aten
BATCH, PIXELS = 8, 8 * 256 * 256
"""Images that go through at once after the ranges are known: more do not fit the caches of a CPU, nor, of large images
with all that a step backward needs, its memory."""


@dataclass(frozen=True)
class Layer:
    """A convolution or matrix product whose weight is int8."""

    node: fx.Node
    data: Grid | None
    weight_grid: Grid
    weight: Tensor
    bias: Tensor | None
    int32_bias: bool
    shared: bool
    """Another layer has the same weight."""

    @property
    def linear(self) -> bool:
        return self.node.target is aten.linear.default

    @property
    def channel_axis(self) -> int:
        """Give the axis of its output's channels."""
        return -1 if self.linear else 1

    def fit(self) -> None:
        """Set the scales of the weight, with room for an int32 bias at the scale of input times weight.

        A channel whose weights are nearly nothing beside its bias, as batch norm leaves behind, would overflow.
        """
        self.weight_grid.fit_channels(self.weight, self._least())

    def make_room(self) -> None:
        """Raise the scales of those channels that a changed bias, or input scale, leaves no room; the others stay."""
        self.weight_grid.scale = torch.maximum(self.weight_grid.scale, torch.as_tensor(self._least()))

    def _least(self) -> Tensor | float:
        """Give the smallest scale of each channel that its bias allows."""
        if not self.int32_bias or self.bias is None or self.data is None:
            return 0.0
        return self.bias.detach().abs() / MOST_BIAS / self.data.scale

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """Compute the layer with another weight and no bias."""
        found: Tensor = cast(Any, self.node.target)(x, weight, None, *self.node.args[3:])
        return found

    def channel_means(self, output: Tensor) -> Tensor:
        """Average an output over all but its channels."""
        return output.movedim(self.channel_axis, -1).flatten(0, -2).mean(0)


def layers(model: fx.GraphModule) -> list[Layer]:
    """List the quantized layers in the order they run."""
    nodes = [node for node in model.graph.nodes if node.target in WEIGHTED and grid_of(model, node.args[1])]
    uses = [str(_origin(node.args[1]).target) for node in nodes]
    return [_layer(model, node, uses.count(use) > 1) for node, use in zip(nodes, uses, strict=True)]


def _layer(model: fx.GraphModule, node: fx.Node, shared: bool) -> Layer:
    given = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    bias = _origin(given) if isinstance(given, fx.Node) else None
    has_bias = bias is not None and bias.op == "get_attr"
    weight_grid = grid_of(model, node.args[1])
    return Layer(
        node,
        grid_of(model, node.args[0]),
        cast(Grid, weight_grid),
        value(model, _origin(node.args[1])),
        value(model, cast(fx.Node, bias)) if has_bias else None,
        int32_bias=has_bias and bias is not given,
        shared=shared,
    )


def own_tensors(model: fx.GraphModule) -> None:
    """Copy every weight and bias of a layer: the graph shares them with the float model, which must stay as it is.

    They keep their names, by which layers are known later; a bias that several layers share becomes one for each.
    """
    seen: set[str] = set()
    for node in [node for node in model.graph.nodes if node.target in WEIGHTED]:
        for place, argument in enumerate(node.args[1:3]):
            origin = _origin(argument) if isinstance(argument, fx.Node) else None
            if origin is None or origin.op != "get_attr" or (place == 0 and str(origin.target) in seen):
                continue
            path, _, name = str(origin.target).rpartition(".")
            owner, copied = model.get_submodule(path), value(model, origin).detach().clone()
            if str(origin.target) in seen:
                name = f"{name}_of_{node.name}"
                origin.target = f"{path}.{name}".lstrip(".")
            else:
                delattr(owner, name)
            owner.register_buffer(name, copied)
            seen.add(str(origin.target))
    model.recompile()


def batch_axis(node: fx.Node) -> int | None:
    """Give the axis of a value that grows with the number of images."""
    shape = getattr(node.meta.get("val"), "shape", ())
    return next((axis for axis, size in enumerate(shape) if not isinstance(size, int)), None)


def mark_batches(model: fx.GraphModule) -> None:
    """Tell each grid where the images are in what goes through it."""
    for node in model.graph.nodes:
        grid = grid_of(model, node)
        if grid is not None and not grid.per_channel:
            grid.batch_axis = batch_axis(node.args[0])


def grids(model: fx.GraphModule) -> list[Grid]:
    """List the grids, of activations and of weights."""
    return [module for module in model.modules() if isinstance(module, Grid)]


def activations(model: fx.GraphModule) -> list[Grid]:
    """List the grids of activations."""
    return [grid for grid in grids(model) if not grid.per_channel]


def set_mode(model: fx.GraphModule, mode: Mode) -> None:
    """Make all grids let everything through, observe or round."""
    for grid in grids(model):
        grid.mode = mode


def is_grid(model: fx.GraphModule, node: Any) -> bool:
    """Say whether a node calls a grid, or the observer of a bias, which is derived from two."""
    return isinstance(node, fx.Node) and node.op == "call_module" and "activation_post_process" in str(node.target)


def grid_of(model: fx.GraphModule, node: Any) -> Grid | None:
    """Give the grid that a node calls, if it calls one."""
    found = model.get_submodule(str(node.target)) if is_grid(model, node) else None
    return found if isinstance(found, Grid) else None


def round_before_pools(model: fx.GraphModule) -> None:
    """Let the grid of what leaves a max pooling round what enters it as well, where nothing else takes that.

    The largest of rounded values is the rounded largest, so no value changes; but the layer before then gives int8,
    a quarter of the bytes, and the pooling runs on it.
    """
    for pool in [node for node in model.graph.nodes if node.target is aten.max_pool2d.default]:
        given, takers = cast(fx.Node, pool.args[0]), list(pool.users)
        if len(takers) == len(given.users) == 1 and grid_of(model, takers[0]):
            with model.graph.inserting_before(pool):
                rounded = model.graph.call_module(str(takers[0].target), (given,))
            rounded.meta = dict(given.meta)
            pool.replace_input_with(given, rounded)
    model.recompile()


def without_grids(model: fx.GraphModule) -> fx.GraphModule:
    """Copy the graph as a float program."""
    copied = copy.deepcopy(model)
    for node in [node for node in copied.graph.nodes if is_grid(copied, node)]:
        node.replace_all_uses_with(node.args[0])
        copied.graph.erase_node(node)
    copied.delete_all_unused_submodules()
    copied.recompile()
    return copied


def value(model: fx.GraphModule, node: fx.Node) -> Tensor:
    """Give the tensor that a get_attr node stands for."""
    return cast(Tensor, attrgetter(str(node.target))(model))


def _origin(node: Any) -> fx.Node:
    """Give what a grid rounds; any other node itself."""
    found = cast(fx.Node, node)
    return cast(fx.Node, found.args[0]) if "activation_post_process" in str(found.target) else found


def batches(model: fx.GraphModule, images: Tensor) -> Iterator[Tensor]:
    """Split images, N×H×W×3, never more than a few at once, nor than the graph takes."""
    if len(images):
        most = fixed_batch(model) or max(1, min(BATCH, PIXELS // max(1, images[0, ..., 0].numel())))
        yield from torch.split(images, most)


def forward(model: fx.GraphModule, images: Tensor) -> Tensor:
    """Run the graph on all images at once, or as many at once as its code fixes; gradients flow."""
    most = fixed_batch(model)
    found: Tensor = model(images) if most is None else torch.cat([model(part) for part in torch.split(images, most)])
    return found


def answers(model: fx.GraphModule, images: Tensor) -> Tensor:
    """Run the graph as its grids are set."""
    with torch.no_grad():
        return torch.cat([model(batch) for batch in batches(model, images)])


def rounded_answers(model: fx.GraphModule, images: Tensor, *, weights: bool = True) -> Tensor:
    """Answer as int8 would, the weights as well or the activations alone."""
    for grid in grids(model):
        grid.mode = "round" if weights or not grid.per_channel else "off"
    found = answers(model, images)
    set_mode(model, "off")
    return found


def quality(model: fx.GraphModule, images: Tensor, teacher: Tensor, *, weights: bool = True) -> float:
    """Give the SQNR in dB of the answers that int8 would give, against the float ones."""
    found = rounded_answers(model, images, weights=weights).double()
    noise = float((found - teacher).square().sum())
    power = decibels(float(teacher.double().square().sum()), noise)
    return float("inf") if power is None else power


def some(images: Tensor, count: int) -> Tensor:
    """Take up to `count` images, spread evenly."""
    return images[places(len(images), count)]


def places(of: int, count: int) -> Tensor:
    """Spread up to `count` indices evenly."""
    return torch.linspace(0, of - 1, min(of, count)).round().long()
