"""A night on the terminal, or as JSON: what became worse first, then every cell in a line."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bitferry.pipeline.nightly.night import Finding, Night, Point
from bitferry.pipeline.report.terminal import STYLES

SEVERITIES = {"regression": "red", "improvement": "green", "notice": "yellow"}
PIPED_WIDTH = 120
"""Characters of a line where there is no terminal."""
MOST = 40
"""Findings on a terminal."""


def show(night: Night, *, as_json: bool) -> None:
    """Print it on stdout."""
    if as_json:
        print(json.dumps(fields(night), indent=2, allow_nan=False))
        return
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, PIPED_WIDTH)
    console.print(_table(night))
    for line in _told(night.findings):
        console.print(line, soft_wrap=True)
    console.print(headline(night), soft_wrap=True)


def fields(night: Night) -> dict[str, object]:
    """Give the night as what JSON can hold, the cells by their figures."""
    cells = [asdict(Point.of(night.id, result)) | {"cell": result.cell.name} for result in night.results]
    found = [asdict(finding) | {"cell": finding.cell.name} for finding in night.findings]
    about = {"night": night.id, "finished": night.finished, "regressed": night.regressed, "seconds": night.seconds}
    return about | {"findings": found, "cells": cells}


def headline(night: Night) -> str:
    """Say in a sentence how the night went."""
    count = {name: sum(one.severity == name for one in night.findings) for name in SEVERITIES}
    reused = sum(one.status == "reused" for one in night.results)
    told = f"{count['regression']} regressions and {count['improvement']} improvements in {len(night.results)} cells"
    stopped = "" if night.finished else "; stopped, and the next run goes on with it"
    return f"{night.id}: {told}, {reused} of them reused{stopped}"


def _told(findings: Sequence[Finding]) -> Iterator[str]:
    """Give regressions first, and of each cell everything together."""
    ranked = sorted(findings, key=lambda one: ([*SEVERITIES].index(one.severity), one.cell))
    for (severity, cell), group in groupby(ranked[:MOST], key=lambda one: (one.severity, one.cell)):
        yield f"[{SEVERITIES[severity]}]{severity}[/] [bold]{escape(cell.name)}[/]"
        found = list(group)
        yield from (f"     {escape(one.sentence)}" for one in found)
        yield from (
            f"     changed: {escape(change)}" for change in dict.fromkeys(c for one in found for c in one.changed)
        )
    if len(findings) > MOST:
        yield f"and {len(findings) - MOST:,} more in the dashboard"


def _table(night: Night) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("cell", overflow="fold")  # never cut: its end tells one precision from another
    table.add_column("verdict", overflow="fold")
    for name in ("accuracy %", "drop pp", "ms", "of baseline", "MB"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in sorted(night.results, key=lambda one: one.cell):
        point = Point.of(night.id, result)
        style = STYLES.get(point.outcome, "red")
        reused = " [dim]reused[/]" if result.status == "reused" else ""
        figures = (
            _number(point.percent, ".2f"),
            _number(point.drop_pp, "+.2f"),
            _number(point.latency_ms, ".2f"),
            _number(point.ratio, ".2f"),
            _number(point.file_bytes and point.file_bytes / 1e6, ".1f"),
        )
        table.add_row(escape(result.cell.name), f"[{style}]{point.outcome}[/]{reused}", *figures)
    return table


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
