"""Bias correction: what rounding shifts in a layer's mean output is taken back in its bias.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.2: the shift of
a channel is E[y] − E[ŷ], here measured on the calibration images. NNCF calls the two ways fast and full.
"""

import torch
from torch import Tensor, fx

from pipeline import progress
from pipeline.quantization.graph import Layer, batches, layers
from pipeline.quantization.lockstep import Lockstep


def fast(model: fx.GraphModule) -> int:
    """Correct each layer alone, for what rounding its weights shifts on the float model's inputs.

    A layer is linear, so the mean of its outputs is its output of the mean input, (Ŵ − W)·E[x]: no image goes through
    again. The observers summed the inputs.
    """
    count = 0
    with torch.no_grad():
        for layer in correctable(model):
            if layer.data is None or not layer.data.seen.rows:
                continue
            mean = torch.as_tensor(layer.data.seen.total / layer.data.seen.rows).to(layer.weight.dtype)
            lost = layer.weight - layer.weight_grid.rounded(layer.weight)
            _bias(layer).add_(layer.channel_means(layer.apply(mean, lost)))
            count += 1
    return count


def full(model: fx.GraphModule, images: Tensor) -> int:
    """Correct layer after layer, each for all that it and those before it, corrected already, shift.

    Of the images' mean shifts the median is taken: in the last layers of MobileNetV2 a few images have values ten
    times as large as all others, which no range that is good for those others holds, and their mean would be theirs.
    """
    wanted = {layer.node: layer for layer in correctable(model)}
    pair = Lockstep(model, list(batches(images)))
    for node in progress.track(pair.steps(), "bias correction", total=len(model.graph.nodes)):
        if node in wanted:
            layer = wanted[node]
            shifts = [
                _image_means(layer, exact - rounded)
                for exact, rounded in zip(pair.exact[node], pair.rounded_outputs(node), strict=True)
            ]
            _bias(layer).add_(torch.cat(shifts).median(0).values)
    return len(wanted)


def correctable(model: fx.GraphModule) -> list[Layer]:
    """List the layers that have a bias to correct."""
    return [layer for layer in layers(model) if layer.bias is not None]


def _image_means(layer: Layer, difference: Tensor) -> Tensor:
    """Average each image's over all but its channels, N×C."""
    moved = difference.movedim(layer.channel_axis, -1)
    return moved.reshape(len(moved), -1, moved.shape[-1]).mean(1)


def _bias(layer: Layer) -> Tensor:
    if layer.bias is None:
        raise ValueError(f"layer {layer.node.name} has no bias")
    return layer.bias.data
