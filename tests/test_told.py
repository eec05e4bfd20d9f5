"""Tests what `bitferry history` prints, and what it says of names that no night has."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from device.errors import InputError
from pipeline.nightly import told
from pipeline.nightly.history import History
from tests import nights

NIGHTS = nights.nights(5)
CELLS = [nights.cell(), nights.cell(precision="float32"), nights.cell("large"), nights.cell("large", "onnxruntime")]


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    """Five nights of one cell: as it was, reused, another pillow, broken, and mended."""
    newer = nights.inputs(packages={"pillow": "14.0.0"})
    results = (
        nights.result(),
        nights.reused(nights.result()),
        nights.result(made_from=newer, percent=90.0, ratio=0.6, outcome="fail"),
        nights.failed(error="conv2d [red]takes[/] no float8"),
        nights.result(percent=91.0, ratio=0.55),
    )
    with History(tmp_path / "nights.db") as opened:
        for night, result in zip(NIGHTS, results, strict=True):
            opened.begin(night)
            opened.write(night, result)
            opened.finish(night, (), 1.0)
        yield opened


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def test_the_table_has_a_night_a_line(history: History, capsys: pytest.CaptureFixture[str]) -> None:
    history.accept([nights.cell()], NIGHTS[2], who="A. Person", why="pillow [14]")
    told.show_history(history, [nights.cell()])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "small/openvino/int8"
    rows = {line[:16]: line for line in lines if line.startswith("2026-")}
    assert len(rows) == 5
    assert rows["2026-11-01 02:00"].split()[2:] == (
        [
            "pass",
            "91.50",
            "%",
            "0.50",
            "(-0.18",
            "to",
            "1.50)",
            "1.000",
            "0.500",
            "(0.495",
            "to",
            "0.505)",
            "1.00",
            "20.0",
        ]
    )
    assert "pass (reused)" in rows["2026-11-02 02:00"]
    assert rows["2026-11-03 02:00"].startswith("2026-11-03 02:00 ◆  fail")
    assert "pillow 13.0.0 → 14.0.0" in rows["2026-11-03 02:00"]
    assert "error: conv2d [red]takes[/] no float8" in rows["2026-11-04 02:00"]
    assert [line[16:18] for line in rows.values()].count(" ◆") == 1
    assert "ratio      ▁▁█ ▅  0.500 to 0.600 of its baseline's time, same night" in lines
    assert lines[-1].startswith("accepted   ◆ 2026-11-03 02:00, by A. Person at 20")
    assert lines[-1].endswith(": pillow [14]")


def test_the_first_night_is_the_reference_until_one_is_accepted(
    history: History, capsys: pytest.CaptureFixture[str]
) -> None:
    told.show_history(history, [nights.cell()], 2)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:16] for line in lines if line.startswith("2026-")] == ["2026-11-04 02:00", "2026-11-05 02:00"]
    assert lines[-1] == "reference  ◆ 2026-11-01 02:00, the first night; `bitferry accept` moves it"


def test_json_has_every_figure_and_change(history: History, capsys: pytest.CaptureFixture[str]) -> None:
    history.accept([nights.cell()], NIGHTS[2], who="A. Person", why="faster")
    told.show_history(history, [nights.cell()], 3, as_json=True)
    (found,) = json.loads(capsys.readouterr().out)
    assert [found[name] for name in ("recipe", "target", "precision", "reference")] == [
        "small", "openvino", "int8", NIGHTS[2],
    ]  # fmt: skip
    assert [(one["night"], one["outcome"], one["percent"]) for one in found["nights"]] == [
        (NIGHTS[2], "fail", 90.0), (NIGHTS[3], "failed", None), (NIGHTS[4], "pass", 91.0),
    ]  # fmt: skip
    assert found["nights"][0]["changed"] == ["package pillow 13.0.0 → 14.0.0"]
    assert [(one["night"], one["who"], one["why"]) for one in found["accepted"]] == [(NIGHTS[2], "A. Person", "faster")]


def test_many_changes_are_cut_short() -> None:
    assert told._short(["a", "b", "c"]) == "a; b; c"
    assert told._short(["a", "b", "c", "d", "e"]) == "a; b; c; and 2 more"


def test_cells_are_chosen_by_name() -> None:
    assert told.chosen(CELLS, "small") == CELLS[:2]
    assert told.chosen(CELLS, "small", "openvino", "int8") == CELLS[:1]
    for names, sentence in (
        (("smal",), "no night has the recipe 'smal'; did you mean small?"),
        (("zebra",), "no night has the recipe 'zebra'; there is large, small"),
        (("small", "onnxruntime"), "no night of small has the target 'onnxruntime'; there is openvino"),
        (("large", "onnxrt"), "no night of large has the target 'onnxrt'; did you mean onnxruntime?"),
        (("small", "openvino", "int4"), "no night of small has the precision 'int4'; did you mean int8?"),
    ):
        with pytest.raises(InputError) as refused:
            told.chosen(CELLS, *names)
        assert str(refused.value) == sentence
    with pytest.raises(InputError, match="the history is empty"):
        told.chosen([], "small")


def test_a_sparkline_spans_its_values() -> None:
    assert told.sparkline([1, 2, None, 8]) == "▁▂ █"
    assert told.sparkline([3, 3]) == "▄▄"
    assert told.sparkline([]) == ""
