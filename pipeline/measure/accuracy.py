"""Compare the artifact's answers with the float model's on the same images: how many, which, and how surely."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from bitferry.device.arrays import Outputs
from bitferry.device.errors import StageFailed
from bitferry.pipeline.data.split import Labels, Split
from bitferry.pipeline.figures import Accuracy, Change
from bitferry.pipeline.measure import metrics
from bitferry.pipeline.measure.answers import (
    Answers,
    Flags,
    answers,
    class_changes,
    confusions,
    flips,
    label_changes,
    reliability,
    worst,
)
from bitferry.pipeline.measure.metrics import COUNTED, Task
from bitferry.pipeline.recipe import Recipe
from bitferry.pipeline.statistics import images_to_decide, paired_bootstrap, sqnr_db, tango_interval
from bitferry.pipeline.verdict import Outcome

PLACES = {"top-1": 1, "top-5": 5}
SURE, LEAST_SURE = 0.995, 0.75
"""One-sided confidence of a gain that is doubted; and the least that a bound must have to be scaled to it."""
POWER = 0.8
MOST_IMAGES = 100_000_000


@dataclass(frozen=True)
class Terms:
    """What a metric is computed with, and the confidence of each of its drop's bounds."""

    task: Task
    classes: int
    options: Mapping[str, object]
    """Of a torchmetrics class."""
    confidence: float

    @staticmethod
    def of(recipe: Recipe) -> "Terms":
        """Take them from a recipe."""
        budget = recipe.budget
        return Terms(recipe.task, len(recipe.classes), budget.metric_options, budget.confidence)


def measure(baseline: Outputs, scores: Outputs, evaluation: Split, recipe: Recipe) -> Accuracy:
    """Compare the artifact's scores with the float model's, both N×K and in the order of the evaluation images.

    Raises StageFailed when the scores are not finite or of another shape, or the judged metric has no value.
    """
    refuse_strange(baseline, scores, evaluation.sources)
    labels, classes, task = evaluation.labels, recipe.classes, recipe.task
    before, after = answers(baseline, labels, task), answers(scores, labels, task)
    several = task == "multilabel"
    noise = sqnr_db(baseline, scores)
    terms = Terms.of(recipe)
    judged = change(recipe.metric, before, after, labels, terms)
    others = [name for name in COUNTED[task] if name != recipe.metric and (name != "top-5" or len(classes) > 5)]
    found = Accuracy(
        images=len(labels),
        judged=judged,
        others=tuple(change(name, before, after, labels, terms) for name in others),
        flips=flips(before, after),
        classes=(label_changes if several else class_changes)(before, after, labels, classes),
        confusions=() if several else confusions(before, after, labels, classes),
        reliability=reliability(before, after),
        sqnr_db=None if noise == np.inf else noise,
        worst=worst(before, after, evaluation, classes),
    )
    return replace(found, further_images=judge_accuracy(found, recipe.budget.accuracy_drop_pp)[2])


def percent(scores: Outputs, evaluation: Split, recipe: Recipe) -> float:
    """Give the judged metric of one model's scores N×K, in percent and without bounds."""
    labels, name = evaluation.labels, recipe.metric
    if name in PLACES:
        return 100 * float(_in_top(scores, labels, PLACES[name]).mean())
    one = answers(scores, labels, recipe.task)
    return 100 * _paired(name, one, one, labels, Terms.of(recipe))[0](np.arange(len(labels)))[0]


def judge_accuracy(accuracy: Accuracy, allowed_pp: float) -> tuple[Outcome, str, int | None]:
    """Pass when the drop's upper bound is allowed, fail when its lower bound is not, otherwise undecided.

    Gives the reason in words and, when undecided, how many further images would decide it.
    """
    judged = accuracy.judged
    sure = f"{'' if judged.metric == 'top-1' else f'in {judged.metric} '}at {100 * judged.confidence:g}% confidence"
    if judged.drop_upper_pp <= allowed_pp:
        return "pass", f"at most {judged.drop_upper_pp:.2f} pp worse {sure}, {allowed_pp:g} pp allowed", None
    if judged.drop_lower_pp > allowed_pp:
        return "fail", f"at least {judged.drop_lower_pp:.2f} pp worse {sure}, {allowed_pp:g} pp allowed", None
    further = _further(accuracy, allowed_pp)
    proved = f"{accuracy.images} images prove only that it is at most {judged.drop_upper_pp:.2f} pp worse {sure}"
    remedy = (
        "the drop is too near the allowed one for any practical number of images to decide"
        if further is None
        else f"about {further:,} further images would decide it ({POWER:.0%} power at the observed rates)"
    )
    return "undecided", f"{proved}, {allowed_pp:g} pp allowed; {remedy}", further


def _further(accuracy: Accuracy, allowed_pp: float) -> int | None:
    """Count the images still needed: by Tango's own test for top-1, else with the bound's width falling as 1/√n."""
    judged, images = accuracy.judged, accuracy.images
    if judged.metric == "top-1":
        counts = accuracy.flips.lost, accuracy.flips.gained
        allowed = allowed_pp / 100
        return images_to_decide(*counts, images, allowed, judged.confidence, power=POWER, most=MOST_IMAGES)
    gap = abs(allowed_pp - judged.drop_pp)
    above = judged.drop_pp <= allowed_pp
    width = judged.drop_upper_pp - judged.drop_pp if above else judged.drop_pp - judged.drop_lower_pp
    quantile = NormalDist().inv_cdf(judged.confidence)
    if quantile <= 0 or width <= 0 or gap == 0:
        return None
    needed = images * ((1 + NormalDist().inv_cdf(POWER) / quantile) * width / gap) ** 2
    return None if needed > MOST_IMAGES else max(int(np.ceil(needed)) - images, 1)


def refuse_strange(baseline: Outputs, scores: Outputs, sources: Sequence[str] = ()) -> None:
    """Raise StageFailed for scores that are not finite, not of one shape, or the same for every image.

    `sources` say where each image came from.
    """
    for whose, found in (("float model", baseline), ("artifact", scores)):
        if found.shape != baseline.shape:
            raise StageFailed(f"the {whose}'s scores have shape {found.shape}; expected {baseline.shape}")
        bad = np.flatnonzero(~np.isfinite(found).reshape(len(found), -1).all(1))
        if len(bad):
            first = f"{sources[bad[0]]}, " if sources else ""
            raise StageFailed(
                f"the {whose}'s scores of {len(bad)} of {len(found)} evaluation images have NaN or infinity (the first "
                f"is {first}number {bad[0] + 1}); expected finite scores"
            )
    if not baseline.any() or (len(baseline) > 1 and not np.ptp(baseline, axis=0).any()):
        raise StageFailed(
            "the float model's scores are the same for every image; expected scores that tell the images apart"
        )


def gained_pp(change: Change) -> float:
    """Say by how many points the artifact is better, at `SURE`: the bound's distance grows as the normal quantile."""
    reach, z = change.drop_upper_pp - change.drop_pp, NormalDist().inv_cdf
    return -(change.drop_pp + reach * z(SURE) / z(max(change.confidence, LEAST_SURE)))


def change(name: str, before: Answers, after: Answers, labels: Labels, terms: Terms) -> Change:
    """Compare a metric of the float model's answers and the artifact's."""
    if name in PLACES:
        first, second = (_in_top(one.scores, labels, PLACES[name]) for one in (before, after))
        return paired_change(name, first, second, terms.confidence)
    paired, higher_is_better = _paired(name, before, after, labels, terms)
    return resampled(name, paired, len(labels), terms.confidence, higher_is_better=higher_is_better)


def _paired(name: str, before: Answers, after: Answers, labels: Labels, terms: Terms) -> tuple[metrics.Paired, bool]:
    """Give a metric that is no count of images, and whether higher is better."""
    if name in COUNTED["multilabel"]:
        return metrics.ranked(name, metrics.rank(before.scores, labels), metrics.rank(after.scores, labels)), True
    metric = metrics.build(name, terms.options, terms.task, terms.classes)
    paired = metrics.torchmetric(metric, before.probabilities, after.probabilities, labels)
    return paired, bool(metric.higher_is_better)


def _in_top(scores: Outputs, labels: Labels, places: int) -> Flags:
    """Say whether each image's class is among the first `places`; of equal scores the lower index is first."""
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    ahead = (scores > own).sum(axis=1)
    level = np.flatnonzero((scores == own).sum(axis=1) > 1)
    earlier = np.arange(scores.shape[1]) < labels[level, None]
    ahead[level] += ((scores[level] == own[level]) & earlier).sum(axis=1)
    return np.asarray(ahead < places)


def paired_change(name: str, before: Flags, after: Flags, confidence: float) -> Change:
    """Compare which images two models answer rightly, N each, by Tango's interval."""
    lost, gained, images = int((before & ~after).sum()), int((after & ~before).sum()), len(before)
    lower, upper = tango_interval(lost, gained, images, confidence)
    return Change(
        metric=name,
        method="tango",
        float_percent=100 * int(before.sum()) / images,
        percent=100 * int(after.sum()) / images,
        drop_pp=100 * (lost - gained) / images,
        drop_lower_pp=100 * lower,
        drop_upper_pp=100 * upper,
        confidence=confidence,
    )


def resampled(
    name: str, metric: metrics.Paired, images: int, confidence: float, *, higher_is_better: bool = True
) -> Change:
    """Bound a metric by the bootstrap, never closer than Tango's bound for images none of which flipped.

    A resample cannot show what no image showed: where nothing changed, its bound would be exactly zero.
    """
    before, after = metric(np.arange(images))
    lower, upper = paired_bootstrap(metric, images, confidence)
    if not np.isfinite([before, after, lower, upper]).all():
        raise StageFailed(f"{name} has no value on these {images} images, or on many resamples of them; add images")
    low, high = (lower, upper) if higher_is_better else (-upper, -lower)
    drop = before - after if higher_is_better else after - before
    unseen = tango_interval(0, 0, images, confidence)[1]
    return Change(
        metric=name,
        method="bootstrap",
        float_percent=100 * before,
        percent=100 * after,
        drop_pp=100 * drop,
        drop_lower_pp=100 * min(low, drop - unseen),
        drop_upper_pp=100 * max(high, drop + unseen),
        confidence=confidence,
        higher_is_better=higher_is_better,
    )
