"""Findings about accuracy: the answers of tonight's artifact and float model beside those of the reference night."""

import math
from collections.abc import Iterator
from statistics import NormalDist

import numpy as np

from bitferry.pipeline.nightly import change_point
from bitferry.pipeline.nightly.apart import Apart, Who, apart
from bitferry.pipeline.nightly.change_point import Figures, Step
from bitferry.pipeline.nightly.judged import Change, Judged, Kind, day, finding, since
from bitferry.pipeline.nightly.night import Finding, Point

REACH = NormalDist().inv_cdf(0.975)
WIDER = 1.08
"""What the errors of shares are multiplied by, so that fewer than 1 in 100 nights is told to be worse by chance: they
have no room of their own, as those of ratios have in the 1 % for loading again."""


def found(one: Judged) -> Iterator[Finding]:
    """Find whether the artifact or the float model is right more or less often than in the reference night."""
    before, after = one.reference.answers, one.result.answers
    if before is None or after is None or not one.reference.measured or not one.result.measured:
        return
    same_data = one.reference.inputs.data.get("evaluation") == one.result.inputs.data.get("evaluation")
    of_float = apart(before, after, "float", same_data=same_data)
    of_artifact = apart(before, after, "artifact", same_data=same_data)
    if of_artifact:
        blame = _blame(of_float) if of_float and of_float.sure and of_float.drop_pp > 0 else ""
        yield from _judge(one, of_artifact, "artifact", same_data=same_data, blame=blame)
    if of_float:
        yield from _judge(one, of_float, "float", same_data=same_data)


def _blame(of_float: Apart) -> str:
    cause = "so the model, the data or the preprocessing is the cause, not quantization"
    return f"the float model lost {of_float.drop_pp:.2f} pp too, {cause}"


def _judge(one: Judged, apart: Apart, who: Who, *, same_data: bool, blame: str = "") -> Iterator[Finding]:
    """Tell of two nights that differ surely, or of a series of nights in which a change shows."""
    points, moved = _step(one, apart, who) if same_data else ([], None)
    night = since(points, moved) if moved else None
    if not apart.sure and moved is None:
        return
    sentence, change = _of_nights(one, apart, who)
    if moved and not apart.sure:
        sentence, change = _of_series(one, moved, points, night, who)
    told = "; ".join(part for part in (sentence, apart.how, blame) if part)
    kind: Kind = "accuracy" if who == "artifact" else "float accuracy"
    worse = (change.after or 0.0) < (change.before or 0.0)
    yield finding(one, kind, "regression" if worse else "improvement", told, change, since=night)


def _of_nights(one: Judged, apart: Apart, who: Who) -> tuple[str, Change]:
    """Say what lies between the reference and tonight."""
    low, high = sorted((apart.lower_pp, apart.upper_pp)) if apart.drop_pp > 0 else (-apart.upper_pp, -apart.lower_pp)
    size, word = abs(apart.drop_pp), "fewer" if apart.drop_pp > 0 else "more"
    figures = f"({size:.2f} pp, {low:.2f} to {high:.2f})"
    than = f"than on {day(one.night, one.tonight)}"
    if one.result.answers is not None and one.result.answers.labels.ndim == 3:
        sentence = f"{_subject(one, who)} has a mIoU {'lower' if apart.drop_pp > 0 else 'higher'} {than} {figures}"
    else:
        right = f"{abs(apart.fewer):,} of {apart.images:,} images"
        sentence = f"{_subject(one, who)} answers {right} {word} right {than} {figures}{_whole(one)}"
    return sentence, Change(apart.before, apart.after, -apart.upper_pp, -apart.lower_pp, "pp")


def _of_series(one: Judged, step: Step, points: list[Point], night: str | None, who: Who) -> tuple[str, Change]:
    """Say what the nights since the reference show together."""
    low, high = sorted((abs(step.lower), abs(step.upper)))
    size, word = abs(step.size), "worse" if step.size < 0 else "better"
    began = f"since {day(night, one.tonight)}" if night else f"than on {day(one.night, one.tonight)}"
    sentence = (
        f"{_subject(one, who)} is {size:.2f} pp {word} {began} ({low:.2f} to {high:.2f}), in {len(points)} nights"
    )
    return sentence, Change(step.before, step.before + step.size, step.lower, step.upper, "pp")


def _subject(one: Judged, who: Who) -> str:
    return one.name if who == "artifact" else f"the float model of {one.name}"


def _whole(one: Judged) -> str:
    """Say what is counted where it is not what the budget is about."""
    verdict = one.result.measured
    metric = verdict.accuracy.judged.metric if verdict else ""
    return "" if metric == "top-1" else f"; whole answers are counted, as {metric} is not kept image by image"


def _step(one: Judged, apart: Apart, who: Who) -> tuple[list[Point], Step | None]:
    """Look for a change in the share of right answers night by night, of the same images.

    Nights in a row with one share are one draw: what did not change is answered alike, and proves nothing anew.
    """
    points: list[Point] = []
    for point in one.points:
        percent = _percent(point, who)
        known = percent is not None and point.images == apart.images
        if known and not (points and percent == _percent(points[-1], who)):
            points.append(point)
    percents = np.array([_percent(point, who) for point in points], float)
    if len(points) < 2 or abs(percents[-1] - apart.after) > 1e-6:  # the judged metric is another than what is counted
        return points, None
    return points, step(percents, apart)


def step(percents: Figures, apart: Apart) -> Step | None:
    """Look for a change in N nights' shares, of which `apart` tells the reference from the last.

    A night scatters by half of what lies between two of them, in variance.
    """
    error = WIDER * (apart.upper_pp - apart.lower_pp) / (2 * REACH * math.sqrt(2))
    return change_point.follow(percents, np.full(len(percents), error))[-1]


def _percent(point: Point, who: Who) -> float | None:
    return point.percent if who == "artifact" else point.float_percent
