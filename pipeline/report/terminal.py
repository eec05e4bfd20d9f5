"""Verdicts for people: a table on stdout, or the same figures as JSON."""

import json
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline import verdict
from pipeline.artifacts import Bundle, Unmeasured, Verified
from pipeline.figures import Candidate, Ratio
from pipeline.verdict import Built, Search, Verdict, Weighed

STYLES = {"pass": "green", "fail": "red", "undecided": "yellow", "unmeasured": "yellow"}
Result = Bundle | Verified | Unmeasured


def exit_code(results: Sequence[Result], *, allow_unmeasured: bool = False) -> int:
    """Give 0 when every target is inside the budget, 1 when one is not, or not provably; unmeasured as allowed."""
    good = {"pass", "unmeasured"} if allow_unmeasured else {"pass"}
    return 0 if all(_verdict(result).outcome in good for result in results) else 1


def show(results: Sequence[Result], *, as_json: bool) -> None:
    """Print the verdict of each target on stdout."""
    if as_json:
        print(json.dumps([_fields(result) for result in results], indent=2, allow_nan=False))
        return
    console = Console()
    measured = [found for result in results if isinstance(found := _verdict(result), Verdict)]
    if measured:
        console.print(_table(measured))
    for result in results:
        for line in _told(_verdict(result)):
            console.print(line, soft_wrap=True)
        if isinstance(result, Bundle):
            console.print(f"     {escape(str(result.path))}", soft_wrap=True)


def rows(found: Verdict) -> dict[str, str]:
    """Give a verdict's figures by their names, in the table's order, without colours."""
    named = {f"{found.target} {found.precision}": f"{found.recipe} {found.version}"}
    return named | {name: cell for name, cell in _cells(found).items() if name != "verdict"}


def show_json(results: Sequence[Result], **more: object) -> None:
    """Print verdicts on stdout as JSON, beside what else is given."""
    print(json.dumps({"verdicts": [_fields(result) for result in results], **more}, indent=2, allow_nan=False))


def _verdict(result: Result) -> Built:
    return result.verified.verdict if isinstance(result, Bundle) else result.verdict


def _fields(result: Result) -> dict[str, object]:
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
    for name in found.ladder.suspects:
        yield f"     [yellow]suspicious:[/] the step {escape(name)} should change nothing, and does; see the report"
    for suspicion in found.latency.suspicions if isinstance(found, Verdict) else ():
        yield f"     [yellow]suspicious:[/] {escape(suspicion.finding)}; {escape(suspicion.remedy)}"


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
        f"drop at most ({100 * judged.confidence:g}% sure)": f"{judged.drop_upper_pp:.2f} pp",
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
