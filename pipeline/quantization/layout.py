"""Where the channels of each value of a graph are: axis 1 of feature maps, the last axis of tokens.

A residual stream of tokens may have a few channels far larger than all others (Dettmers et al. 2022, "LLM.int8()"),
which one scale for the tensor cannot hold, so what adds tokens stays float. The number of axes does not tell them
apart: Swin keeps its tokens as N×H×W×C. What makes a value and what takes it does: a convolution has its channels on
axis 1, a linear layer and a layer norm on the last; what moves axes moves them along.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

aten = torch.ops.aten
ON_MAPS = {
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "batch_norm",
    "group_norm", "instance_norm", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d",
    "pixel_shuffle", "pixel_unshuffle", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d",
}  # fmt: skip
"""Operators with the channels of their input and of their output on axis 1."""
ON_TOKENS = {"linear", "layer_norm", "native_layer_norm", "rms_norm"}
MOVES = {"permute", "transpose"}
MIXES = {
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "matmul", "bmm", "mm", "einsum",
    "expand", "select", "index", "gather", "sum", "mean", "scaled_dot_product_attention", "softmax", "_softmax",
}  # fmt: skip
"""Behind which the axis of channels is another one, or none."""
Axes = dict[fx.Node, int]


def feature_maps(model: fx.GraphModule) -> set[fx.Node]:
    """Return the nodes that give N×C×H×W."""
    return {node for node, axis in channel_axes(model).items() if axis == 1 and _axes_of(node) == 4}


def channel_axes(model: fx.GraphModule) -> Axes:
    """Return the axis of the channels for each value of four axes and more or less where it is known.

    What makes a value decides before what takes it.
    """
    axes: Axes = {}
    nodes = list(model.graph.nodes)
    for node in nodes:
        axis = _of_output(node, axes)
        if axis is not None:
            axes[node] = axis
    for node in reversed(nodes):
        wanted = _of_input(node, axes)
        for given in node.all_input_nodes:
            if wanted is not None and given not in axes and given.op != "get_attr" and _axes_of(given) == wanted[1]:
                axes[given] = wanted[0]
    return axes


def _of_output(node: fx.Node, axes: Axes) -> int | None:
    """Return the axis of channels of what a node gives, from its kind and its inputs."""
    name = _name(node)
    if name in ON_MAPS:
        return 1
    if name in ON_TOKENS:
        return _axes_of(node) - 1
    known = [axes[given] for given in node.all_input_nodes if given in axes and _axes_of(given) == _axes_of(node)]
    if not known or name in MIXES or not name:
        return None
    return _order(node).index(known[0]) if name in MOVES else known[0]


def _of_input(node: fx.Node, axes: Axes) -> tuple[int, int] | None:
    """Return the axis of channels, and the number of axes, of what a node takes, from its kind and its output."""
    name = _name(node)
    if name in ON_MAPS | ON_TOKENS:
        count = _axes_of(cast(fx.Node, node.args[0]))
        return (1 if name in ON_MAPS else count - 1), count
    if node not in axes or name in MIXES or not name:
        return None
    return (_order(node)[axes[node]] if name in MOVES else axes[node]), _axes_of(node)


def _order(node: fx.Node) -> Sequence[int]:
    """Return which axis of its input each axis of a permutation's output is."""
    count = _axes_of(node)
    if _name(node) == "permute":
        return [axis % count for axis in cast(Sequence[int], node.args[1])]
    order = list(range(count))
    first, second = (cast(int, axis) % count for axis in node.args[1:3])
    order[first], order[second] = order[second], order[first]
    return order


def _axes_of(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.ndim if isinstance(value, Tensor) else 0


def _name(node: fx.Node) -> str:
    """Return the name of a node's operator without its overload, `conv2d` of `aten.conv2d.padding`; else nothing."""
    schema: Any = getattr(node.target, "_schema", None)
    return str(schema.name).removeprefix("aten::").removesuffix("_") if schema is not None else ""
