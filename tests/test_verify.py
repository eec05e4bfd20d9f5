"""Verdicts: counts against a plain loop, the three outcomes, and timing that sees a real difference."""

import re
import subprocess
import sys
import time

import numpy as np
import pytest

from device.errors import StageFailed
from pipeline import latency
from pipeline.artifacts import Accuracy, Latency, Timing
from pipeline.recipe import Budget
from pipeline.statistics import ratio_interval, tango_interval
from pipeline.verify import compare, judge
from targets import usable_cpus


def counted(images: int, lost: int, gained: int) -> Accuracy:
    lower, upper = tango_interval(lost, gained, images, 0.95)
    drop = 100 * (lost - gained) / images
    return Accuracy(images, images, images, lost, gained, lost + gained, drop, 100 * upper, 100 * lower, 0.95)


def timed(speedup: float) -> Latency:
    timing = Timing(100, 1.0, 1.1)
    return Latency(2, timing, timing, speedup, speedup * 0.95, speedup * 1.05, ())


def test_counts_are_those_of_a_plain_loop() -> None:
    rng = np.random.default_rng(5)
    baseline, scores = rng.normal(size=(2, 300, 4)).astype(np.float32)
    labels = rng.integers(0, 4, 300)
    found = compare(baseline, scores, labels, 0.95)
    lost = gained = flipped = 0
    for before, after, label in zip(baseline, scores, labels, strict=True):
        was, now = int(np.argmax(before)), int(np.argmax(after))
        flipped += was != now
        lost += was == label != now
        gained += now == label != was
    assert (found.lost, found.gained, found.flipped) == (lost, gained, flipped)
    assert found.drop_pp == pytest.approx((lost - gained) / 3)
    assert found.float_correct - found.correct == lost - gained


@pytest.mark.parametrize(
    ("accuracy", "outcome", "reason"),
    [
        (counted(4000, 15, 12), "pass", "at most 0.30 pp worse at 95% confidence, 1 pp allowed"),
        (counted(4000, 200, 20), "fail", "at least 3.92 pp worse"),
        (counted(100, 1, 1), "undecided", "100 images prove only .* evaluate on more images"),
    ],
)
def test_the_three_outcomes(accuracy: Accuracy, outcome: str, reason: str) -> None:
    found, reasons = judge(accuracy, timed(6.0), Budget())
    assert found == outcome
    assert len(reasons) == 2
    assert re.search(reason, reasons[0]), reasons


@pytest.mark.parametrize(("wanted", "outcome"), [(5.0, "pass"), (7.0, "fail"), (6.1, "undecided")])
def test_a_minimum_speedup_is_judged_by_its_interval(wanted: float, outcome: str) -> None:
    assert judge(counted(4000, 15, 12), timed(6.0), Budget(min_speedup=wanted))[0] == outcome


def test_scores_that_are_not_numbers_are_no_verdict() -> None:
    good = np.zeros((3, 2), np.float32)
    with pytest.raises(StageFailed, match="NaN or infinity"):
        compare(good, np.full((3, 2), np.nan, np.float32), np.zeros(3, np.int64), 0.95)
    with pytest.raises(StageFailed, match=r"shape \(3, 1\)"):
        compare(good, np.zeros((3, 1), np.float32), np.zeros(3, np.int64), 0.95)


def test_the_load_of_other_processes_is_seen() -> None:
    with latency.other_load() as others:
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        time.sleep(1.5)
        busy.kill()
        busy.wait()
    share = others()
    assert share is not None
    assert share > 0.5 / usable_cpus()


def test_interleaved_timing_finds_a_true_ratio() -> None:
    def busy(seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    series = latency.interleave({"slow": lambda: busy(2e-3), "fast": lambda: busy(1e-3)}, seconds=0.5)
    assert series["slow"].size == series["fast"].size >= 72
    low, high = ratio_interval(series["slow"], series["fast"])
    assert low <= 2.1
    assert high >= 1.9
