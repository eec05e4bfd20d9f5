"""The night from which a series of nightly figures lies on another level, if there is one: a change point.

Costs are bounded, so that a wild night counts for no more than any other that does not fit (P. Fearnhead and
G. Rigaill, *Journal of the American Statistical Association* 114, 2019). The limits were chosen by simulation;
`benchmarks/nightly_detection.py` measures how often a change is found, and how often one is seen where there is none.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

WINDOW = 30
"""Nights that are looked at."""
LEAST_BEFORE, LEAST_AFTER, LEAST_NIGHTS = 3, 2, 6
"""Nights on either side of a change point, and in all: one night alone is never a change point."""
BOUND = 6.0
"""What one night can cost at most, in squared standard errors: 2.4 of them. It is not above the limits, so that no
single night raises an alarm, nor do two wild ones against one that is not."""
RECENT, LIMIT_RECENT, LIMIT = 4, 6.0, 10.0
"""What a change must save in cost for an alarm: less for one of the last `RECENT` nights than for an older one, because
the older ones are many and had their chance before."""
KEPT = 0.8
"""The share of the night-to-night differences, smallest first, that the scatter is taken from."""
TOLD_NIGHTS = 6
"""How many nights' worth the standard errors as told count for, against the scatter that is seen."""
PLENTY = 1e3
"""Degrees of freedom where the errors are as good as known."""
STEP, MOST_LEVELS = 0.1, 4000
"""Between two levels that are tried, in standard errors; and how many are."""
NEAR = NormalDist().inv_cdf(0.975) ** 2
"""A night that saves less than the best by no more than this may as well be the one (a likelihood region of 95 %)."""

Figures = NDArray[np.float64]


@dataclass(frozen=True)
class Step:
    """A series that lies on another level than before."""

    size: float
    """New level − old level."""
    lower: float
    upper: float
    """Two-sided 95 %, the night taken as known."""
    before: float
    """The old level."""
    since: int | None = None
    """Position of the first night on the new level; None where only the first of all nights is told from the last."""
    plausible: tuple[int, ...] = ()
    """Every position that may as well be it, ascending; as of the night that the alarm was raised."""


def follow(values: Figures, errors: Figures) -> list[Step | None]:
    """Say after each night which change stands: N values in time's order, and their N standard errors above 0.

    An alarm keeps the night it was first raised for, and ends when later nights no longer bear it out. Where no night
    can be named, because few or none came before it, the last two nights may yet differ from the first of all.
    """
    found: list[Step | None] = []
    standing: Step | None = None
    for count in range(1, len(values) + 1):
        begin = max(0, count - WINDOW)
        if standing and standing.since is not None:
            begin = max(0, min(begin, standing.since - WINDOW // 2))
        seen = slice(begin, count)
        moved = _next(values[seen], errors[seen], _shifted(standing, -begin) if standing else None)
        standing = _shifted(moved, begin) if moved else None
        found.append(standing or against_first(values[:count], errors[:count]))
    return found


def _shifted(step: Step, by: int) -> Step:
    since = None if step.since is None else step.since + by
    return replace(step, since=since, plausible=tuple(one + by for one in step.plausible))


def _next(values: Figures, errors: Figures, standing: Step | None) -> Step | None:
    """Decide after one more night: keep what stands, or look for a change."""
    count = len(values)
    if count < LEAST_NIGHTS:
        return None
    more, freedom = scatter(values, errors)
    scaled = errors * more
    gains = saved(values, scaled)
    limits = np.where(count - np.arange(count) <= RECENT, LIMIT_RECENT, LIMIT)
    beyond = gains - freedom * np.expm1(limits / freedom)  # as a t test's limits are wider than a normal one's
    if standing and standing.since is not None and beyond[standing.since] > 0:
        return replace(measured(values, scaled, standing.since), plausible=standing.plausible)
    since = int(np.argmax(beyond))
    if beyond[since] <= 0:
        return None
    near = np.flatnonzero(gains >= gains[since] - NEAR)
    return replace(measured(values, scaled, since), plausible=tuple(near.tolist()))


def against_first(values: Figures, errors: Figures) -> Step | None:
    """Tell the last night from the first by their errors; the one before it, where there is one, must agree."""
    if len(values) < 2:
        return None
    scaled = errors * (scatter(values[1:], errors[1:])[0] if len(values) > LEAST_NIGHTS else 1.0)
    last = np.arange(max(1, len(values) - 2), len(values))
    steps, reach = values[last] - values[0], np.hypot(scaled[last], scaled[0])
    if np.any(np.abs(steps) <= math.sqrt(LIMIT) * reach) or abs(np.sign(steps).sum()) < len(steps):
        return None
    size, width = float(steps[-1]), NormalDist().inv_cdf(0.975) * float(reach[-1])
    return Step(size, size - width, size + width, float(values[0]))


def scatter(values: Figures, errors: Figures) -> tuple[float, float]:
    """Give by how much N nights scatter more than their errors say, at least 1, and with what degrees of freedom.

    From differences of neighbours, which a single step hardly changes, the largest left out for the wild nights.
    Where it is clearly more than 1 it is taken as seen, and otherwise together with what the errors say.
    """
    squares = np.sort(np.diff(values) ** 2 / (errors[1:] ** 2 + errors[:-1] ** 2))
    count = len(squares)
    kept = max(1, min(round(KEPT * count), count - 1))
    seen = float(squares[:kept].mean()) * _untrimmed(kept / (count + 0.5))
    if seen > 1 + 2 * math.sqrt(2 / count):
        return math.sqrt(seen), 0.6 * count
    return math.sqrt(max(1.0, (TOLD_NIGHTS + count * seen) / (TOLD_NIGHTS + count))), PLENTY


@lru_cache
def _untrimmed(share: float) -> float:
    """Give the mean of a squared normal number over the mean of its smallest `share`."""
    normal = NormalDist()
    cut = normal.inv_cdf((1 + share) / 2)
    return share / (share - 2 * cut * normal.pdf(cut))


def saved(values: Figures, errors: Figures) -> Figures:
    """Give for each night by how much the cost falls when the level may change there, N; −∞ where it may not."""
    count = len(values)
    costs = _costs(values, errors, tried(values, errors))
    until = np.vstack([np.zeros(costs.shape[1]), np.cumsum(costs, axis=0)])
    gains = until[-1].min() - until[:count].min(axis=1) - (until[-1] - until[:count]).min(axis=1)
    gains[:LEAST_BEFORE] = gains[count - LEAST_AFTER + 1 :] = -np.inf
    return np.asarray(gains)


def tried(values: Figures, errors: Figures) -> Figures:
    """Give the levels among which the best is looked for."""
    steps = float(np.ptp(values)) / (STEP * float(errors.min()))
    return np.linspace(values.min(), values.max(), 2 + int(min(steps, MOST_LEVELS)))


def _costs(values: Figures, errors: Figures, levels: Figures) -> Figures:
    """Give what each night costs at each level: the squared distance in standard errors, bounded."""
    return np.minimum(((values[:, None] - levels) / errors[:, None]) ** 2, BOUND)


def measured(values: Figures, errors: Figures, since: int) -> Step:
    """Measure the step at a night."""
    before, first = _level(values[:since], errors[:since])
    after, second = _level(values[since:], errors[since:])
    reach = NormalDist().inv_cdf(0.975) * math.hypot(first, second)
    return Step(after - before, after - before - reach, after - before + reach, before, since)


def _level(values: Figures, errors: Figures) -> tuple[float, float]:
    """Give the level of least cost and its standard error, from the nights that fit it."""
    levels = tried(values, errors)
    best = levels[np.argmin(_costs(values, errors, levels).sum(axis=0))]
    fits = np.abs(values - best) <= math.sqrt(BOUND) * errors
    weights = 1 / errors[fits] ** 2
    return float(np.average(values[fits], weights=weights)), float(weights.sum() ** -0.5)
