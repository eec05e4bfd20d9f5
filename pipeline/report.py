"""Verdicts for people: a table on stdout, or the same figures as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

import targets
from device.errors import TargetUnavailable
from pipeline.artifacts import Bundle, Verdict
from pipeline.recipe import Recipe

STYLES = {"pass": "green", "fail": "red", "undecided": "yellow"}


def exit_code(results: Sequence[Bundle | Verdict]) -> int:
    """Give 0 when every target is inside the budget, 1 when one is not or not provably."""
    return 0 if all(_verdict(result).passed for result in results) else 1


def show(recipe: Recipe, results: Sequence[Bundle | Verdict], *, as_json: bool) -> None:
    """Print the verdict of each target on stdout."""
    if as_json:
        print(json.dumps([_fields(result) for result in results], indent=2))
        return
    console = Console()
    console.print(_table(recipe, [_verdict(result) for result in results]))
    for result in results:
        verdict = _verdict(result)
        console.print(
            f"[{STYLES[verdict.outcome]}]{verdict.outcome}[/] {verdict.target} {verdict.precision}: "
            + "; ".join(verdict.reasons),
            soft_wrap=True,
        )
        if isinstance(result, Bundle):
            console.print(f"     {result.path}", soft_wrap=True)


def show_targets(*, as_json: bool) -> None:
    """Print which targets are ready here, and what the others lack."""
    rows = [_target(name) for name in targets.names()]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("target", "ready", "runtime", "device", "precisions")
    for row in rows:
        table.add_row(row["name"], row["ready"], row["runtime"], row["device"], row["precisions"])
    Console().print(table)


def _target(name: str) -> dict[str, str]:
    try:
        target = targets.get(name)
        found = target.environment()
    except TargetUnavailable as error:
        return {"name": name, "ready": "no", "runtime": str(error), "device": "", "precisions": ""}
    runtime = f"{found.runtime} {found.version}"
    return {
        "name": name,
        "ready": "yes",
        "runtime": runtime,
        "device": " ".join((found.device, *found.isa)),
        "precisions": ", ".join(target.SCHEMES),
    }


def _verdict(result: Bundle | Verdict) -> Verdict:
    return result.verdict if isinstance(result, Bundle) else result


def _fields(result: Bundle | Verdict) -> dict[str, object]:
    verdict = _verdict(result)
    path = str(result.path) if isinstance(result, Bundle) else None
    return asdict(verdict) | {"passed": verdict.passed, "bundle": path}


def _table(recipe: Recipe, verdicts: Sequence[Verdict]) -> Table:
    table = Table(title=f"{recipe.name} {recipe.version}", caption=_caption(verdicts))
    for heading in ("target", "verdict", "ran"):
        table.add_column(heading)
    for heading in ("float top-1", "top-1", "drop", "at most", "float p50", "p50", "p90", "speed-up"):
        table.add_column(heading, justify="right")
    for verdict in verdicts:
        accuracy, latency = verdict.accuracy, verdict.latency
        table.add_row(
            verdict.target,
            f"[{STYLES[verdict.outcome]}]{verdict.outcome}[/]",
            ", ".join(f"{count} {precision}" for precision, count in verdict.executed.items()),
            f"{accuracy.float_correct / accuracy.images:.2%}",
            f"{accuracy.correct / accuracy.images:.2%}",
            f"{accuracy.drop_pp:.2f} pp",
            f"{accuracy.drop_upper_pp:.2f} pp",
            f"{latency.eager_float.p50_ms:.2f} ms",
            f"{latency.artifact.p50_ms:.2f} ms",
            f"{latency.artifact.p90_ms:.2f} ms",
            f"{latency.speedup:.1f}×",
        )
    return table


def _caption(verdicts: Sequence[Verdict]) -> str:
    first = verdicts[0]
    return (
        f"{first.accuracy.images} images, the same for both; float is eager PyTorch float32 on {first.latency.threads} "
        f"threads; 'at most' is the one-sided {first.accuracy.confidence:.0%} bound of the drop; batch 1"
    )
