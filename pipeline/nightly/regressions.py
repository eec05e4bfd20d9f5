"""One cell's night judged against its reference: what became worse or better, by how much, and what changed."""

import statistics
from collections.abc import Iterator, Sequence
from itertools import takewhile

from bitferry.pipeline.nightly import pace, right_answers
from bitferry.pipeline.nightly.judged import Change, InputsOf, Judged, Kind, Severity, day, finding
from bitferry.pipeline.nightly.night import Finding, Point, Result

SIZE_SHARE, SIZE_BYTES = 0.01, 4_000
"""A file is larger where it is so by more than both: a compiler's next version moves a few bytes."""
MEMORY_SHARE, MEMORY_BYTES = 0.10, 8_000_000
"""The same for the peak of memory, which an allocator's luck moves."""
MEMORY_NIGHTS = 5
"""Memory must lie that far from the median of so many nights too, the reference and those after it."""
RANKS = {"pass": 0, "undecided": 1, "fail": 2}


def findings(
    tonight: str,
    result: Result,
    reference: tuple[str, Result] | None,
    past: Sequence[Point],
    inputs_of: InputsOf,
) -> tuple[Finding, ...]:
    """Say what is worse or better than in the reference night, regressions first.

    `past` are this cell's nights before tonight, ascending: all since the reference, of which the last 30 are
    searched for a new change, or as many as there are; `inputs_of` gives what a night was made from,
    where that is kept. Without a reference only a failure is found.
    """
    night, against = reference or (tonight, result)
    one = Judged(tonight, result, night, against, past, inputs_of)
    if result.status == "failed":
        return (_failed(one),)
    if night == tonight:
        return ()
    found = [*_fixed(one), *_verdict(one), *right_answers.found(one), *pace.found(one), *_size(one), *_memory(one)]
    order = ("regression", "improvement", "notice")
    return tuple(sorted(found, key=lambda finding: order.index(finding.severity)))


def _failed(one: Judged) -> Finding:
    """Tell of a cell without a verdict: since when, and whether the machine was at fault."""
    failing = list(takewhile(lambda point: point.status == "failed", reversed(one.past)))
    since = failing[-1].night if failing else one.tonight
    if not failing:
        when = (
            "fails, and gave a verdict before" if one.past or one.night != one.tonight else "fails in its first night"
        )
    else:
        when = f"fails since {day(since, one.tonight)}"
    blame = " (the machine was at fault)" if one.result.error_kind == "machine" else ""
    return finding(one, "failure", "regression", f"{one.name} {when}{blame}: {one.result.error}", since=since)


def _fixed(one: Judged) -> Iterator[Finding]:
    """Tell of a cell that failed in the night before, or in its reference, and gives a verdict."""
    failed = one.past[-1].status == "failed" if one.past else one.reference.status == "failed"
    if failed:
        yield finding(one, "failure", "improvement", f"{one.name} gives a verdict again: {one.result.outcome}")


def _verdict(one: Judged) -> Iterator[Finding]:
    """Tell of another outcome than the reference's."""
    before, after = one.reference.outcome, one.result.outcome
    if before in (after, "failed") or one.result.verdict is None:
        return
    severity: Severity = "notice"
    if before in RANKS and after in RANKS:
        severity = "regression" if RANKS[after] > RANKS[before] else "improvement"
    told = f"is {after}, and was {before} on {day(one.night, one.tonight)}"
    yield finding(one, "verdict", severity, f"{one.name} {told}: {one.result.verdict.headline}")


def _size(one: Judged) -> Iterator[Finding]:
    before, after = (point.file_bytes for point in _two(one))
    if before and after and _beyond(before, after, SIZE_SHARE, SIZE_BYTES):
        yield _moved(one, "size", "file", before, after)


def _memory(one: Judged) -> Iterator[Finding]:
    """Compare the peak with the reference's, and with the usual one of the nights that began there."""
    before, after = (point.memory_bytes for point in _two(one))
    if not before or not after or one.reference.kind != one.result.kind:
        return
    began = [p.memory_bytes for p in one.points if p.kind == one.result.kind and p.night != one.tonight]
    usual = int(statistics.median([size for size in began if size][:MEMORY_NIGHTS]))
    beyond = all(_beyond(size, after, MEMORY_SHARE, MEMORY_BYTES) for size in (before, usual))
    if beyond and (after > before) == (after > usual):
        yield _moved(one, "memory", "peak of memory", before, after)


def _two(one: Judged) -> tuple[Point, Point]:
    return Point.of(one.night, one.reference), Point.of(one.tonight, one.result)


def _beyond(before: int, after: int, share: float, least: int) -> bool:
    return abs(after - before) > max(share * before, least)


def _moved(one: Judged, kind: Kind, what: str, before: int, after: int) -> Finding:
    share = f"{abs(after / before - 1):.1%}".replace("%", " %")
    grows = after > before
    told = f"{what} is {share} {'larger' if grows else 'smaller'} than on {day(one.night, one.tonight)}"
    sentence = f"{one.name}: the {told} ({before / 1e6:.2f} → {after / 1e6:.2f} MB)"
    return finding(one, kind, "regression" if grows else "improvement", sentence, Change(before, after, unit="bytes"))
