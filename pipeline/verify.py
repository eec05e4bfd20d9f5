"""Judge a compiled artifact against the eager float model: same images, same threads, one process."""

from collections.abc import Iterable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import targets
from device.arrays import Images, Outputs, Predict
from device.errors import StageFailed
from pipeline import cache, latency, progress
from pipeline.artifacts import (
    Accuracy,
    Compiled,
    FloatModel,
    Labels,
    Latency,
    Outcome,
    Split,
    Timing,
    Verdict,
)
from pipeline.recipe import Budget
from pipeline.statistics import ratio_interval, tango_interval

BATCH = 64
MOST_OTHER_LOAD = 0.1
"""Of all CPUs. PyTorch's threads spin while they wait for each other, so one busy neighbour slows it manyfold."""
Check = tuple[Outcome, str]


def verify(model: FloatModel, compiled: Compiled, evaluation: Split, budget: Budget, build: cache.Cache) -> Verdict:
    """Answer every evaluation image, time both models and compare with the budget.

    The float answers are computed once per model and data; everything about the artifact is measured anew.
    """
    target = targets.get(compiled.target)
    predict = target.load(compiled.path, precision=compiled.precision, threads=compiled.threads)
    baseline = float_scores(model, evaluation, build)
    with progress.timed("verify", compiled.target):
        scores = _answer(predict, evaluation.images, f"evaluate {compiled.target}")
        accuracy = compare(baseline, scores, evaluation.labels, budget.confidence)
        timed = _time(eager(model.module()), predict, evaluation.images[:1].copy(), compiled.threads)
    outcome, reasons = judge(accuracy, timed, budget)
    return Verdict(
        target=compiled.target,
        precision=compiled.precision,
        outcome=outcome,
        reasons=reasons,
        accuracy=accuracy,
        latency=timed,
        executed=dict(target.executed(compiled.path, precision=compiled.precision)),
        environment=target.environment(),
        compiled_key=compiled.key,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def eager(module: nn.Module) -> Predict:
    """Wrap a PyTorch module as a Predict."""

    def predict(images: Images) -> Outputs:
        with torch.inference_mode():
            scores: Outputs = module(torch.from_numpy(images)).numpy()
        return scores

    return predict


def float_scores(model: FloatModel, evaluation: Split, build: cache.Cache) -> Outputs:
    """Answer every evaluation image with the float model, once."""
    key = cache.key("baseline", code=__file__, packages=("torch",), model=model.key, data=evaluation.key)
    scores: Outputs = np.load(build.folder("baseline", key, partial(_baseline, model, evaluation)) / "scores.npy")
    return scores


def compare(baseline: Outputs, scores: Outputs, labels: Labels, confidence: float) -> Accuracy:
    """Count, image by image, what the artifact loses and gains; scores are N×K, labels N."""
    if scores.shape != baseline.shape or not np.isfinite(scores).all():
        found = f"shape {scores.shape}" if scores.shape != baseline.shape else "NaN or infinity"
        raise StageFailed(f"the artifact's scores have {found}; expected finite scores of shape {baseline.shape}")
    float_answers, answers = baseline.argmax(axis=1), scores.argmax(axis=1)
    float_right, right = float_answers == labels, answers == labels
    lost, gained = int((float_right & ~right).sum()), int((right & ~float_right).sum())
    lower, upper = tango_interval(lost, gained, len(labels), confidence)
    return Accuracy(
        images=len(labels),
        float_correct=int(float_right.sum()),
        correct=int(right.sum()),
        lost=lost,
        gained=gained,
        flipped=int((float_answers != answers).sum()),
        drop_pp=100 * (lost - gained) / len(labels),
        drop_upper_pp=100 * upper,
        drop_lower_pp=100 * lower,
        confidence=confidence,
    )


def judge(accuracy: Accuracy, timed: Latency, budget: Budget) -> tuple[Outcome, tuple[str, ...]]:
    """Pass when both bounds are inside the budget, fail when one is outside, otherwise undecided; with reasons."""
    sure = f"{budget.confidence:.0%}"
    drop, allowed = accuracy.drop_upper_pp, budget.accuracy_drop_pp
    if drop <= allowed:
        first: Check = "pass", f"at most {drop:.2f} pp worse at {sure} confidence, {allowed:g} pp allowed"
    elif accuracy.drop_lower_pp > allowed:
        first = (
            "fail",
            f"at least {accuracy.drop_lower_pp:.2f} pp worse at {sure} confidence, {allowed:g} pp allowed",
        )
    else:
        proved = f"{accuracy.images} images prove only that it is at most {drop:.2f} pp worse at {sure} confidence"
        first = "undecided", f"{proved}, {allowed:g} pp allowed; evaluate on more images"
    checks = [first, _speed_check(timed, budget.min_speedup)]
    outcomes = [outcome for outcome, _ in checks]
    worst: Outcome = "fail" if "fail" in outcomes else "undecided" if "undecided" in outcomes else "pass"
    return worst, tuple(reason for _, reason in checks)


def _speed_check(timed: Latency, wanted: float | None) -> Check:
    interval = f"{timed.speedup_lower:.2f} to {timed.speedup_upper:.2f} times as fast as eager float32"
    if wanted is None or timed.speedup_lower >= wanted:
        return "pass", f"{interval}, " + ("no minimum asked for" if wanted is None else f"{wanted:g} asked for")
    return ("fail" if timed.speedup_upper < wanted else "undecided"), f"{interval}, {wanted:g} asked for"


def _baseline(model: FloatModel, evaluation: Split, out: Path) -> None:
    torch.set_num_threads(targets.usable_cpus())
    np.save(out / "scores.npy", _answer(eager(model.module()), evaluation.images, "evaluate float"))


def _answer(predict: Predict, images: Images, text: str) -> Outputs:
    starts: Iterable[int] = range(0, len(images), BATCH)
    parts = [
        predict(images[i : i + BATCH].copy()) for i in progress.track(starts, text, total=-(-len(images) // BATCH))
    ]
    return np.concatenate(parts)


def _time(float_predict: Predict, predict: Predict, image: Images, threads: int) -> Latency:
    torch.set_num_threads(threads)
    with latency.other_load() as others:
        series = latency.interleave({"float": lambda: float_predict(image), "artifact": lambda: predict(image)})
    low, high = ratio_interval(series["float"], series["artifact"])
    return Latency(
        threads=threads,
        eager_float=_timing(series["float"]),
        artifact=_timing(series["artifact"]),
        speedup=float(np.median(series["float"]) / np.median(series["artifact"])),
        speedup_lower=low,
        speedup_upper=high,
        suspicions=_suspicions(others()),
    )


def _suspicions(others: float | None) -> tuple[str, ...]:
    if others is None or others <= MOST_OTHER_LOAD:
        return ()
    return (
        f"other processes, or this machine's host, used {others:.0%} of the CPUs while timing, so the latencies are "
        "too high and their ratio may be off; verify again when it is quiet",
    )


def _timing(series: latency.Series) -> Timing:
    p50, p90 = np.quantile(series, [0.5, 0.9]) * 1e3
    return Timing(samples=series.size, p50_ms=float(p50), p90_ms=float(p90))
