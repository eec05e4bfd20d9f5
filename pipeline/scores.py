"""What a float model must give: finite float32 scores, one per class, that depend on the image and on nothing else."""

import re
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from bitferry.device.errors import InputError, first_line
from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline import dependence, progress
from bitferry.pipeline.recipe import Recipe

CHANNELS = (1, 2, 4, 5, 6, 8, 9, 12, 13)
"""Other numbers of channels that are tried where a model cannot take 3."""
SIDES = (224, 32, 28, 64, 96, 112, 128, 160, 192, 256, 299, 320, 384, 448, 512)
"""Other sizes that are tried where a model cannot take the recipe's."""
SHOWN = 6
ONE_SCORE = (
    "; of one score for two classes make two, as torch.cat([torch.zeros_like(score), score], 1); of a class's number "
    "(argmax) give the scores before it"
)
CASTS = {"Half", "BFloat16", "Double", "double"}
"""What PyTorch's errors call floats of other widths."""


def check_scores(model: nn.Module, recipe: Recipe) -> int | None:
    """Raise InputError where a model does not give finite scores, one per class, of each image alone.

    A black image and noise are tried, the former with another image beside it as well. A model that takes one image
    at a time is tried with one; then 1 is returned, else None.
    """
    contract, source = recipe.preprocessing, recipe.model.source
    noise = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, *contract.shape), dtype=torch.uint8, generator=noise)
    images[0] = 0
    found, given = _answered(model, images[:2], recipe)
    scores = _shaped(found, len(given), recipe)
    _refuse_values(scores, source)
    if len(given) == 1:
        dependence.refuse_random(model, given, source)
        return 1
    dependence.refuse(model, given, images[2], source)
    _doubt_probabilities(scores, recipe)
    return None


def _answered(model: nn.Module, images: Tensor, recipe: Recipe) -> tuple[object, Tensor]:
    """Give the answer for two images; where the model takes one at a time, for the second. And those images."""
    try:
        with torch.no_grad():
            return model(images), images
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the model is somebody else's code and may raise anything
        try:
            with torch.no_grad():
                scores: object = model(images[1:])
        except (Exception, SystemExit):  # noqa: BLE001
            raise _cannot_take(model, recipe, error) from error
        told = f"'{recipe.model.source}' takes one image at a time; with two: {_told(error)}"
        progress.stage("load", told)
        return scores, images[1:]


def _cannot_take(model: nn.Module, recipe: Recipe, error: BaseException) -> InputError:
    contract, source = recipe.preprocessing, recipe.model.source
    size = (contract.height, contract.width)
    several = f" times {contract.views}" if contract.views > 1 else ""
    return InputError(
        f"the model '{source}' cannot take 2{several} images of {size[0]}×{size[1]}: {_told(error)}"
        f"{_cast(error) or other_input(getattr(model, 'model', None), contract, source)}"
    )


def _cast(error: BaseException) -> str:
    """Say what to do where a model's own code casts to floats of another width."""
    found = CASTS & set(re.findall(r"[A-Za-z0-9]+", str(error)))
    return f"; everything is float32 here: take casts to {found.pop()} out of the model's code" if found else ""


def other_input(model: object, contract: Preprocessing, source: str) -> str:
    """Say which channels, sizes or floats a model takes instead, by trying; nothing where none was found."""
    if not isinstance(model, nn.Module) or contract.views > 1:
        return ""
    floats = {tensor.dtype for tensor in chain(model.parameters(), model.buffers()) if tensor.is_floating_point()}
    if others := sorted(str(dtype).removeprefix("torch.") for dtype in floats - {torch.float32}):
        way = "export it from model.float()" if source.startswith("pt2:") else "make all of it float32 by .float()"
        return f"; it has weights in {', '.join(others)}, and is given float32: {way}"
    for channels in CHANNELS:
        if _takes(model, channels, contract.height, contract.width):
            return f"; it takes images of {told_channels(channels)}"
    for side in SIDES:
        if _takes(model, 3, side, side):
            return f"; it takes {side}×{side}: set preprocessing height = {side}, width = {side}"
    for channels, side in ((channels, side) for channels in (1, 4) for side in SIDES[:4]):
        if _takes(model, channels, side, side):
            return f"; it takes images of {side}×{side} of {told_channels(channels)}"
    return ""


def told_channels(channels: int) -> str:
    """Say what to do with a model of other than three channels."""
    if channels == 1:
        return (
            "1 channel, and bitferry gives every model 3, R, G and B: put it into a module that takes their mean, as "
            "model(x.mean(1, keepdim=True)), and says so by source = 'module:FILE:FACTORY'"
        )
    return f"{channels} channels, and bitferry gives every model 3, R, G and B; other numbers are not supported"


def _takes(model: nn.Module, *shape: int) -> bool:
    try:
        with torch.no_grad():
            model(torch.zeros(1, *shape))
    except (Exception, SystemExit):  # noqa: BLE001
        return False
    return True


def _shaped(scores: object, count: int, recipe: Recipe) -> Tensor:
    """Give the scores as a tensor; raise InputError where they are of another shape or type than the recipe's."""
    contract, classes = recipe.preprocessing, len(recipe.classes)
    source, images = recipe.model.source, f"{count} image{'s'[: count != 1]}"
    wanted = (count, classes, *((contract.height, contract.width) if recipe.task == "segmentation" else ()))
    if not isinstance(scores, Tensor) or tuple(scores.shape) != wanted:
        found = tuple(scores.shape) if isinstance(scores, Tensor) else described(scores)
        raise InputError(
            f"the model '{source}' gives {found} for {images}; the recipe has {classes} classes, "
            f"so {wanted} was expected{_way_out(found, wanted)}"
        )
    if scores.dtype != torch.float32:
        kind = str(scores.dtype).removeprefix("torch.")
        raise InputError(
            f"the model '{source}' gives scores in {kind}; float32 was expected: take casts to {kind} out of it, or "
            "end it with .float()"
        )
    return scores


def _refuse_values(scores: Tensor, source: str) -> None:
    for one, kind in zip(scores.flip(0), ("noise", "a black image"), strict=False):
        if not bool(torch.isfinite(one).all()):
            raise InputError(f"the model '{source}' answers {kind} with NaN or infinity")


def described(found: object) -> str:
    """Describe what a model gives that is no tensor, as `a tuple of 2: 2×10, 2×4`."""
    parts: Iterable[tuple[str, Any]]
    if isinstance(found, Mapping):
        parts = [(f"{name} ", value) for name, value in found.items()]
    elif isinstance(found, tuple | list):
        parts = [("", value) for value in found]
    else:
        return type(found).__name__
    shown = [f"{name}{_shape(value)}" for name, value in list(parts)[:SHOWN]]
    return f"a {type(found).__name__} of {len(found)}: {', '.join(shown)}"


def _shape(value: object) -> str:
    return "×".join(map(str, value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _doubt_probabilities(scores: Tensor, recipe: Recipe) -> None:
    """Say so where a model seems to end in a softmax or a sigmoid: bitferry takes what comes before those."""
    if not bool(((scores >= 0) & (scores <= 1)).all()):
        return
    way_out = "give the model without it, or `predict` takes its probabilities for scores"
    if recipe.task == "multilabel":
        progress.stage("load", f"the scores are all from 0 to 1, as of a sigmoid; {way_out}")
    elif recipe.task == "classification" and bool(torch.isclose(scores.sum(1), torch.ones(1), atol=1e-3).all()):
        progress.stage("load", f"the scores add up to 1, as of a softmax; {way_out}")


def _way_out(found: tuple[int, ...] | str, wanted: tuple[int, ...]) -> str:
    """Say what to do where the scores are of another kind or size than the task's."""
    if isinstance(found, str):
        return (
            "; wrap it in a factory of your own (source = 'module:FILE:FACTORY') that returns the one tensor of scores"
        )
    if len(found) == len(wanted):
        return _way_to_size(found, wanted)
    if found[2:] == (1, 1):
        return "; end the model with .flatten(1)"
    ways = {
        1: ONE_SCORE,
        2: '; set task = "classification"',
        3: "; bitferry takes classifiers (N×K) and segmentation models (N×K×H×W): no text (N×T×K), no boxes (N×C×A)",
        4: '; set task = "segmentation"',
    }
    return ways.get(len(found), "")


def _way_to_size(found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """Say what to do where the task is right and a size is not."""
    if len(found) == 4:
        same_classes = found[:2] == wanted[:2]
        return "; resize the scores to the input's size inside the model (F.interpolate)" if same_classes else ""
    return ONE_SCORE if found[1:] == (1,) else ""


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
