"""What is constant in a captured graph is worked out before quantization: weights, paddings and batch norms.

A layer is quantized where its weight is a constant of the graph. Weight normalization, weight standardization and the
like compute it from other constants on each call. Batch norms are folded into the layers before them here and not by
torchao, which folds a norm into a layer whose output or weight something else takes as well, and knows no groups of a
transposed convolution.
"""

from collections.abc import Mapping
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

aten = torch.ops.aten
PADDED_BY_NAME = {getattr(aten, f"conv{n}d").padding: getattr(aten, f"conv{n}d").default for n in (1, 2, 3)}
TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
LAYERS = {*PADDED_BY_NAME.values(), *PADDED_BY_NAME, *TRANSPOSED, aten.linear.default}
"""Whose second and third arguments are a weight and a bias."""
PRODUCTS = {aten.matmul.default, aten.mm.default}


def fold_constants(model: fx.GraphModule) -> None:
    """Change a captured graph so that each layer has a constant weight and bias, and as few operators around it.

    The graph keeps its answers, up to the rounding of float32.
    """
    fold_weights(model)
    for node in [node for node in model.graph.nodes if node.target in PADDED_BY_NAME]:
        _pad_by_numbers(node)
    for norm in [node for node in model.graph.nodes if node.target is aten.batch_norm.default]:
        if _can_fold(norm):
            _fold(model, norm)
    model.graph.eliminate_dead_code()
    model.recompile()


def fold_weights(model: fx.GraphModule) -> None:
    """Replace what computes a layer's weight or bias from constants by its result, and products with one by a layer.

    A weight that is computed from the images, as in attention, stays as it is.
    """
    constants = _constants(model)
    known: dict[fx.Node, Any] = {}
    for node in list(model.graph.nodes):
        if node.target in PRODUCTS:
            _as_linear(model, node, node.args[0], node.args[1], None, constants, known)
        elif node.target is aten.addmm.default and not node.kwargs:
            _as_linear(model, node, node.args[1], node.args[2], node.args[0], constants, known)
        if node.target in LAYERS:
            for place, name in enumerate(("weight", "bias"), 1):
                given = node.args[place] if len(node.args) > place else None
                if isinstance(given, fx.Node) and given.op != "get_attr" and given in constants:
                    value = _evaluate(model, given, known)
                    node.update_arg(place, _add_parameter(model, node, f"{node.name}_{name}", value))
    model.graph.eliminate_dead_code()
    model.recompile()


def _constants(model: fx.GraphModule) -> dict[fx.Node, bool]:
    """Return the nodes that give the same tensors whatever the images are: of each whether a parameter is in it."""
    found: dict[fx.Node, bool] = {}
    for node in model.graph.nodes:
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if node.op == "get_attr":
            found[node] = isinstance(attrgetter(str(node.target))(model), nn.Parameter)
        elif node.op == "call_function" and not random and found.keys() >= {*node.all_input_nodes}:
            found[node] = any(found[given] for given in node.all_input_nodes)
    return found


def _evaluate(model: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """Return what a constant node gives, and keep it with all it took in `known`."""
    pending = [node]
    while pending:  # no recursion: a chain may be long
        last = pending[-1]
        if last in known:
            pending.pop()
            continue
        missing = [given for given in last.all_input_nodes if given not in known]
        if missing:
            pending += missing
            continue
        pending.pop()
        if last.op == "get_attr":
            known[last] = attrgetter(str(last.target))(model)
        else:
            arguments, options = fx.node.map_arg((last.args, dict(last.kwargs)), known.__getitem__)
            with torch.no_grad():
                known[last] = cast(Any, last.target)(*arguments, **options)
    return known[node]


def _as_linear(
    model: fx.GraphModule,
    node: fx.Node,
    data: Any,
    weight: Any,
    bias: Any,
    constants: Mapping[fx.Node, bool],
    known: dict[fx.Node, Any],
) -> None:
    """Write a product by a constant matrix K×N as the linear layer that it is, where that was learned."""
    if weight not in constants or data in constants or (bias is not None and bias not in constants):
        return
    if not constants[weight]:  # as resizing by products is not
        return
    matrix = _evaluate(model, weight, known)
    shift = None if bias is None else _evaluate(model, bias, known)
    if matrix.ndim != 2 or data.meta["val"].ndim < 2 or (shift is not None and shift.shape != matrix.shape[1:]):
        return
    node.target = aten.linear.default
    node.args = (data, _add_parameter(model, node, f"{node.name}_weight", matrix.T))
    if shift is not None:
        node.args = (*node.args, _add_parameter(model, node, f"{node.name}_bias", shift))


def _pad_by_numbers(node: fx.Node) -> None:
    """Write a convolution whose padding goes by a name as one with numbers, behind a padding where they are uneven."""
    given: list[Any] = list(node.args)
    weight = given[1].meta["val"]
    size = weight.ndim - 2
    defaults = [None, [1] * size, "valid", [1] * size, 1]
    x, _, bias, stride, padding, dilation, groups = given + defaults[len(given) - 2 :]
    dilation = list(dilation) * (size if len(dilation) == 1 else 1)
    pairs = zip(dilation, weight.shape[2:], strict=True)
    around = [0] * size if padding == "valid" else [d * (k - 1) for d, k in pairs]
    if any(one % 2 for one in around):
        with node.graph.inserting_before(node):
            ends = [end for one in reversed(around) for end in (one // 2, one - one // 2)]
            padded = node.graph.call_function(aten.constant_pad_nd.default, (x, ends, 0.0))
        padded.meta = {key: value for key, value in node.meta.items() if key != "val"}
        padded.meta["val"] = torch.nn.functional.pad(x.meta["val"], ends)
        x, around = padded, [0] * size
    node.target = PADDED_BY_NAME[cast(Any, node.target)]
    node.args = (x, given[1], bias, stride, [one // 2 for one in around], dilation, groups)


def _can_fold(norm: fx.Node) -> bool:
    """Return whether a batch norm has constant statistics and stands behind a layer with constant weights."""
    layer, *tensors, training = norm.args[:6]
    constant = all(one is None or cast(fx.Node, one).op == "get_attr" for one in tensors)
    if training or not constant or None in tensors[2:] or cast(fx.Node, layer).target not in LAYERS:
        return False
    weights = [one for one in cast(fx.Node, layer).args[1:3] if isinstance(one, fx.Node)]
    same_axis = cast(fx.Node, layer).target is not aten.linear.default or norm.meta["val"].ndim == 2
    return same_axis and all(one.op == "get_attr" for one in weights)


def _fold(model: fx.GraphModule, norm: fx.Node) -> None:
    """Fold a batch norm into the layer before it, or into a copy of one whose output something else takes as well."""
    layer = cast(fx.Node, norm.args[0])
    if len(layer.users) > 1:
        with model.graph.inserting_after(layer):
            layer = model.graph.node_copy(layer)
        norm.replace_input_with(cast(fx.Node, norm.args[0]), layer)
    tensors = [None if one is None else _value(model, cast(fx.Node, one)) for one in norm.args[1:5]]
    scale, shift, mean, variance = tensors
    weight, *rest = [None if one is None else _value(model, cast(fx.Node, one)) for one in layer.args[1:3]]
    groups = int(cast(Any, layer.args[6])) if layer.target in TRANSPOSED and len(layer.args) > 6 else 1
    by_output = cast(Tensor, weight)
    if layer.target in TRANSPOSED:
        by_output = _exchanged(by_output, groups)
    bias = rest[0] if rest else None
    folded, moved = fuse_conv_bn_weights(
        by_output, bias, cast(Any, mean), cast(Any, variance), cast(float, norm.args[7]), scale, shift
    )
    if layer.target in TRANSPOSED:
        by_output = _exchanged(folded, groups)
    _replace(model, layer, 1, by_output if layer.target in TRANSPOSED else folded)
    _replace(model, layer, 2, moved)
    norm.replace_all_uses_with(layer)
    model.graph.erase_node(norm)


def _exchanged(weight: Tensor, groups: int) -> Tensor:
    """Exchange inputs and outputs within each group: [g·I, O, …] of a transposed convolution ↔ [g·O, I, …]."""
    return weight.view(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)


def _replace(model: fx.GraphModule, layer: fx.Node, place: int, value: Tensor) -> None:
    """Give a layer another weight or bias, under the name it had where nothing else goes by that."""
    given = layer.args[place] if len(layer.args) > place else None
    if given is None:
        name = f"{cast(fx.Node, layer.args[1]).target}_bias"  # in the layer's own module, which TorchScript names it by
    elif _uses(model, cast(fx.Node, given)) == 1:
        name = str(cast(fx.Node, given).target)
    else:
        name = f"{cast(fx.Node, given).target}_of_{layer.name}"
    layer.args = (*layer.args, *[None] * (place + 1 - len(layer.args)))
    layer.update_arg(place, _add_parameter(model, layer, name, value))


def _add_parameter(model: fx.GraphModule, layer: fx.Node, name: str, value: Tensor) -> fx.Node:
    """Add a constant to the graph before `layer`, in place of one of the same name; contiguous and its own memory."""
    path, _, last = name.rpartition(".")
    owner = model.get_submodule(path)
    if hasattr(owner, last):
        delattr(owner, last)
    stored = nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format), requires_grad=False)
    owner.register_parameter(last, stored)
    with model.graph.inserting_before(layer):
        node = model.graph.get_attr(name)
    node.meta["val"] = layer.meta["val"].fake_mode.from_tensor(stored, static_shapes=True)
    return node


def _uses(model: fx.GraphModule, given: fx.Node) -> int:
    alike = [node for node in model.graph.nodes if node.op == "get_attr" and node.target == given.target]
    return sum(len(node.users) for node in alike)


def _value(model: fx.GraphModule, node: fx.Node) -> Tensor:
    return cast(Tensor, attrgetter(str(node.target))(model))
