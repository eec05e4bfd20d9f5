"""The metric of the budget on the images held out."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bitferry.pipeline import loader
from bitferry.pipeline.augmentation import Augmentation
from bitferry.pipeline.data.split import Split
from bitferry.pipeline.measure import accuracy, segmentation
from bitferry.pipeline.recipe import Recipe
from bitferry.pipeline.training.holdout import Positions
from bitferry.pipeline.training.losses import Loss

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Validated:
    """What the held-out images say of the weights after an epoch."""

    loss: float
    percent: float
    """Of the metric · 100; NaN where it has no value on these images."""


@dataclass(frozen=True)
class Validation:
    """The images held out, and how they are looked at."""

    recipe: Recipe
    data: Split
    held_out: Positions
    loss: Loss
    batch: int

    def look(self, answer: Callable[[Tensor], Tensor], accelerator: "Accelerator") -> Validated:
        """Answer for all of them, each process for its part, in evaluation mode."""
        processes = accelerator.num_processes
        each = math.ceil(len(self.held_out) / processes)
        order = np.resize(self.held_out, each * processes).reshape(processes, each)[accelerator.process_index]
        real = int(np.clip(len(self.held_out) - accelerator.process_index * each, 0, each))
        total, size = (torch.zeros((), device=accelerator.device) for _ in range(2))
        answers: list[Tensor] = []
        with torch.inference_mode():
            for images, labels in self._batches(order):
                scores = answer(images.to(accelerator.device)).float()
                known = labels[: max(0, real)].to(accelerator.device)
                total += self.loss.sum(scores[: len(known)], known)
                size += self.loss.sizes(known)
                real -= len(labels)
                answers.append(scores.argmax(1).to(torch.uint8) if scores.ndim == 4 else scores)
        mine = torch.cat(answers)
        found = accelerator.gather(mine)[: len(self.held_out)].cpu()
        total, size = (accelerator.reduce(one, "sum") for one in (total, size))
        return Validated(float(total) / max(float(size), 1.0), self._percent(found))

    def _batches(self, order: Positions) -> Iterator[tuple[Tensor, Tensor]]:
        return loader.batches(
            self.data, order, batch_size=self.batch, augmentation=Augmentation(), task=self.recipe.task, seed=0
        )

    def _percent(self, answers: Tensor) -> float:
        labels = np.asarray(self.data.labels[self.held_out])
        if self.recipe.task == "segmentation":
            found = segmentation.counts(answers.numpy(), labels, len(self.recipe.classes))
            return 100 * segmentation.value(self.recipe.metric, found, np.ones(len(labels)))
        held = replace(self.data, labels=labels)
        return accuracy.percent(answers.numpy(), held, self.recipe)
