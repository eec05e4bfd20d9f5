"""Time several models against each other in one process: blocks in random order, warm-up found, nothing clipped."""

import random
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCKS = 40
FEWEST_CALLS, MOST_CALLS = 3, 200
SETTLING_CALLS = 2
WINDOW = 5

Call = Callable[[], object]


@dataclass(frozen=True)
class Series:
    """What was measured of one candidate."""

    seconds: NDArray[np.float64]
    """Per call, blocks × calls."""
    first_seconds: float
    warm_up_calls: int
    settled: bool
    """False when the calls were still getting faster when the warm-up's time was over."""

    @property
    def block_medians(self) -> NDArray[np.float64]:
        """Give the median of each block."""
        medians: NDArray[np.float64] = np.median(self.seconds, axis=1)
        return medians


def interleave(
    calls: Mapping[str, Call], *, seconds: float, seed: int = 0, blocks: Iterable[int] = range(BLOCKS)
) -> dict[str, Series]:
    """Time each call in every block, in an order shuffled per block, for about `seconds` in all.

    Each candidate has the same share of the time, so a fast one is called more often; at least 120 calls each are
    counted, more than the 64 that a 90th percentile needs. The first calls of a turn are not counted: they pay
    for the threads and caches of the candidate before. `blocks` are the 40 of them, maybe with a bar that counts.
    """
    warm = {name: _warm_up(call, seconds / 5) for name, call in calls.items()}
    turn = seconds / BLOCKS / len(calls)
    counts = {
        name: int(np.clip(turn / best - SETTLING_CALLS, FEWEST_CALLS, MOST_CALLS)) for name, (best, *_) in warm.items()
    }
    taken: dict[str, list[list[float]]] = {name: [] for name in calls}
    order = random.Random(seed)  # noqa: S311 - an order, not a secret
    for _ in blocks:
        for name in order.sample(sorted(calls), len(calls)):
            taken[name].append(_turn(calls[name], counts[name]))
    return {name: Series(np.array(taken[name]), *warm[name][1:]) for name in calls}


def _turn(call: Call, count: int) -> list[float]:
    for _ in range(SETTLING_CALLS):
        call()
    return [_seconds(call) for _ in range(count)]


def _warm_up(call: Call, longest: float) -> tuple[float, float, int, bool]:
    """Call until a window of calls is no faster than the one before it, or `longest` seconds are over.

    Returns the best time, the first one, the number of calls and whether it settled.
    """
    end = time.perf_counter() + longest
    taken = [_seconds(call)]
    while True:
        taken.append(_seconds(call))
        if len(taken) > 2 * WINDOW and _settled(taken):
            return min(taken), taken[0], len(taken), True
        if time.perf_counter() > end and len(taken) > WINDOW:
            return min(taken), taken[0], len(taken), len(taken) <= 2 * WINDOW


def _settled(taken: list[float]) -> bool:
    return float(np.median(taken[-WINDOW:])) >= 0.98 * float(np.median(taken[-2 * WINDOW : -WINDOW]))


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
