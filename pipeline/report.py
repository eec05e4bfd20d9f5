"""Verdicts for people: a table on stdout, or the same figures as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
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
        for suspicion in verdict.latency.suspicions:
            console.print(f"     [yellow]suspicious:[/] {suspicion}", soft_wrap=True)
        if isinstance(result, Bundle):
            console.print(f"     {escape(str(result.path))}", soft_wrap=True)


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
    """Lay out a column per target, so that the table fits a narrow terminal."""
    table = Table(title=f"{recipe.name} {recipe.version}", caption=_caption(verdicts), caption_justify="left")
    table.add_column("")
    for verdict in verdicts:
        table.add_column(f"{verdict.target} {verdict.precision}", justify="right")
    rows = [_cells(verdict) for verdict in verdicts]
    for name in rows[0]:
        table.add_row(name, *(row[name] for row in rows))
    return table


def _cells(verdict: Verdict) -> dict[str, str]:
    accuracy, latency = verdict.accuracy, verdict.latency
    eager, artifact = latency.eager_float, latency.artifact
    return {
        "verdict": f"[{STYLES[verdict.outcome]}]{verdict.outcome}[/]",
        "top-1, float": f"{accuracy.float_correct / accuracy.images:.2%}",
        "top-1": f"{accuracy.correct / accuracy.images:.2%}",
        "drop": f"{accuracy.drop_pp:.2f} pp",
        f"drop at most ({accuracy.confidence:.0%} sure)": f"{accuracy.drop_upper_pp:.2f} pp",
        "lost / gained": f"{accuracy.lost} / {accuracy.gained}",
        "p50 / p90, eager float": f"{eager.p50_ms:.2f} / {eager.p90_ms:.2f} ms",
        "p50 / p90": f"{artifact.p50_ms:.2f} / {artifact.p90_ms:.2f} ms",
        "speed-up": f"{latency.speedup:.1f}×",
        "speed-up (95 % interval)": f"{latency.speedup_lower:.1f} to {latency.speedup_upper:.1f}",
        "layers really run as": ", ".join(f"{count} {name}" for name, count in verdict.executed.items()),
    }


def _caption(verdicts: Sequence[Verdict]) -> str:
    first = verdicts[0]
    return (
        f"{first.accuracy.images} images, the same for both. Float is eager PyTorch float32. Batch 1, "
        f"{first.latency.threads} threads, {first.latency.artifact.samples} calls each, interleaved."
    )
