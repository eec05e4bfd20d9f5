"""The history of nights in one SQLite file: what came of every cell, what was found, and what was accepted."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from bitferry.device.errors import InputError
from bitferry.pipeline.nightly import packed
from bitferry.pipeline.nightly.database import PATIENCE_SECONDS, Database
from bitferry.pipeline.nightly.night import Cell, Finding, Inputs, Night, Point, Result, Samples, Status
from bitferry.pipeline.report.record import Recorded

# Statements are put together from the column names here and in packed.py, never from what was read.
# ruff: noqa: S608

NIGHT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
CELL = "recipe, target, precision"
OF_CELL = "recipe = ? AND target = ? AND precision = ?"
FIGURES = ", ".join(packed.FIGURES)
ROW = (*packed.FIGURES, *packed.FACTS, *packed.CONTENTS)


@dataclass(frozen=True)
class Accepted:
    """A night that someone made the reference of a cell."""

    night: str
    at: str
    """When, in UTC, ISO 8601."""
    who: str
    why: str


class History:
    """One open history; the tables are described in docs/history.md.

    Every method raises InputError when the file is damaged, full, or held by another process for too long.
    """

    def __init__(self, path: Path, *, read_only: bool = False, patience: float = PATIENCE_SECONDS) -> None:
        """Open the file, or begin it unless `read_only`; raise InputError when it is no history or of a newer schema.

        `patience` is how many seconds to wait for another process that writes.
        """
        self._file = Database(path, read_only=read_only, patience=patience)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; it may then be copied as it is."""
        self._file.close()

    # A night, from its beginning to its end.

    def begin(self, night: str) -> None:
        """Begin a night, or go on with it; raise InputError when it is finished, or older than the last one."""
        if not NIGHT.fullmatch(night):
            raise InputError(f"'{night}' is no night; expected when it began, in UTC, as 2026-11-22T02:00:00Z")
        with self._file.transaction():
            later = self._file.rows("SELECT max(night) FROM nights WHERE night > ?", [night])[0][0]
            if later and not self._file.rows("SELECT 1 FROM nights WHERE night = ?", [night]):
                raise InputError(f"night {night} would come before {later}, which is kept already; is the clock right?")
            self._file.run("INSERT OR IGNORE INTO nights (night) VALUES (?)", [night])
            self._check_unfinished(night)

    def unfinished(self) -> str | None:
        """Name the last night where it was stopped before its end."""
        found = self._file.rows("SELECT night, seconds FROM nights ORDER BY night DESC LIMIT 1")
        return found[0][0] if found and found[0][1] is None else None

    def write(self, night: str, *results: Result) -> None:
        """Keep what came of cells, all or none, in place of what this night had of them.

        Raises InputError when the night is finished or has not begun. One call for many is quicker: each waits for
        the disk once.
        """
        with self._file.transaction():
            self._check_unfinished(night)
            for result in results:
                values = packed.columns(night, result)
                values |= {name: self._kept(content) for name, content in packed.contents(result).items()}
                self._insert("INSERT OR REPLACE INTO results", values)

    def _insert(self, into: str, values: Mapping[str, object]) -> None:
        self._file.run(f"{into} ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})", list(values.values()))

    def _check_unfinished(self, night: str) -> None:
        found = self._file.rows("SELECT seconds FROM nights WHERE night = ?", [night])
        if not found:
            raise InputError(f"night {night} has not begun")
        if found[0][0] is not None:
            raise InputError(f"night {night} is finished, and stays as it is; begin a new one")

    def _kept(self, content: bytes) -> int:
        """Keep a content once; give its number."""
        digest, find = packed.digest(content), "SELECT id FROM blobs WHERE sha256 = ?"
        found = self._file.rows(find, [digest])
        if not found:
            values = {"sha256": digest, "size": len(content), "content": packed.deflated(content)}
            self._insert("INSERT INTO blobs", values)
            found = self._file.rows(find, [digest])
        return int(found[0][0])

    def finish(self, night: str, findings: Sequence[Finding], seconds: float) -> None:
        """End a night with what was found in it; raise InputError when it is finished already."""
        with self._file.transaction():
            self._check_unfinished(night)
            for position, one in enumerate(findings):
                self._insert("INSERT INTO findings", {"night": night, "position": position, **packed.finding(one)})
            self._file.run("UPDATE nights SET seconds = ? WHERE night = ?", [seconds, night])

    # What is kept.

    def nights(self, last: int | None = None, *, finished: bool = False) -> list[str]:
        """Name the nights, or the last so many, in order; those that run or were stopped too, unless `finished`."""
        limit, which = -1 if last is None else last, "WHERE seconds IS NOT NULL" if finished else ""
        rows = self._file.rows(f"SELECT night FROM nights {which} ORDER BY night DESC LIMIT ?", [limit])
        return [row[0] for row in reversed(rows)]

    def night(self, night: str) -> Night:
        """Read everything of a night; raise InputError when there is none of that name."""
        known = self._file.rows("SELECT seconds FROM nights WHERE night = ?", [night])
        if not known:
            last = self.nights(1)
            raise InputError(
                f"there is no night {night}; " + (f"the last one is {last[0]}" if last else "there is none")
            )
        seconds = known[0][0]
        return Night(
            night, tuple(self.results(night)), tuple(self._findings(night)), seconds or 0.0, seconds is not None
        )

    def _findings(self, night: str) -> list[Finding]:
        columns = f"{CELL}, {', '.join(packed.FINDING)}"
        rows = self._file.rows(f"SELECT {columns} FROM findings WHERE night = ? ORDER BY position", [night])
        return [packed.finding_of(Cell(*row[:3]), row[3:]) for row in rows]

    def results(self, night: str) -> list[Result]:
        """Read what came of each cell in a night; raise InputError as `result` does."""
        rows = self._file.rows(f"SELECT {CELL}, {', '.join(ROW)} FROM results WHERE night = ? ORDER BY {CELL}", [night])
        return [self._result(night, Cell(*row[:3]), row[3:]) for row in rows]

    def result(self, night: str, cell: Cell) -> Result | None:
        """Read what came of a cell in a night, if anything did.

        Raises InputError when its verdict is of a schema that this bitferry does not read; `points`, `inputs`,
        `answers` and `samples` still give the rest.
        """
        found = self._file.rows(
            f"SELECT {', '.join(ROW)} FROM results WHERE night = ? AND {OF_CELL}", _key(night, cell)
        )
        return self._result(night, cell, found[0]) if found else None

    def _result(self, night: str, cell: Cell, values: Sequence[Any]) -> Result:
        row, place = dict(zip(ROW, values, strict=True)), f"{cell.name} in {night}"
        return packed.result(
            cell, row, {name: self._content(row[name], place) for name in packed.CONTENTS if row[name]}, place
        )

    def _content(self, number: int, place: str) -> bytes:
        content, size, digest = self._file.rows("SELECT content, size, sha256 FROM blobs WHERE id = ?", [number])[0]
        return packed.inflated(content, size, digest, place)

    def _contents(self, night: str, cell: Cell, names: Sequence[str]) -> Mapping[str, bytes]:
        rows = self._file.rows(
            f"SELECT {', '.join(names)} FROM results WHERE night = ? AND {OF_CELL}", _key(night, cell)
        )
        found = zip(names, rows[0], strict=True) if rows else ()
        return {name: self._content(number, f"{cell.name} in {night}") for name, number in found if number}

    def samples(self, night: str, cell: Cell) -> Samples:
        """Read the timed calls of a cell in a night; empty where none are kept."""
        return packed.samples(self._contents(night, cell, ["samples"]))

    def answers(self, night: str, cell: Cell) -> Recorded | None:
        """Read what was answered for each image, where that is kept."""
        return packed.answers(self._contents(night, cell, packed.ANSWERS), f"{cell.name} in {night}")

    def inputs(self, night: str, cell: Cell) -> Inputs | None:
        """Read what the result of a cell in a night depends on, where there is one."""
        kept = self._contents(night, cell, ["inputs", "packages"])
        return packed.inputs(kept) if kept else None

    def latest(
        self, cell: Cell, *, before: str | None = None, status: Status | None = "measured"
    ) -> tuple[str, Result] | None:
        """Read the last result with a verdict, of that status or any, and its night; raise InputError as `result`."""
        row = self._file.rows(
            f"SELECT max(night) FROM results WHERE {OF_CELL} AND outcome <> 'failed' AND night < ?"
            " AND status = coalesce(?, status)",
            [*astuple(cell), before or "9999", status],
        )
        night = row[0][0]
        found = self.result(night, cell) if night else None
        return (night, found) if found else None

    def points(self, cell: Cell | None = None, *, last: int | None = None) -> list[Point]:
        """Read the figures of every cell, or of one, in each of the last nights; in order of nights, then cells."""
        where, values = (f" AND {OF_CELL}", astuple(cell)) if cell else ("", ())
        first = (self.nights(last) or ["9999"])[0]
        rows = self._file.rows(
            f"SELECT night, {CELL}, {FIGURES} FROM results WHERE night >= ?{where} ORDER BY night, {CELL}",
            [first, *values],
        )
        cells = {row[1:4]: Cell(*row[1:4]) for row in rows}
        return [Point(row[0], cells[row[1:4]], *row[4:]) for row in rows]

    def cells(self) -> list[Cell]:
        """List every cell of which anything is kept."""
        return [Cell(*row) for row in self._file.rows(f"SELECT DISTINCT {CELL} FROM results ORDER BY {CELL}")]

    # References.

    def reference(self, cell: Cell) -> str | None:
        """Name the night that was accepted last; where none was, the first in which the cell was measured."""
        accepted = self.accepted(cell)
        if accepted:
            return accepted[-1].night
        found = self._file.rows(
            f"SELECT night FROM results WHERE {OF_CELL} AND status = 'measured'"
            " ORDER BY percent IS NULL, night LIMIT 1",
            astuple(cell),
        )
        return found[0][0] if found else None

    def accept(self, cells: Sequence[Cell], night: str, *, who: str, why: str) -> None:
        """Make a night the reference of these cells, from now on; a later call undoes it, and both stay on record.

        Raises InputError, and accepts none, when one of the cells has no verdict in that night.
        """
        at = datetime.now(UTC).isoformat(timespec="seconds")
        with self._file.transaction():
            rows = self._file.rows(f"SELECT {CELL} FROM results WHERE night = ? AND outcome <> 'failed'", [night])
            lacking = sorted(set(cells) - {Cell(*row) for row in rows})
            if lacking:
                more = f" and {len(lacking) - 1} more" if lacking[1:] else ""
                raise InputError(f"{lacking[0].name}{more} has no verdict in night {night}, so it can be no reference")
            for cell in cells:
                self._insert("INSERT INTO accepted", asdict(cell) | {"night": night, "at": at, "who": who, "why": why})

    def accepted(self, cell: Cell) -> list[Accepted]:
        """Read every acceptance of a cell, the one that counts last."""
        rows = self._file.rows(f"SELECT night, at, who, why FROM accepted WHERE {OF_CELL} ORDER BY id", astuple(cell))
        return [Accepted(*row) for row in rows]

    def forget(self, before: str) -> int:
        """Drop the samples and answers of older nights, but for references; give how many results lost them.

        Figures and verdicts stay; what a later night points at stays too.
        """
        wanted = [f"{name} IS NOT NULL" for name in (*packed.ANSWERS, "samples")]
        with self._file.transaction():
            old = self._file.rows(
                f"SELECT night, {CELL} FROM results WHERE night < ? AND ({' OR '.join(wanted)})"
                f" AND (night, {CELL}) NOT IN (SELECT night, {CELL} FROM accepted)",
                [before],
            )
            references = {cell: self.reference(cell) for cell in {Cell(*row[1:]) for row in old}}
            dropped = [row for row in old if row[0] != references[Cell(*row[1:])]]
            for row in dropped:
                nothing = ", ".join(f"{name} = NULL" for name in (*packed.ANSWERS, "samples"))
                self._file.run(f"UPDATE results SET {nothing} WHERE night = ? AND {OF_CELL}", row)
            used = " UNION ".join(f"SELECT {name} FROM results WHERE {name} IS NOT NULL" for name in packed.CONTENTS)
            self._file.run(f"DELETE FROM blobs WHERE id NOT IN ({used})")
        if dropped:  # it writes the whole file anew
            self._file.run("VACUUM")
        return len(dropped)


def _key(night: str, cell: Cell) -> list[str]:
    return [night, *astuple(cell)]
