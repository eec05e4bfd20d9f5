"""How wrong scores are: a sum, and what it is to be divided by, so that a batch may be computed in parts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bitferry.device.pixels import IGNORED
from bitferry.pipeline.data.split import Labels
from bitferry.pipeline.measure.metrics import Task
from bitferry.pipeline.training.settings import Training

NOWHERE = -1
"""What no label of an image is."""
LEAST_WRONG = 1e-7
"""Of 1 − p: where it is 0, a power of it below 1 has an infinite gradient."""
AT_ONCE = 256
"""Masks counted in one go."""


@dataclass(frozen=True)
class Loss:
    """Cross entropy of one class per image or pixel, or of each label where there may be several; or focal of both.

    Focal (Lin et al. 2017, "Focal Loss for Dense Object Detection") multiplies each by (1 − p)^gamma, p being the
    probability given to the truth: what is already right counts little. `weights` are of the classes: K values for
    one class per image or pixel; for several labels what a label that is there counts, one that is not counting 1.
    """

    task: Task
    settings: Training
    weights: Tensor | None = None

    def sizes(self, labels: Tensor) -> Tensor:
        """Give what the sum over these labels is to be divided by."""
        if self.task == "multilabel":
            return torch.tensor(float(labels.numel()), device=labels.device)
        counted = labels.long()[labels != self._ignored]
        if self.weights is None:
            return torch.tensor(float(counted.numel()), device=labels.device)
        return self.weights.to(labels.device)[counted].sum()

    def sum(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Add up the loss of all labels."""
        scores = scores.float()
        weights = None if self.weights is None else self.weights.to(scores.device)
        focal = self.settings.loss == "focal"
        if self.task == "multilabel":
            truth = labels.float()
            each = F.binary_cross_entropy_with_logits(scores, truth, pos_weight=weights, reduction="none")
            right = torch.sigmoid(torch.where(truth > 0, scores, -scores)) if focal else None
        else:
            smoothing = self.settings.label_smoothing
            labels = labels.long()
            each = F.cross_entropy(
                scores, labels, weights, ignore_index=self._ignored, reduction="none", label_smoothing=smoothing
            )
            right = self._right(scores, labels) if focal else None
        return (each if right is None else each * (1 - right).clamp(min=LEAST_WRONG) ** self.settings.gamma).sum()

    def _right(self, scores: Tensor, labels: Tensor) -> Tensor:
        picked = labels.masked_fill(labels == self._ignored, 0).unsqueeze(1)
        return scores.log_softmax(1).gather(1, picked).squeeze(1).exp()

    @property
    def _ignored(self) -> int:
        return IGNORED if self.task == "segmentation" else NOWHERE


def loss(task: Task, settings: Training, labels: Labels, classes: int) -> Loss:
    """Make the loss of a training, its class weights counted from the labels it learns from."""
    balanced = settings.class_weights == "balanced"
    return Loss(task, settings, torch.tensor(_balanced(task, labels, classes)).float() if balanced else None)


def _balanced(task: Task, labels: Labels, classes: int) -> Sequence[float]:
    """Give weights with which each class counts as much in all as any other; 1 for a class that is nowhere."""
    if task == "multilabel":
        there = labels.sum(0, dtype=np.int64)
        return [float(len(labels) - n) / n if n else 1.0 for n in there]
    counts = np.zeros(classes, np.int64)
    for part in _counted(labels):
        counts += np.bincount(part, minlength=classes)[:classes]
    total, present = float(counts.sum()), int(np.count_nonzero(counts))
    return [total / (present * int(n)) if n else 1.0 for n in counts]


def _counted(labels: Labels) -> Iterator[Labels]:
    for start in range(0, len(labels), AT_ONCE):
        part = np.asarray(labels[start : start + AT_ONCE]).ravel()
        yield part[part != IGNORED] if labels.ndim > 1 else part
