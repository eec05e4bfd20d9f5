"""A cell's night beside its reference, and the findings that are drawn from the two."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from bitferry.pipeline.nightly.change_point import Step
from bitferry.pipeline.nightly.changes import changed
from bitferry.pipeline.nightly.night import Finding, Inputs, Point, Result

InputsOf = Callable[[str], Inputs | None]
Kind = Literal["accuracy", "float accuracy", "latency", "size", "memory", "verdict", "failure"]
Severity = Literal["regression", "improvement", "notice"]
Unit = Literal["pp", "ratio", "bytes", ""]


@dataclass(frozen=True)
class Judged:
    """What a cell's findings are drawn from."""

    tonight: str
    result: Result
    night: str
    """The reference's."""
    reference: Result
    past: Sequence[Point]
    """Of this cell, before tonight, ascending."""
    inputs_of: InputsOf

    @property
    def name(self) -> str:
        return self.result.cell.name

    @property
    def points(self) -> list[Point]:
        """Give the nights from the reference to tonight, both included, that were measured anew."""
        later = [one for one in self.past if one.night > self.night and one.status == "measured"]
        tonight = [Point.of(self.tonight, self.result)] if self.result.status == "measured" else []
        return [Point.of(self.night, self.reference), *later, *tonight]


@dataclass(frozen=True)
class Change:
    """A figure before and after, with the two-sided 95 % interval of the change between."""

    before: float | None = None
    after: float | None = None
    lower: float | None = None
    upper: float | None = None
    unit: Unit = ""


def finding(
    one: Judged,
    kind: Kind,
    severity: Severity,
    sentence: str,
    change: Change | None = None,
    *,
    since: str | None = None,
) -> Finding:
    """Make a finding that names what changed: in the night it began first, then since the reference."""
    found = change or Change()
    return Finding(
        cell=one.result.cell,
        kind=kind,
        severity=severity,
        sentence=sentence,
        before=found.before,
        after=found.after,
        lower=found.lower,
        upper=found.upper,
        unit=found.unit,
        reference=one.night,
        since=since,
        changed=tuple(dict.fromkeys((*_began(one, since), *changed(one.reference.inputs, one.result.inputs)))),
    )


def _began(one: Judged, since: str | None) -> tuple[str, ...]:
    """Name what changed between the night before `since` and that one, where both are kept."""
    if since is None:
        return ()
    nights = [point.night for point in one.points]
    if since not in nights[1:]:
        return ()
    before, after = (_inputs(one, night) for night in (nights[nights.index(since) - 1], since))
    return changed(before, after) if before and after else ()


def _inputs(one: Judged, night: str) -> Inputs | None:
    kept = {one.night: one.reference.inputs, one.tonight: one.result.inputs}
    return kept.get(night) or one.inputs_of(night)


def since(points: Sequence[Point], step: Step) -> str | None:
    """Name the night of a step; of the plausible ones, the nearest one that was made from something else.

    What is slower or wrong from one night on was made from something else in that night, if in any.
    """
    if step.since is None:
        return None
    made_anew = [at for at in step.plausible if at and points[at].key != points[at - 1].key]
    nearest = min(made_anew, key=lambda at: abs(at - (step.since or 0)), default=step.since)
    return points[nearest].night


def day(night: str, beside: str) -> str:
    """Give a night's date, and its time where another night of the same date is spoken of."""
    return night if night[:10] == beside[:10] else night[:10]
