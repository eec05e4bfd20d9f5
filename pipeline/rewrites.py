"""Operators that runtimes compute each in a way of its own, written as others that all of them compute alike.

Done right after the capture, so that every later form of the program has them: int8, ONNX, ExecuTorch's. Eager PyTorch
stays as it is, and the export is compared with it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
POOLS = {aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default}
RESIZES, SCALED = (
    {getattr(getattr(aten, name), overload) for name in names for overload in ("vec", "default")}
    for names in (
        ("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "upsample_bicubic2d"),
        ("upsample_bilinear2d", "upsample_nearest2d", "_upsample_nearest_exact2d"),
    )
)
"""Resizing that every runtime has of its own, or lacks; and such as differs where a scale is not new size / old."""
MOST_VALUES = 2**22
"""Of the images that a resizing is tried on at once."""
Mapped = Callable[[Tensor], Tensor]


def rewrite(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Give a program whose operators every runtime computes alike: itself where it has no others.

    Average pooling over the edge becomes explicit padding, plain pooling and a multiplication; resizing to a fixed
    size that is cubic, with antialiasing, or by a scale that is not the ratio of the sizes becomes two products with
    constant matrices; circular padding becomes a concatenation; attention of N×L×E becomes that of one head, N×1×L×E.
    """
    module = cast(fx.GraphModule, program.module())
    found = {node: made for node in module.graph.nodes if (made := _replacement(node)) is not None}
    headless = [node for node in module.graph.nodes if _is_headless(node)]
    if not found and not headless:
        return program
    for node, made in found.items():
        _replace(module, node, made)
    for node in headless:
        _give_head(module, node)
    module.recompile()
    with torch.no_grad():
        return torch.export.export(module, program.example_inputs[0], dynamic_shapes=(open_axes(module),))


class ExplicitAverage(nn.Module):
    """Average pooling of N×C×… with its padding explicit, and windows at the edge weighted as the mean wanted them.

    `wanted` and `plain` pool; `pads` are the zeros that `plain` needs around its input, as `F.pad` takes them. A mean
    is linear: what the two make of ones has the ratio that all their windows have.
    """

    ratio: Tensor | None

    def __init__(self, wanted: Mapped, plain: Mapped, pads: Sequence[int], size: Sequence[int]) -> None:
        super().__init__()
        self.plain, self.pads = plain, list(pads)
        ones = torch.ones(1, 1, *size)
        ratio = wanted(ones) / plain(F.pad(ones, self.pads))
        self.register_buffer("ratio", None if bool((ratio == 1).all()) else ratio)

    def forward(self, x: Tensor) -> Tensor:
        """Pool."""
        means = self.plain(F.pad(x, self.pads) if any(self.pads) else x)
        return means if self.ratio is None else means * self.ratio


class MatrixResize(nn.Module):
    """Resizing of N×C×H×W to a fixed size as products with two matrices, one for each axis."""

    rows: Tensor | None
    columns: Tensor | None

    def __init__(self, resize: Mapped, size: Sequence[int]) -> None:
        super().__init__()
        rows, columns = axis_weights(resize, size, 0), axis_weights(resize, size, 1)
        self.register_buffer("rows", None if _is_identity(rows) else rows)
        self.register_buffer("columns", None if _is_identity(columns) else columns.T.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """Resize."""
        x = x if self.columns is None else torch.matmul(x, self.columns)
        return x if self.rows is None else torch.matmul(self.rows, x)


class CircularPad(nn.Module):
    """Circular padding of N×C×… as concatenations; `pads` are as `F.pad` takes them, negative ones cut off."""

    def __init__(self, pads: Sequence[int]) -> None:
        super().__init__()
        self.pads = list(pads)

    def forward(self, x: Tensor) -> Tensor:
        """Pad."""
        for axis, (before, after) in enumerate(zip(self.pads[::2], self.pads[1::2], strict=True), 1):
            cut = max(-before, 0), max(-after, 0)
            x = x.narrow(-axis, cut[0], x.shape[-axis] - sum(cut)) if any(cut) else x
            parts = [x.narrow(-axis, x.shape[-axis] - before, before)] if before > 0 else []
            parts += [x, *([x.narrow(-axis, 0, after)] if after > 0 else [])]
            x = torch.cat(parts, -axis) if len(parts) > 1 else x
        return x


def axis_weights(resize: Mapped, size: Sequence[int], axis: int) -> Tensor:
    """Find the weights, new × old, by which a separable resizing of images H×W makes one axis out of the old one.

    They are what it makes of images that are 1 in one row, or column, and 0 elsewhere: along the other axis such an
    image is constant, and interpolating keeps a constant.
    """
    found, step = [], max(1, MOST_VALUES // (size[0] * size[1]))
    for some in torch.split(torch.eye(size[axis]), step):
        lines = some[:, None, :, None] if axis == 0 else some[:, None, None, :]
        resized = resize(lines.expand(-1, 1, *size).contiguous())
        found.append(resized[:, 0, :, 0] if axis == 0 else resized[:, 0, 0, :])
    return torch.cat(found).T.contiguous()


def _replacement(node: fx.Node) -> nn.Module | None:
    """Make what computes a node's value as every runtime does; None for a node that stays."""
    if node.target is aten.pad.default and _arguments(node).get("mode") == "circular":
        return CircularPad(_arguments(node)["pad"])
    if node.target not in POOLS | RESIZES | SCALED:
        return None
    given, found = node.all_input_nodes[0].meta["val"].shape, node.meta["val"].shape
    if not all(isinstance(axis, int) for axis in (*given[2:], *found[2:])):
        return None
    compute, old, new = partial(_computed, node), given[2:], found[2:]
    if node.target in POOLS:
        return _average(node, compute, old, new)
    plain = node.target in SCALED and _scales_as_sizes(node, old, new)
    return None if plain else MatrixResize(compute, old)


def _computed(node: fx.Node, x: Tensor) -> Tensor:
    """Compute a node of one input for another one."""
    value: Tensor = cast(Any, node.target)(x, *node.args[1:], **node.kwargs)
    return value


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Give a node's arguments by the names that its operator has for them."""
    names = [argument.name for argument in cast(Any, node.target)._schema.arguments]
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _scales_as_sizes(node: fx.Node, old: Sequence[int], new: Sequence[int]) -> bool:
    """Say whether a resizing's scales, where it has any, are those of its sizes: 0.7 of 15 pixels are 10, not 10.5."""
    given = _arguments(node)
    if given.get("align_corners"):  # which looks at sizes alone
        return True
    scales = given.get("scale_factors") or [given.get("scales_h"), given.get("scales_w")]
    return all(scale is None or scale * a == b for scale, a, b in zip(scales, old, new, strict=True))


def _average(node: fx.Node, compute: Mapped, size: Sequence[int], pooled: Sequence[int]) -> nn.Module | None:
    """Make an average pooling explicit that rounds its size up, or divides by a number of its own."""
    given = _arguments(node)
    if not given.get("ceil_mode") and given.get("divisor_override") is None:
        return None
    kernel = _each(given["kernel_size"], size)
    stride, padding = _each(given.get("stride") or kernel, size), _each(given.get("padding", 0), size)
    reach = [(count - 1) * step + width for count, step, width in zip(pooled, stride, kernel, strict=True)]
    after = [max(0, end - old - before) for end, old, before in zip(reach, size, padding, strict=True)]
    pads = [pad for pair in zip(reversed(padding), reversed(after), strict=True) for pad in pair]
    return ExplicitAverage(compute, lambda x: cast(Any, node.target)(x, kernel, stride), pads, size)


def _each(value: Any, size: Sequence[int]) -> list[int]:
    """Give an operator's number for each axis."""
    values = [value] if isinstance(value, int) else list(value)
    return values * len(size) if len(values) == 1 else values


def open_axes(module: fx.GraphModule) -> dict[int, Any]:
    """Say which axes of the images may have any size: those that were captured so."""
    images = next(node for node in module.graph.nodes if node.op == "placeholder")
    shape = images.meta["val"].shape
    return {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(shape) if not isinstance(size, int)}


def _is_identity(matrix: Tensor) -> bool:
    return matrix.shape[0] == matrix.shape[1] and bool((matrix == torch.eye(len(matrix))).all())


def _is_headless(node: fx.Node) -> bool:
    """Return whether a node is attention of tokens N×L×E, which the ONNX exporter knows with an axis of heads alone."""
    return node.target is ATTENTION and all(one.meta["val"].ndim == 3 for one in cast(Any, node.args[:3]))


def _give_head(module: fx.GraphModule, node: fx.Node) -> None:
    def widened(value: fx.Node) -> fx.Node:
        if value.meta["val"].ndim != 3:  # a mask of L×S
            return value
        made = module.graph.call_function(aten.unsqueeze.default, (value, 1))
        made.meta = dict(node.meta)
        return made

    with module.graph.inserting_before(node):
        args, kwargs = fx.map_arg((node.args, node.kwargs), widened)
    with module.graph.inserting_after(node):
        squeezed = module.graph.call_function(aten.squeeze.dim, (node, 1))
    squeezed.meta = dict(node.meta)
    node.replace_all_uses_with(squeezed, delete_user_cb=lambda user: user is not squeezed)
    node.args, node.kwargs = args, kwargs


def _replace(module: fx.GraphModule, node: fx.Node, made: nn.Module) -> None:
    name = f"rewritten_{node.name}"
    module.add_module(name, made)
    with module.graph.inserting_before(node):
        called = module.graph.call_module(name, (node.all_input_nodes[0],))
    called.meta = dict(node.meta)
    node.replace_all_uses_with(called)
    module.graph.erase_node(node)
