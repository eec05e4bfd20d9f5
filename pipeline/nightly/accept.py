"""Move the night that later ones are compared with: a change was looked at, and is wanted."""

import getpass
from collections.abc import Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path

from bitferry.device.errors import InputError
from bitferry.pipeline.nightly.history import History
from bitferry.pipeline.nightly.night import Cell

HISTORY = "history.sqlite"


def accept(out: Path, names: Sequence[str], night: str | None, why: str) -> list[str]:
    """Make `night`, by default the last, the reference of the cells named; give a line for each.

    A name may hold `*` for any text, and `all` is every cell of the night. Raises InputError for names of no cell, and
    where a cell was not measured in that night.
    """
    with History(out / HISTORY) as history:
        nights = history.nights(finished=True)
        if not nights:
            raise InputError(f"{out / HISTORY} has no finished night")
        chosen = night or nights[-1]
        if chosen not in nights:
            raise InputError(f"there is no finished night '{chosen}'; the last is {nights[-1]}")
        points = {point.cell: point for point in history.points() if point.night == chosen}
        cells = _named(names, [*points])
        if any(set(name) & {"*", "?"} or name == "all" for name in names):
            cells = [cell for cell in cells if points[cell].outcome != "failed"]
        if not cells:
            raise InputError(f"every cell of the night {chosen} that is meant failed; there is nothing to compare with")
        before = {cell: history.reference(cell) for cell in cells}
        history.accept(cells, chosen, who=getpass.getuser(), why=why)
    return [f"{cell.name}: {chosen} (before: {before[cell]})" for cell in cells]


def _named(names: Sequence[str], cells: Sequence[Cell]) -> list[Cell]:
    found: dict[Cell, None] = {}
    for name in names:
        fitting = [cell for cell in cells if name == "all" or fnmatchcase(cell.name, name)]
        if not fitting:
            close = get_close_matches(name, [cell.name for cell in cells], n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"there are {len(cells)} cells in that night"
            raise InputError(f"'{name}' is no cell of that night; {hint}")
        found |= dict.fromkeys(fitting)
    return sorted(found)
