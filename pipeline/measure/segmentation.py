"""Class maps of the float model and the artifact, compared image by image: mIoU, pixels, classes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitferry.device import kept
from bitferry.device.errors import StageFailed
from bitferry.device.kept import Kept
from bitferry.device.pixels import IGNORED, Maps, thin_masks
from bitferry.pipeline.data.split import Labels, Split
from bitferry.pipeline.figures import Accuracy, Change, ClassChange, Flips, WorstImage
from bitferry.pipeline.measure import metrics
from bitferry.pipeline.measure.accuracy import judge_accuracy, refuse_strange, resampled
from bitferry.pipeline.measure.answers import of_pixels, reliability
from bitferry.pipeline.measure.metrics import COUNTED, Values
from bitferry.pipeline.recipe import Recipe
from bitferry.pipeline.statistics import Indices, mcnemar_mid_p, sqnr_db

WORST_IMAGES = 12
MOST_NAMED = 3
Counted = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Counts:
    """Pixels of each image and class, N×K each; those that the mask says do not count are left out."""

    labelled: Counted
    answered: Counted
    right: Counted


def counts(maps: Maps, labels: Labels, classes: int) -> Counts:
    """Count the pixels of maps N×H×W against masks of the same shape."""
    rows = [_count(found, mask, classes) for found, mask in zip(maps, labels, strict=True)]
    labelled, answered, right = np.array(rows, np.int64).reshape(-1, 3, classes).transpose(1, 0, 2)
    return Counts(labelled, answered, right)


def _count(found: Maps, mask: Labels, classes: int) -> list[Counted]:
    counted = mask != IGNORED
    truth, answer = mask[counted], found[counted]
    return [np.bincount(one, minlength=classes) for one in (truth, answer, truth[truth == answer])]


def ious(found: Counts, weights: Values) -> Values:
    """Give each class's intersection over union, images counted `weights` times; NaN where no pixel is labelled so.

    The union is over all images together. Classes that are nowhere in the masks are left out of the mean, for any
    model alike; a pixel wrongly answered so still counts against the class that it is of.
    """
    labelled, answered, right = (weights @ one for one in (found.labelled, found.answered, found.right))
    return np.where(labelled > 0, right / np.maximum(labelled + answered - right, 1), np.nan)


def value(name: str, found: Counts, weights: Values) -> float:
    """Give `mIoU` or `pixel accuracy` as a share, images counted `weights` times."""
    if name == COUNTED["segmentation"][0]:
        known = ious(found, weights)
        known = known[~np.isnan(known)]
        return float(known.mean()) if known.size else np.nan
    labelled = float((weights @ found.labelled).sum())
    return float((weights @ found.right).sum()) / labelled if labelled else np.nan


def paired(name: str, before: Counts, after: Counts) -> metrics.Paired:
    """Give a metric of both models on the images drawn."""
    images = len(before.right)

    def measure(drawn: Indices) -> tuple[float, float]:
        weights = np.bincount(drawn, minlength=images).astype(np.float64)
        return value(name, before, weights), value(name, after, weights)

    return measure


def change(name: str, before: Counts, after: Counts, confidence: float) -> Change:
    """Bound the drop of a metric by the bootstrap over images."""
    return resampled(name, paired(name, before, after), len(before.right), confidence)


def measure(baseline: Kept, artifact: Kept, evaluation: Split, recipe: Recipe) -> Accuracy:
    """Compare the artifact's maps with the float model's, in the order of the evaluation images.

    Raises StageFailed when the scores are not finite or of another shape, or no pixel counts.
    """
    refuse_strange(baseline.scores, artifact.scores, evaluation.sources)
    maps, labels, classes = _maps(baseline, artifact), evaluation.labels, len(recipe.classes)
    before, after = (counts(one, labels, classes) for one in maps)
    changed = np.array([int(((a != b) & (m != IGNORED)).sum()) for a, b, m in zip(*maps, labels, strict=True)])
    noise = sqnr_db(baseline.scores, artifact.scores)
    confidence, few = recipe.budget.confidence, thin_masks(labels, classes)
    found = Accuracy(
        images=len(labels),
        judged=change(recipe.metric, before, after, confidence),
        others=tuple(
            change(name, before, after, confidence) for name in COUNTED["segmentation"] if name != recipe.metric
        ),
        flips=_flips(before, after, changed),
        classes=_classes(before, after, recipe.classes),
        confusions=(),
        reliability=reliability(of_pixels(baseline.scores, few), of_pixels(artifact.scores, few)),
        sqnr_db=None if noise == np.inf else noise,
        worst=_worst(maps, (before, after), changed, evaluation, recipe.classes),
    )
    return replace(found, further_images=judge_accuracy(found, recipe.budget.accuracy_drop_pp)[2])


def percent(answers: Kept, evaluation: Split, recipe: Recipe) -> float:
    """Give the judged metric of one model's answers, in percent and without bounds."""
    (maps,) = _maps(answers)
    found = counts(maps, evaluation.labels, len(recipe.classes))
    return 100 * value(recipe.metric, found, np.ones(len(maps)))


def constant_percent(labels: Labels) -> float:
    """Give the mIoU, in percent, of answering the commonest class for every pixel of masks N×H×W."""
    rows = [np.bincount(mask[mask != IGNORED], minlength=IGNORED) for mask in labels]
    found = np.sum(rows, axis=0)
    total, classes = int(found.sum()), int((found > 0).sum())
    return 100 * float(found.max()) / max(1, total * classes)


def packed(found: Counts) -> Labels:
    """Give N×K×2: each image's pixels of each class that are rightly answered, and all that are answered, so."""
    return np.stack([found.right, found.answered], axis=-1)


def perfect(found: Counts) -> Labels:
    """Give what `packed` gives where every answer is right."""
    return np.stack([found.labelled, found.labelled], axis=-1)


def unpacked(labels: Labels, answers: Labels) -> Counts:
    """Give the counts that were written by `perfect` and `packed`."""
    return Counts(labels[..., 0], answers[..., 1], answers[..., 0])


def _maps(*found: Kept) -> tuple[Maps, ...]:
    maps = kept.maps(*found)
    if len(maps) < len(found):
        raise StageFailed("a model gave scores N×K where a class for every pixel, N×K×H×W, was expected")
    return maps


def _flips(before: Counts, after: Counts, changed: Counted) -> Flips:
    """Count the images with fewer and with more right pixels, and those with any other pixel."""
    gain = after.right.sum(axis=1) - before.right.sum(axis=1)
    lost, gained = int((gain < 0).sum()), int((gain > 0).sum())
    share = 100 * int(changed.sum()) / max(1, int(before.labelled.sum()))
    return Flips(lost, gained, int((changed > 0).sum()), mcnemar_mid_p(lost, gained), pixels_percent=share)


def _classes(before: Counts, after: Counts, classes: Sequence[str]) -> tuple[ClassChange, ...]:
    images = (before.labelled > 0).sum(axis=0)
    was, now = (ious(one, np.ones(len(one.right))) for one in (before, after))
    return tuple(
        ClassChange(name, int(n), *(None if np.isnan(share) else 100 * float(share) for share in (a, b)))
        for name, n, a, b in zip(classes, images, was, now, strict=True)
    )


def _worst(
    maps: Sequence[Maps],
    found: tuple[Counts, Counts],
    changed: Counted,
    evaluation: Split,
    classes: Sequence[str],
) -> tuple[WorstImage, ...]:
    """List the images with the largest share of pixels whose class changed; those without any are left out."""
    counted = np.maximum(found[0].labelled.sum(axis=1), 1)
    first = np.argsort(-changed / counted, kind="stable")[:WORST_IMAGES].tolist()
    right = [100 * one.right.sum(axis=1) / counted for one in found]
    return tuple(
        WorstImage(
            index=i,
            source=evaluation.sources[i],
            truth=_named(found[0].labelled[i], classes),
            float_answer=_named(found[0].answered[i], classes),
            float_confidence_percent=float(right[0][i]),
            answer=_named(found[1].answered[i], classes),
            confidence_percent=float(right[1][i]),
            change_pp=100 * float(changed[i] / counted[i]),
        )
        for i in first
        if changed[i]
    )


def _named(pixels: Counted, classes: Sequence[str]) -> str:
    """Name the classes of an image, those of most pixels first."""
    first = [int(k) for k in np.argsort(-pixels, kind="stable") if pixels[k]]
    more = f" and {len(first) - MOST_NAMED} more" if len(first) > MOST_NAMED else ""
    return ", ".join(classes[k] for k in first[:MOST_NAMED]) + more or "none"
