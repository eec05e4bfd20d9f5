"""Lays a night out as people read it: recipes down, targets and precisions across, findings by how much they matter."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from bitferry.pipeline.nightly.night import Cell, Finding, Night, Point
from bitferry.targets import PRECISIONS

OUTCOMES = {"pass": "✓", "fail": "✗", "undecided": "?", "unmeasured": "–", "failed": "!"}
"""Each outcome's symbol, so that none is told by its colour alone."""
SEVERITIES = ("regression", "improvement", "notice")
KINDS = ("failure", "verdict", "accuracy", "float accuracy", "latency", "memory", "size")


@dataclass(frozen=True)
class Heatmap:
    """One night's cells as a table; None where a recipe has no such cell."""

    columns: tuple[tuple[str, str], ...]
    """Target and precision."""
    rows: tuple[tuple[str, tuple[Point | None, ...]], ...]
    """Recipe and its points, in the order of `columns`."""

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Give each target with the number of its columns."""
        return [(target, len(list(columns))) for target, columns in groupby(self.columns, lambda column: column[0])]


def heatmap(points: Iterable[Point]) -> Heatmap:
    """Lay points of different cells out; recipes and targets by name, precisions from int8 up, `auto` last."""
    by_cell = {point.cell: point for point in points}
    columns = sorted({(cell.target, cell.precision) for cell in by_cell}, key=_by_precision)
    recipes = sorted({cell.recipe for cell in by_cell})
    rows = ((recipe, tuple(by_cell.get(Cell(recipe, *column)) for column in columns)) for recipe in recipes)
    return Heatmap(tuple(columns), tuple(rows))


def _by_precision(column: tuple[str, str]) -> tuple[str, int, str]:
    target, precision = column
    known = list(PRECISIONS)
    return target, known.index(precision) if precision in known else len(known), precision


def tonight(night: Night) -> list[Point]:
    """Give the figures of every cell of the night."""
    return [Point.of(night.id, result) for result in night.results]


def ranked(findings: Iterable[Finding]) -> list[Finding]:
    """Sort findings: regressions first, improvements, then what is worth a look; by kind, then by cell."""
    return sorted(findings, key=lambda one: (SEVERITIES.index(one.severity), KINDS.index(one.kind), one.cell))


def sentence(night: Night) -> str:
    """Say what came of the night, as in `2 regressions in 48 cells: 45 reused, 2 measured, 1 failed.`."""
    counts = {severity: sum(one.severity == severity for one in night.findings) for severity in SEVERITIES}
    told = [count(number, severity) for severity, number in counts.items() if number] or ["Nothing changed"]
    if not counts["regression"] and len(told) < len(SEVERITIES) and night.findings:
        told.insert(0, "No regression")
    return f"{', '.join(told)} in {count(len(night.results), 'cell')}: {', '.join(_statuses(night))}."


def _statuses(night: Night) -> Iterator[str]:
    for status in ("measured", "reused", "failed"):
        number = sum(result.status == status for result in night.results)
        if number or status == "measured":
            yield f"{number:,} {status}"


def count(number: int, noun: str) -> str:
    """Write a number of things, as in `1 cell` or `2 cells`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Write a time as a person says it: `42 s`, `7 min`, `2 h 5 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def slowest(night: Night, most: int) -> Sequence[tuple[Cell, float]]:
    """List the cells that took longest in this night, with their seconds."""
    timed = [(result.cell, result.seconds) for result in night.results if result.seconds > 0]
    return sorted(timed, key=lambda one: -one[1])[:most]
