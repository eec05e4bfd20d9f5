"""What a night leaves to be read: the dashboard, a summary in Markdown, a JUnit file, and each cell's report."""

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote

from bitferry.pipeline import progress
from bitferry.pipeline.nightly import dashboard, summary
from bitferry.pipeline.nightly.changes import changed
from bitferry.pipeline.nightly.history import History
from bitferry.pipeline.nightly.night import Cell, Night, Point

SUMMARY, JUNIT, REPORTS = "summary.md", "junit.xml", "reports"
SHOWN = 365
"""Nights of a trend."""
KEPT = 30
"""Reports of each cell."""
JOB_SUMMARY = "GITHUB_STEP_SUMMARY"
"""Environment variable: the file that becomes a CI job's page."""


def publish(history: History, night: Night, out: Path) -> Path:
    """Write everything into the folder `out`; give the dashboard's page."""
    shown = {result.cell for result in night.results}
    points = [one for one in history.points(last=SHOWN) if one.night <= night.id and one.cell in shown]
    by_cell: dict[Cell, list[Point]] = {}
    for point in points:
        by_cell.setdefault(point.cell, []).append(point)
    accepted = {cell: reference for cell in by_cell if (reference := history.reference(cell))}
    page = dashboard.write(
        out,
        points,
        night,
        references=accepted,
        reports={cell: name for cell in by_cell if (name := latest(out, cell))},
        changes=dict(_changes(history, by_cell)),
    )
    before = [one for one in points if one.night == _before(points, night.id)]
    text = summary.markdown(night, before, dashboard=page.name)
    (out / SUMMARY).write_text(text)
    (out / JUNIT).write_text(summary.junit(night))
    job = os.environ.get(JOB_SUMMARY)
    if job:
        with Path(job).open("a") as stream:
            stream.write(summary.markdown(night, before))
    progress.stage("dashboard", str(page))
    return page


def _before(points: Sequence[Point], night: str) -> str | None:
    """Give the night before this one."""
    return max((one.night for one in points if one.night < night), default=None)


def folder(out: Path) -> Path:
    """Give the folder of the cells' reports."""
    return out / REPORTS


def keep(folder: Path, cell: Cell, night: str, page: bytes) -> Path:
    """Write a cell's report of a night, and let go of its oldest."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{cell.slug}--{night.replace(':', '')}.html"
    part = path.with_suffix(".part")
    part.write_bytes(page)
    part.replace(path)
    for ending in ("html", "txt"):
        for old in sorted(folder.glob(f"{cell.slug}--*.{ending}"))[:-KEPT]:
            old.unlink()
    return path


def keep_trace(folder: Path, cell: Cell, night: str, trace: str | None) -> None:
    """Write why a cell failed, with all that was said, beside the reports."""
    if trace:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{cell.slug}--{night.replace(':', '')}.txt").write_text(trace)


def latest(out: Path, cell: Cell) -> str | None:
    """Give the link to the cell's last report, from the dashboard."""
    found = sorted(folder(out).glob(f"{cell.slug}--*.html"))
    return quote(f"{REPORTS}/{found[-1].name}") if found else None


def _changes(
    history: History, by_cell: Mapping[Cell, Sequence[Point]]
) -> Iterator[tuple[tuple[Cell, str], tuple[str, ...]]]:
    """Say what changed at each night whose cell was made of something else than the night before."""
    for cell, points in by_cell.items():
        for before, after in pairwise(points):
            if before.key != after.key:
                old, new = history.inputs(before.night, cell), history.inputs(after.night, cell)
                if old and new:
                    yield (cell, after.night), changed(old, new)
