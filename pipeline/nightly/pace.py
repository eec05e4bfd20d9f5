"""Findings about latency: the artifact's time over its baseline's, of every night that one kind of machine measured."""

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist

import numpy as np

from bitferry.pipeline.nightly import change_point
from bitferry.pipeline.nightly.change_point import Figures, Step
from bitferry.pipeline.nightly.judged import Change, Judged, day, finding, since
from bitferry.pipeline.nightly.night import Finding, Point, disturbed
from bitferry.pipeline.statistics import RELOAD

REACH = NormalDist().inv_cdf(0.975)
SPIKE, SPIKE_NIGHTS = 0.05, 5
"""How far, as a share, and from the median of how many nights, one night must lie to be worth a notice."""


def found(one: Judged) -> Iterator[Finding]:
    """Find whether the artifact became slower or faster against its baseline, on tonight's kind of machine."""
    points = [point for point in one.points if point.kind == one.result.kind and _ratio(point)]
    if len(points) < 2:
        return
    logs, errors = series(points)
    step = change_point.follow(logs, errors)[-1]
    if step:
        yield _told(one, points, step)
    elif points[-1].night == one.tonight:
        yield from _spike(one, logs, errors)


def series(points: Sequence[Point]) -> tuple[Figures, Figures]:
    """Give the logarithm of each night's ratio and its standard error, that of loading the model anew included."""
    ratios = [_ratio(point) for point in points]
    logs = np.log(np.array(ratios, float))
    return logs[:, 0], errors_of(logs)


def errors_of(logs: Figures) -> Figures:
    """Give each night's standard error from the logarithms of its ratio and of its interval's ends, N×3."""
    within = np.maximum((logs[:, 2] - logs[:, 1]) / 2 - RELOAD, 0.0) / REACH
    return np.asarray(np.hypot(within, RELOAD))


def _ratio(point: Point) -> tuple[float, float, float] | None:
    if point.ratio is None or point.ratio_lower is None or point.ratio_upper is None:
        return None
    return point.ratio, point.ratio_lower, point.ratio_upper


def _told(one: Judged, points: Sequence[Point], step: Step) -> Finding:
    night = since(points, step)
    times, low, high = (math.exp(size) for size in (step.size, step.lower, step.upper))
    began = (
        f"since {day(night, one.tonight)}"
        if night
        else f"{'as' if times >= 2 else 'than'} on {day(points[0].night, one.tonight)}"
    )
    sentence = f"{one.name} takes {_more(times)} {began} ({_range(low, high)}), {_over(one)}"
    before = math.exp(step.before)
    change = Change(before, before * times, low, high, "ratio")
    doubtful = [one.result, *([one.reference] if night is None else [])]
    if any(disturbed(result.verdict) for result in doubtful):
        told = f"{sentence}; other processes were busy meanwhile, so this proves nothing"
        return finding(one, "latency", "notice", told, change, since=night)
    return finding(one, "latency", "regression" if times > 1 else "improvement", sentence, change, since=night)


def _more(times: float) -> str:
    """Say a factor in percent, or from 2 on as a factor."""
    if times >= 2:
        return f"{times:.1f} times as long"
    return f"{abs(times - 1):.1%} {'longer' if times > 1 else 'less time'}".replace("%", " %")


def _range(low: float, high: float) -> str:
    if high >= 2:
        return f"{low:.1f} to {high:.1f} times"
    first, last = sorted((abs(low - 1), abs(high - 1)))
    return f"{100 * first:.1f} to {100 * last:.1f} %"


def _over(one: Judged) -> str:
    verdict = one.result.measured
    own = verdict and verdict.latency.runtime_speedup
    other = "float ONNX" if verdict and verdict.latency.baseline == "float ONNX" else "eager PyTorch in float"
    return f"against {'the same runtime in float' if own else other}, timed in the same nights"


def _spike(one: Judged, logs: Figures, errors: Figures) -> Iterator[Finding]:
    """Tell of a night that lies apart: the next night says whether it stays."""
    usual = logs[-1 - SPIKE_NIGHTS : -1]
    away = float(logs[-1] - np.median(usual))
    if abs(away) <= max(math.log1p(SPIKE), math.sqrt(change_point.LIMIT) * float(errors[-1])):
        return
    reach = REACH * float(errors[-1])
    sentence = f"{one.name} takes {_more(math.exp(away))} tonight, {_over(one)}; one night is no change yet"
    usually = math.exp(float(np.median(usual)))
    change = Change(usually, math.exp(float(logs[-1])), math.exp(away - reach), math.exp(away + reach), "ratio")
    yield finding(one, "latency", "notice", sentence, change)
