"""What a model gives, looked at before a recipe is written: how many classes, and whether it is scores at all."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from bitferry.device.errors import InputError
from bitferry.pipeline import checkpoint, load, scores, unwrapped
from bitferry.pipeline.init import architecture, trial
from bitferry.pipeline.measure.metrics import Task
from bitferry.pipeline.recipe import Recipe

SIDES = (224, 32, 64, 28, 96, 128, 256, 299, 384)
"""Sizes that a model is tried with to see what it gives."""
EXPECTED = "expected one tensor of scores, N×K of a classifier or N×K×H×W of a segmentation model"


def head(
    source: str, state: Mapping[str, Tensor], folder: Path, path: Path, task: Task, size: tuple[int, int] | None
) -> int | None:
    """Give how many classes the weights of a named model are of; None where that is not seen.

    Raises InputError where the model gives something else than scores.
    """
    if source.startswith("module:"):
        model = load.architecture(_recipe(source, 2, task), folder).eval()
        checkpoint.fill(model, state, path)
        return _width(model, source, [*([size] if size else []), *((side, side) for side in SIDES)])
    shapes = [tuple(t.shape) for name, t in state.items() if architecture.HEAD.fullmatch(name)]
    last = [tuple(t.shape) for t in state.values() if t.ndim in (2, 4)][-1:]
    for count in dict.fromkeys(shape[0] for shape in (*shapes, *last)):
        if count >= 2 and _fits(_recipe(source, count, task), state, folder):
            return count
    return None


def _recipe(source: str, classes: int, task: Task) -> Recipe:
    return Recipe.model_validate(
        {"name": "init", "classes": classes, "task": task, "model": {"source": source},
         "preprocessing": {"height": 32, "width": 32}, "data": {"calibration": "-", "evaluation": "-"}}
    )  # fmt: skip


def _fits(recipe: Recipe, state: Mapping[str, Tensor], folder: Path) -> bool:
    with torch.device("meta"):
        own = load.architecture(recipe, folder).state_dict()
    shapes = {name: t.shape for name, t in own.items() if not name.endswith("num_batches_tracked")}
    form = unwrapped.fitting(state, set(own))
    return all(name in form and form[name].shape == shape for name, shape in shapes.items())


def _width(model: nn.Module, source: str, sizes: Sequence[tuple[int, int]]) -> int | None:
    """Run a model on noise of usual sizes, and give the classes of its scores."""
    for size in sizes:
        noise = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
        try:
            with torch.no_grad():
                found: object = model(noise)
        except Exception:  # noqa: BLE001, S112 - of another size, or one image at a time; told when it is tried
            continue
        return _scores(found, source).shape[1]
    return None


def check(opened: trial.Opened, task: Task, classes: int) -> None:
    """Raise InputError where a model gives anything but scores of so many classes."""
    contract = opened.contracts[0][1]
    try:
        with torch.no_grad():
            found: object = opened.answer(torch.zeros(1, 3, contract.height, contract.width))
    except InputError:
        raise
    except Exception:  # noqa: BLE001 - of another size; told when it is tried
        return
    shape = tuple(_scores(found, opened.source).shape)
    if len(shape) != (4 if task == "segmentation" else 2) or shape[1] != classes:
        raise InputError(
            f"{opened.source} gives scores {'×'.join(map(str, shape))} for one image; there are {classes} classes, and "
            f"the images are for {task}; {EXPECTED}"
        )


def _scores(found: object, source: str) -> Tensor:
    found = found.get("out", found) if isinstance(found, dict) else found  # torchvision's segmentation
    found = getattr(found, "logits", found)
    if not isinstance(found, Tensor):
        raise InputError(
            f"{source} gives {scores.described(found)}; {EXPECTED}; wrap it in a factory that returns that"
        )
    if found.ndim not in (2, 4):
        shape = "×".join(map(str, found.shape))
        raise InputError(
            f"{source} gives {shape} for {len(found)} images; {EXPECTED}: no text (N×T×K), no boxes (N×C×A)"
        )
    return found
