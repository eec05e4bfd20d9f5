"""Several measurements of a cell in one night: its outcome, reasons and figures are those of all together."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bitferry.device.timing import Series
from bitferry.pipeline.artifacts import Verified
from bitferry.pipeline.nightly import work
from bitferry.pipeline.verify import judged_again
from tests.test_accuracy import a_recipe, a_split
from tests.test_page import verdict


def loaded(ms: float, outcome: str) -> Verified:
    """Give one of a night's measurements: eager takes 10 ms, the artifact so long, each call a little otherwise."""
    rng = np.random.default_rng(int(ms))
    series = tuple(
        Series(rng.normal(one, one / 100, (40, 5)) / 1e3, one / 1e3, 3, settled=True) for one in (10.0, 10.0, 10.0, ms)
    )
    given = verdict()
    golden = dataclasses.replace(given.golden, files=())
    found = dataclasses.replace(given, golden=golden, outcome=outcome, headline=f"{ms} ms", reasons=(f"{ms} ms",))  # type: ignore[arg-type]
    none = np.zeros((0, 10), np.float32)
    return Verified(found, none, none, none, Path(), a_split(np.arange(5000) % 10), series=series)


def test_a_night_s_outcome_and_reasons_are_those_of_all_its_measurements() -> None:
    """The last one alone would fail: it was loaded where it is slow."""
    runs = [loaded(2.0, "pass"), loaded(2.0, "pass"), loaded(6.0, "fail")]
    series = tuple(
        dataclasses.replace(one, seconds=np.concatenate([run.series[at].seconds for run in runs]))
        for at, one in enumerate(runs[-1].series)
    )
    latency = work._latency(runs, series)
    assert [one.timing.samples for one in latency.candidates] == [600] * 4
    assert latency.seconds == pytest.approx(3 * runs[0].verdict.latency.seconds)
    assert len(latency.suspicions) == 1  # the same of each
    way: Any = SimpleNamespace(
        compiled=SimpleNamespace(precision="int8", target="openvino"),
        program=SimpleNamespace(baseline=SimpleNamespace(record=None)),
    )
    for wanted, outcome in ((2.0, "pass"), (6.0, "fail")):
        recipe = a_recipe(10, min_speedup=wanted)
        found = judged_again(recipe, way, runs[-1], dataclasses.replace(latency, suspicions=()), series)
        assert found.verdict.outcome == outcome
        ratio = found.verdict.latency.speedup
        assert 3 < ratio.value < 5
        assert any(f"{ratio.lower:.2f} to {ratio.upper:.2f} times as fast" in one for one in found.verdict.reasons)
        assert "6.0 ms" not in (found.verdict.headline, *found.verdict.reasons)
