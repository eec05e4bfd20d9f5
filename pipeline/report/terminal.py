"""Verdicts for people: a table on stdout, or the same figures as JSON."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bitferry.pipeline import verdict
from bitferry.pipeline.artifacts import Bundle, Unmeasured, Verified
from bitferry.pipeline.figures import Candidate, Ratio, Suspicion
from bitferry.pipeline.measure.suspicion import by_weight
from bitferry.pipeline.verdict import Built, Failed, Search, Verdict, Weighed

STYLES = {"pass": "green", "fail": "red", "undecided": "yellow", "unmeasured": "yellow"}
Result = Bundle | Verified | Unmeasured
Outcome = Result | Failed


def exit_code(results: Sequence[Outcome], *, allow_unmeasured: bool = False) -> int:
    """Give 0 when every target is inside the budget, 1 when one is not, or not provably; unmeasured as allowed.

    2 when one failed, whatever the others are.
    """
    if any(isinstance(result, Failed) for result in results):
        return 2
    good = {"pass", "unmeasured"} if allow_unmeasured else {"pass"}
    return 0 if all(_verdict(result).outcome in good for result in _judged(results)) else 1


def show(results: Sequence[Outcome], *, as_json: bool) -> None:
    """Print the verdict of each target on stdout."""
    if as_json:
        print(json.dumps([_fields(result) for result in results], indent=2, allow_nan=False))
        return
    console = Console()
    measured = [found for result in _judged(results) if isinstance(found := _verdict(result), Verdict)]
    if measured:
        console.print(_table(measured))
    for result in results:
        if isinstance(result, Failed):
            title = escape(f"{result.target} {result.precision}")
            console.print(f"[red]failed[/] {title}: {escape(result.error)}", soft_wrap=True)
            continue
        for line in _told(_verdict(result)):
            console.print(line, soft_wrap=True)
        if isinstance(result, Bundle):
            console.print(f"     {escape(str(result.path))}", soft_wrap=True)


def rows(found: Verdict) -> dict[str, str]:
    """Give a verdict's figures by their names, in the table's order, without colours."""
    named = {f"{found.target} {found.precision}": f"{found.recipe} {found.version}"}
    return named | {name: cell for name, cell in _cells(found).items() if name != "verdict"}


def show_json(results: Sequence[Outcome], **more: object) -> None:
    """Print verdicts on stdout as JSON, beside what else is given."""
    print(json.dumps({"verdicts": [_fields(result) for result in results], **more}, indent=2, allow_nan=False))


def _verdict(result: Result) -> Built:
    return result.verified.verdict if isinstance(result, Bundle) else result.verdict


def _judged(results: Sequence[Outcome]) -> list[Result]:
    return [result for result in results if not isinstance(result, Failed)]


def _fields(result: Outcome) -> dict[str, object]:
    if isinstance(result, Failed):
        return {"outcome": "failed"} | asdict(result) | {"bundle": None}
    path = str(result.path) if isinstance(result, Bundle) else None
    return verdict.fields(_verdict(result)) | {"bundle": path}


def _told(found: Built) -> Iterator[str]:
    """Say the verdict, its reasons, what ran, where accuracy was lost and what to be suspicious of, a line each."""
    yield f"[{STYLES[found.outcome]}]{found.outcome}[/] {escape(found.headline)}"
    for reason in found.reasons:
        yield f"     {escape(reason)}"
    if isinstance(found, Verdict):
        yield f"     {escape(found.execution.summary)}"
    if found.search:
        yield f"     {escape(found.search.reason)}; SQNR on {_images_of(found.search)}"
        for one in found.search.weighed:
            yield f"       {escape(_weighed(one))}"
    if found.ladder.lost_most and not found.passed:
        layers = ", ".join(layer.name for layer in found.ladder.worst_layers)
        yield f"     most is lost in {escape(found.ladder.lost_most)}" + (
            f": layers {escape(layers)}" if layers else ""
        )
    if found.ladder.suspects:
        steps = " and ".join(found.ladder.suspects)
        yield f"     [yellow]suspicious:[/] a step that should change nothing does: {escape(steps)}; see the report"
    if isinstance(found, Verdict):
        yield from suspicious(found.latency.suspicions)


def suspicious(found: Sequence[Suspicion]) -> Iterator[str]:
    """Say what may have disturbed a timing in two lines: what weighs most, and the kinds of the rest."""
    ranked = by_weight(found)
    for one in ranked[:1]:
        yield f"     [yellow]suspicious:[/] {escape(one.finding)}; {escape(one.remedy)}"
    if rest := ranked[1:]:
        kinds = Counter(one.kind for one in rest)
        told = ", ".join(f"{kind} ({count})" if count > 1 else kind for kind, count in kinds.items())
        yield f"     [yellow]and {len(rest)} more:[/] {escape(told)}; the report has them"


def _table(verdicts: Sequence[Verdict]) -> Table:
    """Lay out a column per target, so that the table fits a narrow terminal."""
    first = verdicts[0]
    table = Table(title=f"{first.recipe} {first.version}", caption=_caption(first), caption_justify="left")
    table.add_column("")
    for found in verdicts:
        table.add_column(f"{found.target} {found.precision}", justify="right")
    rows = [_cells(found) for found in verdicts]
    for name in dict.fromkeys(name for row in rows for name in row):
        table.add_row(name, *(row.get(name, "") for row in rows))
    return table


def _cells(found: Verdict) -> dict[str, str]:
    accuracy, latency = found.accuracy, found.latency
    judged, flips, artifact = accuracy.judged, accuracy.flips, latency.artifact
    return {
        "verdict": f"[{STYLES[found.outcome]}]{found.outcome}[/]",
        f"{judged.metric}, float": f"{judged.float_percent:.2f} %",
        judged.metric: f"{judged.percent:.2f} %",
        "drop": f"{judged.drop_pp:.2f} pp",
        "drop at most": f"{judged.drop_upper_pp:.2f} pp, {100 * judged.confidence:g}% sure",
        **{one.metric: f"{one.float_percent:.2f} → {one.percent:.2f} %" for one in accuracy.others},
        "lost / gained / flipped": f"{flips.lost} / {flips.gained} / {flips.flipped}",
        **({} if flips.pixels_percent is None else {"pixels flipped": f"{flips.pixels_percent:.2f} %"}),
        f"SQNR of the scores, {accuracy.images} images": "equal"
        if accuracy.sqnr_db is None
        else f"{accuracy.sqnr_db:.1f} dB",
        f"p50 / p90 / p99, {latency.baseline}": _percentiles(latency.eager),
        "p50 / p90 / p99": _percentiles(artifact),
        f"speed-up over {latency.baseline}": _ratio(latency.speedup),
        "speed-up over its own float": _ratio(latency.runtime_speedup),
        "images/s at best": f"{artifact.throughput.images_per_second:.0f}" if artifact.throughput else "—",
    } | _footprint(artifact)


def _footprint(artifact: Candidate) -> dict[str, str]:
    used = artifact.footprint
    if used is None:
        return {}
    return {
        "size / peak memory": f"{used.file_bytes / 1e6:.1f} / {used.peak_memory_bytes / 1e6:.0f} MB",
        "load / first answer": f"{used.load_ms:.0f} / {used.first_answer_ms:.1f} ms",
    }


def _images_of(search: Search) -> str:
    return "some calibration images" if search.images is None else f"{search.images} calibration images"


def _weighed(one: Weighed) -> str:
    ratio = f", {_ratio(one.over_chosen)} the chosen one's time" if one.over_chosen and not one.chosen else ""
    judged = f", {one.outcome}: at most {one.drop_upper_pp:.2f} pp worse" if one.outcome else ""
    noise = "equal scores" if one.sqnr_db is None else f"{one.sqnr_db:.1f} dB"
    mark, size = "*" if one.chosen else "-", f"{one.file_bytes / 1e6:.1f} MB"
    return f"{mark} {one.name}: {one.ms:.2f} ms{ratio}, {noise}, {size}{judged}"


def _percentiles(candidate: Candidate) -> str:
    found = {percentile.percent: f"{percentile.ms:.2f}" for percentile in candidate.timing.percentiles}
    return " / ".join(found.get(percent, "—") for percent in (50, 90, 99)) + " ms"


def _ratio(ratio: Ratio | None) -> str:
    return "—" if ratio is None else f"{ratio.value:.2f}× ({ratio.lower:.2f} to {ratio.upper:.2f})"


def _caption(found: Verdict) -> str:
    return (
        f"{found.accuracy.images} evaluation images, the same for both. Batch {found.latency.batch}, "
        f"{found.latency.threads} threads, interleaved blocks; intervals are 95 %. A percentile that too few calls "
        "support is left out (—)."
    )
