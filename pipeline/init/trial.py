"""A float model on labelled images with several preprocessings: which gives the most right answers, and is it proof."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitferry.device.arrays import Images
from bitferry.device.errors import InputError, first_line
from bitferry.device.pixels import IGNORED
from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline import progress
from bitferry.pipeline.data.decoding import fitted
from bitferry.pipeline.data.sample import Sample
from bitferry.pipeline.measure.metrics import Task
from bitferry.pipeline.scores import other_input
from bitferry.pipeline.statistics import binomial_tail, mcnemar_mid_p
from bitferry.targets import usable_cpus

Variants = Callable[[Preprocessing], list[tuple[str, Preprocessing]]]
Model = Callable[[Tensor], Tensor]
"""Normalized images N×3×H×W → scores."""
MOST_BATCH, BATCH_PIXELS = 64, 8 * 224 * 224
LEAST, MOST = 32, 256
"""Images that are tried."""
SECONDS = 20.0
"""About how long all trials together may take; fewer images where the model is slow."""
SURE = 0.01
"""P value below which one is surely better: of a test with as many tries as there are preprocessings."""
ALIKE = 0.05


@dataclass(frozen=True)
class Tried:
    """One preprocessing, and for each image the share of its answers that were right."""

    name: str
    contract: Preprocessing
    source: str
    right: NDArray[np.float64]

    @property
    def percent(self) -> float:
        """Give the share of right answers in percent."""
        return 100 * float(self.right.mean())


@dataclass(frozen=True)
class Trial:
    """What was tried, best first, and what guessing gives."""

    tried: tuple[Tried, ...]
    task: Task
    chance_percent: float
    """Of always answering what is most frequent."""
    best: Tried
    """The likeliest of those that none is surely better than."""

    @property
    def better_than_chance(self) -> bool:
        """Say whether the best is, at 99 % for all that were tried together; of images with one class each."""
        right = self.best.right
        if self.task != "classification":
            return self.best.percent > self.chance_percent
        tail = binomial_tail(round(float(right.sum())), len(right), self.chance_percent / 100)
        return tail * len(self.tried) < SURE

    @property
    def clear(self) -> bool:
        """Say whether every other preprocessing is surely worse than the best."""
        others = [one for one in self.tried if one is not self.best and one.source == self.best.source]
        return not any(_apart(one, self.best) >= ALIKE for one in others)


def _apart(one: Tried, other: Tried) -> float:
    """Give the mid-p value that two that were tried on the same images are alike (McNemar)."""
    lost, gained = (int(((a - b) > 0).sum()) for a, b in ((one.right, other.right), (other.right, one.right)))
    return mcnemar_mid_p(lost, gained)


def likeliest(tried: Sequence[Tried]) -> Tried:
    """Choose of what was tried, the likelier first, the first that the best is not surely better than."""
    best = max(tried, key=_percent)
    return next(one for one in tried if one is best or _apart(best, one) >= SURE)


@dataclass(frozen=True)
class Opened:
    """A model that can be tried."""

    source: str
    answer: Model
    contracts: Sequence[tuple[str, Preprocessing]]


def run(models: Sequence[Opened], samples: Sequence[Sample], task: Task, classes: int, others: Variants) -> Trial:
    """Try every preprocessing of every model on the same images, then `others` of the best.

    Raises InputError, with what the model said, where none of them can be run.
    """
    chosen = spread(samples, task)
    fit = _Fitted(chosen[: _affordable(models[0], chosen)])
    first, *more = models
    faults: list[str] = []
    tried = _all(first, first.contracts, fit, task, faults)
    for other in more:  # where the first answers as well as any, these differ in details only
        leading = likeliest(tried) if tried else None
        kept = [(leading.name, leading.contract)] if leading else []
        tried += _all(other, list(dict.fromkeys([*kept, *other.contracts[:1]])), fit, task, faults)
    if not tried:
        hint = other_input(first.answer, first.contracts[0][1], first.source) or "; name its size with --size"
        raise InputError(f"{first.source} cannot take the images: {faults[0]}{hint}")
    best = likeliest(tried)
    opened = next(one for one in models if one.source == best.source)
    ways = [(f"{best.name}, {name}", contract) for name, contract in others(best.contract)]
    tried += _all(opened, [way for way in ways if way[1] not in {one.contract for one in tried}], fit, task, faults)
    best = likeliest(tried)
    if best.contract.color == "RGB" and not fit.grey(best.contract):
        swapped = replace(best.contract, color="BGR", mean=best.contract.mean[::-1], std=best.contract.std[::-1])
        tried += _all(opened, [(f"{best.name}, BGR", swapped)], fit, task, faults)
    truth = fit.truth(best.contract, task)
    ranked = sorted(tried, key=lambda one: -one.percent)
    return Trial(tuple(ranked), task, 100 * _most_frequent(truth, task, classes), likeliest(tried))


def _percent(one: Tried) -> float:
    return one.percent


def _all(
    model: Opened, ways: Sequence[tuple[str, Preprocessing]], fit: "_Fitted", task: Task, faults: list[str]
) -> list[Tried]:
    found = (
        _try(model, *way, fit, task, faults) for way in progress.track(ways, "which preprocessing?", total=len(ways))
    )
    return [one for one in found if one is not None]


def spread(samples: Sequence[Sample], task: Task) -> list[Sample]:
    """Put samples in an order that takes one of each class in turn."""
    if task != "classification":
        return list(samples)
    turns: dict[int, int] = {}
    keyed = []
    for index, sample in enumerate(samples):
        turn = turns[sample.labels[0]] = turns.get(sample.labels[0], -1) + 1
        keyed.append((turn, sample.labels[0], index))
    return [samples[index] for _, _, index in sorted(keyed)]


class _Fitted:
    """Samples, decoded once for each geometry."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples
        self._kept: dict[object, tuple[Images, list[NDArray[np.uint8] | None]]] = {}

    def get(self, contract: Preprocessing) -> tuple[Images, list[NDArray[np.uint8] | None]]:
        """Give images N×H×W×3 in RGB, and their masks."""
        plain = Preprocessing(
            height=contract.height, width=contract.width, resize=contract.resize, interpolation=contract.interpolation
        )
        if plain not in self._kept:
            with ThreadPoolExecutor(usable_cpus()) as pool:
                pairs = list(pool.map(partial(fitted, plain), self.samples))
            self._kept[plain] = np.stack([image for image, _ in pairs]), [mask for _, mask in pairs]
        return self._kept[plain]

    def grey(self, contract: Preprocessing) -> bool:
        """Say whether every pixel has three equal values."""
        images = self.get(contract)[0]
        return bool((images == images[..., :1]).all())

    def truth(self, contract: Preprocessing, task: Task) -> list[NDArray[np.integer]]:
        """Give what is right for each image: its classes, or the class of each pixel."""
        if task == "segmentation":
            return [np.asarray(mask) for mask in self.get(contract)[1] if mask is not None]
        return [np.array(sample.labels, np.int64) for sample in self.samples]


def _affordable(model: Opened, samples: Sequence[Sample]) -> int:
    """Give how many images all trials together can afford, by the time of one batch in each geometry."""
    spent = 0.0
    for _, contract in model.contracts:
        pixels = torch.zeros(_batch(contract), 3, contract.height, contract.width)
        start = time.perf_counter()
        try:
            scores(model.answer, pixels)
        except Exception:  # noqa: BLE001, S112 - told when it is tried
            continue
        spent += (time.perf_counter() - start) / len(pixels)
    return min(len(samples), MOST, max(LEAST, int(SECONDS / spent) if spent else MOST))


def _batch(contract: Preprocessing) -> int:
    return max(1, min(MOST_BATCH, BATCH_PIXELS // (contract.height * contract.width)))


def scores(answer: Model, pixels: Tensor) -> Tensor:
    """Give a model's scores for normalized images; raise InputError when it gives anything else."""
    with torch.no_grad():
        found: object = answer(pixels)
    found = found.get("out") if isinstance(found, dict) else found  # torchvision's segmentation
    if not isinstance(found, Tensor):
        raise InputError(f"the model gives a {type(found).__name__}, expected one tensor of scores")
    return found


def _try(
    model: Opened, name: str, contract: Preprocessing, fit: _Fitted, task: Task, faults: list[str]
) -> Tried | None:
    images = fit.get(contract)[0]
    images = images[..., ::-1] if contract.color == "BGR" else images
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (contract.mean, contract.std))
    right: list[float] = []
    truth = fit.truth(contract, task)
    try:
        for start in range(0, len(images), size := _batch(contract)):
            batch = torch.from_numpy(np.ascontiguousarray(images[start : start + size])).permute(0, 3, 1, 2)
            found = scores(model.answer, (batch.float() * contract.scale - mean) / std).numpy()
            right += [_right(one, true, task) for one, true in zip(found, truth[start : start + size], strict=True)]
    except Exception as error:  # noqa: BLE001 - the model is somebody else's code, and may be of another input size
        fault = f"{name}, {contract.height}×{contract.width}: {first_line(error)[:200]}"
        progress.stage("init", f"{model.source} cannot take {fault}")
        faults.append(fault)
        return None
    return Tried(name, contract, model.source, np.array(right))


def _right(scores: NDArray[np.float32], truth: NDArray[np.integer], task: Task) -> float:
    """Give the share of one image's answers that are right."""
    if task == "classification":
        return float(scores.argmax() == truth[0])
    if task == "multilabel":
        return float(((scores >= 0) == np.isin(np.arange(len(scores)), truth)).mean())
    counts = truth != IGNORED
    return float((scores.argmax(0) == truth)[counts].mean()) if counts.any() else 1.0


def _most_frequent(truth: Sequence[NDArray[np.integer]], task: Task, classes: int) -> float:
    """Give the share of right answers of who always answers what is most frequent."""
    if task == "multilabel":
        shares = np.bincount(np.concatenate(truth).astype(np.int64), minlength=classes) / len(truth)
        return float(np.maximum(shares, 1 - shares).mean())
    values = np.concatenate([one.ravel() for one in truth])
    counts = np.bincount(values[values != IGNORED] if task == "segmentation" else values, minlength=classes)
    return float(counts.max() / counts.sum())
