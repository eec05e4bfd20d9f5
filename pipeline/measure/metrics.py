"""Metrics that are no count per image: mAP and AUC of multi-label scores, and torchmetrics' classes by name."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from bitferry.device.arrays import Outputs
from bitferry.device.errors import InputError, first_line
from bitferry.pipeline.data.split import Labels
from bitferry.pipeline.statistics import Indices

if TYPE_CHECKING:
    from torch import Tensor
    from torchmetrics import Metric

Task = Literal["classification", "multilabel", "segmentation"]
Values = NDArray[np.float64]
Paired = Callable[[Indices], tuple[float, float]]
"""A metric of the float model and of the artifact on the images at these positions, as shares."""

COUNTED: dict[Task, tuple[str, ...]] = {
    "classification": ("top-1", "top-5"),
    "multilabel": ("mAP", "AUC"),
    "segmentation": ("mIoU", "pixel accuracy"),
}
"""Measured for each task, the one that is judged by default first."""
TORCHMETRICS = "torchmetrics:"
KINDS: dict[Task, tuple[str, str]] = {
    "classification": ("multiclass", "num_classes"),
    "multilabel": ("multilabel", "num_labels"),
}
"""What torchmetrics calls a task, and how its constructors are told the number of classes."""


@dataclass(frozen=True)
class Ranking:
    """The images in each class's order of falling scores, sorted once so that a resample is only counted anew."""

    order: Indices
    """K×N: image positions, highest score first."""
    hits: Indices
    """Positions in the flattened order that hold an image of the class."""
    rows: Indices
    """The class of each hit."""
    first: Indices
    """The flattened position, counted with one more per row, where each hit's group of equal scores starts."""
    last: Indices
    """The same where the group ends."""
    hits_before: Indices
    """How many hits come before each hit's group, in all classes."""
    hits_through: Indices
    """How many come up to its end."""


def rank(scores: Outputs, labels: Labels) -> Ranking:
    """Sort the images of each class by their scores; both N×K."""
    order = np.argsort(-scores, axis=0, kind="stable").T
    ranked = np.take_along_axis(scores.T, order, axis=1)
    classes, images = order.shape
    starts = np.ones((classes, images), dtype=bool)
    starts[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    hit = np.take_along_axis(labels.T, order, axis=1).ravel() > 0
    hits = np.flatnonzero(hit)
    opening = np.append(np.flatnonzero(starts), starts.size)
    group = np.cumsum(starts)[hits] - 1
    before = np.append(0, np.cumsum(hit))
    rows = hits // images
    return Ranking(
        order=order,
        hits=hits,
        rows=rows,
        first=opening[group] + rows,
        last=opening[group + 1] + rows,
        hits_before=before[opening[group]],
        hits_through=before[opening[group + 1]],
    )


def class_values(ranking: Ranking, weights: Values) -> tuple[Values, Values]:
    """Give each class's average precision and area under the ROC curve, images counted `weights` times.

    Equal scores are one threshold: average precision is Σ (Rₖ − Rₖ₋₁)·Pₖ, and a tied pair counts a half in the area.
    A class that all images or none are of has NaN in both.
    """
    classes, images = ranking.order.shape
    counts = weights[ranking.order]
    through = np.zeros((classes, images + 1))
    np.cumsum(counts, axis=1, out=through[:, 1:])
    of_hit = counts.ravel()[ranking.hits]
    found = np.append(0.0, np.cumsum(of_hit))
    positives = np.bincount(ranking.rows, of_hit, classes)
    row_start = np.append(0.0, np.cumsum(positives))[ranking.rows]
    found_first, found_last = found[ranking.hits_before] - row_start, found[ranking.hits_through] - row_start
    count_first, count_last = through.ravel()[ranking.first], through.ravel()[ranking.last]
    precision = found_last / np.maximum(count_last, 1)
    negatives = weights.sum() - positives
    false_alarms = (count_first - found_first + count_last - found_last) / 2
    below = negatives[ranking.rows] - false_alarms
    usable = (positives > 0) & (negatives > 0)
    average = np.bincount(ranking.rows, of_hit * precision, classes) / np.where(usable, positives, np.nan)
    area = np.bincount(ranking.rows, of_hit * below, classes) / np.where(usable, positives * negatives, np.nan)
    return average, area


def ranked(name: str, baseline: Ranking, artifact: Ranking) -> Paired:
    """Give `mAP` or `AUC`, macro-averaged over the classes that some but not all of the drawn images are of."""
    images = baseline.order.shape[1]
    which = COUNTED["multilabel"].index(name)

    def measure(drawn: Indices) -> tuple[float, float]:
        weights = np.bincount(drawn, minlength=images).astype(np.float64)
        return _mean(class_values(baseline, weights)[which]), _mean(class_values(artifact, weights)[which])

    return measure


def _mean(values: Values) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else np.nan


def torchmetric(metric: "Metric", baseline: Outputs, artifact: Outputs, labels: Labels) -> Paired:
    """Compute a torchmetrics metric of both models' probabilities N×K."""
    import torch  # noqa: PLC0415 - seconds to import, for these metrics only

    both = torch.from_numpy(baseline), torch.from_numpy(artifact)
    truth = torch.from_numpy(labels)
    if hasattr(metric, "validate_args"):
        metric.validate_args = False  # it was on for `build`'s trial; a thousand draws are of the same values

    def measure(drawn: Indices) -> tuple[float, float]:
        picked = torch.from_numpy(drawn)
        before, after = (float(_value(metric, scores[picked], truth[picked])) for scores in both)
        return before, after

    return measure


def _value(metric: "Metric", scores: "Tensor", labels: "Tensor") -> "Tensor":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class that a draw has no image of is no news
        metric.reset()
        metric.update(scores, labels)
        value: Tensor = metric.compute()
        return value


def build(name: str, options: Mapping[str, object], task: Task, classes: int) -> "Metric":
    """Make the metric `torchmetrics:CLASS`, told the number of classes, and try it on a few made-up scores.

    Raises InputError when there is none of that name for the task, its options are wrong, it gives no single number,
    or it does not say whether higher is better.
    """
    if task not in KINDS:
        others = ", ".join(COUNTED[task])
        raise InputError(f"'{name}' needs the scores of every pixel, which are not kept; task '{task}' has {others}")
    import torchmetrics.classification as library  # noqa: PLC0415 - seconds to import, for these metrics only

    title, (kind, count) = name.removeprefix(TORCHMETRICS), KINDS[task]
    wrapper = not title.startswith(("Binary", "Multiclass", "Multilabel"))
    known = [n for n in library.__all__ if n.lower().startswith(kind) or f"{kind.title()}{n}" in library.__all__]
    if title not in known:
        close = get_close_matches(title, known, n=1)
        hint = f", did you mean '{TORCHMETRICS}{close[0]}'?" if close else ""
        raise InputError(f"torchmetrics has no {kind} metric called '{title}'{hint}")
    told = {count: classes} | ({"task": kind} if wrapper else {}) | dict(options)
    try:
        metric: Metric = getattr(library, title)(**told)
        shape = _trial(metric, task, classes)
    except Exception as error:  # torchmetrics raises a dozen kinds on what it cannot use
        raise InputError(f"'{name}' cannot be used with {told}: {first_line(error)}") from error
    if shape != ():
        raise InputError(f"'{name}' gives no single number with {told}; set its `average`, or name another")
    if metric.higher_is_better is None:
        raise InputError(f"'{name}' does not say whether higher is better, so no drop can be judged; name another")
    return metric


def higher_is_better(name: str, options: Mapping[str, object], task: Task, classes: int) -> bool:
    """Say whether more of a metric is better, as of all that are counted here."""
    return not name.startswith(TORCHMETRICS) or bool(build(name, options, task, classes).higher_is_better)


def _trial(metric: "Metric", task: Task, classes: int) -> object:
    import torch  # noqa: PLC0415 - seconds to import, for these metrics only

    scores = torch.full((classes, classes), 0.4 / classes) + 0.6 * torch.eye(classes)
    labels = torch.eye(classes, dtype=torch.int64) if task == "multilabel" else torch.arange(classes)
    return getattr(_value(metric, scores[:64], labels[:64]), "shape", None)
