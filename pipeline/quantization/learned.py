"""Learned ranges: the calibration images' float answers are the teacher, no label is needed.

The scale's gradient is Esser et al.'s ("Learned Step Size Quantization", 2020), the zero point's Bhalgat et al.'s
("LSQ+", 2020). What is minimized is the answers' error, with the whole network as the one block of Li et al.
("BRECQ", 2021).
"""

from typing import Any

import torch
from torch import Tensor, fx, nn

from bitferry.pipeline import progress
from bitferry.pipeline.quantization.graph import BATCH, activations, forward, layers, set_mode
from bitferry.pipeline.quantization.grid import Grid
from bitferry.pipeline.recipe import Quantization

SCALE_RATE, ZERO_RATE, BIAS_RATE = 1e-3, 1e-2, 2e-4
"""Of Adam: relative to a scale, in steps of the grid, and in the bias's own unit."""


class Rounding(torch.autograd.Function):
    """Round to a grid; the gradient goes through where the value is in the range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
        zero = zero.round()
        ctx.save_for_backward(x, scale, zero)
        ctx.bounds = low, high
        return (x * (1 / scale)).round_().clamp_(low - float(zero), high - float(zero)).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, scale, zero = ctx.saved_tensors
        low, high = (bound - float(zero) for bound in ctx.bounds)
        steps = x * (1 / scale)
        inside = (steps >= low) & (steps <= high)
        passed = gradient * inside
        of_scale = (gradient * steps.round().clamp_(low, high)).sum() - (passed * steps).sum()
        of_zero = (passed.sum() - gradient.sum()) * scale
        return passed, of_scale.view_as(scale), of_zero.view_as(zero), None, None


class LearnedRange(nn.Module):
    """An activation's grid whose scale, and zero point where it has one, are parameters."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.bounds = grid.quant_min, grid.quant_max
        self.log_scale = nn.Parameter(grid.scale.float().log())
        zero = int(grid.zero_point.flatten()[0])
        moves = grid.qscheme is not torch.per_tensor_symmetric and zero not in self.bounds
        self.zero = nn.Parameter(torch.tensor([float(zero)]), requires_grad=moves)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = Rounding.apply(x, self.log_scale.exp(), self.zero, *self.bounds)
        return found

    def settle(self, grid: Grid) -> None:
        """Put what was learned into the grid."""
        grid.scale = self.log_scale.detach().exp()
        grid.zero_point = self.zero.detach().round().clamp(*self.bounds).long()


def noise(found: Tensor, wanted: Tensor) -> Tensor:
    """Give the scores' noise as a share of their power: the loss of all that learns from the float model."""
    return (found - wanted).square().sum() / wanted.square().sum().clamp(min=1e-12)


def learn(model: fx.GraphModule, images: Tensor, teacher: Tensor, settings: Quantization) -> int:
    """Learn ranges with biases in `iterations` steps of a few images each; give how many ranges there are."""
    ranges = {grid: LearnedRange(grid) for grid in activations(model)}
    if not ranges:
        return 0
    biases = [layer.bias for layer in layers(model) if layer.bias is not None]
    set_mode(model, "round")
    for grid, learned in ranges.items():
        grid.stand_in = learned
    try:
        _train(model, images, teacher, settings, list(ranges.values()), biases)
    finally:
        for grid in ranges:
            grid.stand_in = None
        set_mode(model, "off")
    for grid, learned in ranges.items():
        learned.settle(grid)
    return len(ranges)


def _train(
    model: fx.GraphModule,
    images: Tensor,
    teacher: Tensor,
    settings: Quantization,
    ranges: list[LearnedRange],
    biases: list[Tensor],
) -> None:
    for bias in biases:
        bias.requires_grad_(True)
    parts = [
        {"params": [one.log_scale for one in ranges], "lr": SCALE_RATE},
        {"params": [one.zero for one in ranges if one.zero.requires_grad], "lr": ZERO_RATE},
        {"params": biases, "lr": BIAS_RATE},
    ]
    optimizer = torch.optim.Adam([part for part in parts if part["params"]])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.iterations)
    random = torch.Generator().manual_seed(settings.seed)
    order: list[int] = []
    with torch.enable_grad():
        for _ in progress.track(range(settings.iterations), "learn", total=settings.iterations):
            if len(order) < BATCH:
                order += torch.randperm(len(images), generator=random).tolist()
            drawn, order = order[:BATCH], order[BATCH:]
            loss = noise(forward(model, images[drawn]), teacher[drawn])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    for bias in biases:
        bias.requires_grad_(False)
