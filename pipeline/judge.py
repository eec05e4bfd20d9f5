"""Figures → pass, fail or undecided, with the reasons and one sentence: every check that can decide, in one place."""

from dataclasses import dataclass

import numpy as np

from pipeline.data.split import Labels
from pipeline.figures import Accuracy, Change, Latency
from pipeline.measure.accuracy import judge_accuracy
from pipeline.measure.golden import LEAST_LIMIT
from pipeline.measure.segmentation import constant_percent
from pipeline.recipe import Budget
from pipeline.statistics import binomial_tail
from pipeline.training.record import Record
from pipeline.verdict import Golden, Ladder, Outcome

GUESSING = 0.05
"""How likely as many right answers by guessing may be before a float model is said to know nothing."""
SHORT_OF_KNOWN = 2.0
"""How many points a float model may be below what it is known to reach: of another sample, another decoder."""
SPREADS = 3.0
"""How many standard deviations of both samples are allowed besides."""
ANY_DROP = 100.0
"""A budget that allows this is not about accuracy."""
Check = tuple[Outcome, str]


@dataclass(frozen=True)
class Measured:
    """The figures that a verdict is drawn from."""

    accuracy: Accuracy
    latency: Latency
    ladder: Ladder
    golden: Golden


def judge(
    measured: Measured, budget: Budget, labels: Labels, what: str, record: Record | None = None
) -> tuple[Outcome, str, tuple[str, ...]]:
    """Pass when every bound is inside the budget, fail when one is outside, otherwise undecided.

    `what` names the artifact, as in `int8 on openvino`; `record` is what its weights' file says.
    Gives the outcome, the headline and the reasons.
    """
    drop, reason, _ = judge_accuracy(measured.accuracy, budget.accuracy_drop_pp)
    checks = [(drop, reason), _speed(measured.latency, budget), *_baseline(measured.accuracy, labels, budget)]
    checks += [*_recorded(measured.accuracy, record), *_golden(measured.golden)]
    outcomes = [outcome for outcome, _ in checks]
    worst: Outcome = "fail" if "fail" in outcomes else "undecided" if "undecided" in outcomes else "pass"
    said = headline(worst, drop, what, measured, budget)
    return worst, said, tuple(reason for _, reason in checks)


def headline(outcome: Outcome, drop: Outcome, what: str, measured: Measured, budget: Budget) -> str:
    """Say the verdict in one sentence; `drop` is the outcome of the accuracy alone."""
    latency, change = measured.latency, measured.accuracy.judged
    ratio = latency.speedup.value
    pace = f"{ratio:.1f}× faster" if ratio >= 1 else f"{1 / ratio:.1f}× slower"
    pace += f" than {latency.baseline}"
    if budget.min_speedup is not None and _speed(latency, budget)[0] != "pass":
        pace += f" ({budget.min_speedup:g}× asked for)"
    if _disturbed(latency):
        pace += " (timed beside other load)"
    bound = f"at least {change.drop_lower_pp:.2f}" if drop == "fail" else f"at most {change.drop_upper_pp:.2f}"
    worse = f"{bound} pp worse ({change.metric}), {100 * change.confidence:g}% sure"
    opening = {"pass": "Ship", "fail": "Do not ship", "undecided": "Undecided about"}[outcome]
    return f"{opening} {what}: {pace}, {worse}"


def _speed(timed: Latency, budget: Budget) -> Check:
    """Judge the interval; beside other load, which slows PyTorch most, against eager's fastest tenth as well."""
    ratio, wanted = timed.speedup, budget.min_speedup
    told = f"{ratio.lower:.2f} to {ratio.upper:.2f} times as fast as {timed.eager.name}"
    if wanted is None:
        return "pass", f"{told}, no minimum asked for"
    least = timed.eager.timing.fastest_tenth_ms / timed.artifact.timing.median_ms
    if _disturbed(timed) and ratio.lower >= wanted > least:
        return "undecided", f"{told}, {wanted:g} asked for; timed beside other load, which flatters: verify when quiet"
    if ratio.lower >= wanted:
        return "pass", f"{told}, {wanted:g} asked for"
    return ("fail" if ratio.upper < wanted else "undecided"), f"{told}, {wanted:g} asked for"


def _disturbed(timed: Latency) -> bool:
    return any(one.kind == "other load" for one in timed.suspicions)


def _baseline(accuracy: Accuracy, labels: Labels, budget: Budget) -> list[Check]:
    """Doubt a float model that guesses, or misses what it is known for: nothing can be lost where nothing is right."""
    judged, known = accuracy.judged, budget.float_percent
    if known is not None and _short(judged, known) > SHORT_OF_KNOWN:
        told = f"the float model itself reaches {judged.metric} {judged.float_percent:.1f} %, not the {known:g} % that"
        remedy = "it is not asked what it was trained for: check labels, class order, weights and preprocessing"
        return [("fail", f"{told} budget.float_percent records; {remedy}")]
    if budget.accuracy_drop_pp >= ANY_DROP:
        return []
    if labels.ndim == 3:
        overlap, constant = _float_percent(accuracy, "mIoU"), constant_percent(labels)
        guesses = overlap <= constant
        told = (
            f"the float model itself has a mIoU of {overlap:.1f} %, and the commonest class everywhere {constant:.1f} %"
        )
    elif labels.ndim == 2:
        area = _float_percent(accuracy, "AUC")
        guesses = area <= 50
        told = f"the float model itself ranks no better than chance (AUC {area:.1f} %)"
    else:
        chance = float(np.bincount(labels).max() / len(labels))  # always answering the commonest class
        right = round(len(labels) * _float_percent(accuracy, "top-1") / 100)
        guesses = binomial_tail(right, len(labels), chance) > GUESSING
        told = f"the float model itself is right on {right / len(labels):.1%}, and guessing gives {chance:.1%}"
    remedy = "check labels, class order, weights and preprocessing, or allow a drop of 100 pp to judge speed alone"
    return [("undecided", f"{told}: {remedy}")] if guesses else []


def _recorded(accuracy: Accuracy, record: Record | None) -> list[Check]:
    """Hold the float model against what its training recorded: more below it than two samples of images differ by."""
    judged = accuracy.judged
    if record is None or record.percent is None or record.metric != judged.metric or not record.images:
        return []
    share = min(max(record.percent / 100, judged.float_percent / 100, 0.0), 1 - 1 / (record.images + 2))
    spread = 100 * (share * (1 - share) * (1 / record.images + 1 / accuracy.images)) ** 0.5
    if _short(judged, record.percent) <= SHORT_OF_KNOWN + SPREADS * spread:
        return []
    told = (
        f"the float model itself reaches {judged.metric} {judged.float_percent:.1f} %, not the {record.percent:.1f} %"
    )
    cause = f"the preprocessing is another one: {', '.join(record.differences)}" if record.differences else ""
    remedy = cause or "the images, their labels or the order of the classes are not those it was trained with"
    return [("fail", f"{told} that its training recorded in the weights' file; {remedy}")]


def _short(judged: Change, known: float) -> float:
    """Say how much worse the float model is than what is known of it, in points."""
    return known - judged.float_percent if judged.higher_is_better else judged.float_percent - known


def _float_percent(accuracy: Accuracy, metric: str) -> float:
    """Give the float model's value of a metric, whichever is judged."""
    changes = (accuracy.judged, *accuracy.others)
    return next(one.float_percent for one in changes if one.metric == metric)


def _golden(proved: Golden) -> list[Check]:
    """Fail when a fresh process answers otherwise, or when torchvision reads a file otherwise."""
    checks: list[Check] = []
    for file in proved.files:
        if not file.score_difference <= LEAST_LIMIT:
            told = f"by {file.score_difference:.2g} of the largest score, at most {LEAST_LIMIT:.2g} allowed"
            checks.append(("fail", f"{file.name} ({file.kind}): a fresh process answers otherwise, {told}"))
        if file.torchvision_mean is not None and file.torchvision_mean > proved.torchvision_limit:
            told = f"by {file.torchvision_mean:.1f} levels on average, {proved.torchvision_limit:g} allowed"
            checks.append(("fail", f"{file.name} ({file.kind}): torchvision decodes and resizes it otherwise, {told}"))
    return checks
