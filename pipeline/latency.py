"""Time several models against each other in one process: blocks in random order, nothing clipped."""

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline import progress

BLOCKS = 24
FEWEST_CALLS, MOST_CALLS = 3, 30
SETTLING_CALLS = 2

Series = NDArray[np.float64]
"""Seconds per call, blocks × calls."""


def interleave(calls: Mapping[str, Callable[[], object]], *, seconds: float = 3.0) -> dict[str, Series]:
    """Time each call in every block, in an order shuffled per block, for about `seconds` in all.

    The first calls of a turn are not counted: they pay for the other model's threads and caches. At least 72
    calls each are counted, more than the 64 that a 90th percentile needs (MLPerf's early-stopping bound).
    """
    once = {name: _warm_up(call) for name, call in calls.items()}
    count = int(np.clip(seconds / BLOCKS / sum(once.values()) - SETTLING_CALLS, FEWEST_CALLS, MOST_CALLS))
    series = {name: np.empty((BLOCKS, count)) for name in calls}
    order = random.Random(0)  # noqa: S311 - an order, not a secret
    for block in progress.track(range(BLOCKS), "time", total=BLOCKS):
        for name in order.sample(sorted(calls), len(calls)):
            series[name][block] = _turn(calls[name], count)
    return series


@contextmanager
def other_load() -> Iterator[Callable[[], float | None]]:
    """Give a function that says, once the block is over, which share of all CPUs others used (Linux; else None).

    Others are the other processes, and the host where this is a virtual machine.
    """
    before = _cpu_seconds()
    shares: list[float | None] = []
    yield lambda: shares[0]
    after = _cpu_seconds()
    if before is None or after is None or after[1] <= before[1]:
        shares.append(None)
    else:
        shares.append(max(0.0, (after[0] - before[0]) / (after[1] - before[1])))


def _cpu_seconds() -> tuple[float, float] | None:
    """Give the CPU seconds that others have used, and all that there were, since the machine started."""
    try:
        counts = [int(count) for count in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except OSError:
        return None
    ticks = os.sysconf("SC_CLK_TCK")
    idle = counts[3] + counts[4]
    times = os.times()
    return (sum(counts) - idle) / ticks - times.user - times.system, sum(counts) / ticks


def _turn(call: Callable[[], object], count: int) -> list[float]:
    for _ in range(SETTLING_CALLS):
        call()
    return [_seconds(call) for _ in range(count)]


def _warm_up(call: Callable[[], object]) -> float:
    """Call until three in a row are no faster than the best so far (20 at most); return the best time in seconds."""
    best, since = float("inf"), 0
    for _ in range(20):
        taken = _seconds(call)
        best, since = (taken, 0) if taken < best else (best, since + 1)
        if since == 3:
            break
    return best


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
