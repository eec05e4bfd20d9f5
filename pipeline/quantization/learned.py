"""Learned ranges and roundings: the calibration images' float answers are the teacher, no label is needed.

Ranges: the scale's gradient is Esser et al.'s ("Learned Step Size Quantization", 2020), the zero point's Bhalgat et
al.'s ("LSQ+", 2020). Roundings: a weight is s·(⌊W/s⌋ + h(V)), and a regularizer drives h(V) to 0 or 1, as in Nagel et
al. ("Up or Down? Adaptive Rounding for Post-Training Quantization", 2020). What is minimized is the answers' error,
with the whole network as the one block of Li et al. ("BRECQ", 2021).
"""

import math
from typing import Any

import torch
from torch import Tensor, fx, nn

from pipeline import progress
from pipeline.quantization.graph import Layer, activations, grids, layers, set_mode
from pipeline.quantization.grid import Grid
from pipeline.recipe import Quantization

SCALE_RATE, ZERO_RATE, BIAS_RATE, ROUNDING_RATE = 1e-3, 1e-2, 2e-4, 1e-2
"""Of Adam: relative to a scale, in steps of the grid, in the bias's own unit and in that of V."""
STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1
"""Of the sigmoid, so that h(V) reaches 0 and 1."""
BATCH = 8


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


class LearnedRounding(nn.Module):
    """A weight's grid on which each weight goes down or up as learned."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        grid = layer.weight_grid
        self.most = grid.quant_max
        self.scale = grid.scale.view(-1, *[1] * (layer.weight.ndim - 1))
        steps = layer.weight.detach() / self.scale
        self.floor = steps.floor()
        up = (((steps - self.floor) - STRETCH_LOW) / (STRETCH_HIGH - STRETCH_LOW)).clamp(1e-3, 1 - 1e-3)
        self.choice = nn.Parameter(up.logit())

    def up(self) -> Tensor:
        """Say how much of a step each weight goes up, h(V)."""
        return (self.choice.sigmoid() * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0, 1)

    def forward(self, weight: Tensor) -> Tensor:
        return (self.floor + self.up()).clamp(-self.most, self.most) * self.scale

    def undecided(self, sharpness: float) -> Tensor:
        """Give the regularizer that drives h(V) to 0 or 1, Σ 1 − |2h − 1|^β."""
        return (1 - (2 * self.up() - 1).abs().clamp(min=1e-6).pow(sharpness)).sum()

    def settle(self, weight: Tensor) -> None:
        """Replace the weight by what it rounds to."""
        up = (self.up().detach() >= 0.5).to(weight.dtype)
        weight.copy_((self.floor + up).clamp(-self.most, self.most) * self.scale)


def learn(model: fx.GraphModule, images: Tensor, teacher: Tensor, settings: Quantization) -> None:
    """Learn ranges with biases, or weights' roundings, or both, in `iterations` steps of a few images each."""
    chosen = layers(model)
    ranges = {grid: LearnedRange(grid) for grid in activations(model)} if settings.ranges == "learned" else {}
    roundings = [LearnedRounding(layer) for layer in chosen] if settings.rounding == "learned" else []
    biases = [layer.bias for layer in chosen if layer.bias is not None] if ranges else []
    set_mode(model, "round")
    for grid, learned in ranges.items():
        grid.learned = learned
    for layer, rounding in zip(chosen, roundings, strict=bool(roundings)):
        layer.weight_grid.learned = rounding
    try:
        _train(model, images, teacher, settings, (list(ranges.values()), roundings, biases))
    finally:
        for any_grid in grids(model):
            any_grid.learned = None
        set_mode(model, "off")
    with torch.no_grad():
        for grid, learned in ranges.items():
            learned.settle(grid)
        for layer, rounding in zip(chosen, roundings, strict=bool(roundings)):
            rounding.settle(layer.weight)


def _train(
    model: fx.GraphModule,
    images: Tensor,
    teacher: Tensor,
    settings: Quantization,
    what: tuple[list[LearnedRange], list[LearnedRounding], list[Tensor]],
) -> None:
    ranges, roundings, biases = what
    for bias in biases:
        bias.requires_grad_(True)
    parts = [
        {"params": [one.log_scale for one in ranges], "lr": SCALE_RATE},
        {"params": [one.zero for one in ranges if one.zero.requires_grad], "lr": ZERO_RATE},
        {"params": biases, "lr": BIAS_RATE},
        {"params": [one.choice for one in roundings], "lr": ROUNDING_RATE},
    ]
    optimizer = torch.optim.Adam([part for part in parts if part["params"]])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.iterations)
    random = torch.Generator().manual_seed(settings.seed)
    order: list[int] = []
    with torch.enable_grad():
        for step in progress.track(range(settings.iterations), "learn", total=settings.iterations):
            if len(order) < BATCH:
                order += torch.randperm(len(images), generator=random).tolist()
            drawn, order = order[:BATCH], order[BATCH:]
            loss = _loss(model(images[drawn]), teacher[drawn], roundings, step / settings.iterations)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    for bias in biases:
        bias.requires_grad_(False)


def _loss(found: Tensor, teacher: Tensor, roundings: list[LearnedRounding], done: float) -> Tensor:
    """Give the answers' noise over their power, and from a fifth of the way on the price of being undecided."""
    loss = (found - teacher).square().sum() / teacher.square().sum().clamp(min=1e-12)
    if roundings and done > 0.2:
        sharpness = 2 + 18 * (1 + math.cos(math.pi * (done - 0.2) / 0.8)) / 2
        count = sum(one.choice.numel() for one in roundings)
        loss = loss + sum((one.undecided(sharpness) for one in roundings), torch.zeros(())) / count
    return loss
