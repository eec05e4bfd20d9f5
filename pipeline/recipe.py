"""TOML → a typed, validated recipe: everything that decides what is built, and how it is judged."""

import contextlib
import json
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    JsonValue,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from bitferry import targets
from bitferry.device.errors import InputError, TargetUnavailable
from bitferry.device.pixels import IGNORED
from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline import faulty
from bitferry.pipeline.augmentation import Augmentation, with_alias
from bitferry.pipeline.data.source import Data, Part, Sizes, Table
from bitferry.pipeline.measure import metrics
from bitferry.pipeline.measure.metrics import COUNTED, TORCHMETRICS, Task
from bitferry.pipeline.section import Beside, Section, beside_recipe
from bitferry.pipeline.training import settings
from bitferry.pipeline.training.settings import Training
from bitferry.targets import Options, Precision

PRECISIONS = (*targets.PRECISIONS, "auto")


def _class_names(value: object, info: ValidationInfo) -> object:
    """Accept the names themselves, a text file with one per line, or just how many there are."""
    if isinstance(value, int) and not isinstance(value, bool):
        if not 2 <= value <= MOST_CLASSES:
            raise ValueError(f"a count of classes must be 2 to {MOST_CLASSES}")
        return [str(index) for index in range(value)]
    if isinstance(value, str):
        path = beside_recipe(Path(value), info)
        if not path.is_file():
            raise ValueError(f"the file {path} does not exist")
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").strip().splitlines()]
    return value


ClassName = Annotated[str, Field(min_length=1)]


MOST_CLASSES = 100_000


class Model(Section):
    """Where the architecture and its weights come from; without weights, it is trained."""

    source: Annotated[str, Field(pattern=r"^(torchvision|timm|module|pt2|onnx):.+$")]
    weights: Beside | None = None
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Keyword arguments of the model's constructor."""

    @property
    def whole(self) -> str | None:
        """Say what holds the weights as well, where the source is a file; None where it is code."""
        return {"pt2": "an exported program", "onnx": "an ONNX file"}.get(self.source.partition(":")[0])


class Quantization(Section):
    """How int8 is made; docs/quantization.md says what each step does."""

    method: Literal["ptq", "qat"] = "ptq"
    """qat: fine-tuned on `data.train` afterwards, with the float model as teacher."""
    epochs: Annotated[int, Field(gt=0)] = 1
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    """Of qat: a step changes a value by about this share of its tensor's size."""
    observer: Literal["best", "minmax", "mean-minmax", "percentile", "mse", "histogram", "scores"] = "best"
    equalize: bool = True
    bias_correction: Literal["none", "fast", "full"] = "fast"
    ranges: Literal["observed", "learned"] = "observed"
    rounding: Literal["nearest", "layers"] = "nearest"
    iterations: Annotated[int, Field(gt=0)] = 100
    """Of learning, a few images each."""
    seed: int = 0
    """Of the order in which learning sees the images."""
    batch_size: Annotated[int, Field(gt=0)] = 8
    images: Annotated[int, Field(gt=0)] | Literal["enough"] | None = None
    """How many calibration images to use, drawn evenly; None for all; "enough" until more bring nothing."""
    keep: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Layers that stay float, by their path in the model, as `features.0.0`."""

    @property
    def first_images(self) -> int | None:
        """Give how many calibration images are used, drawn evenly; None for all."""
        return self.images if isinstance(self.images, int) else None

    def thorough(self) -> "Quantization":
        """Give the same with the two steps that take minutes, roundings by layers and learned ranges."""
        return self.model_copy(update={"rounding": "layers", "ranges": "learned"})


class Budget(Section):
    metric: Annotated[str, Field(min_length=1)] | None = None
    """One of `metrics.COUNTED`, or `torchmetrics:CLASS`; None for the task's first (`Recipe.metric`)."""
    metric_options: dict[str, JsonValue] = Field(default_factory=dict)
    """Keyword arguments of the torchmetrics class."""
    accuracy_drop_pp: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Of the metric · 100."""
    accuracy_gain_pp: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Of the metric · 100: an artifact that is surely better than its float model by more is doubted."""
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    min_speedup: Annotated[float, Field(gt=0)] | None = None
    """Over the eager float model, at the same thread count."""
    float_percent: Annotated[float, Field(gt=0, le=100)] | None = None
    """What the float model is known to reach on these images, of the metric; a baseline below it fails."""


class Search(Section):
    """Of `precision = "auto"`."""

    minutes: Annotated[float, Field(ge=0)] = 10.0
    """For mixes of int8 and float, after every whole precision was tried."""


class Nightly(Section):
    """How the nightly matrix treats it."""

    nodes: dict[str, str] = Field(default_factory=dict)
    """Target → what the kind of node that measures it must be, as "avx512_vnni" or "H100"; "*" for all others."""


class Recipe(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    version: Annotated[str, Field(pattern=r"^[0-9][A-Za-z0-9._+-]*$")] = "0.1.0"
    license: Annotated[str, Field(pattern=r"^[A-Za-z0-9.+() -]+$")] | None = None
    """Of the model, as an SPDX expression; for the bill of materials."""
    classes: Annotated[tuple[ClassName, ...], Field(min_length=2), BeforeValidator(_class_names)]
    task: Task = "classification"
    precision: Precision | Literal["auto"] = "auto"
    model: Model
    preprocessing: Preprocessing
    data: Data
    training: Training = Training()
    augmentation: Augmentation = Augmentation()
    quantization: Quantization = Quantization()
    budget: Budget = Budget()
    search: Search = Search()
    nightly: Nightly = Nightly()
    targets: dict[str, dict[str, JsonValue]] = Field(default_factory=dict)
    """Each target's own options (`Options` in its file)."""

    @property
    def lessons(self) -> Training:
        """Give how a quantized model is fine-tuned: mirrored images too, where training has them."""
        return self.training.model_copy(update={"horizontal_flip": self.augmentation.horizontal_flip})

    @property
    def metric(self) -> str:
        """Give the metric that the budget is about."""
        return self.budget.metric or COUNTED[self.task][0]

    @model_validator(mode="before")
    @classmethod
    def _flip_of_training(cls, given: object) -> object:
        """Take `training.horizontal_flip` as what it was before there were other augmentations."""
        return with_alias(given)

    @model_validator(mode="after")
    def _fits_its_task(self) -> "Recipe":
        faults = [*_metric_faults(self)]
        faults += settings.faults(self.training, self.task, self.model.weights is None)
        if self.task == "segmentation" and len(self.classes) > IGNORED:
            told = f"{len(self.classes)} classes, at most {IGNORED} for task 'segmentation', whose masks are 8-bit"
            faults.append(f"classes: {told}")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def at_look(self, look: int) -> "Recipe":
        """Give the recipe as the k-th look at the evaluation data holds it: with 1 − (1 − confidence)/2ᵏ.

        However many looks there are, the chance that one of them passes by luck is at most 1 − confidence (the sum of
        the parts: Bonferroni). Look 0 is the only one, and has all.
        """
        confidence = 1 - (1 - self.budget.confidence) / 2**look
        return self.model_copy(update={"budget": self.budget.model_copy(update={"confidence": confidence})})

    def options(self, target: str) -> Options:
        """Give what is set under `[targets.NAME]` as that target's own options; raise InputError for what it lacks."""
        kind, given = targets.get(target).Options, self.targets.get(target, {})
        if "color" in given:
            raise InputError(f"recipe '{self.name}': color belongs under [preprocessing], not [targets.{target}]")
        whole = given | {"color": self.preprocessing.color}
        try:
            options: Options = TypeAdapter(kind).validate_json(json.dumps(whole))  # JSON: a list is a tuple
        except ValidationError as error:
            known = [field.name for field in fields(kind) if field.name != "color"]
            faults: dict[tuple[int | str, ...], str] = {}
            for detail in error.errors():  # a choice between types gives one fault for each of them
                told = faulty.told(dict(detail), ("targets", target, *detail["loc"][:1]), known)
                faults[detail["loc"][:1]] = faults.get(detail["loc"][:1], "") + f"; {told}"
            raise InputError(f"recipe '{self.name}'{''.join(faults.values())}".replace(";", ":", 1)) from None
        return options


def _metric_faults(recipe: Recipe) -> Iterator[str]:
    """Say what is wrong with the judged metric; a torchmetrics class is made and tried."""
    name, options = recipe.metric, recipe.budget.metric_options
    if name.startswith(TORCHMETRICS):
        try:
            metrics.build(name, options, recipe.task, len(recipe.classes))
        except InputError as error:
            yield f"budget.metric: {error}"
        return
    known = [*COUNTED[recipe.task], *([f"{TORCHMETRICS}ClassName"] if recipe.task in metrics.KINDS else [])]
    if name in known and name == "top-5" and len(recipe.classes) <= 5:
        yield f"budget.metric: 'top-5' needs more than 5 classes; this recipe has {len(recipe.classes)}"
    elif name not in known:
        owner = next((task for task, names in COUNTED.items() if name in names), None)
        hint = f"it is for task '{owner}'" if owner else _nearest_metric(name, known)
        yield f"budget.metric: '{name}' is no metric for task '{recipe.task}' ({', '.join(known)}); {hint}"
    if options:
        yield f"budget.metric_options are for a '{TORCHMETRICS}' metric; take them out for '{name}'"


def _nearest_metric(name: str, known: Sequence[str]) -> str:
    by_lower = {one.lower(): one for one in known}
    close = get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return f"did you mean '{by_lower[close[0]]}'?" if close else "name one of these"


def read(path: Path, *, precision: str | None = None, minutes: float | None = None) -> Recipe:
    """Read a recipe, `precision` and the `minutes` of a search in place of its own if given.

    Raises InputError with every fault in it, unknown keys with the nearest known one.
    """
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        told = "name a recipe, as in `bitferry deploy mine.toml`; `bitferry init` writes a first one"
        raise InputError(f"recipe {path} does not exist; {told}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"recipe {path} cannot be read: {error}") from error
    if precision is not None and precision not in PRECISIONS:
        raise InputError(f"--precision {precision}: expected one of {', '.join(PRECISIONS)}")
    try:
        given |= {"precision": precision} if precision else {}
        given |= {"search": {"minutes": minutes}} if minutes is not None else {}
        recipe = Recipe.model_validate(given, context={"folder": path.parent})
    except ValidationError as error:
        details = faulty.joined(error.errors())
        faults = [faulty.told(detail, detail["loc"], _known_keys(detail["loc"][:-1])) for detail in details]
        raise InputError(f"recipe {path}: {'; '.join(dict.fromkeys(faults))}") from None
    for name in recipe.nightly.nodes.keys() - {"*"}:
        targets.check_name(name)
    for name, options in recipe.targets.items():
        targets.check_name(name)
        if options:
            with contextlib.suppress(TargetUnavailable):  # told when it is asked for
                recipe.options(name)
    return recipe


def _known_keys(where: tuple[str | int, ...]) -> list[str]:
    """List the keys that may stand in the recipe's table at `where`."""
    if not where:
        return list(Recipe.model_fields)
    if where[0] == "preprocessing":
        return list(Preprocessing.__dataclass_fields__)
    if where[0] == "data":
        tables: dict[str, type[Section]] = {"table": Table, "split": Sizes, "part": Part}
        inner = tables.get(str(where[-1]), Data)
        return [*inner.model_fields, *(("source", "split", "manifest") * (inner is Data))]
    section = Recipe.model_fields[str(where[0])].annotation
    return list(section.model_fields) if isinstance(section, type) and issubclass(section, BaseModel) else []
