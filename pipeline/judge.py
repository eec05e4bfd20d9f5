"""Figures → pass, fail or undecided, with the reasons and one sentence: every check that can decide, in one place."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from bitferry.pipeline.data.split import Labels
from bitferry.pipeline.figures import Accuracy, Change, Latency, Ratio
from bitferry.pipeline.measure.accuracy import gained_pp, judge_accuracy
from bitferry.pipeline.measure.golden import LEAST_LIMIT
from bitferry.pipeline.measure.segmentation import constant_percent
from bitferry.pipeline.recipe import Budget
from bitferry.pipeline.statistics import binomial_tail
from bitferry.pipeline.training.record import Record
from bitferry.pipeline.verdict import Golden, Ladder, Outcome
from bitferry.targets import Layer, Precision

GUESSING = 0.05
"""How likely as many right answers by guessing may be before a float model is said to know nothing."""
SHORT_OF_KNOWN = 2.0
"""How many points a float model may be below what it is known to reach: of another sample, another decoder."""
SPREADS = 3.0
"""How many standard deviations of both samples are allowed besides."""
ANY_DROP = 100.0
"""A budget that allows this is not about accuracy."""
TOO_WIDE = 4.0
"""Of a ratio's interval, upper over lower end, from which on nothing is claimed of the speed."""
WIDE = 1.5
"""The same, from which on only the end nearer to 1 is claimed."""
FEW_DIFFERENT = 0.9
"""Of the evaluation images, that must differ from all others."""
MANY_FLIPS, LOUD_DB = 0.05, 20.0
"""Of the images: so many other answers, with so little signal over noise, are told even where the accuracy is kept."""
ORDER: tuple[Outcome, ...] = ("fail", "undecided", "unmeasured", "pass")
Check = tuple[Outcome, str]


@dataclass(frozen=True)
class Measured:
    """The figures that a verdict is drawn from."""

    accuracy: Accuracy
    latency: Latency
    ladder: Ladder
    golden: Golden
    asked: Precision = "float32"
    layers: Sequence[Layer] = ()
    """As the runtime ran them."""
    different: int | None = None
    """How many of the evaluation images differ from all others; None where that is not known."""


def judge(
    measured: Measured, budget: Budget, labels: Labels, what: str, record: Record | None = None
) -> tuple[Outcome, str, tuple[str, ...]]:
    """Pass when every bound is inside the budget, fail when one is outside, otherwise undecided.

    `what` names the artifact, as in `int8 on openvino`; `record` is what its weights' file says.
    Gives the outcome, the headline and the reasons, those first that keep it from passing.
    """
    drop, reason = judge_answers(measured.accuracy, budget)
    checks = [(drop, reason), _speed(measured.latency, budget), *_baseline(measured.accuracy, labels, budget)]
    checks += [*_recorded(measured.accuracy, record), *_golden(measured.golden), *_ran(measured)]
    checks += [*_repeated(measured), *_differing(measured.accuracy)]
    checks.sort(key=lambda check: ORDER.index(check[0]))
    outcomes = [outcome for outcome, _ in checks]
    worst: Outcome = "fail" if "fail" in outcomes else "undecided" if "undecided" in outcomes else "pass"
    said = headline(worst, drop, what, measured, budget)
    return worst, said, tuple(reason for _, reason in checks)


def judge_answers(accuracy: Accuracy, budget: Budget) -> Check:
    """Judge the drop; where it is allowed, doubt a gain that rounding cannot bring."""
    drop, reason, _ = judge_accuracy(accuracy, budget.accuracy_drop_pp)
    doubt = doubted(accuracy.judged, budget.accuracy_drop_pp, budget.accuracy_gain_pp) if drop == "pass" else None
    if doubt is None:
        return drop, reason
    flips, noise = accuracy.flips, "" if accuracy.sqnr_db is None else f", SQNR {accuracy.sqnr_db:.1f} dB"
    return "undecided", f"{doubt} ({flips.flipped} of {accuracy.images} answers differ{noise})"


def doubted(judged: Change, allowed_pp: float, gain_pp: float) -> str | None:
    """Say what is wrong with an artifact that is surely better than the float model it was rounded from."""
    gained = gained_pp(judged)
    if allowed_pp >= ANY_DROP or gained <= gain_pp:
        return None
    return (
        f"surely {gained:.1f} pp better in {judged.metric} than the float model, {gain_pp:g} pp are believed: rounding "
        "teaches a model nothing, so labels were made by this artifact, or the float model is not asked what it was "
        "trained for; check labels, class order, weights and preprocessing, or set budget.accuracy_gain_pp if you know "
        "the cause"
    )


def headline(outcome: Outcome, drop: Outcome, what: str, measured: Measured, budget: Budget) -> str:
    """Say the verdict in one sentence; `drop` is the outcome of the accuracy alone."""
    latency, change = measured.latency, measured.accuracy.judged
    pace = _pace(latency.speedup, latency.baseline)
    if budget.min_speedup is not None and _speed(latency, budget)[0] != "pass":
        pace += f" ({budget.min_speedup:g}× asked for)"
    if _disturbed(latency):
        pace += " (timed beside other load)"
    bound = f"at least {change.drop_lower_pp:.2f}" if drop == "fail" else f"at most {change.drop_upper_pp:.2f}"
    worse = f"{bound} pp worse ({change.metric}), {100 * change.confidence:g}% sure"
    if drop == "undecided" and change.drop_upper_pp <= budget.accuracy_drop_pp:
        worse = f"surely {gained_pp(change):.1f} pp better than its float model ({change.metric}), which is no proof"
    opening = {"pass": "Ship", "fail": "Do not ship", "undecided": "Undecided about"}[outcome]
    return f"{opening} {what}: {pace}, {worse}"


def _pace(ratio: Ratio, baseline: str) -> str:
    """Say how fast, and no more than the interval bears out."""
    lower, upper, value = ratio.lower, ratio.upper, ratio.value
    if upper > TOO_WIDE * lower:
        return f"speed-up not measured ({lower:.2f} to {upper:.2f}× of {baseline})"
    if lower <= 1 <= upper:
        return f"about as fast as {baseline} ({lower:.2f} to {upper:.2f}×)"
    if upper > WIDE * lower:
        return (
            f"at least {lower:.1f}× faster than {baseline}"
            if lower > 1
            else f"up to {1 / lower:.1f}× slower than {baseline}"
        )
    return (f"{value:.1f}× faster" if value >= 1 else f"{1 / value:.1f}× slower") + f" than {baseline}"


def _ran(measured: Measured) -> list[Check]:
    """Fail where no layer ran in the precision that was asked for: it is another artifact than the one wanted."""
    asked, layers = measured.asked, measured.layers
    if asked == "float32" or not layers or any(layer.precision == asked for layer in layers):
        return []
    ran = ", ".join(f"{count} {name}" for name, count in Counter(layer.precision for layer in layers).most_common())
    told = f"{asked} was asked for, and none of the {len(layers)} convolutions and matrix products ran in it ({ran})"
    return [("fail", f"{told}; ask for {layers[0].precision}, or for another target")]


def _repeated(measured: Measured) -> list[Check]:
    """Doubt bounds that count the same image many times as if each were another."""
    different, images = measured.different, measured.accuracy.images
    if different is None or different >= FEW_DIFFERENT * images:
        return []
    told = f"the {images} evaluation images are only {different} different ones"
    return [("undecided", f"{told}, and repeating an image proves nothing; give each once")]


def _differing(accuracy: Accuracy) -> list[Check]:
    """Tell of many other answers and much noise, where the accuracy alone does not show it."""
    flips, images, noise = accuracy.flips, accuracy.images, accuracy.sqnr_db
    if noise is None or noise >= LOUD_DB or flips.flipped < MANY_FLIPS * images:
        return []
    told = f"{flips.flipped} of {images} answers are others than the float model's ({flips.lost} became wrong, "
    return [("pass", f"{told}{flips.gained} right), SQNR of the scores {noise:.1f} dB: see where it is lost")]


def _speed(timed: Latency, budget: Budget) -> Check:
    """Judge the interval; beside other load, which slows PyTorch most, against eager's fastest tenth as well."""
    ratio, wanted = timed.speedup, budget.min_speedup
    told = f"{ratio.lower:.2f} to {ratio.upper:.2f} times as fast as {timed.eager.name}"
    asked = "no minimum asked for" if wanted is None else f"{wanted:g} asked for"
    if ratio.upper > TOO_WIDE * ratio.lower:
        remedy = "too wide an interval to be a measurement: verify when the machine is quiet, or with --thorough"
        return "pass" if wanted is None else "undecided", f"{told}, {asked}; {remedy}"
    if wanted is None:
        return "pass", f"{told}, {asked}"
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
        chance = _area_of_chance(labels)
        guesses = area <= chance
        told = f"the float model itself ranks no better than chance (AUC {area:.1f} %, chance reaches {chance:.1f} %)"
    else:
        chance = float(np.bincount(labels).max() / len(labels))  # always answering the commonest class
        right = round(len(labels) * _float_percent(accuracy, "top-1") / 100)
        guesses = binomial_tail(right, len(labels), chance) > GUESSING
        told = f"the float model itself is right on {right / len(labels):.1%}, and guessing gives {chance:.1%}"
    remedy = "check labels, class order, weights and preprocessing, or allow a drop of 100 pp to judge speed alone"
    return [("undecided", f"{told}: {remedy}")] if guesses else []


def _area_of_chance(labels: Labels) -> float:
    """Give what the mean AUC of scores that know nothing stays under 95 times in 100, in percent; labels N×K.

    Of one class it varies by (P + N + 1)/(12·P·N) around a half, P images of the class and N others (Mann & Whitney
    1947); the classes are taken for independent.
    """
    positives = labels.sum(axis=0, dtype=np.float64)
    negatives = len(labels) - positives
    usable = (positives > 0) & (negatives > 0)
    if not usable.any():
        return 100.0
    variances = (len(labels) + 1) / (12 * positives[usable] * negatives[usable])
    return 50 + 100 * NormalDist().inv_cdf(1 - GUESSING) * float(np.sqrt(variances.sum()) / usable.sum())


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
