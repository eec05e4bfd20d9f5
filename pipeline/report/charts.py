"""Where the marks of a chart go: scales, ticks, the Pareto front, and labels that keep out of each other's way."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from bitferry.pipeline.figures import Candidate, Change, Timing
from bitferry.pipeline.verdict import Verdict

LABEL_HEIGHT, CHARACTER = 15.0, 7.3  # of the template's 12.5 px text, measured generously
POINT = 12.0  # what another point's label keeps away from a point


@dataclass(frozen=True)
class Scale:
    """An axis: values from `low` to `high` lie between the pixels `start` and `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Give the pixel of a value."""
        share = (self._flat(value) - self._flat(self.low)) / (self._flat(self.high) - self._flat(self.low))
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self, count: int = 5) -> list[float]:
        """List about `count` round values on the axis."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
            found = [value for value in found if self.low <= value <= self.high]
            if len(found) > count + 1:
                found = [value for value in found if math.log10(value) % 1 < 1e-9]
            if len(found) >= 3:
                return found
        step = _round_step((self.high - self.low) / count)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(index * step, 10) for index in range(first, last + 1)]

    def _flat(self, value: float) -> float:
        return math.log(value) if self.log else value


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return float(next(digit for digit in (1, 2, 5, 10) if digit * power >= rough * 0.999) * power)


def scale(values: Iterable[float], start: float, end: float, *, pad: float = 0.06, log: bool = False) -> Scale:
    """Make an axis for values, with a margin; `log` allows a logarithmic one where they spread fivefold or more."""
    found = list(values)
    low, high = min(found), max(found)
    if log and low > 0 and high / low >= 5:
        margin = (high / low) ** pad
        return Scale(low / margin, high * margin, start, end, log=True)
    margin = (high - low) * pad or abs(high) * pad or 1.0
    return Scale(low - margin, high + margin, start, end)


class Box(NamedTuple):
    """A rectangle in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: "Box") -> bool:
        """Say whether two rectangles overlap."""
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def inside(self, other: "Box") -> bool:
        """Say whether this rectangle lies within another."""
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )


@dataclass(frozen=True)
class Point:
    """A candidate in the trade-off chart, with its label."""

    candidate: Candidate
    role: str
    """`artifact`, `own` for the others of this verdict, `other` for those of another."""
    x: float
    y: float
    label: str
    box: Box
    """Where the label stands."""

    @property
    def leader(self) -> str:
        """Join the point with its label, as an SVG path; empty where the label is close by."""
        to = (min(max(self.x, self.box.left), self.box.right), min(max(self.y, self.box.top), self.box.bottom))
        return "" if math.dist(to, (self.x, self.y)) < POINT else f"M{self.x} {self.y}L{to[0]:.1f} {to[1]:.1f}"


@dataclass(frozen=True)
class TradeOff:
    """Accuracy against latency, laid out for one width."""

    width: int
    height: int
    plot: Box
    x: Scale
    y: Scale
    budget_percent: float
    front: str
    """The Pareto front as an SVG path."""
    points: tuple[Point, ...] = field(repr=False)
    higher_is_better: bool = True


def measured(verdict: Verdict, others: Sequence[Verdict]) -> list[tuple[str, Candidate]]:
    """List every candidate of these verdicts once, by name, with its role; this verdict's own come first."""
    latency = verdict.latency
    found = {c.name: ("artifact" if c is latency.artifact else "own", c) for c in latency.candidates}
    for other in others:
        for candidate in other.latency.candidates:
            found.setdefault(candidate.name, ("other", candidate))
    return list(found.values())


def pareto(candidates: Iterable[Candidate], *, higher_is_better: bool = True) -> list[Candidate]:
    """List the candidates that no faster one equals in accuracy, fastest first."""
    front: list[Candidate] = []
    best, sign = -math.inf, 1 if higher_is_better else -1
    for candidate in sorted(candidates, key=lambda c: (c.timing.median_ms, -sign * (c.accuracy_percent or 0.0))):
        if candidate.accuracy_percent is not None and sign * candidate.accuracy_percent > best:
            front.append(candidate)
            best = sign * candidate.accuracy_percent
    return front


def trade_off(verdict: Verdict, others: Sequence[Verdict], width: int, height: int) -> TradeOff:
    """Lay out the candidates whose accuracy is known, their Pareto front and the budget."""
    known = [(role, c, c.accuracy_percent) for role, c in measured(verdict, others) if c.accuracy_percent is not None]
    judged = verdict.accuracy.judged
    better = judged.higher_is_better  # the better side is up in either case
    budget = judged.float_percent + (-verdict.budget_drop_pp if better else verdict.budget_drop_pp)
    plot = Box(54, 14, width - 12, height - 46)
    medians = [c.timing.median_ms for _, c, _ in known] or [verdict.latency.artifact.timing.median_ms]
    x = scale(medians, plot.left, plot.right, pad=0.14, log=True)
    ends = (plot.bottom, plot.top) if better else (plot.top, plot.bottom)
    y = scale([budget, judged.percent] + [p for *_, p in known], *ends, pad=0.2)
    corners = [
        (x(c.timing.median_ms), y(c.accuracy_percent or 0.0))
        for c in pareto((c for _, c, _ in known), higher_is_better=better)
    ]
    lines = [*_budget_line(y(budget), plot), *_steps(corners, plot.right)]
    marks = [(x(c.timing.median_ms), y(percent)) for _, c, percent in known]
    points: list[Point] = []
    for role, candidate, percent in sorted(known, key=lambda item: item[0] != "artifact"):
        at = (x(candidate.timing.median_ms), y(percent))
        label = candidate.name if len(candidate.name) <= 30 else candidate.name[:29] + "…"
        taken = [point.box for point in points] + [_around(mark) for mark in marks if mark != at]
        points.append(Point(candidate, role, *at, label, _place(at, len(label) * CHARACTER, plot, taken, lines)))
    return TradeOff(width, height, plot, x, y, budget, _front(corners, plot.right), tuple(points), better)


def _front(corners: Sequence[tuple[float, float]], right: float) -> str:
    """Draw the Pareto front from its fastest candidate as stairs, to the right edge."""
    if not corners:
        return ""
    (x, y), *rest = corners
    return f"M{x} {y}" + "".join(f"H{left}V{top}" for left, top in rest) + f"H{right}"


def _around(mark: tuple[float, float]) -> Box:
    return Box(mark[0] - POINT, mark[1] - POINT, mark[0] + POINT, mark[1] + POINT)


def _budget_line(y: float, plot: Box) -> list[Box]:
    """Give the room of the budget's line and of its name, which stands below the line at the right."""
    return [Box(plot.left, y - 1, plot.right, y + 1), Box(plot.right - 220, y, plot.right, y + LABEL_HEIGHT + 3)]


def _steps(corners: Sequence[tuple[float, float]], right: float) -> list[Box]:
    """Give the room of the Pareto front's line: right from each corner, then up to the next."""
    found = []
    for (x, y), (next_x, next_y) in zip(corners, [*corners[1:], (right, None)], strict=True):
        found.append(Box(x, y - 1, next_x, y + 1))
        if next_y is not None:
            found.append(Box(next_x - 1, next_y, next_x + 1, y))
    return found


def _place(at: tuple[float, float], width: float, plot: Box, taken: Sequence[Box], lines: Sequence[Box]) -> Box:
    """Find the nearest free place for a label, beside its point or above or below; at worst, upon a line."""
    (x, y), half = at, width / 2
    spots = [(x + side * (half + 11), y) for side in (-1, 1)]
    spots += [(x + side * (half - 8), y + shift) for shift in (-18, 18, -35, 35, -52, 52) for side in (0, -1, 1)]
    boxes = [Box(cx - half, cy - LABEL_HEIGHT / 2, cx + half, cy + LABEL_HEIGHT / 2) for cx, cy in spots]
    within = [box for box in boxes if box.inside(plot)] or boxes
    clear = [box for box in within if not any(box.meets(other) for other in taken)]
    return next((box for box in clear if not any(box.meets(line) for line in lines)), (clear or within)[0])


def latency_scale(candidates: Sequence[Candidate], start: float, end: float) -> Scale:
    """Make the axis that the histograms of all candidates share."""
    edges = [edge for c in candidates for edge, _ in _bins(c.timing)] + [_lowest(c.timing) for c in candidates]
    return scale(edges, start, end, pad=0.02, log=True)


def histogram(timing: Timing, x: Scale, base: float, height: float) -> str:
    """Draw a histogram as an SVG path: area is calls, the tallest bar is `height`, a lone slow call still shows."""
    edges = [x(_lowest(timing))] + [x(edge) for edge, _ in _bins(timing)]
    widths = [max(right - left, 0.5) for left, right in pairwise(edges)]
    density = [calls / width for (_, calls), width in zip(_bins(timing), widths, strict=True)]
    tallest = max(density, default=1.0) or 1.0
    bars = zip(edges, widths, density, strict=False)
    return "".join(
        f"M{left:.1f} {base:.1f}v-{max(dense / tallest * height, 1.5):.1f}h{width:.1f}V{base:.1f}z"
        for left, width, dense in bars
        if dense
    )


def _bins(timing: Timing) -> Sequence[tuple[float, int]]:
    return timing.histogram_ms or ((timing.median_ms, timing.samples),)


def _lowest(timing: Timing) -> float:
    """Give the first bin's lower edge, which the verdict leaves out: as far below as the next edge is above."""
    edges = [edge for edge, _ in _bins(timing)]
    return edges[0] ** 2 / edges[1] if len(edges) > 1 else edges[0] * 0.98


def drop_scale(change: Change, budget_pp: float, start: float, end: float) -> Scale:
    """Make the axis for one metric's drop: zero, the bounds and the budget are all on it."""
    return scale((0.0, budget_pp, change.drop_lower_pp, change.drop_upper_pp), start, end, pad=0.12)
