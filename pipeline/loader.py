"""Batches of training images, changed at random and made ahead by threads; the same again from any batch on."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitferry.pipeline import augment
from bitferry.pipeline.augmentation import Augmentation
from bitferry.pipeline.data.split import Split
from bitferry.pipeline.measure.metrics import Task
from bitferry.targets import usable_cpus

Order = Sequence[int] | NDArray[np.integer[Any]]
Batch = tuple[Tensor, Tensor]


def batches(
    split: Split,
    order: Order,
    *,
    batch_size: int,
    augmentation: Augmentation,
    task: Task,
    seed: int,
    start: int = 0,
) -> Iterator[Batch]:
    """Yield uint8 images N×H×W×3 (of several views N×V×H×W×3) and their labels, in `order`, from batch `start` on.

    What is random depends on the seed and the batch's number alone, so that a training that is gone on with sees what
    it would have seen. The last batch may be smaller.
    """
    rows = np.asarray(order)
    make = partial(_batch, split, augmentation, task, seed)
    starts = range(start * batch_size, len(rows), batch_size)
    jobs = ((number, rows[first : first + batch_size]) for number, first in enumerate(starts, start))
    workers = usable_cpus()
    with ThreadPoolExecutor(workers, "batches") as pool:
        waiting: deque[Future[Batch]] = deque()
        try:
            for number, chosen in jobs:
                waiting.append(pool.submit(make, number, chosen))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # also where who takes them stops early
            for one in waiting:
                one.cancel()


def _batch(
    split: Split, how: Augmentation, task: Task, seed: int, number: int, rows: NDArray[np.integer[Any]]
) -> Batch:
    random = np.random.default_rng([seed, number])
    masked = task == "segmentation"
    if how.only_flips:
        return _flipped(split.images[rows], split.labels[rows], how, random, masked=masked)
    size = (int(split.images.shape[-3]), int(split.images.shape[-2]))
    images = split.images if split.roomy is None else split.roomy.images
    masks = split.labels if split.roomy is None or split.roomy.masks is None else split.roomy.masks
    made = np.empty((len(rows), *split.images.shape[1:]), np.uint8)
    labels = np.array(split.labels[rows])
    for place, row in enumerate(rows):
        views = images[row].reshape(-1, *images.shape[-3:])
        changed = augment.sample(views, masks[row] if masked else None, size, how, random)
        # NumPy's copy, since PyTorch's would wake a team of threads for each image in each of ours.
        made[place] = changed[0].permute(0, 2, 3, 1).numpy().reshape(made.shape[1:])
        if masked:
            labels[place] = changed[1].numpy()
    return torch.from_numpy(made), torch.from_numpy(labels)


def _flipped(
    images: NDArray[np.uint8],
    labels: NDArray[np.integer[Any]],
    how: Augmentation,
    random: np.random.Generator,
    *,
    masked: bool,
) -> Batch:
    """Mirror whole batches at once, which is all that many recipes ask for."""
    for asked, axis in ((how.horizontal_flip, -1), (how.vertical_flip, -2)):
        if asked:
            chosen = random.random(len(images)) < 0.5
            images[chosen] = np.flip(images[chosen], axis - 1)
            if masked:
                labels[chosen] = np.flip(labels[chosen], axis)
    return torch.from_numpy(images), torch.from_numpy(labels)
