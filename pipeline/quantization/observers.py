"""What the calibration images put through each activation → its range.

Every statistic is of one image, whatever the batch: per-image extremes, and where asked for some of its values.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, fx

from device.errors import InputError
from pipeline import progress
from pipeline.quantization import effects
from pipeline.quantization.graph import activations, mark_batches, places, quality, set_mode, some
from pipeline.quantization.grid import Grid
from pipeline.recipe import Quantization

VALUES = 2**19
"""Of a tensor that are kept in all, for the observers that look at more than the extremes."""
WEIGHED, JUDGES = 32, 32
"""Calibration images that `scores` looks at, and that judge observers and steps."""
TAIL = 1e-4
"""Left out at either end by `percentile`."""
SHRINKS, ROUNDS = 24, 2
"""Steps of the search of `mse`: how many ranges, each 4 % of the whole smaller, and how often from both ends."""
Ranges = list[tuple[Tensor, Tensor]]
"""Scale and zero point of each activation."""


def candidates(settings: Quantization) -> Sequence[str]:
    """List the observers whose ranges are to be compared."""
    return BEST if settings.observer == "best" else (settings.observer,)


def observe(model: fx.GraphModule, images: Tensor, settings: Quantization) -> tuple[Tensor, int]:
    """Run every calibration image once and keep what the observers need; give float answers, and how many went through.

    The answers are of the images that judge, `some(images, JUDGES)`; of all where ranges are learned from them. Those
    of a segmentation model are as large as its images.
    """
    look = not {"percentile", "mse", "histogram"}.isdisjoint(candidates(settings))
    mark_batches(model)
    for grid in activations(model):
        grid.forget()
        grid.samples = max(16, min(4096, VALUES // len(images))) if look else 0
        grid.sums = settings.bias_correction == "fast" or settings.rounding == "layers"
    set_mode(model, "observe")
    wanted = torch.full((len(images),), settings.ranges == "learned")
    wanted[places(len(images), JUDGES)] = True
    answers, count = list[Tensor](), 0
    split = torch.split(images, settings.batch_size)
    for batch in progress.track(split, "calibrate", total=len(split)):
        for grid in activations(model):
            grid.batch, grid.seen.calls = len(batch), 0
        found = model(batch)
        if not bool(torch.isfinite(found).all()):
            bad = count + next(i for i, scores in enumerate(found) if not bool(torch.isfinite(scores).all()))
            raise InputError(f"the float model's scores of calibration image {bad + 1} are not finite; take it out")
        answers.append(found[wanted[count : count + len(found)]])
        count += len(found)
    set_mode(model, "off")
    return torch.cat(answers), count


def set_ranges(model: fx.GraphModule, images: Tensor, teacher: Tensor, settings: Quantization) -> None:
    """Set each activation's range by the observer asked for, or by that one whose ranges answer best.

    The weights stay float meanwhile: what rounding shifts in their means would hide the difference, and is corrected
    later.
    """
    names = candidates(settings)
    ranged = [grid for grid in activations(model) if grid.seen.low]  # what no image reaches is no loss
    found = effects.weigh(model, some(images, WEIGHED)) if "scores" in names else {}
    judges = some(images, JUDGES), some(teacher, JUDGES)
    tried: dict[str, tuple[float, Ranges]] = {}
    for name in names:
        for grid in ranged:
            if name == "scores":
                grid.set_range(*found[grid].bounds())
            else:
                RANGES[name](grid, torch.stack(grid.seen.low), torch.stack(grid.seen.high))
        worth = quality(model, *judges, weights=False) if len(names) > 1 else 0.0
        tried[name] = worth, [(grid.scale, grid.zero_point) for grid in ranged]
    best = max(tried, key=lambda name: tried[name][0])
    for grid, (scale, zero_point) in zip(ranged, tried[best][1], strict=True):
        grid.scale, grid.zero_point = scale, zero_point
        grid.seen.values.clear()
    if len(names) > 1:
        told = ", ".join(f"{name} {worth:.1f}" for name, (worth, _) in tried.items())
        progress.stage("quantize", f"ranges by {best} (dB with float weights: {told})")


def _whole(grid: Grid, low: Tensor, high: Tensor) -> None:
    grid.set_range(float(low.min()), float(high.max()))


def _mean(grid: Grid, low: Tensor, high: Tensor) -> None:
    """Average the images' extremes, as NNCF does by default: one odd image cannot stretch the range."""
    grid.set_range(float(low.double().mean()), float(high.double().mean()))


def _percentile(grid: Grid, low: Tensor, high: Tensor) -> None:
    values = _values(grid, low, high)
    ends = torch.quantile(values[:: -(-len(values) // 2**24)], torch.tensor([TAIL, 1 - TAIL]))
    grid.set_range(float(ends[0]), float(ends[1]))


def _least_error(grid: Grid, low: Tensor, high: Tensor) -> None:
    """Search the range that rounds the values themselves with the least mean square error."""
    values = _values(grid, low, high)
    values = values[:: -(-len(values) // 2**17)]
    ends = [float(low.min()), float(high.max())]
    parts = [1.0, 1.0]

    def error(side: int, part: float) -> float:
        tried = [part if i == side else parts[i] for i in range(2)]
        grid.set_range(ends[0] * tried[0], ends[1] * tried[1])
        return float((grid.rounded(values) - values).square().mean())

    for side in (1, 0) * ROUNDS:
        if ends[side]:
            candidates = [1 - 0.04 * step for step in range(SHRINKS)]
            parts[side] = min(candidates, key=lambda part: error(side, part))
    grid.set_range(ends[0] * parts[0], ends[1] * parts[1])


def _histogram(grid: Grid, low: Tensor, high: Tensor) -> None:
    """Use torchao's histogram observer: it minimizes the square error over its bins."""
    from torchao.quantization.pt2e import HistogramObserver  # noqa: PLC0415 - seconds to import

    more = {"quant_min": grid.quant_min, "quant_max": grid.quant_max, "eps": 2**-12}
    observer = HistogramObserver(dtype=grid.dtype, qscheme=grid.qscheme, **more)
    observer(_values(grid, low, high))
    scale, zero_point = cast(tuple[Tensor, Tensor], observer.calculate_qparams())
    grid.scale, grid.zero_point = scale.view(1), zero_point.view(1).long()


def _values(grid: Grid, low: Tensor, high: Tensor) -> Tensor:
    return torch.cat([*grid.seen.values, low, high])


BEST = ("scores", "histogram", "mean-minmax")
"""That `best` compares."""
RANGES: Mapping[str, Callable[[Grid, Tensor, Tensor], None]] = {
    "minmax": _whole,
    "mean-minmax": _mean,
    "percentile": _percentile,
    "mse": _least_error,
    "histogram": _histogram,
}
