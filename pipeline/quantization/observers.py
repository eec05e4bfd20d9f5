"""What the calibration images put through each activation → its range.

Every statistic is of one image, whatever the batch: per-image extremes, and where asked for some of its values.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, fx

from bitferry.pipeline import progress
from bitferry.pipeline.capture import fixed_batch
from bitferry.pipeline.division import refuse_infinite
from bitferry.pipeline.quantization import correct, effects
from bitferry.pipeline.quantization.graph import activations, layers, mark_batches, set_mode
from bitferry.pipeline.quantization.grid import Grid
from bitferry.pipeline.quantization.judges import Judges, Noise
from bitferry.pipeline.recipe import Quantization
from bitferry.pipeline.statistics import is_less

VALUES = 2**19
"""Of a tensor that are kept in all, for the observers that look at more than the extremes."""
WEIGHED, EXTREME = 32, 96
"""Images that `scores` looks at, and at most how many more for holding the extreme value of an activation."""
TAIL = 1e-4
"""Left out at either end by `percentile`."""
SHRINKS, ROUNDS = 24, 2
"""Steps of the search of `mse`: how many ranges, each 4 % of the whole smaller, and how often from both ends."""


def candidates(settings: Quantization) -> Sequence[str]:
    """List the observers whose ranges are to be compared, the one to prefer where none is better first."""
    return BEST if settings.observer == "best" else (settings.observer,)


def observe(
    model: fx.GraphModule, images: Tensor, settings: Quantization, *, further: bool = False
) -> tuple[Tensor, int]:
    """Run every image once and keep what the observers need; give float answers, and how many images went through.

    The answers are kept where ranges are learned from them, else none: those of a segmentation model are as large as
    its images. `further` adds to what was seen, of the values alone and not of the mean inputs. Raises NotFinite.
    """
    look = not {"percentile", "mse", "histogram"}.isdisjoint(candidates(settings))
    mark_batches(model)
    for grid in activations(model):
        grid.samples = grid.samples if further else max(16, min(4096, VALUES // len(images))) if look else 0
        grid.sums = not further and (settings.bias_correction != "none" or settings.rounding == "layers")
        if not further:
            grid.forget()
    set_mode(model, "observe")
    answers, count = list[Tensor](), 0
    split = torch.split(images, fixed_batch(model) or settings.batch_size)
    for batch in progress.track(split, "calibrate", total=len(split)):
        for grid in activations(model):
            grid.batch, grid.seen.calls = len(batch), 0
        found = model(batch)
        refuse_infinite(found.numpy(), batch.numpy())
        answers.append(found if settings.ranges == "learned" else found[:0])
        count += len(found)
    set_mode(model, "off")
    return torch.cat(answers), count


def set_ranges(model: fx.GraphModule, images: Tensor, judges: Judges | None, settings: Quantization) -> Judges | None:
    """Set each activation's range by the observer asked for, or by that one whose ranges answer best.

    Another than the first is chosen only where it answers better beyond chance on images that no range was made of;
    without such images the first is taken. Weights are rounded meanwhile and the means they shift corrected, as in what
    is shipped: ranges that are better with float weights can be worse with int8 ones. In the end the ranges are those
    of all images, of the judges too, where the judges find them no worse: a value that no image reached is cut off, and
    with few images that costs more than all choices. Gives the judges, which know what they have become.
    """
    names = candidates(settings) if judges else candidates(settings)[:1]
    if judges is None:
        _set(model, images, names[0])
    else:
        best, before = _choose(model, images, names, judges)
        judges = _with_judges(model, images, best, before, judges, settings)
    for grid in _ranged(model):
        grid.seen.values.clear()
    return judges


def _with_judges(
    model: fx.GraphModule, images: Tensor, observer: str, before: Noise, judges: Judges, settings: Quantization
) -> Judges:
    """Set the ranges of all images, and back where the judges answer worse."""
    kept = [(grid, grid.scale, grid.zero_point) for grid in _ranged(model)]
    observe(model, judges.images, settings.model_copy(update={"ranges": "observed"}), further=True)
    _set(model, torch.cat([images, judges.images]), observer)
    after = corrected_noise(model, judges)
    if after.sum() > before.sum():
        for grid, scale, zero_point in kept:
            grid.scale, grid.zero_point = scale, zero_point
        progress.stage("quantize", "ranges of all images answer worse; those of the images fitted on stay")
        return judges
    told = f"{judges.db(before):.1f} → {judges.db(after):.1f} dB {judges.having_seen()}"
    progress.stage("quantize", f"ranges of all images in place of those fitted on: {told}")
    return judges.having_seen()


def _ranged(model: fx.GraphModule) -> list[Grid]:
    """List the activations that images reached; what none reaches is no loss."""
    return [grid for grid in activations(model) if grid.seen.low]


def _choose(model: fx.GraphModule, images: Tensor, names: Sequence[str], judges: Judges) -> tuple[str, Noise]:
    """Set the ranges of the best observer; give its name and each judge's noise."""
    tried, best = dict[str, Noise](), names[0]
    for name in names:
        _set(model, images, name)
        tried[name] = corrected_noise(model, judges)
        best = name if is_less(tried[name], tried[best]) else best
    if best != names[-1]:
        _set(model, images, best)
    told = ", ".join(f"{name} {judges.db(noise):.1f} dB" for name, noise in tried.items())
    progress.stage("quantize", f"ranges by {best}: {told} {judges}")
    return best, tried[best]


def corrected_noise(model: fx.GraphModule, judges: Judges) -> Noise:
    """Give each image's noise with the ranges as they are, weights rounded and means corrected; biases stay."""
    biases = [layer.bias for layer in layers(model) if layer.bias is not None]
    kept = [bias.detach().clone() for bias in biases]
    for layer in layers(model):
        layer.fit()
    correct.fast(model)
    found = judges.noise(model)
    for bias, before in zip(biases, kept, strict=True):
        bias.data.copy_(before)
    return found


def _set(model: fx.GraphModule, images: Tensor, name: str) -> None:
    ranged = _ranged(model)
    found = effects.weigh(model, images[_weighed(ranged)]) if name == "scores" else {}
    for grid in ranged:
        if name == "scores":
            grid.set_range(*found[grid].bounds())
        else:
            RANGES[name](grid, torch.stack(grid.seen.low), torch.stack(grid.seen.high))


def _weighed(ranged: Sequence[Grid]) -> list[int]:
    """Choose images whose effects are weighed: the first, and those that reach furthest.

    What lies beyond the values of the images weighed costs nothing in their sums, so a range chosen by the first alone
    would cut off what others reach.
    """
    count = len(ranged[0].seen.low) if ranged else 0
    lows = [int(torch.stack(grid.seen.low).argmin()) for grid in ranged]
    highs = [int(torch.stack(grid.seen.high).argmax()) for grid in ranged]
    extreme = [place for place, _ in Counter([*lows, *highs]).most_common() if WEIGHED <= place < count]
    return [*range(min(WEIGHED, count)), *sorted(extreme[:EXTREME])]


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


BEST = ("histogram", "scores", "mean-minmax")
"""That `best` compares; the first where no other is better."""
RANGES: Mapping[str, Callable[[Grid, Tensor, Tensor], None]] = {
    "minmax": _whole,
    "mean-minmax": _mean,
    "percentile": _percentile,
    "mse": _least_error,
    "histogram": _histogram,
}
