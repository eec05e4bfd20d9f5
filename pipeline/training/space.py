"""What a search for settings may try, as `learning_rate=1e-4..1e-2` or `optimizer=adamw,sgd`: checked beforehand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import combinations, product

from pydantic import ValidationError

from bitferry.device.errors import InputError
from bitferry.pipeline.recipe import Recipe
from bitferry.pipeline.training import settings
from bitferry.pipeline.training.settings import Training

Value = str | float | int | bool
TUNABLE = (
    "learning_rate", "weight_decay", "label_smoothing", "backbone_learning_rate", "batch_size", "accumulate",
    "optimizer", "momentum", "nesterov", "schedule", "warm_up", "clip_norm", "loss", "gamma", "class_weights", "ema",
    "horizontal_flip",
)  # fmt: skip
"""Not what decides how long a trial takes, what it is compared by or what it starts from."""
LOGARITHMIC = 10
"""From what ratio of its ends on a range is drawn from by its logarithm."""
AROUND = 10
"""How far around the recipe's own rates the default space reaches, as a factor."""


@dataclass(frozen=True)
class Range:
    """Any number between two."""

    low: float
    high: float
    whole: bool

    @property
    def logarithmic(self) -> bool:
        """Say whether each factor is as likely, not each difference."""
        return self.low > 0 and self.high / self.low >= LOGARITHMIC


Space = dict[str, Range | tuple[Value, ...]]


def read(given: Sequence[str], recipe: Recipe) -> Space:
    """Read the options of the command line, or make the default space; raise InputError for what cannot be tried."""
    space = dict(_read(text) for text in given) if given else default(recipe)
    for key, tried in space.items():
        for value in _ends(tried):
            _check({key: value}, recipe)
        if isinstance(tried, Range) and isinstance(own := getattr(recipe.training, key), str | None):
            told = "none" if own is None else f"'{own}'"
            raise InputError(f"--space {key}: the recipe, which is tried first, has {told}; set a number there")
    if "horizontal_flip" in space and recipe.augmentation.horizontal_flip and not recipe.training.horizontal_flip:
        raise InputError("--space horizontal_flip: the recipe has it in [augmentation]; move it to [training]")
    for one, other in combinations(space, 2):
        for first, second in product(_ends(space[one]), _ends(space[other])):
            _check({one: first, other: second}, recipe)
    return space


def _ends(tried: Range | tuple[Value, ...]) -> tuple[Value, ...]:
    return (tried.low, tried.high) if isinstance(tried, Range) else tried


def default(recipe: Recipe) -> Space:
    """Give rates and decays around the recipe's own, and label smoothing where the task has it."""
    training = recipe.training
    rate, decay = training.learning_rate, max(training.weight_decay, 1e-4)
    space: Space = {
        "learning_rate": Range(rate / AROUND, rate * AROUND, False),
        "weight_decay": Range(decay / AROUND, decay * AROUND, False),
    }
    if recipe.task != "multilabel" and training.loss != "focal":
        space["label_smoothing"] = Range(0.0, 0.2, False)
    return space


def _read(text: str) -> tuple[str, Range | tuple[Value, ...]]:
    key, equals, values = (part.strip() for part in text.partition("="))
    if not equals or not values:
        raise InputError(f"--space {text}: expected KEY=LOW..HIGH or KEY=A,B,…, as learning_rate=1e-4..1e-2")
    if key not in TUNABLE:
        close = get_close_matches(key, TUNABLE, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"these can: {', '.join(TUNABLE)}"
        raise InputError(f"--space {text}: '{key}' cannot be searched; {hint}")
    if ".." not in values:
        return key, tuple(_value(one.strip()) for one in values.split(","))
    ends = [_value(one.strip()) for one in values.split("..", 1)]
    low, high = ends[0], ends[-1]
    if isinstance(low, bool | str) or isinstance(high, bool | str) or low >= high:
        raise InputError(f"--space {text}: expected two numbers, the lower one first")
    return key, Range(low, high, isinstance(low, int) and isinstance(high, int))


def _value(text: str) -> Value:
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _check(tried: Mapping[str, Value], recipe: Recipe) -> None:
    given = {**recipe.training.model_dump(exclude_unset=True, exclude={"start"}), **tried}
    what = " with ".join(f"training.{key} {value!r}" for key, value in tried.items()).replace(" ", " cannot be ", 1)
    try:
        made = Training.model_validate(given | ({"start": "torchvision:DEFAULT"} if recipe.training.start else {}))
    except ValidationError as error:
        told = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise InputError(f"--space: {what}: {told}") from None
    wrong = list(settings.faults(made, recipe.task, trained=True))
    if wrong:
        raise InputError(f"--space: {what}: {'; '.join(wrong)}")
