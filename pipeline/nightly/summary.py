"""A night as Markdown for a CI job's page, and as the JUnit file that CI systems draw their test lists from."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from xml.etree import ElementTree as ET

from bitferry.pipeline.nightly.heatmap import OUTCOMES, count, duration, heatmap, ranked, sentence, slowest, tonight
from bitferry.pipeline.nightly.night import Cell, Finding, Night, Point, Result
from bitferry.pipeline.report.page import number, times

LIMIT_BYTES = 1_000_000
"""GitHub refuses a job summary above 1 MiB; the rest is room for what other steps of the job write."""
FINDINGS, SLOWEST, SENTENCE = 100, 5, 400
"""Most findings and slowest cells that are listed, and characters of a sentence: an error may be a whole log."""
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot hold, however it is escaped."""
FIGURES = ("percent", "float_percent", "drop_pp", "latency_ms", "ratio", "file_bytes", "memory_bytes")
"""The figures of a point that become properties of the JUnit file."""


def markdown(night: Night, points_before: Sequence[Point] = (), *, dashboard: str | None = None) -> str:
    """Write the night for $GITHUB_STEP_SUMMARY: headline, findings, the matrix, the slowest cells.

    `points_before` are those of the night before, from which a changed outcome is told; `dashboard` is its address.
    """
    state = "❌" if night.regressed else "✅" if night.finished else "⏸️"
    head = [f"## {state} Nightly matrix, {plain(night.id)}", f"**{plain(sentence(night))}** It took {_took(night)}"]
    if dashboard:
        head += [f"[Dashboard]({_address(dashboard)})"]
    text = "\n\n".join([*head, *_findings(night)]) + "\n\n"
    tail = "\n".join(_slowest(night)) + "\n"
    was = {point.cell: point.outcome for point in points_before}
    recipes = len({result.cell.recipe for result in night.results})
    room = LIMIT_BYTES - len((text + tail).encode())
    return text + "\n".join(_fitting(_matrix(night, was), room, recipes)) + "\n\n" + tail


def _took(night: Night) -> str:
    rest = "" if night.finished else " so far: it was stopped, and the next `bitferry matrix` goes on with it"
    return f"{duration(night.seconds)}{rest}."


def _findings(night: Night) -> Iterator[str]:
    found = ranked(night.findings)
    if not found:
        yield "No finding: every cell is as its accepted reference."
        return
    rows = ["| | Cell | What | Changed since the reference |", "|---|---|---|---|"]
    for one in found[:FINDINGS]:
        changed = "<br>".join(plain(change) for change in one.changed[:3]) or "nothing that is recorded"
        more = f"<br>and {len(one.changed) - 3} more" if len(one.changed) > 3 else ""
        since = f" Since {plain(one.since)}." if one.since else ""
        rows.append(f"| {one.severity} | {plain(one.cell.name)} | {plain(one.sentence)}{since} | {changed}{more} |")
    yield "\n".join(rows)
    if len(found) > FINDINGS:
        yield f"and {count(len(found) - FINDINGS, 'more finding')}"


def _matrix(night: Night, was: Mapping[Cell, str]) -> Iterator[str]:
    laid = heatmap(tonight(night))
    yield f"| Recipe | {' | '.join(plain(f'{target} {precision}') for target, precision in laid.columns)} |"
    yield "|---" * (len(laid.columns) + 1) + "|"
    for recipe, points in laid.rows:
        yield f"| {plain(recipe)} | {' | '.join(_square(point, was) for point in points)} |"


def _square(point: Point | None, was: Mapping[Cell, str]) -> str:
    """Write one cell of the matrix: symbol, drop in percentage points, time over the baseline's."""
    if point is None:
        return ""
    drop = f" {number(point.drop_pp)} pp" if point.drop_pp is not None else ""
    ratio = f" {times(point.ratio)}" if point.ratio is not None else ""
    before = was.get(point.cell, point.outcome)
    changed = f" (was {before})" if before != point.outcome else ""
    text = f"{OUTCOMES[point.outcome]}{drop}{ratio}"
    return f"*{text}*{changed}" if point.status == "reused" else f"{text}{changed}"


def _fitting(rows: Iterable[str], room: int, recipes: int) -> Iterator[str]:
    """Give the table's two head rows and its recipes' as far as there is room in bytes, then how many are left out."""
    for index, row in enumerate(rows):
        room -= len(row.encode()) + 1
        if room < 200:
            yield f"\nand {count(recipes - max(index - 2, 0), 'more recipe')}"
            return
        yield row


def _slowest(night: Night) -> Iterator[str]:
    legend = ", ".join(f"{symbol} {outcome}" for outcome, symbol in OUTCOMES.items())
    yield f"{legend}; drop of the judged metric; × time over the float baseline's; *italic*: reused.\n"
    found = slowest(night, SLOWEST)
    if found:
        yield f"Slowest: {', '.join(f'{plain(cell.name)} {duration(seconds)}' for cell, seconds in found)}."


def plain(text: str) -> str:
    """Escape a text for one field of a Markdown table: nothing in it is markup, a link, a formula or a new line."""
    short = legal(text if len(text) <= SENTENCE else f"{text[:SENTENCE]} …")
    entities = re.sub(r"[&<>]", lambda found: {"&": "&amp;", "<": "&lt;", ">": "&gt;"}[found[0]], short)
    return " ".join(re.sub(r"([\\`*_\[\]|~$#!@])", r"\\\1", entities).split())


def _address(url: str) -> str:
    return re.sub(r"[\s()<>|]", lambda found: f"%{ord(found[0]):02X}", url)


def junit(night: Night) -> str:
    """Write the night as JUnit XML: a suite per recipe, a case per cell.

    A regression is a failure, a cell without a verdict an error, one that could not be measured is skipped.
    """
    suites = ET.Element("testsuites")
    found: dict[Cell, list[Finding]] = {}
    for one in ranked(night.findings):
        if one.severity == "regression":
            found.setdefault(one.cell, []).append(one)
    results = sorted(night.results, key=lambda result: result.cell)
    for index, (recipe, group) in enumerate(groupby(results, lambda result: result.cell.recipe)):
        suites.append(_suite(night, recipe, list(group), found, index))
    ET.indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(suites, encoding="unicode") + "\n"


def _suite(
    night: Night, recipe: str, results: Sequence[Result], found: Mapping[Cell, Sequence[Finding]], index: int
) -> ET.Element:
    """Give one recipe's suite, in the order of elements that the schema of Ant's JUnit task asks for."""
    cases = [_case(result, found.get(result.cell, ())) for result in results]
    suite = ET.Element("testsuite", name=recipe, package="bitferry", id=str(index), timestamp=night.id[:19])
    suite.set("hostname", legal(results[0].inputs.machine.get("hostname", "")).strip() or "localhost")
    suite.set("tests", str(len(cases)))
    for total, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(total, str(sum(case.find(tag) is not None for case in cases)))
    suite.set("time", f"{sum(result.seconds for result in results):.3f}")
    properties = ET.SubElement(suite, "properties")
    for result in results:
        for name, value in _figures(Point.of(night.id, result)):
            ET.SubElement(properties, "property", name=f"{result.cell.target}.{result.cell.precision}.{name}").set(
                "value", value
            )
    suite.extend(cases)
    suite.extend((ET.Element("system-out"), ET.Element("system-err")))
    return suite


def _figures(point: Point) -> Iterator[tuple[str, str]]:
    yield from (("outcome", point.outcome), ("status", point.status), ("kind", legal(point.kind)))
    for name in FIGURES:
        value = getattr(point, name)
        if value is not None:
            yield name, f"{value:.6g}" if isinstance(value, float) else str(value)


def _case(result: Result, regressions: Sequence[Finding]) -> ET.Element:
    cell = result.cell
    case = ET.Element("testcase", name=cell.precision, classname=f"{cell.recipe}.{cell.target}")
    case.set("time", f"{result.seconds:.3f}")
    if result.status == "failed":
        message = result.error or "no verdict came of it, and no reason is known"
        told = ET.SubElement(case, "error", message=legal(message), type=f"{result.error_kind or 'unknown'} error")
        told.text = legal("\n".join(_explained(one) for one in regressions) or message)
    elif regressions:
        message = "; ".join(one.sentence for one in regressions)
        told = ET.SubElement(case, "failure", message=legal(message), type=regressions[0].kind)
        told.text = legal("\n".join(_explained(one) for one in regressions))
    elif result.measured is None:
        reason = result.verdict.headline if result.verdict else "not measured"
        ET.SubElement(case, "skipped", message=legal(reason))
    return case


def _explained(finding: Finding) -> str:
    changed = "".join(f"\n  changed: {change}" for change in finding.changed) or "\n  nothing that is recorded changed"
    since = f"\n  since {finding.since}" if finding.since else ""
    return f"{finding.kind}: {finding.sentence}\n  against {finding.reference}{since}{changed}"


def legal(text: str) -> str:
    """Leave out what an XML file cannot hold: control characters and halves of surrogate pairs."""
    return NOT_XML.sub("", text)
