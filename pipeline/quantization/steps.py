"""The order of the steps, each kept only where the answers get no worse."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from pipeline import progress
from pipeline.quantization import correct, equalize, learned, rounding
from pipeline.quantization.finetune import Course, finetune
from pipeline.quantization.graph import (
    answers,
    grids,
    layers,
    own_tensors,
    places,
    quality,
    set_mode,
    some,
    without_grids,
)
from pipeline.quantization.observers import JUDGES, observe, set_ranges
from pipeline.recipe import Quantization
from pipeline.statistics import decibels

SIDE_BY_SIDE, FEW = 32, 16
"""Calibration images that those steps see which hold two programs' values in memory, and that judge equalization."""
SAME = 40.0
"""dB that the float answers keep after equalization: a clip that an unseen image reaches is no more than this."""
SIMPLE = Quantization(observer="mean-minmax")
"""Of what equalization is judged by."""
NOISE = 0.05
"""dB: a step that costs less than this on so few images is not known to cost anything."""
FIRST, FLAT = 16, 0.1
"""Images that are tried first for `images = "enough"`, and the dB that two doublings must bring to go on."""

State = tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]
"""Each weight and bias with a copy, and each grid's scale and zero point: all that a step may change."""


@dataclass(frozen=True)
class Calibrated:
    """What came of it, besides the graph itself."""

    float_counterpart: fx.GraphModule
    """The graph without its grids: the float program whose tensors inside they round, equalized where that stays."""
    images: int
    """Calibration images that went through."""
    curve: Mapping[int, float]
    """SQNR in dB on images held out, by the count of images; empty where all were to be used."""


def calibrate(
    model: fx.GraphModule, images: Tensor, settings: Quantization, course: Course | None = None
) -> Calibrated:
    """Set the grids of a prepared graph, and better its weights and biases, by every step that the settings name."""
    own_tensors(model)
    set_mode(model, "off")
    if settings.equalize:
        _equalize(model, images)
    float_counterpart = without_grids(model)
    images, curve = _enough(model, images, settings) if settings.images == "enough" else (images, {})
    teacher, count = observe(model, images, settings)
    set_ranges(model, images, teacher, settings)
    fit(model)
    judges = some(images, JUDGES), some(teacher, JUDGES)
    steps: dict[str, Callable[[], object]] = {}
    if settings.rounding == "layers":
        steps["rounding"] = lambda: rounding.round_layers(model, some(images, SIDE_BY_SIDE))
    if settings.bias_correction == "fast":
        steps["bias correction"] = lambda: correct.fast(model)
    if settings.bias_correction == "full":
        steps["bias correction"] = lambda: correct.full(model, some(images, SIDE_BY_SIDE))
    if settings.ranges == "learned":
        steps["learning"] = lambda: learned.learn(model, images, teacher, settings)
    if course:
        steps["fine-tuning"] = lambda: finetune(model, course)
    best = quality(model, *judges) if steps else 0.0
    for name, step in steps.items():
        best = _try(model, name, step, best, lambda: quality(model, *judges))
    for grid in grids(model):
        grid.forget()
    return Calibrated(float_counterpart, count, curve)


def _enough(model: fx.GraphModule, images: Tensor, settings: Quantization) -> tuple[Tensor, Mapping[int, float]]:
    """Double the number of images until that brings nothing on some that are held out; those are used in the end, too.

    Of plain ranges with the observer asked for and the mean shift corrected.
    """
    held_out = some(images, JUDGES)
    is_held = torch.zeros(len(images), dtype=torch.bool)
    is_held[places(len(images), JUDGES)] = True
    rest, found = images[~is_held], dict[int, float]()
    rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(0))]  # a folder is sorted by class
    count = min(FIRST, len(rest))
    while count:
        found[count] = _rough_quality(model, rest[:count], settings, held_out)
        last = list(found.values())
        flat = len(last) > 2 and last[-1] - last[-3] < FLAT
        if flat or count == len(rest):
            break
        count = min(2 * count, len(rest))
    told = ", ".join(f"{tried} {worth:.1f} dB" for tried, worth in found.items()) or f"{len(images)}"
    end = "more bring nothing" if count < len(rest) else "more may be better"
    progress.stage("quantize", f"calibration images: {told}; {end}")
    return torch.cat([rest[:count], held_out]), found


def fit(model: fx.GraphModule) -> None:
    """Fit every weight's grid to it."""
    for layer in layers(model):
        layer.fit()


def _try(
    model: fx.GraphModule, name: str, step: Callable[[], object], before: float, judge: Callable[[], float]
) -> float:
    """Take a step, and back where the answers got worse; give their SQNR."""
    state = _save(model)
    if step() == 0:
        progress.stage("quantize", f"{name}: no layer has anything to correct")
        return before
    for layer in layers(model):
        layer.make_room()
    after = judge()
    if after < before - NOISE:
        _restore(model, state)
        progress.stage("quantize", f"{name} dropped: {before:.1f} dB without it, {after:.1f} with it")
        return before
    progress.stage("quantize", f"{name}: {before:.1f} → {after:.1f} dB")
    return after


def _equalize(model: fx.GraphModule, images: Tensor) -> bool:
    """Equalize, and back where the float answers changed or int8 ones would be worse; say whether it stays."""
    if not equalize.groups(model):
        progress.stage("quantize", "equalization: no channels lie between convolutions alone")
        return False
    few = some(images, FEW)
    state, before, plain = _save(model), answers(model, few), _rough_quality(model, few, SIMPLE, few)
    equalize.equalize(model, some(images, SIDE_BY_SIDE))
    noise = float((answers(model, few) - before).double().square().sum())
    kept = decibels(float(before.double().square().sum()), noise)
    equalized = _rough_quality(model, few, SIMPLE, few)
    if kept is not None and kept < SAME:
        _restore(model, state)
        progress.stage("quantize", f"equalization dropped: it changes the float answers ({kept:.1f} dB)")
    elif equalized < plain - NOISE:
        _restore(model, state)
        progress.stage("quantize", f"equalization dropped: {plain:.1f} dB without it, {equalized:.1f} with it")
    else:
        progress.stage("quantize", f"equalization: {plain:.1f} → {equalized:.1f} dB")
        return True
    return False


def _rough_quality(model: fx.GraphModule, images: Tensor, settings: Quantization, judges: Tensor) -> float:
    """Give the SQNR with ranges alone and the mean shift corrected; biases stay as they are."""
    wanted = answers(model, judges)
    simple = settings.model_copy(update={"bias_correction": "fast"})
    teacher, _ = observe(model, images, simple)
    set_ranges(model, images, teacher, simple)
    fit(model)
    state = _save(model)
    correct.fast(model)
    found = quality(model, judges, wanted)
    _restore(model, state)
    for grid in grids(model):
        grid.forget()
    return found


def _save(model: fx.GraphModule) -> State:
    tensors = {id(t): t for layer in layers(model) for t in (layer.weight, layer.bias) if t is not None}
    saved = [(tensor, tensor.detach().clone()) for tensor in tensors.values()]
    return saved, [(grid.scale, grid.zero_point) for grid in grids(model)]


def _restore(model: fx.GraphModule, state: State) -> None:
    for tensor, kept in state[0]:
        tensor.data.copy_(kept)
    for grid, (scale, zero_point) in zip(grids(model), state[1], strict=True):
        grid.scale, grid.zero_point = scale, zero_point
