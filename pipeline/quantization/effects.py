"""What rounding one activation does to the scores, to first order, for every range that it could have.

A change d of an activation changes the scores by J·d. With v of random signs, (v·J·d)² has the mean |J·d|²
(Hutchinson 1990), and v·J is what one backward pass gives. So for each image and activation g = Jᵀv is found, and

- what lies beyond a range is cut off all in one direction, which adds up: (Σ g·(x − bound))², for every bound at once
  from sums of g and g·x over the bins of a histogram;
- what lies inside is rounded this way and that, which does not: step²/12 · Σ g², of the values that are not 0.

An error that reaches no score costs nothing, however large, and the few images whose values are ten times those of all
others decide no more than their scores suffer. That is what the error of the values themselves cannot tell.
"""

from collections.abc import Callable

import torch
from torch import Tensor, fx

from bitferry.pipeline import progress
from bitferry.pipeline.quantization.graph import activations, batches
from bitferry.pipeline.quantization.grid import Grid, channels_last

BINS = 256
"""Bounds that are tried, from the smallest to the largest value seen."""
Hook = Callable[[Tensor], None]


class Effect:
    """Stands in for an activation's grid: lets everything through, and sums what its gradients say."""

    def __init__(self, grid: Grid, images: int, source: Tensor) -> None:
        self.ends = (
            min(0.0, float(torch.stack(grid.seen.low).min())),
            max(0.0, float(torch.stack(grid.seen.high).max())),
        )
        self.source, self.grid = source, grid
        self.sums, self.power = torch.zeros(2, images, BINS, dtype=torch.float64), 0.0
        self.first = 0

    def __call__(self, x: Tensor) -> Tensor:
        passed = x + self.source
        if passed.requires_grad:  # x, for what passed may be changed in place
            passed.register_hook(self._adding(x.detach(), self.first))  # type: ignore[no-untyped-call]
        return passed

    def bounds(self) -> tuple[float, float]:
        """Give the range that costs the scores least."""
        edges, costs = self.costs()
        near = 1e-9 * (self.ends[1] - self.ends[0])
        costs[edges > near] = torch.inf  # 0 is in every range
        costs[:, edges < -near] = torch.inf
        low, high = divmod(int(costs.argmin()), len(edges))
        return float(edges[low]), float(edges[high])

    def costs(self) -> tuple[Tensor, Tensor]:
        """Give the bounds and, for each lower (rows) and upper one (columns), what the range costs the scores."""
        edges = torch.linspace(*self.ends, BINS + 1, dtype=torch.float64)
        beyond = torch.zeros(2, self.sums.shape[1], BINS + 1, dtype=torch.float64)
        below = beyond.clone()
        beyond[..., :-1] = self.sums.flip(-1).cumsum(-1).flip(-1)
        below[..., 1:] = self.sums.cumsum(-1)
        above_costs = (beyond[1] - edges * beyond[0]).square().sum(0)
        below_costs = (below[1] - edges * below[0]).square().sum(0)
        steps = self.grid.step(edges[:, None], edges[None, :])
        return edges, below_costs[:, None] + above_costs + steps.square() / 12 * self.power

    def _adding(self, x: Tensor, first: int) -> Hook:
        def add(gradient: Tensor) -> None:
            (moved, rows), (slope, _) = self.grid.by_image(x), self.grid.by_image(gradient)
            if channels_last(moved):
                moved, slope = moved.movedim(1, -1), slope.movedim(1, -1)
            values, slopes = moved.reshape(rows, -1), slope.reshape(rows, -1)
            low, high = self.ends
            places = ((values - low) * (BINS / max(high - low, 1e-12))).long().clamp_(0, BINS - 1)
            places += BINS * torch.arange(rows)[:, None]
            for sums, weights in zip(self.sums, (slopes, slopes * values), strict=True):
                found = torch.bincount(places.flatten(), weights.flatten(), rows * BINS)
                sums[first : first + rows] += found.view(rows, BINS)
            self.power += float((slopes * (values != 0)).square_().sum())

        return add


def weigh(model: fx.GraphModule, images: Tensor) -> dict[Grid, Effect]:
    """Find the effects of every activation that was observed, by one pass forward and one back for each image.

    `images` are N×H×W×3 uint8; the random signs belong to the image, so they are the same whatever the batch.
    """
    source = torch.zeros(1, requires_grad=True)
    effects = {grid: Effect(grid, len(images), source) for grid in activations(model) if grid.seen.low}
    for grid, effect in effects.items():
        grid.stand_in = effect
    random, first = torch.Generator().manual_seed(0), 0
    split = list(batches(model, images))
    try:
        with torch.enable_grad():
            for batch in progress.track(split, "weigh ranges", total=len(split)):
                for effect in effects.values():
                    effect.first, effect.grid.batch = first, len(batch)
                scores = model(batch)
                signs = torch.randint(0, 2, scores.shape, generator=random).to(scores.dtype) * 2 - 1
                if scores.requires_grad:
                    scores.backward(signs)
                first += len(batch)
    finally:
        for grid in effects:
            grid.stand_in = None
    return effects
