"""Which training images are held out to look at, never to learn from; and the order of the rest in each epoch."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitferry.device.errors import InputError
from bitferry.pipeline.data.split import Labels
from bitferry.pipeline.measure.metrics import Task
from bitferry.pipeline.training.settings import Training

Positions = NDArray[np.int64]


@dataclass(frozen=True)
class Holdout:
    """Positions in the training data."""

    learnt: Positions
    held_out: Positions


def hold_out(labels: Labels, task: Task, share: float, seed: int) -> Holdout:
    """Draw a share of the images, of every class as large a one; of several labels the rarest one is an image's class.

    Masks are drawn regardless of what is in them.
    """
    order = np.random.default_rng((seed, 0)).permutation(len(labels))
    order = order[np.argsort(_strata(labels, task)[order], kind="stable")]
    steps = np.floor(np.arange(len(labels) + 1) * share + 0.5)
    taken = np.diff(steps) > 0  # evenly spread, so that each class gives its share
    return Holdout(np.sort(order[~taken]), np.sort(order[taken]))


def _strata(labels: Labels, task: Task) -> NDArray[np.int64]:
    if task == "classification":
        return np.asarray(labels, np.int64)
    if task == "segmentation":
        return np.zeros(len(labels), np.int64)
    rarest = np.argsort(labels.sum(0), kind="stable")
    ranked = labels[:, rarest] > 0
    return np.asarray(np.where(ranked.any(1), ranked.argmax(1), labels.shape[1]), np.int64)


def epoch_order(learnt: Positions, seed: int, epoch: int) -> Positions:
    """Shuffle the images for an epoch; the same whatever came before."""
    return np.random.default_rng((seed, 1, epoch)).permutation(learnt)


@dataclass(frozen=True)
class Batches:
    """How a step's images are divided: among processes, and in parts one after the other."""

    size: int
    """Of a step, in all."""
    processes: int
    parts: int

    @property
    def part(self) -> int:
        """Give how many images a process computes at once."""
        return self.size // (self.processes * self.parts)

    def of(self, order: Positions, process: int) -> Positions:
        """Give the images of one process in their order; the last, smaller batch is left out."""
        steps = len(order) // self.size
        return order[: steps * self.size].reshape(steps, self.processes, -1)[:, process].ravel()


def divide(learnt: int, training: Training, size: int, processes: int) -> Batches:
    """Make the batch fit the data and divide evenly; raise InputError where less than two images are left for each."""
    shares = processes * training.accumulate
    whole = min(size, learnt)
    if shares > 1 and whole < 2 * shares:
        raise InputError(
            f"a batch of {whole} images does not divide among {processes} processes and {training.accumulate} parts; "
            f"at least 2 each are needed: raise training.batch_size, or lower --processes or training.accumulate"
        )
    return Batches(whole // shares * shares, processes, training.accumulate)
