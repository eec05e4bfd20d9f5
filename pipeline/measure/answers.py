"""Answers image by image: what each model decides, and where the artifact decides otherwise than the float model."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitferry.device.arrays import Outputs
from bitferry.device.pixels import IGNORED
from bitferry.device.runner import softmax
from bitferry.pipeline.data.split import Labels, Split
from bitferry.pipeline.figures import Bin, ClassChange, Confusion, Flips, Reliability, WorstImage
from bitferry.pipeline.measure import metrics
from bitferry.pipeline.measure.metrics import Task
from bitferry.pipeline.statistics import mcnemar_mid_p

BINS = 15
MOST_CONFUSIONS = 20
WORST_IMAGES = 12

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Answers:
    """What one model's scores say about every image."""

    scores: Outputs
    probabilities: Outputs
    """Softmax, or the sigmoid of each score for multi-label models; N×K."""
    chosen: Labels
    """The likeliest class, N; or for each class whether its probability is at least a half, N×K."""
    right: Flags
    """Whether each image's answer is right, N; of several labels all must be."""
    confidence: Outputs
    """The probability of each decision: N, or N×K."""
    decided_right: Flags
    """Of the same shape."""


def answers(scores: Outputs, labels: Labels, task: Task) -> Answers:
    """Turn one model's scores N×K into decisions and whether they are right."""
    if task == "multilabel":
        chosen = (scores >= 0).astype(np.int64)
        each = np.asarray(chosen == labels)
        probabilities = np.asarray(0.5 + 0.5 * np.tanh(scores / 2), dtype=np.float32)
        confidence = np.maximum(probabilities, 1 - probabilities)
        return Answers(scores, probabilities, chosen, np.asarray(each.all(axis=1)), confidence, each)
    chosen, probabilities = scores.argmax(axis=1), softmax(scores)
    right = np.asarray(chosen == labels)
    return Answers(scores, probabilities, chosen, right, probabilities.max(axis=1), right)


def of_pixels(scores: Outputs, labels: Labels) -> Answers:
    """Decide about pixels, those left out that do not count; scores N×K×P, labels N×P."""
    counted = labels != IGNORED
    return answers(np.moveaxis(scores, 1, 2)[counted], labels[counted], "classification")


def flips(before: Answers, after: Answers) -> Flips:
    """Count the images whose answers differ, and those that became wrong or right."""
    lost, gained = int((before.right & ~after.right).sum()), int((after.right & ~before.right).sum())
    differ = (before.chosen != after.chosen).reshape(len(before.right), -1).any(axis=1)
    return Flips(lost=lost, gained=gained, flipped=int(differ.sum()), mcnemar_p=mcnemar_mid_p(lost, gained))


def class_changes(before: Answers, after: Answers, labels: Labels, classes: tuple[str, ...]) -> tuple[ClassChange, ...]:
    """Give the recall of each class before and after; labels N."""
    images, was, now = (
        np.bincount(labels[which], minlength=len(classes)).tolist()
        for which in (np.ones(len(labels), dtype=bool), before.right, after.right)
    )
    return tuple(
        ClassChange(name, n, 100 * was[i] / n if n else None, 100 * now[i] / n if n else None)
        for i, (name, n) in enumerate(zip(classes, images, strict=True))
    )


def label_changes(before: Answers, after: Answers, labels: Labels, classes: tuple[str, ...]) -> tuple[ClassChange, ...]:
    """Give the average precision and the area under the ROC curve of each class; labels N×K."""
    once = np.ones(len(labels))
    values = [metrics.class_values(metrics.rank(one.scores, labels), once) for one in (before, after)]
    (was, area_was), (now, area_now) = values
    return tuple(
        ClassChange(name, int(n), _percent(was[i]), _percent(now[i]), _percent(area_was[i]), _percent(area_now[i]))
        for i, (name, n) in enumerate(zip(classes, labels.sum(axis=0), strict=True))
    )


def _percent(share: float) -> float | None:
    return None if np.isnan(share) else 100 * float(share)


def confusions(before: Answers, after: Answers, labels: Labels, classes: tuple[str, ...]) -> tuple[Confusion, ...]:
    """List the pairs of classes that were confused more or less often than before, most changed first."""
    was, now = _mistakes(before, labels, len(classes)), _mistakes(after, labels, len(classes))
    changed = [pair for pair in was.keys() | now.keys() if was.get(pair, 0) != now.get(pair, 0)]
    first = sorted(
        changed,
        key=lambda pair: (
            -abs(now.get(pair, 0) - was.get(pair, 0)),
            -max(now.get(pair, 0), was.get(pair, 0)),
            pair,
        ),
    )
    return tuple(
        Confusion(classes[pair // len(classes)], classes[pair % len(classes)], was.get(pair, 0), now.get(pair, 0))
        for pair in first[:MOST_CONFUSIONS]
    )


def _mistakes(one: Answers, labels: Labels, classes: int) -> Mapping[int, int]:
    """Count the wrong answers by truth · K + answer."""
    pairs, counts = np.unique((labels * classes + one.chosen)[~one.right], return_counts=True)
    return dict(zip(pairs.tolist(), counts.tolist(), strict=True))


def reliability(before: Answers, after: Answers) -> Reliability:
    """Compare the confidence of decisions with how often they are right (Guo et al., ICML 2017)."""
    float_bins, bins = _bins(before), _bins(after)
    was, now = (100 * float(one.confidence.mean(dtype=np.float64)) for one in (before, after))
    return Reliability(
        float_ece_percent=_calibration_error(float_bins),
        ece_percent=_calibration_error(bins),
        float_confidence_percent=was,
        confidence_shift_pp=now - was,
        float_bins=float_bins,
        bins=bins,
    )


def _calibration_error(bins: tuple[Bin, ...]) -> float:
    gaps = sum(one.images * abs(one.confidence_percent - one.right_percent) for one in bins)
    return gaps / sum(one.images for one in bins)


def _bins(one: Answers) -> tuple[Bin, ...]:
    """Sort the decisions into bins (m/15, (m+1)/15] of confidence."""
    confidence, right = one.confidence.ravel().astype(np.float64), one.decided_right.ravel()
    which = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    counts, sums, rights = (np.bincount(which, weights, BINS) for weights in (None, confidence, right))
    return tuple(
        Bin(int(n), 100 * float(total / n), 100 * float(good / n))
        for n, total, good in zip(counts, sums, rights, strict=True)
        if n
    )


def worst(before: Answers, after: Answers, evaluation: Split, classes: tuple[str, ...]) -> tuple[WorstImage, ...]:
    """List the images with the largest change of any class's probability; those without any are left out."""
    changes = np.abs(after.probabilities - before.probabilities)
    largest, which = changes.max(axis=1), changes.argmax(axis=1)
    first = [i for i in np.argsort(-largest, kind="stable")[:WORST_IMAGES].tolist() if largest[i] > 0]
    return tuple(
        WorstImage(
            index=i,
            source=evaluation.sources[i],
            truth=_named(evaluation.labels[i], classes),
            float_answer=_named(before.chosen[i], classes),
            float_confidence_percent=_confidence(before, i, int(which[i])),
            answer=_named(after.chosen[i], classes),
            confidence_percent=_confidence(after, i, int(which[i])),
            change_pp=100 * float(largest[i]),
        )
        for i in first
    )


def _named(chosen: Labels, classes: tuple[str, ...]) -> str:
    """Name a class, or several joined by commas; `none` where an image has no label."""
    if np.ndim(chosen) == 0:
        return classes[int(chosen)]
    return ", ".join(classes[i] for i in np.flatnonzero(chosen)) or "none"


def _confidence(one: Answers, image: int, column: int) -> float:
    """Give a decision's confidence in percent; of a multi-label answer, that about the class that changed most."""
    confidence = one.confidence[image]
    return 100 * float(confidence if np.ndim(confidence) == 0 else confidence[column])
