"""Writes the dashboard of the nightly matrix: a folder that any browser opens, from disk or from any web server."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from bitferry.pipeline.nightly.heatmap import (
    OUTCOMES,
    SEVERITIES,
    duration,
    heatmap,
    ranked,
    sentence,
    slowest,
    tonight,
)
from bitferry.pipeline.nightly.night import Cell, Finding, Night, Point
from bitferry.pipeline.report import charts, page

INDEX, SCRIPT = "index.html", "nightly.js"
KEPT = 2
"""Data folders: this night's, and the last one's, for pages that are open while a new night is written."""
OPEN_FINDINGS = 20
"""Findings of one severity that are open; the rest is folded away."""
SPARK_NIGHTS, SPARK_WIDTH, SPARK_HEIGHT = 30, 150, 34
SLOWEST = 3
HEADLINE = 300
"""Characters of a headline that are shown: an error may be a whole log."""
SERIES = (
    *("percent", "float_percent", "drop_pp", "drop_lower_pp", "drop_upper_pp", "images", "latency_ms", "baseline_ms"),
    *("ratio", "ratio_lower", "ratio_upper", "file_bytes", "memory_bytes", "status", "outcome", "kind"),
)
SPARKS = {
    "accuracy": "percent",
    "float accuracy": "float_percent",
    "latency": "ratio",
    "size": "file_bytes",
    "memory": "memory_bytes",
}
"""The figure that a finding of a kind is about."""

Changes = Mapping[tuple[Cell, str], tuple[str, ...]]


def write(
    folder: Path,
    points: Sequence[Point],
    night: Night,
    *,
    references: Mapping[Cell, str],
    reports: Mapping[Cell, str],
    changes: Changes | None = None,
) -> Path:
    """Write `index.html` and its data into `folder`, replacing the last night's; give the page.

    `points` are all cells' over the nights to be shown, `references` each cell's accepted night, `reports` relative
    links to their reports, `changes` what changed at a night. The data gets a folder of a new name and the page comes
    last, so that a server never gives half of it.
    """
    series = _series(points, night)
    files = {SCRIPT: (Path(page.__file__).parent / SCRIPT).read_text(encoding="utf-8")}
    for cell, own in series.items():
        found = [one for one in ranked(night.findings) if one.cell == cell]
        files[f"{cell.slug}.js"] = _data(cell, own, found, references.get(cell), reports.get(cell), changes or {})
    folder.mkdir(parents=True, exist_ok=True)
    data = _place(folder, files)
    part = folder / f".{INDEX}.{os.getpid()}"
    # A tool's error may hold half of a surrogate pair, which no file can.
    part.write_text(_index(series, night, reports, data), encoding="utf-8", errors="replace")
    part.replace(folder / INDEX)
    _forget(folder, data)
    return folder / INDEX


def _series(points: Sequence[Point], night: Night) -> dict[Cell, list[Point]]:
    """Give each cell its points by night; the night's own results stand for its points."""
    by_cell: dict[Cell, dict[str, Point]] = {}
    for point in (*points, *tonight(night)):
        by_cell.setdefault(point.cell, {})[point.night] = point
    return {cell: [own[name] for name in sorted(own)] for cell, own in sorted(by_cell.items())}


def _data(
    cell: Cell, own: Sequence[Point], found: Sequence[Finding], reference: str | None, report: str | None, told: Changes
) -> str:
    """Give one cell's history as a script: a page from disk may run a script beside it, but not read a file."""
    history = {
        "cell": cell.name,
        "report": report,
        "reference": reference,
        "findings": [
            {name: getattr(one, name) for name in ("kind", "severity", "sentence", "since", "reference", "changed")}
            for one in found
        ],
        "nights": [point.night for point in own],
        "changes": {point.night: told[cell, point.night] for point in own if told.get((cell, point.night))},
        "headline": own[-1].headline[:HEADLINE],
        **{name: [_short(getattr(point, name)) for point in own] for name in SERIES},
    }
    return f"bitferryNightly.add({json.dumps(history, separators=(',', ':'), allow_nan=False)});\n"


def _short(value: float | str | None) -> float | str | None:
    """Round to the six figures that a chart can show."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _place(folder: Path, files: Mapping[str, str]) -> str:
    """Write the files into a folder named after what they hold, whole or not at all; give its name."""
    content = hashlib.sha256("\0".join(f"{name}\0{text}" for name, text in sorted(files.items())).encode())
    name = f"data-{content.hexdigest()[:16]}"
    part = folder / f".{name}.{os.getpid()}"
    part.mkdir()
    for file, text in files.items():
        (part / file).write_text(text, encoding="utf-8")
    if (folder / name).exists():
        shutil.rmtree(part)
        os.utime(folder / name)
    else:
        part.rename(folder / name)
    return name


def _forget(folder: Path, data: str) -> None:
    others = [one for one in folder.glob("data-*") if one.name != data and (one / SCRIPT).is_file()]
    for old in sorted(others, key=lambda one: one.stat().st_mtime, reverse=True)[KEPT - 1 :]:
        shutil.rmtree(old)


def _index(series: Mapping[Cell, Sequence[Point]], night: Night, reports: Mapping[Cell, str], data: str) -> str:
    found = ranked(night.findings)
    latest = {cell: own[-1] for cell, own in series.items()}
    return (
        page.environment()
        .get_template("nightly.html.jinja")
        .render(
            night=night,
            sentence=sentence(night),
            took=duration(night.seconds),
            findings=[(severity, [one for one in found if one.severity == severity]) for severity in SEVERITIES],
            open_findings=OPEN_FINDINGS,
            map=heatmap(latest.values()),
            marks={one.cell: one.severity for one in reversed(found)},
            outcomes=OUTCOMES,
            reports=reports,
            slowest=[(cell, duration(seconds)) for cell, seconds in slowest(night, SLOWEST)],
            spark=lambda one: _spark(series.get(one.cell, ()), one),
            nights=max((len(own) for own in series.values()), default=0),
            headline_length=HEADLINE,
            data=data,
            script=SCRIPT,
        )
    )


def _spark(own: Sequence[Point], finding: Finding) -> tuple[str, float, float] | None:
    """Draw the last nights of the figure that a finding is about: an SVG path and where it ends; None for none."""
    shown = [(index, getattr(point, SPARKS.get(finding.kind, ""), None)) for index, point in enumerate(own)]
    known = [(index, float(value)) for index, value in shown[-SPARK_NIGHTS:] if value is not None]
    if len(known) < 2:
        return None
    x = charts.Scale(known[0][0], known[-1][0], 3, SPARK_WIDTH - 5)
    y = charts.scale([value for _, value in known], SPARK_HEIGHT - 5, 5, pad=0.01)
    path = "".join(f"{'L' if place else 'M'}{x(i)} {y(value)}" for place, (i, value) in enumerate(known))
    return path, x(known[-1][0]), y(known[-1][1])
