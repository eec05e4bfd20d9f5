"""What weights are known to reach and were trained for: written into their file, and held against their use."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

from safetensors import SafetensorError, safe_open

from bitferry.device.errors import InputError
from bitferry.pipeline import progress
from bitferry.pipeline.recipe import Recipe

KEY = "bitferry"
"""One entry holds all: safetensors writes several in an order that is another one each time."""


@dataclass(frozen=True)
class Record:
    """What a training left in its weights' file."""

    metric: str
    percent: float | None
    """Of the metric · 100 on images held out; None where none were, or the metric has other options now."""
    images: int
    """How many those were."""
    differences: tuple[str, ...] = ()
    """How the preprocessing that the weights are used with differs from that of the training."""


def metadata(recipe: Recipe, percent: float | None, images: int) -> dict[str, str]:
    """Give what goes into the file: what was reached, and the classes and preprocessing it was reached with."""
    return {KEY: json.dumps(_told(recipe, percent, images))}


def _told(recipe: Recipe, percent: float | None, images: int) -> dict[str, str | int | float | None]:
    classes, contract = json.dumps(recipe.classes), json.dumps(asdict(recipe.preprocessing), sort_keys=True)
    return {
        "version": version("bitferry"),
        "metric": recipe.metric,
        "metric_options": json.dumps(recipe.budget.metric_options, sort_keys=True),
        "percent": percent if percent is None else round(percent, 4),
        "validation_images": images,
        "classes": classes,
        "classes_sha256": _digest(classes),
        "preprocessing": contract,
        "preprocessing_sha256": _digest(contract),
    }


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def check(path: Path, recipe: Recipe) -> Record | None:
    """Hold a recipe against what its weights' file records; None where that records nothing.

    Raises InputError where the classes are the same in another order: every answer would have a wrong name.
    """
    text = _read(path)
    if text is None:
        return None
    now = _told(recipe, None, 0)
    try:
        found = json.loads(text)
        if found["classes_sha256"] != now["classes_sha256"]:
            _compare_classes(json.loads(found["classes"]), recipe.classes, path)
        differences: tuple[str, ...] = ()
        if found["preprocessing_sha256"] != now["preprocessing_sha256"]:
            differences = tuple(_changed(json.loads(found["preprocessing"]), asdict(recipe.preprocessing)))
            progress.stage("load", f"{path} was trained with another preprocessing: {', '.join(differences)}")
        same = found.get("metric_options", "{}") == now["metric_options"]  # macro is not to be compared with micro
        percent = None if found["percent"] is None or not same else float(found["percent"])
        return Record(str(found["metric"]), percent, int(found["validation_images"]), differences)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} says that bitferry trained it, and its record cannot be read ({error!r}); "
            "save the tensors without metadata, or train again"
        ) from error


def _read(path: Path) -> str | None:
    try:
        with safe_open(path, "pt") as stream:
            found: Mapping[str, str] | None = stream.metadata()
    except (SafetensorError, OSError):
        return None
    return (found or {}).get(KEY)


def _compare_classes(trained: list[str], given: tuple[str, ...], path: Path) -> None:
    differ = [i for i, (one, other) in enumerate(zip(trained, given, strict=False)) if one != other]
    if len(trained) == len(given) and sorted(trained) == sorted(given):
        first = differ[0]
        raise InputError(
            f"{path} was trained with the same classes in another order: class {first} was '{trained[first]}' and is "
            f"'{given[first]}' in the recipe; write `classes` in the order of the training"
        )
    if differ:
        first = differ[0]
        told = f"class {first} was '{trained[first]}' and is '{given[first]}', {len(differ)} in all"
        progress.stage("load", f"{path} was trained with other names of classes: {told}")


def _changed(trained: Mapping[str, object], given: Mapping[str, object]) -> Iterator[str]:
    given = json.loads(json.dumps(given))  # a tuple is a list there
    for name in sorted({*trained, *given}):
        if trained.get(name) != given.get(name):
            yield f"{name} was {trained.get(name)} and is {given.get(name)}"
