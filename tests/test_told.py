"""Tests what `bitferry history` prints, and what it says of names that no night has."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from bitferry.device.errors import InputError
from bitferry.pipeline.nightly import shown, told
from bitferry.pipeline.nightly.history import History
from bitferry.pipeline.nightly.night import Night
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


def test_the_table_has_a_night_a_line(history: History, capsys: pytest.CaptureFixture[str]) -> None:
    history.accept([nights.cell()], NIGHTS[2], who="A. Person", why="pillow [14]")
    told.show_history(history, [nights.cell()])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "small/openvino/int8"
    assert [" ".join(line.split()) for line in lines[1:7]] == [
        "night, UTC outcome accuracy, % drop, pp ms ratio MB memory, MB",
        "2026-11-01 pass 91.50 0.50 (-0.18 to 1.50) 1.000 0.500 (0.495 to 0.505) 1.00 20.0",
        "2026-11-02 pass, reused 91.50 0.50 (-0.18 to 1.50) 1.000 0.500 (0.495 to 0.505) 1.00 20.0",
        "2026-11-03 ◆ fail 90.00 2.00 (1.13 to 3.51) 1.000 0.600 (0.594 to 0.606) 1.00 20.0",
        "2026-11-04 failed — — — — — —",
        "2026-11-05 pass 91.00 1.00 (0.32 to 2.21) 1.000 0.550 (0.544 to 0.556) 1.00 20.0",
    ]
    assert lines[7:9] == [
        "ratio      ▁▁█ ▅  0.500 to 0.600 of its float model's time",
        "changed    2026-11-03 package pillow 13.0.0 → 14.0.0",
    ]
    assert "error      2026-11-04 conv2d [red]takes[/] no float8" in lines
    assert lines[-1].startswith("accepted   2026-11-03 ◆ pillow [14] (A. Person, 20")


def test_the_first_night_is_the_reference_until_one_is_accepted(
    history: History, capsys: pytest.CaptureFixture[str]
) -> None:
    told.show_history(history, [nights.cell()], 2)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:10] for line in lines if line.startswith("2026-")] == ["2026-11-04", "2026-11-05"]
    assert lines[-1] == "reference  2026-11-01 ◆ the first; `bitferry accept` moves it"


def test_a_narrow_terminal_folds_and_loses_nothing(
    history: History, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(told, "PIPED_WIDTH", 0)
    monkeypatch.setenv("COLUMNS", "80")
    told.show_history(history, [nights.cell()])
    table = capsys.readouterr().out.split("ratio   ")[0]
    assert max(map(len, table.splitlines())) <= 80
    assert "…" not in table


def test_nights_of_one_date_are_told_with_their_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with History(tmp_path / "nights.db") as history:
        for night in ("2026-11-01T02:00:00Z", "2026-11-01T14:30:05Z", "2026-11-02T02:00:00Z"):
            history.begin(night)
            history.write(night, nights.result())
        told.show_history(history, [nights.cell()])
    starts = [line[:19].rstrip() for line in capsys.readouterr().out.splitlines() if line.startswith("2026-")]
    assert starts == ["2026-11-01 02:00:00", "2026-11-01 14:30:05", "2026-11-02"]


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
    assert told._cut(["a", "b", "c"]) == "a; b; c"
    assert told._cut(["a", "b", "c", "d", "e"]) == "a; b; c; and 2 more"


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


@pytest.mark.parametrize("width", [70, 80, 120])
def test_a_night_s_table_tells_precisions_apart_in_any_terminal(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [nights.cell("fashion-resnet18-of-a-long-name", "onnxruntime", one) for one in ("int8", "float32")]
    table = shown._table(Night("n", tuple(nights.result(one) for one in cells), (), 1.0, finished=True))
    Console(width=width).print(table)
    told = capsys.readouterr().out
    first = "".join(line[: line.index(" ")] for line in told.splitlines()[1:])
    assert "…" not in told
    assert [one.name in first for one in cells] == [True, True]
