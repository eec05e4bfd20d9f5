"""Timings of several models: how long one effort takes, with a bar that counts the blocks, and a summary of each."""

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bitferry.device import timing as timer
from bitferry.device.timing import BLOCKS, Call, Series
from bitferry.pipeline import progress
from bitferry.pipeline.figures import Percentile, Timing
from bitferry.pipeline.statistics import order_statistic_bound

Effort = Literal["quick", "default", "thorough"]
SECONDS: Mapping[Effort, float] = {"quick": 1.5, "default": 3.0, "thorough": 60.0}
"""Spent on the timed calls of all candidates together, where the slowest allows it."""
BINS = 40


def interleave(calls: Mapping[str, Call], *, seconds: float = SECONDS["default"], seed: int = 0) -> dict[str, Series]:
    """Time each call in every block, in an order shuffled per block, for about `seconds` in all."""
    blocks = progress.track(range(BLOCKS), "time", total=BLOCKS)
    return timer.interleave(calls, seconds=seconds, seed=seed, blocks=blocks)


def timing(series: Series) -> Timing:
    """Summarize one candidate; a percentile is given only where the samples support it (MLPerf's early stopping)."""
    samples = np.sort(series.seconds.ravel()) * 1e3
    return Timing(
        samples=samples.size,
        blocks=len(series.seconds),
        percentiles=tuple(found for percent in (50, 90, 99) if (found := _percentile(samples, percent))),
        fastest_tenth_ms=float(np.quantile(samples, 0.1)),
        median_ms=float(np.median(samples)),
        mean_ms=float(samples.mean()),
        cov_percent=float(100 * samples.std() / samples.mean()),
        first_ms=series.first_seconds * 1e3,
        warm_up_calls=series.warm_up_calls,
        histogram_ms=_histogram(samples),
    )


def _percentile(samples: NDArray[np.float64], percent: int) -> Percentile | None:
    above = order_statistic_bound(samples.size, percent / 100)
    if above is None:
        return None
    return Percentile(percent, float(np.quantile(samples, percent / 100)), float(samples[-above]))


def _histogram(samples: NDArray[np.float64]) -> tuple[tuple[float, int], ...]:
    """Count in equal bins up to twice the 90th percentile, and everything slower in a last one."""
    end = min(2 * float(np.quantile(samples, 0.9)), float(samples[-1]))
    edges = np.linspace(samples[0], max(end, float(samples[0]) * 1.001), BINS + 1)
    counts, _ = np.histogram(samples, np.append(edges[:-1], np.inf))
    uppers = [*edges[1:-1].tolist(), float(samples[-1])]
    return tuple(zip(uppers, counts.tolist(), strict=True))
