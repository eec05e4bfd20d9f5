"""A night on a CI job's page and in its test list: everything is told, nothing is markup, and it fits."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from itertools import product

import pytest

from bitferry.pipeline.nightly.heatmap import duration, sentence
from bitferry.pipeline.nightly.night import Cell, Finding, Night, Point
from bitferry.pipeline.nightly.summary import junit, markdown, plain
from tests import nights as made

BEFORE, TONIGHT = made.nights(2)
NASTY = "Error: a|b\n<script>alert(1)</script> `c` $x$ [d](https://e) **f** \x00\x1b[31m\ud800 ]]>"
SLOWER, GOOD, REUSED, BROKEN, ABSENT = (
    made.cell(),
    made.cell(precision="float32"),
    made.cell(target="onnxruntime"),
    made.cell("other"),
    made.cell("other", "coreml"),
)


def finding(cell: Cell, kind: str, severity: str, text: str, *changed: str) -> Finding:
    return Finding(cell, kind, severity, text, 0.5, 0.6, 1.1, 1.3, "ratio", BEFORE, TONIGHT, changed)  # type: ignore[arg-type]


@pytest.fixture
def night() -> Night:
    """One of each: a regression, a good cell, a reused, a failed and an unmeasured one."""
    results = (
        made.result(SLOWER, ratio=0.6, outcome="undecided"),
        made.result(GOOD),
        made.reused(made.result(REUSED)),
        made.failed(BROKEN, NASTY, seconds=95.0),
        made.unmeasured(ABSENT),
    )
    findings = (
        finding(GOOD, "size", "notice", "is 0.9 % larger"),
        finding(SLOWER, "latency", "regression", "takes 20 % longer (10 to 30 %)", "package pillow 12.0.0 → 12.1.0", "a", "b", "c"),
        finding(BROKEN, "failure", "regression", f"fails: {NASTY}"),
    )  # fmt: skip
    return Night(TONIGHT, results, findings, 605.0, finished=True)


def rows(text: str) -> list[list[str]]:
    """Split the tables of a Markdown text into fields, as a renderer does: at bars that are not escaped."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[field.strip() for field in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_page_tells_headline_findings_matrix_and_slowest(night: Night) -> None:
    points = [Point.of(BEFORE, made.result(cell)) for cell in (SLOWER, GOOD)]
    text = markdown(night, points, dashboard="https://ci.example/a b/(1)/index.html")
    assert text.startswith("## ❌ Nightly matrix, 2026-11-02T02:00:00Z\n")
    assert "**2 regressions, 1 notice in 5 cells: 3 measured, 1 reused, 1 failed.** It took 10 min." in text
    assert "[Dashboard](https://ci.example/a%20b/%281%29/index.html)" in text
    table = rows(text)
    assert [row[0] for row in table[2:5]] == ["regression", "regression", "notice"]
    assert table[2][1] == "other/openvino/int8"
    assert table[3][2:] == [
        "takes 20 % longer (10 to 30 %) Since 2026-11-02T02:00:00Z.",
        "package pillow 12.0.0 → 12.1.0<br>a<br>b<br>and 1 more",
    ]
    assert table[5:] == [
        ["Recipe", "coreml int8", "onnxruntime int8", "openvino int8", "openvino float32"],
        ["---"] * 5,
        ["other", "–", "", "!", ""],
        ["small", "", "*✓ 0.50 pp 0.500×*", "? 0.50 pp 0.600× (was pass)", "✓ 0.50 pp 0.500×"],
    ]  # fmt: skip
    assert "Slowest: other/openvino/int8 2 min," in text
    assert {len(row) for row in table[:5]} == {4}


def test_nothing_in_an_error_is_markup(night: Night) -> None:
    text = markdown(night)
    assert "<script" not in text
    assert r"a\|b" in text
    assert not re.search(r"(?<!\\)[`$\[]", text.split("fails:")[1].splitlines()[0])
    assert plain("x" * 9999) == "x" * 400 + " …"
    assert "\x1b" not in text
    text.encode()


def test_a_quiet_night_and_a_stopped_one_say_so() -> None:
    quiet = Night(TONIGHT, (made.reused(made.result()),), (), 3.0, finished=True)
    assert sentence(quiet) == "Nothing changed in 1 cell: 0 measured, 1 reused."
    assert "## ✅" in markdown(quiet)
    assert "No finding" in markdown(quiet)
    stopped = markdown(replace(quiet, finished=False))
    assert "## ⏸️" in stopped
    assert "the next `bitferry matrix`" in stopped
    better = replace(quiet, findings=(finding(SLOWER, "latency", "improvement", "faster"),))
    assert sentence(better) == "No regression, 1 improvement in 1 cell: 0 measured, 1 reused."
    assert [duration(seconds) for seconds in (0.2, 89, 91, 5400, 7500)] == ["0 s", "89 s", "2 min", "1 h 30 min", "2 h 5 min"]  # fmt: skip


def test_ten_thousand_cells_fit_and_what_is_left_out_is_counted() -> None:
    plain_result = made.reused(made.result())
    cells = [Cell(f"recipe-{i:04d}-{'x' * 60}", *names) for i in range(500) for names in product("abcd", "efghi")]
    results = tuple(replace(plain_result, cell=cell) for cell in cells)
    findings = tuple(finding(cell, "failure", "regression", NASTY * 50) for cell in cells)
    text = markdown(Night(TONIGHT, results, findings, 9.0, finished=True))
    assert len(text.encode()) <= 1_000_000
    assert "and 9,900 more findings" in text
    table = [row for row in rows(text) if row[0].startswith("recipe-")]
    assert len(table) == 500
    longer = tuple(replace(plain_result, cell=Cell(f"recipe-{i:04d}{'_' * 300}", "a", "e")) for i in range(10_000))
    text = markdown(Night(TONIGHT, longer, (), 9.0, finished=True))
    assert 900_000 < len(text.encode()) <= 1_000_000
    shown = sum(row[0].startswith("recipe-") for row in rows(text))
    assert 0 < shown < 10_000
    assert f"and {10_000 - shown:,} more recipes" in text


def test_the_junit_file_has_a_case_per_cell(night: Night) -> None:
    root = ET.fromstring(junit(night))  # noqa: S314 - our own
    suites = {suite.get("name"): suite for suite in root}
    assert list(suites) == ["other", "small"]
    cases = {(case.get("classname"), case.get("name")): case for case in root.iter("testcase")}
    assert len(cases) == 5
    failure = cases["small.openvino", "int8"].find("failure")
    assert failure is not None
    assert (failure.get("type"), failure.get("message")) == ("latency", "takes 20 % longer (10 to 30 %)")
    assert "changed: package pillow 12.0.0 → 12.1.0" in (failure.text or "")
    assert len(cases["small.openvino", "float32"]) == len(cases["small.onnxruntime", "int8"]) == 0
    error = cases["other.openvino", "int8"].find("error")
    assert error is not None
    assert error.get("message") == re.sub("[\x00\x1b\ud800]", "", NASTY)
    assert [child.tag for child in cases["other.coreml", "int8"]] == ["skipped"]
    counts = [[suites[name].get(key) for key in ("tests", "failures", "errors", "skipped", "time")] for name in suites]
    assert counts == [["2", "0", "1", "1", "107.500"], ["3", "1", "0", "0", "25.000"]]
    properties = {one.get("name"): one.get("value") for one in suites["small"].iter("property")}
    assert properties["openvino.int8.percent"] == "91.5"
    assert properties["openvino.int8.ratio"] == "0.6"
    assert properties["onnxruntime.int8.status"] == "reused"
    assert properties["openvino.int8.file_bytes"] == "1000000"


def test_the_junit_file_keeps_to_the_schema_of_ants_task(night: Night) -> None:
    """Check what the schema asks for: https://github.com/windyroad/JUnit-Schema."""
    root = ET.fromstring(junit(night))  # noqa: S314 - our own
    assert (root.tag, root.attrib) == ("testsuites", {})
    for index, suite in enumerate(root):
        tags = [child.tag for child in suite]
        assert tags == ["properties", *["testcase"] * (len(tags) - 3), "system-out", "system-err"]
        assert set(suite.attrib) == {"name", "package", "id", "timestamp", "hostname", "tests", "failures", "errors", "skipped", "time"}  # fmt: skip
        assert suite.get("id") == str(index)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", suite.get("timestamp") or "")
        assert all(suite.get(name) for name in ("name", "hostname"))
        assert all(set(one.attrib) == {"name", "value"} and one.get("name") for one in suite.iter("property"))
        for case in suite.iter("testcase"):
            assert set(case.attrib) == {"name", "classname", "time"}
            assert len(case) <= 1
            assert all(child.tag in ("skipped", "error", "failure") for child in case)
            assert all(child.get("type") for child in case if child.tag != "skipped")


def test_a_machine_without_a_name_and_an_error_without_a_text() -> None:
    nameless = replace(made.inputs(), machine={"hostname": " "})
    bare = replace(made.failed(), inputs=nameless, error=None, error_kind=None)
    root = ET.fromstring(junit(Night(TONIGHT, (bare,), (), 1.0, finished=True)))  # noqa: S314 - our own
    assert root[0].get("hostname") == "localhost"
    error = root[0].find("testcase/error")
    assert error is not None
    assert "no reason is known" in (error.get("message") or "")
