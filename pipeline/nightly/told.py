"""The history of cells for people: a table of nights on stdout, or the same figures as JSON."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from itertools import pairwise

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bitferry.device.errors import InputError
from bitferry.pipeline.nightly.history import Accepted, History
from bitferry.pipeline.nightly.night import Cell, Point

STYLES = {"pass": "green", "fail": "red", "undecided": "yellow", "unmeasured": "yellow", "failed": "red"}
BARS = "▁▂▃▄▅▆▇█"
MARK = "◆"
SHOWN = 3
"""Of what changed in a night; JSON has all."""
PIPED_WIDTH = 120
"""Characters of a line where there is no terminal, so that no interval is folded."""


@dataclass(frozen=True)
class Past:
    """One cell over its last nights."""

    cell: Cell
    points: tuple[Point, ...]
    changed: tuple[tuple[str, ...], ...]
    """For each point, what differs from the cell's night before it."""
    reference: str | None
    accepted: tuple[Accepted, ...]


def chosen(cells: Sequence[Cell], recipe: str, target: str | None = None, precision: str | None = None) -> list[Cell]:
    """Take the cells of a recipe, on one target and in one precision where these are given.

    Raises InputError that names what is kept and comes nearest, when there is none.
    """
    if not cells:
        raise InputError("the history is empty; `bitferry matrix` fills it")
    found = list(cells)
    for kind, wanted in (("recipe", recipe), ("target", target), ("precision", precision)):
        if wanted is None:
            continue
        known = sorted({getattr(cell, kind) for cell in found})
        if wanted not in known:
            kept = "" if kind == "recipe" else f" of {recipe}"
            raise InputError(f"no night{kept} has the {kind} '{wanted}'; {_nearest(wanted, known)}")
        found = [cell for cell in found if getattr(cell, kind) == wanted]
    return found


def _nearest(wanted: str, known: Sequence[str]) -> str:
    close = get_close_matches(wanted, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"there is {', '.join(known[:10])}" + (f" and {len(known) - 10} more" if known[10:] else "")


def read(history: History, cell: Cell, last: int) -> Past:
    """Read the last nights of a cell, and what changed from each to the next."""
    from bitferry.pipeline.nightly.changes import changed  # noqa: PLC0415

    points = history.points(cell)[-last - 1 :]
    inputs = [history.inputs(point.night, cell) for point in points]
    told = [changed(a, b) if a and b else () for a, b in pairwise(inputs)]
    if len(points) <= last:
        told = [(), *told]  # the very first night follows none
    return Past(cell, tuple(points[-last:]), tuple(told), history.reference(cell), tuple(history.accepted(cell)))


def show_history(history: History, cells: Sequence[Cell], last: int = 30, *, as_json: bool = False) -> None:
    """Print the last nights of each cell."""
    found = [read(history, cell, last) for cell in cells]
    if as_json:
        print(json.dumps([_fields(past) for past in found], indent=2, ensure_ascii=False, allow_nan=False))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, PIPED_WIDTH)
    for past in found:
        console.print(_table(past))
        for line in _below(past):
            console.print(line, soft_wrap=True)


def _fields(past: Past) -> dict[str, object]:
    nights = [asdict(point) | {"changed": changed} for point, changed in zip(past.points, past.changed, strict=True)]
    for night in nights:
        del night["cell"]
    accepted = [asdict(one) for one in past.accepted]
    return {**asdict(past.cell), "reference": past.reference, "accepted": accepted, "nights": nights}


def _table(past: Past) -> Table:
    accepted, short = {one.night for one in past.accepted}, _short_names(past)
    table = Table(title=past.cell.name, title_justify="left", box=None, pad_edge=False)
    table.add_column("night, UTC", no_wrap=True)
    table.add_column("outcome", no_wrap=True)
    for name in ("accuracy, %", "drop, pp", "ms", "ratio", "MB", "memory, MB"):
        table.add_column(name, justify="right", overflow="fold")
    for point in past.points:
        mark = f" {MARK}" if point.night in accepted or point.night == past.reference else ""
        outcome = f"[{STYLES[point.outcome]}]{point.outcome}[/]{', reused' if point.status == 'reused' else ''}"
        table.add_row(short[point.night] + mark, outcome, *_figures(point))
    return table


def _short_names(past: Past) -> dict[str, str]:
    """Name the nights by their dates, with the times where two share one."""
    nights = {point.night for point in past.points} | {one.night for one in past.accepted}
    nights |= {past.reference} if past.reference else set()
    dates = Counter(night[:10] for night in nights)
    return {night: night[:10] if dates[night[:10]] == 1 else f"{night[:10]} {night[11:19]}" for night in nights}


def _figures(point: Point) -> Iterator[str]:
    yield _number(point.percent, 2)
    yield _bounded(point.drop_pp, point.drop_lower_pp, point.drop_upper_pp, 2)
    yield _number(point.latency_ms, 3)
    yield _bounded(point.ratio, point.ratio_lower, point.ratio_upper, 3)
    yield _number(None if point.file_bytes is None else point.file_bytes / 1e6, 2)
    yield _number(None if point.memory_bytes is None else point.memory_bytes / 1e6, 1)


def _number(value: float | None, digits: int) -> str:
    return "—" if value is None else f"{value:.{digits}f}"


def _bounded(value: float | None, lower: float | None, upper: float | None, digits: int) -> str:
    bounds = "" if lower is None or upper is None else f" ({lower:.{digits}f} to {upper:.{digits}f})"
    return _number(value, digits) + bounds


def _below(past: Past) -> Iterator[str]:
    """Say what a table has no room for: the trend, what changed when, the errors, and who accepted which night."""
    short, ratios = _short_names(past), [point.ratio for point in past.points]
    known = [ratio for ratio in ratios if ratio is not None]
    if known:
        yield f"ratio      {sparkline(ratios)}  {min(known):.3f} to {max(known):.3f} of its float model's time"
    for point, changed in zip(past.points, past.changed, strict=True):
        if changed:
            yield f"changed    {short[point.night]} {escape(_cut(changed))}"
        if point.status == "failed":
            yield f"error      {short[point.night]} {escape(point.headline)}"
    if past.reference and not past.accepted:
        yield f"reference  {short[past.reference]} {MARK} the first; `bitferry accept` moves it"
    for one in past.accepted:
        yield f"accepted   {short[one.night]} {MARK} {escape(f'{one.why} ({one.who}, {one.at[:10]})')}"


def _cut(changed: Sequence[str]) -> str:
    more = f"; and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
    return "; ".join(changed[:SHOWN]) + more


def sparkline(values: Sequence[float | None]) -> str:
    """Draw values as bars between the lowest and the highest; a space where there is none."""
    known = [value for value in values if value is not None]
    low, span = min(known, default=0.0), max(known, default=0.0) - min(known, default=0.0)
    steps = len(BARS) - 1
    return "".join(
        " " if value is None else BARS[round((value - low) / span * steps) if span else steps // 2] for value in values
    )
