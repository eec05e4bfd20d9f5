"""The calibration images that judge what the others made."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from bitferry.device import pixels
from bitferry.pipeline.division import SEEN, on
from bitferry.pipeline.quantization.graph import batches, grids, set_mode
from bitferry.pipeline.statistics import decibels

Noise = NDArray[np.float64]
"""Of the scores of each image, its power."""


@dataclass(frozen=True)
class Judges:
    """Images N×H×W×3 with the float model's scores; of maps, those of a few pixels."""

    images: Tensor
    teacher: Tensor
    seen: bool = False
    """Whether the ranges are of these images, too: figures on them then say more than of other images."""

    def having_seen(self) -> "Judges":
        """Give the same images, now that the ranges have seen them."""
        return replace(self, seen=True)

    def noise(self, model: fx.GraphModule, *, weights: bool = True) -> Noise:
        """Give each image's noise, were the weights and activations int8, or the activations alone."""
        for grid in grids(model):
            grid.mode = "round" if weights or not grid.per_channel else "off"
        found = scores(model, self.images)
        set_mode(model, "off")
        return self.apart(found)

    def apart(self, found: Tensor) -> Noise:
        """Give the power of each image's difference from the float model's scores."""
        return np.asarray((found.double() - self.teacher).square().flatten(1).sum(1).numpy(), np.float64)

    def db(self, noise: Noise) -> float:
        """Give the SQNR in dB of all images together."""
        found = decibels(float(self.teacher.double().square().sum()), float(noise.sum()))
        return float("inf") if found is None else found

    def __str__(self) -> str:
        return f"{on(self.images)}{SEEN if self.seen else ''}"


def scores(model: fx.GraphModule, images: Tensor) -> Tensor:
    """Run the graph as its grids are set; of maps keep a few pixels' scores, as all of a hundred fill a memory."""
    with torch.no_grad():
        return torch.cat([torch.from_numpy(pixels.thin(model(batch).numpy())) for batch in batches(model, images)])
