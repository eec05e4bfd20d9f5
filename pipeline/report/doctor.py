"""What the doctor found, for people: a line for each thing examined, a table of targets, and what would help."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bitferry.pipeline.doctor import Report, State

STYLES = {"ok": "green", "note": "yellow", "problem": "red"}
READY = {"yes": "[green]yes[/]", "builds": "[yellow]builds only[/]", "no": "[red]no[/]"}


def show(report: Report, *, as_json: bool) -> None:
    """Print the report on stdout."""
    if as_json:
        print(json.dumps(asdict(report) | {"able": report.able}, indent=2))
        return
    console = Console()
    for check in report.checks:
        grade = f"[{STYLES[check.grade]}]{check.grade:<8}[/]"
        console.print(
            f"{grade} [bold]{escape(check.name):<10}[/] {escape(check.found)}", soft_wrap=True, highlight=False
        )
        if check.remedy:
            console.print(f"{'':20}→ {escape(check.remedy)}", soft_wrap=True, highlight=False)
    console.print()
    _show_states(report.targets, hardware=True)
    console.print(_conclusion(report), soft_wrap=True, highlight=False)


def show_targets(states: Sequence[State], *, as_json: bool) -> None:
    """Print the short list: which targets are ready here, and what the others lack."""
    if as_json:
        print(json.dumps([asdict(state) for state in states], indent=2))
    else:
        _show_states(states, hardware=False)


def _show_states(states: Sequence[State], *, hardware: bool) -> None:
    console = Console()
    table = Table()
    for name in ("target", "ready", "runtime"):
        table.add_column(name, no_wrap=True)
    for name in ("precisions", "at speed here"):
        table.add_column(name)
    for state in states:
        texts = (state.runtime, ", ".join(state.precisions), ", ".join(state.fast))
        table.add_row(escape(state.name), READY[state.ready], *map(escape, texts))
    console.print(table)
    for state in states if hardware else ():
        if state.ready != "no":
            does = "runs on" if state.ready == "yes" else "builds for"
            told = f"{state.name}: {does} {', '.join(state.found or (state.device,))}"
            console.print(escape(told), soft_wrap=True, highlight=False)
    for line in _reasons(states):
        console.print(escape(line), soft_wrap=True, highlight=False)


def _reasons(states: Sequence[State]) -> Iterator[str]:
    for state in states:
        if state.reason:
            yield f"{state.name}: {state.reason}"
        if state.install:
            yield f"    {state.install}"


def _conclusion(report: Report) -> str:
    problems = [check.name for check in report.checks if check.grade == "problem"]
    if problems:
        return f"[red]cannot deploy here yet:[/] see {escape(', '.join(problems))}"
    ready = [state.name for state in report.targets if state.ready != "no"]
    return f"[green]ready:[/] bitferry deploy RECIPE --target {escape(','.join(ready))}"
