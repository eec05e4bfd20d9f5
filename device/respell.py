"""An exported program, written as XNNPACK's partitioner knows it, the arithmetic unchanged: ExecuTorch's."""

import re
from operator import attrgetter
from typing import Any

Node = Any  # a torch.fx.Node, whose arguments may be of every type

QUANTIZE, DEQUANTIZE = (f"quantized_decomposed.{verb}_per_tensor" for verb in ("quantize", "dequantize"))
RELUS = {"aten.relu", "aten.relu6", "aten.hardtanh"}
MOVES = "alias clone contiguous detach flatten max_pool2d permute reshape squeeze transpose unsqueeze view"
CARRIERS = {f"aten.{name}" for name in (*MOVES.split(), "clamp")}
"""What rounding may go before as well as after: what moves values, and what only cuts them off."""


def respelled(module: Any) -> Any:
    """Write a quantized or float program so that XNNPACK takes all of it; the module is changed and given back."""
    graph = module.graph
    _part_biases(module)
    for node in list(graph.nodes):
        _respell(node)
    _permute_last(module, next(node for node in graph.nodes if node.op == "placeholder"))
    for node in [node for node in graph.nodes if operator(node) == QUANTIZE]:
        _quantize_first(node)
    for weight in [node.args[1] for node in graph.nodes if len(node.args) > 1 and not _runs_int8(node)]:
        if "dequantize_per_channel" in operator(weight):  # for which nothing but XNNPACK's int8 layers has a kernel
            values = [attrgetter(a.target)(module) if isinstance(a, type(weight)) else a for a in weight.args]
            weight.replace_all_uses_with(_constant(module, weight, weight.target(*values)))
    graph.eliminate_dead_code()
    module.recompile()
    return module


def _part_biases(module: Any) -> None:
    """Give layers that share a bias one each: XNNPACK keeps it as int32 at the scale of one layer, for all of them."""
    seen = set()
    for node in [one for one in module.graph.nodes if re.match(r"aten\.(conv\dd|linear)", operator(one))]:
        bias = node.args[2] if len(node.args) > 2 else None
        if bias is not None and bias.op == "get_attr":
            if bias.target in seen:
                node.replace_input_with(bias, _constant(module, node, attrgetter(bias.target)(module).clone()))
            seen.add(bias.target)


def _respell(node: Node) -> None:
    from torch import ops  # noqa: PLC0415

    if operator(node) == "aten._assert_tensor_metadata":
        node.graph.erase_node(node)
    elif operator(node) == "aten.dropout":
        node.replace_all_uses_with(node.args[0])
    elif operator(node) == "aten.adaptive_avg_pool2d" and list(node.args[1]) == [1, 1]:
        node.target, node.args = ops.aten.mean.dim, (node.args[0], [-1, -2], True)


def _permute_last(module: Any, images: Node) -> None:
    """Put N×H×W×3 → N×3×H×W behind the arithmetic on pixels: XNNPACK permutes numbers, but not the bytes of images."""
    (permute,) = images.users if len(images.users) == 1 else (images,)
    if operator(permute) != "aten.permute":
        return
    order, last = list(permute.args[1]), permute
    back = [order.index(axis) for axis in range(len(order))]
    while len(last.users) == 1 and operator(user := next(iter(last.users))) in ("aten.to", "aten.mul", "aten.add"):
        constants = [node for node in user.all_input_nodes if node is not last]
        values = [attrgetter(node.target)(module) for node in constants if node.op == "get_attr"]
        if len(values) < len(constants) or any(value.dim() != len(order) for value in values):
            break
        for node, value in zip(constants, values, strict=True):
            user.replace_input_with(node, _constant(module, node, value.permute(back).contiguous()))
        last = user
    with images.graph.inserting_after(last):
        moved = images.graph.call_function(permute.target, (last, order))
    last.replace_all_uses_with(moved, delete_user_cb=lambda user: user is not moved)
    permute.replace_all_uses_with(images)


def _quantize_first(node: Node) -> None:
    """Quantize before what only moves values: the same answer, but int8 is what is moved and what a layer gives."""
    dequantize, given = next(iter(node.users)).target, node.args[0]
    while operator(given) in CARRIERS and len(given.users) == 1:
        before = given.args[0]
        with node.graph.inserting_before(given):
            inside = node.graph.call_function(node.target, (before, *node.args[1:]))
            given.args = (node.graph.call_function(dequantize, (inside, *node.args[1:])), *given.args[1:])
        given = before


def _runs_int8(layer: Node) -> bool:
    """Say whether XNNPACK will run a layer on int8: quantized input, at most one ReLU behind it, quantized output."""
    if operator(layer) == "aten.conv3d" or operator(layer.args[0]) != DEQUANTIZE or len(layer.users) != 1:
        return False
    (user,) = layer.users
    if operator(user) in RELUS and len(user.users) == 1:
        (user,) = user.users
    return operator(user) == QUANTIZE


def _constant(module: Any, place: Node, value: Any) -> Node:
    name = f"respelled_{place.name}"
    module.register_buffer(name, value)
    with place.graph.inserting_before(place):
        return place.graph.get_attr(name)


def operator(node: Any) -> str:
    """Name a node's operator, `aten.relu`, without its overload; one that works in place as the one that does not."""
    found = re.match(r"(?:<EdgeOpOverload: )?(\w+\.\w+?)_?\.\w+", str(getattr(node, "target", "")))
    return found[1] if found else ""
