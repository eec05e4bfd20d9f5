"""Bias correction: what rounding shifts in a layer's mean output is taken back in its bias.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2: the shift of
a channel is E[y] − E[ŷ], here measured on the calibration images. NNCF calls the two ways fast and full.
"""

from typing import cast

import torch
from torch import Tensor, fx

from bitferry.pipeline import progress
from bitferry.pipeline.quantization.graph import Layer, batch_axis, batches, layers
from bitferry.pipeline.quantization.lockstep import Lockstep


def fast(model: fx.GraphModule) -> int:
    """Correct each layer alone, for what rounding its weights shifts on the float model's inputs.

    A layer is linear, so the mean of its outputs is its output of the mean input, (Ŵ − W)·E[x]: no image goes through
    again. The observers summed the inputs.
    """
    with torch.no_grad():
        return sum(absorb(layer, layer.weight - layer.weight_grid.rounded(layer.weight)) for layer in layers(model))


def absorb(layer: Layer, lost: Tensor) -> bool:
    """Put into a layer's bias what its outputs lose in the mean with part of its weight; False where it cannot be."""
    if layer.bias is None or layer.data is None or not layer.data.seen.rows:
        return False
    mean = torch.as_tensor(layer.data.seen.total / layer.data.seen.rows).to(layer.weight.dtype)
    layer.bias.data.add_(layer.channel_means(layer.apply(mean, lost)))
    return True


def full(model: fx.GraphModule, images: Tensor) -> int:
    """Correct layer after layer, each for all that it and those before it, corrected already, shift.

    Of the images' mean shifts the median is taken: in the last layers of MobileNetV2 a few images have values ten
    times as large as all others, which no range that is good for those others holds, and their mean would be theirs.
    """
    wanted = {layer.node: layer for layer in layers(model) if layer.bias is not None}
    pair = Lockstep(model, list(batches(model, images)))
    for node in progress.track(pair.steps(), "bias correction", total=len(model.graph.nodes)):
        if node in wanted:
            layer = wanted[node]
            shifts = [
                _image_means(layer, exact - rounded)
                for exact, rounded in zip(pair.exact[node], pair.rounded_outputs(node), strict=True)
            ]
            cast(Tensor, layer.bias).data.add_(torch.cat(shifts).median(0).values)
    return len(wanted)


def _image_means(layer: Layer, difference: Tensor) -> Tensor:
    """Average each image's over all but its channels, N×C."""
    moved = difference.movedim(layer.channel_axis, -1).movedim(batch_axis(layer.node) or 0, 0)
    return moved.reshape(len(moved), -1, moved.shape[-1]).mean(1)
