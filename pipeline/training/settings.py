"""The recipe's [training]: what a training starts from, how it learns, when it ends and what is kept."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo

from bitferry.pipeline.measure.metrics import Task
from bitferry.pipeline.section import Section, beside_recipe

LIBRARY = re.compile(r"(torchvision|timm):\w[\w.-]*")
BACKBONE = "backbone"
"""In `freeze`: all but the head."""


def _start(text: str, info: ValidationInfo) -> str:
    """Leave a library's weights as they are named, and look for a file beside the recipe."""
    return text if LIBRARY.fullmatch(text) else str(beside_recipe(Path(text), info))


PathPrefix = Annotated[str, Field(min_length=1)]
Epoch = Annotated[int, Field(gt=0)]


class Training(Section):
    """How weights are learned; docs/training.md explains the choices."""

    start: Annotated[str, Field(min_length=1), AfterValidator(_start)] | None = None
    """A state dict, or `torchvision:WEIGHTS` or `timm:TAG` of the model's own architecture; None for scratch."""
    freeze: tuple[PathPrefix, ...] = ()
    """Paths of modules that do not learn, or "backbone"."""
    unfreeze: Epoch | tuple[Epoch, ...] | None = None
    """After how many epochs they do learn: all of `freeze`, or each; None for never."""
    backbone_learning_rate: Annotated[float, Field(gt=0)] = 1.0
    """Of all but the head, as a multiple of `learning_rate`."""
    epochs: Annotated[int, Field(gt=0)] = 10
    batch_size: Annotated[int, Field(gt=1)] | Literal["auto"] = 128
    """Images of a step, of all processes and parts together."""
    accumulate: Annotated[int, Field(gt=0)] = 1
    """In how many parts a batch is computed, one after the other, where memory is short."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of sgd."""
    nesterov: bool = True
    """Of sgd."""
    schedule: Literal["one-cycle", "cosine"] = "one-cycle"
    warm_up: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """The share of all steps in which the learning rate rises."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    """Not of biases and norms."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """The largest length of a step's gradient."""
    loss: Literal["cross-entropy", "focal"] = "cross-entropy"
    """Of each label by itself for task 'multilabel'."""
    gamma: Annotated[float, Field(ge=0)] = 2.0
    """Of focal: how little what is already right counts."""
    class_weights: Literal["none", "balanced"] = "none"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of the average of weights that is validated and kept in place of the last ones."""
    validation: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    """The share of the training images that is held out."""
    patience: Annotated[int, Field(gt=0)] | None = None
    """Epochs without a better validation after which training ends."""
    keep: Literal["best", "last"] | None = None
    """Which epoch's weights; None for the best with `patience` and the last without."""
    horizontal_flip: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @property
    def keeps_best(self) -> bool:
        """Say whether the weights of the best epoch are kept."""
        return self.keep == "best" or (self.keep is None and self.patience is not None)

    @property
    def thaws(self) -> dict[str, int | None]:
        """Give each part that is frozen, with the epoch from which it learns."""
        after = self.unfreeze if isinstance(self.unfreeze, tuple) else (self.unfreeze,) * len(self.freeze)
        return dict(zip(self.freeze, after, strict=True))

    @property
    def fixed_batch(self) -> int:
        """Give the batch size, 32 where it is left to be found out."""
        return 32 if self.batch_size == "auto" else self.batch_size


def faults(given: Training, task: Task, trained: bool) -> Iterator[str]:
    """Say what does not fit together; `trained` where the recipe has no weights."""
    if task == "multilabel" and given.label_smoothing:
        yield "training.label_smoothing is for classification only; take it out for task 'multilabel'"
    if given.loss == "focal" and given.label_smoothing:
        yield "training.label_smoothing does not go with training.loss = 'focal'; take one of them out"
    for key, allowed in _only_with(given).items():
        if key in given.model_fields_set and not allowed[1]:
            yield f"training.{key} is for training.{allowed[0]}; take it out, or set that"
    if given.nesterov and given.optimizer == "sgd" and not given.momentum:
        yield "training.nesterov needs a momentum; set training.nesterov = false, or training.momentum above 0"
    yield from _start_faults(given, trained)
    if not given.validation:
        for text, wanted in {"patience": given.patience, "keep = 'best'": given.keep == "best"}.items():
            if wanted:
                yield f"training.{text} needs images held out; set training.validation above 0, as 0.1"
    if given.patience and given.keep == "last":
        yield "training.keep = 'last' would throw away what training.patience waited for; take one of them out"


def _only_with(given: Training) -> dict[str, tuple[str, bool]]:
    sgd, focal = given.optimizer == "sgd", given.loss == "focal"
    told = "optimizer = 'sgd'"
    return {"momentum": (told, sgd), "nesterov": (told, sgd), "gamma": ("loss = 'focal'", focal)}


def _start_faults(given: Training, trained: bool) -> Iterator[str]:
    if given.start and not trained:
        yield "training.start is of no use beside model.weights, which are not trained; take one of them out"
    if not given.start:
        used = {"freeze": given.freeze, "backbone_learning_rate": given.backbone_learning_rate != 1}
        for name in (name for name, value in used.items() if value):
            yield f"training.{name} is for weights that know something already; name them in training.start"
    if given.unfreeze is not None and not given.freeze:
        yield "training.unfreeze says when training.freeze ends, which is not set"
    several = given.unfreeze if isinstance(given.unfreeze, tuple) else ()
    if several and len(several) != len(given.freeze):
        yield f"training.unfreeze has {len(several)} epochs for the {len(given.freeze)} parts of training.freeze"
    latest = (
        max((epoch or 0 for epoch in given.thaws.values()), default=0) if len(several) in (0, len(given.freeze)) else 0
    )
    if latest >= given.epochs:
        yield f"training.unfreeze = {latest} never comes: training ends after {given.epochs} epochs"
