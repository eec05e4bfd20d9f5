"""The order of the steps, each kept only where the answers get better on images that it was not fitted on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from bitferry.pipeline import progress
from bitferry.pipeline.division import FEWEST, divide, refuse_infinite
from bitferry.pipeline.quantization import correct, equalize, learned, rounding
from bitferry.pipeline.quantization.finetune import Course, finetune
from bitferry.pipeline.quantization.graph import grids, layers, own_tensors, set_mode, without_grids
from bitferry.pipeline.quantization.judges import Judges, Noise, scores
from bitferry.pipeline.quantization.observers import corrected_noise, observe, set_ranges
from bitferry.pipeline.recipe import Quantization
from bitferry.pipeline.statistics import is_less

SIDE_BY_SIDE = 32
"""Images that those steps are fitted on which hold two programs' values in memory."""
SAME = 40.0
"""dB that the float answers keep after equalization: a clip that an unseen image reaches is no more than this."""
SIMPLE = Quantization(observer="histogram")
"""Of what equalization is judged by."""
TOO_FEW = f"fewer than {2 * FEWEST} different calibration images are too few to judge it"
FIRST, FLAT = 16, 0.1
"""Images that are tried first for `images = "enough"`, and the dB that two doublings must bring to go on."""

FAST = "bias correction"

State = tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]
"""Each weight and bias with a copy, and each grid's scale and zero point: all that a step may change."""


@dataclass(frozen=True)
class Calibrated:
    """What came of it, besides the graph itself."""

    float_counterpart: fx.GraphModule
    """The graph without its grids: the float program whose tensors inside they round, equalized where that stays."""
    images: int
    """Calibration images that went through, to fit on or to validate."""
    validation: int
    """Of those, the ones that judged; 0 where there were too few to divide."""
    curve: Mapping[int, float]
    """SQNR in dB on the validation images, by the count of images fitted on; empty where all were to be used."""


def calibrate(
    model: fx.GraphModule, images: Tensor, settings: Quantization, course: Course | None = None
) -> Calibrated:
    """Set the grids of a prepared graph, and better its weights and biases, by every step that the settings name.

    What comes of N×H×W×3 images hangs on their pixels alone, not on the order that they are listed in.
    """
    own_tensors(model)
    set_mode(model, "off")
    division = divide(images.numpy(), settings.first_images)
    progress.stage("quantize", str(division))
    fitting = images[torch.from_numpy(division.fitting)]
    judges = _judges(model, images[torch.from_numpy(division.validation)]) if len(division.validation) else None
    if settings.equalize:
        _equalize(model, fitting, judges)
    float_counterpart = without_grids(model)
    fitting, curve = _enough(model, fitting, settings, judges) if settings.images == "enough" else (fitting, {})
    teacher, count = observe(model, fitting, settings)
    judges = set_ranges(model, fitting, judges, settings)
    fit(model)
    _better(model, _steps(model, fitting, teacher, settings), judges)
    if course:
        judge = judges or Judges(fitting, scores(model, fitting), seen=True)  # training has images of its own to fit on
        _better(model, {"fine-tuning": lambda: finetune(model, course)}, judge)
    for grid in grids(model):
        grid.forget()
    held = len(division.validation)
    return Calibrated(float_counterpart, count + held, held, curve)


def _judges(model: fx.GraphModule, images: Tensor) -> Judges:
    teacher = scores(model, images)
    refuse_infinite(teacher.numpy(), images.numpy())
    return Judges(images, teacher)


def _steps(
    model: fx.GraphModule, images: Tensor, teacher: Tensor, settings: Quantization
) -> Mapping[str, Callable[[], int]]:
    """List what the settings name beyond ranges, in order; all of it is fitted on the images given."""
    steps: dict[str, Callable[[], int]] = {}
    if settings.rounding == "layers":
        steps["rounding"] = lambda: rounding.round_layers(model, images[:SIDE_BY_SIDE])
    if settings.bias_correction == "fast":
        steps[FAST] = lambda: correct.fast(model)
    if settings.bias_correction == "full":
        steps["full bias correction"] = lambda: correct.full(model, images[:SIDE_BY_SIDE])
    if settings.ranges == "learned":
        steps["learning"] = lambda: learned.learn(model, images, teacher, settings)
    return steps


def _better(model: fx.GraphModule, steps: Mapping[str, Callable[[], int]], judges: Judges | None) -> None:
    """Take each step that the judges find better; without judges none but `correct.fast`, of means alone."""
    if judges is None:
        _unjudged(steps)
        return
    if not steps:
        return
    best = judges.noise(model)
    for name, step in steps.items():
        best = _try(model, name, step, best, judges)


def _unjudged(steps: Mapping[str, Callable[[], int]]) -> None:
    for name, step in steps.items():
        if name == FAST:
            step()
        told = "is taken as it is" if name == FAST else "is left out"
        progress.stage("quantize", f"{name} {told}: {TOO_FEW}")


def _enough(
    model: fx.GraphModule, fitting: Tensor, settings: Quantization, judges: Judges | None
) -> tuple[Tensor, Mapping[int, float]]:
    """Double the number of images to fit on until that brings nothing on those that judge.

    Of the ranges of the observer asked for, or of the first of several, and with the mean shift corrected.
    """
    if judges is None:
        return fitting, {}
    count, found = min(FIRST, len(fitting)), dict[int, float]()
    while count:
        found[count] = judges.db(_rough(model, fitting[:count], settings, judges))
        last = list(found.values())
        flat = len(last) > 2 and last[-1] - last[-3] < FLAT
        if flat or count == len(fitting):
            break
        count = min(2 * count, len(fitting))
    told = ", ".join(f"{tried} {worth:.1f} dB" for tried, worth in found.items())
    end = "more bring nothing" if count < len(fitting) else "more may be better"
    progress.stage("quantize", f"calibration images to fit on: {told}, {judges}; {end}")
    return fitting[:count], found


def fit(model: fx.GraphModule) -> None:
    """Fit every weight's grid to it."""
    for layer in layers(model):
        layer.fit()


def _try(model: fx.GraphModule, name: str, step: Callable[[], int], before: Noise, judges: Judges) -> Noise:
    """Take a step, and back where the answers are not better beyond chance; give each image's noise."""
    state = _save(model)
    if step() == 0:
        progress.stage("quantize", f"{name}: no layer has anything to correct")
        return before
    for layer in layers(model):
        layer.make_room()
    after = judges.noise(model)
    if not is_less(after, before):
        _restore(model, state)
        progress.stage("quantize", _dropped(name, before, after, judges))
        return before
    progress.stage("quantize", f"{name}: {judges.db(before):.1f} → {judges.db(after):.1f} dB {judges}")
    return after


def _dropped(name: str, before: Noise, after: Noise, judges: Judges) -> str:
    without, having = judges.db(before), judges.db(after)
    chance = ", no more than chance" if having > without else ""
    return f"{name} dropped: {without:.1f} dB without it, {having:.1f} with it{chance}, {judges}"


def _equalize(model: fx.GraphModule, fitting: Tensor, judges: Judges | None) -> None:
    """Equalize, and back where the float answers changed or int8 ones are not better."""
    if not equalize.groups(model):
        progress.stage("quantize", "equalization: no channels lie between convolutions alone")
        return
    if judges is None:
        progress.stage("quantize", f"equalization is left out: {TOO_FEW}")
        return
    few = fitting[:SIDE_BY_SIDE]
    state, plain = _save(model), _rough(model, few, SIMPLE, judges)
    equalize.equalize(model, few)
    kept = judges.db(judges.apart(scores(model, judges.images)))
    equalized = _rough(model, few, SIMPLE, judges)
    if kept < SAME:
        _restore(model, state)
        told = f"equalization dropped: it changes the float answers ({kept:.1f} dB {judges})"
    elif not is_less(equalized, plain):
        _restore(model, state)
        told = _dropped("equalization", plain, equalized, judges)
    else:
        told = f"equalization: {judges.db(plain):.1f} → {judges.db(equalized):.1f} dB {judges}"
    progress.stage("quantize", told)


def _rough(model: fx.GraphModule, images: Tensor, settings: Quantization, judges: Judges) -> Noise:
    """Give each image's noise with ranges alone and the mean shift corrected; biases stay as they are."""
    simple = settings.model_copy(update={"bias_correction": "fast", "ranges": "observed"})
    observe(model, images, simple)
    set_ranges(model, images, None, simple)
    found = corrected_noise(model, judges)
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
