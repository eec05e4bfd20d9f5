"""A split's images batch by batch, varied: the same whether a training was interrupted or not."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.artifacts import Split
from pipeline.augmentation import Augmentation
from pipeline.measure.metrics import Task


def batches(
    split: Split,
    order: Sequence[int] | NDArray[np.int64],
    *,
    batch_size: int,
    augmentation: Augmentation,
    task: Task,
    seed: int,
    start: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield uint8 images N×H×W×3 (of several views N×V×H×W×3) and labels in `order`, from batch `start` on.

    What is random in a batch depends on the seed and the batch's number alone.
    """
    for number in range(start, -(-len(order) // batch_size)):
        picked = np.asarray(order[number * batch_size : (number + 1) * batch_size])
        images, labels = torch.from_numpy(split.images[picked]), torch.from_numpy(split.labels[picked])
        if augmentation.horizontal_flip:
            random = torch.Generator().manual_seed(int(np.random.SeedSequence((seed, number)).generate_state(1)[0]))
            images, labels = flipped(images, labels, task, random)
        yield images, labels


def flipped(images: Tensor, labels: Tensor, task: Task, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mirror a random half of the images left to right, all views of one together, and their masks with them."""
    mirrored = torch.rand(len(images), generator=random) < 0.5
    images = torch.where(mirrored.view(-1, *[1] * (images.ndim - 1)), images.flip(-2), images)
    if task == "segmentation":
        labels = torch.where(mirrored.view(-1, 1, 1), labels.flip(-1), labels)
    return images, labels
