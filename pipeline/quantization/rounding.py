"""Each weight up or down so that the errors of a layer's weights cancel on what the layer is really given.

Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers": column after
column is rounded to the nearest, and what that does to the layer's outputs is made good in the columns that follow,
(W − Ŵ)·H·(W − Ŵ)ᵀ being least; H = X·Xᵀ over the calibration images. No labels and no iterations. Here also for
convolutions, group by group, on inputs that are int8 already; with a bias, H is of the inputs less their mean, for
what rounding shifts in the mean goes into the bias.

Every image has the same weight in H: a few with values ten times as large as all others would decide alone.
"""

from collections.abc import Callable, Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from bitferry.pipeline import progress
from bitferry.pipeline.quantization.correct import absorb
from bitferry.pipeline.quantization.graph import Layer, batches, layers
from bitferry.pipeline.quantization.lockstep import Lockstep

DAMPING = 0.01
"""Of the mean of H's diagonal, added to it: inputs that never differ would leave H without an inverse."""
COLUMNS, PLACES = 64, 2048
"""Columns that are rounded before the rest is brought up to date; places of an image that are looked at, at most."""
MOST_INPUTS = 4608
"""Of one output of a layer, that of a 3×3 convolution of 512 channels. H is of their square: a layer with more is
rounded to nearest, as VGG's first classifier, whose H would take gigabytes and minutes."""


def round_layers(model: fx.GraphModule, images: Tensor) -> int:
    """Replace each layer's weight by its rounded one, from the first to the last; give how many there were."""
    wanted = {layer.node: layer for layer in layers(model) if _can(layer)}
    pair = Lockstep(model, list(batches(model, images)))
    for node in progress.track(pair.steps(), "round weights", total=len(model.graph.nodes)):
        if node in wanted:
            _round(wanted[node], pair.rounded[cast(fx.Node, node.args[0])])
    return len(wanted)


def _can(layer: Layer) -> bool:
    return layer.node.target in _UNFOLD and not layer.shared and layer.weight[0].numel() <= MOST_INPUTS


def round_weight(weight: Tensor, moments: Tensor, scale: Tensor, most: int) -> Tensor:
    """Round G×O×K weights to ±`most` steps of `scale` (G×O×1), given H, G×K×K."""
    diagonal = torch.diagonal(moments, dim1=1, dim2=2)
    order = diagonal.argsort(dim=1, descending=True)  # what matters most while there are others to make it good
    factor = _factor(_permuted(_permuted(moments, order).mT, order).mT)
    if factor is None:
        return (weight / scale).round().clamp(-most, most) * scale
    left, made = _permuted(weight, order), torch.zeros_like(weight)
    count = weight.shape[2]
    for start in range(0, count, COLUMNS):
        end = min(start + COLUMNS, count)
        errors = torch.zeros_like(left[..., start:end])
        for column in range(start, end):
            one = left[..., column : column + 1]
            made[..., column : column + 1] = (one / scale).round().clamp(-most, most) * scale
            error = (one - made[..., column : column + 1]) / factor[:, column, column].view(-1, 1, 1)
            left[..., column:end] -= error * factor[:, column : column + 1, column:end]
            errors[..., column - start : column - start + 1] = error
        left[..., end:] -= errors @ factor[:, start:end, end:]
    return torch.empty_like(made).scatter_(2, order[:, None].expand_as(made), made)


def _factor(moments: Tensor) -> Tensor | None:
    """Give U of H⁻¹ = Uᵀ·U, with more damping where H needs it; None where all is in vain, as for inputs of 0."""
    mean = torch.diagonal(moments, dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    for damping in (DAMPING, 10 * DAMPING, 100 * DAMPING):
        damped = moments + torch.diag_embed((damping * mean)[:, None].expand(moments.shape[:2]))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed.any()):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(failed.any()):
                return cast(Tensor, upper)
    return None


def _round(layer: Layer, inputs: Iterable[Tensor]) -> None:
    groups = 1 if layer.linear or len(layer.node.args) < 7 else int(cast(int, layer.node.args[6]))
    before = layer.weight.clone()
    weight = before.reshape(groups, len(before) // groups, -1).double()
    moments, total, count = torch.zeros(groups, weight.shape[2], weight.shape[2], dtype=torch.float64), 0.0, 0.0
    mean = torch.zeros(groups, weight.shape[2], dtype=torch.float64)
    for image in (image for batch in inputs for image in batch):
        columns = _UNFOLD[layer.node.target](layer, image[None], groups)
        columns = columns[..., :: -(-columns.shape[-1] // PLACES)]
        power = float(columns.double().square().sum())
        if power > 0:
            moments += (columns @ columns.mT).double() / power
            mean += columns.double().sum(2) / power
            count += columns.shape[2] / power
            total += 1
    if not total:
        return
    if layer.bias is not None:
        moments -= mean[:, :, None] * mean[:, None, :] / count
    scale = layer.weight_grid.scale.double().view(groups, -1, 1)
    layer.weight.copy_(round_weight(weight, moments, scale, layer.weight_grid.quant_max).reshape(before.shape))
    absorb(layer, before - layer.weight)


def _columns_of_linear(layer: Layer, x: Tensor, groups: int) -> Tensor:
    """Give a layer's inputs as G×K×places."""
    return x.reshape(-1, x.shape[-1]).T[None]


def _columns_of_convolution(layer: Layer, x: Tensor, groups: int) -> Tensor:
    given = cast(list[list[int]], list(layer.node.args[3:6]))
    stride, padding, dilation = (tuple(one) for one in given + [[1, 1], [0, 0], [1, 1]][len(given) :])
    columns = F.unfold(x, tuple(layer.weight.shape[2:]), dilation, padding, stride)
    return columns.view(groups, -1, columns.shape[-1])


def _permuted(rows: Tensor, order: Tensor) -> Tensor:
    """Put the last axis of G×R×K in each group's order."""
    return rows.gather(2, order[:, None].expand(-1, rows.shape[1], -1))


_UNFOLD: dict[object, Callable[[Layer, Tensor, int], Tensor]] = {
    torch.ops.aten.linear.default: _columns_of_linear,
    torch.ops.aten.conv2d.default: _columns_of_convolution,
}
