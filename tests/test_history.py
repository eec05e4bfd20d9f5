"""Tests that the history keeps every night whole for years: kills, copies, damage, old schemas, other programs."""

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import astuple, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from bitferry.device.errors import InputError
from bitferry.pipeline import verdict
from bitferry.pipeline.nightly import database, matrix
from bitferry.pipeline.nightly.history import Accepted, History
from bitferry.pipeline.nightly.matrix import Asked
from bitferry.pipeline.nightly.night import ARTIFACT, Cell, Finding, Point, Result
from bitferry.pipeline.nightly.store import Store
from bitferry.pipeline.report.record import Recorded
from tests import nights
from tests.conftest import ROOT

OLD = ROOT / "tests/history_v1.sql"
NIGHTS = nights.nights(4)
FINDING = Finding(
    nights.cell(), "accuracy", "regression", "it's größer", 91.5, 90.0, 0.2, None, "pp", NIGHTS[0], None, ("a", "b")
)


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    with History(tmp_path / "nights.db") as opened:
        yield opened


def keep(history: History, night: str, *results: Result, findings: tuple[Finding, ...] = ()) -> None:
    """Keep a whole night."""
    history.begin(night)
    history.write(night, *results)
    history.finish(night, findings, 61.5)


def same(one: Recorded | None, other: Recorded | None) -> bool:
    if one is None or other is None:
        return one is other
    return all(np.array_equal(a, b) for a, b in zip(astuple(one), astuple(other), strict=True))


def assert_equal(found: Result | None, written: Result) -> None:
    assert found is not None
    assert replace(found, samples={}, answers=None) == replace(written, samples={}, answers=None)
    assert same(found.answers, written.answers)
    assert found.samples.keys() == written.samples.keys()
    assert all(np.array_equal(found.samples[name], written.samples[name]) for name in written.samples)


def multilabel() -> Recorded:
    random, plain = np.random.default_rng(1), nights.answers(20)
    labels, given = (random.integers(2, size=(20, 5)) for _ in range(2))
    return Recorded(plain.digests, labels, given, labels)


def segmented() -> Recorded:
    plain, counts = nights.answers(20), np.random.default_rng(2).integers(100, size=(20, 3, 2))
    return Recorded(plain.digests, counts, counts + 1, counts)


@pytest.mark.parametrize(
    "written",
    [
        nights.result(),
        nights.result(nights.cell(precision="float32"), percent=90, seed=3),
        nights.reused(nights.result()),
        nights.unmeasured(nights.cell(target="tensorrt")),
        nights.failed(error="conv2d: größer\n'x'", error_kind="machine"),
        replace(nights.result(), answers=multilabel(), measured_at=None, samples={}),
        replace(nights.result(), answers=segmented()),
    ],
    ids=["int8", "float32", "reused", "unmeasured", "failed", "multi-label", "segmentation"],
)
def test_a_result_comes_back_as_it_was(history: History, written: Result) -> None:
    keep(history, NIGHTS[0], written, findings=(FINDING,))
    assert_equal(history.result(NIGHTS[0], written.cell), written)
    assert history.points() == [Point.of(NIGHTS[0], written)]
    assert history.inputs(NIGHTS[0], written.cell) == written.inputs
    assert same(history.answers(NIGHTS[0], written.cell), written.answers)
    assert history.samples(NIGHTS[0], written.cell).keys() == written.samples.keys()
    night = history.night(NIGHTS[0])
    assert (night.id, night.findings, night.seconds, night.finished) == (NIGHTS[0], (FINDING,), 61.5, True)
    assert len(night.results) == 1
    assert_equal(night.results[0], written)


def test_what_is_not_there_is_none_and_an_unknown_night_names_the_last(history: History) -> None:
    with pytest.raises(InputError, match="there is none"):
        history.night(NIGHTS[0])
    assert (history.nights(), history.points(), history.cells(), history.unfinished()) == ([], [], [], None)
    keep(history, NIGHTS[0], nights.result())
    other = nights.cell("other")
    assert [read(NIGHTS[0], other) for read in (history.result, history.inputs, history.answers)] == [None] * 3
    assert [read(other) for read in (history.latest, history.reference)] == [None] * 2
    assert history.samples(NIGHTS[0], other) == {}
    with pytest.raises(InputError, match=f"no night {NIGHTS[1]}; the last one is {NIGHTS[0]}"):
        history.night(NIGHTS[1])


def test_a_night_is_open_until_it_is_finished(history: History) -> None:
    night, first, second = NIGHTS[1], nights.result(percent=90.0), nights.result(percent=91.0)
    with pytest.raises(InputError, match="has not begun"):
        history.write(night, first)
    history.begin(night)
    history.write(night, first)
    assert history.unfinished() == night
    assert not history.night(night).finished
    history.begin(night)  # goes on
    history.write(night, second)
    assert [point.percent for point in history.points()] == [91.0]
    history.finish(night, (), 1.0)
    assert history.unfinished() is None
    with pytest.raises(InputError, match="is finished"):
        history.begin(night)
    with pytest.raises(InputError, match="is finished"):
        history.write(night, first)
    with pytest.raises(InputError, match="is finished"):
        history.finish(night, (), 1.0)
    with pytest.raises(InputError, match="is the clock right"):
        history.begin(NIGHTS[0])
    with pytest.raises(InputError, match="expected when it began"):
        history.begin("yesterday")


def test_a_stopped_night_before_a_finished_one_is_not_gone_on_with(history: History) -> None:
    history.begin(NIGHTS[0])
    keep(history, NIGHTS[1])
    assert history.unfinished() is None


def test_results_of_one_call_are_kept_all_or_none(history: History) -> None:
    history.begin(NIGHTS[0])
    broken = replace(nights.result(nights.cell("other")), samples={ARTIFACT: "no array"})  # type: ignore[dict-item]
    with pytest.raises(AttributeError):
        history.write(NIGHTS[0], nights.result(), broken)
    assert history.points() == []
    history.write(NIGHTS[0], nights.result())
    assert len(history.points()) == 1


def test_points_come_in_order_of_a_cell_and_of_the_last_nights(history: History) -> None:
    cells = [nights.cell(target=target) for target in ("openvino", "onnxruntime")]
    for night in NIGHTS:
        keep(history, night, *(nights.result(cell) for cell in cells))
    found = [(point.night, point.cell) for point in history.points(last=2)]
    assert found == [(night, cell) for night in NIGHTS[2:] for cell in sorted(cells)]
    assert [point.night for point in history.points(cells[0], last=3)] == NIGHTS[1:] == history.nights(3)
    assert {point.cell for point in history.points(cells[0])} == {cells[0]}
    assert history.cells() == sorted(cells)


def test_the_latest_verdict_is_found_by_status(history: History) -> None:
    one = nights.result(percent=90.0)
    keep(history, NIGHTS[0], one)
    keep(history, NIGHTS[1], nights.reused(one))
    keep(history, NIGHTS[2], nights.failed())
    measured, reused, either = (history.latest(one.cell, status=status) for status in ("measured", "reused", None))
    assert measured
    assert reused
    assert either
    assert [pair[0] for pair in (measured, reused, either)] == [NIGHTS[0], NIGHTS[1], NIGHTS[1]]
    assert_equal(measured[1], one)
    assert history.latest(one.cell, before=NIGHTS[0]) is None


def test_a_reused_result_costs_a_row(history: History, tmp_path: Path) -> None:
    results = [nights.result(nights.cell(f"r{index}"), images=2000, seed=index) for index in range(20)]
    keep(history, NIGHTS[0], *results)
    sizes = [(tmp_path / "nights.db").stat().st_size]
    for night in NIGHTS[1:]:
        keep(history, night, *map(nights.reused, results))
        sizes.append((tmp_path / "nights.db").stat().st_size)
    assert sizes[0] > 20 * 5_000
    assert (sizes[-1] - sizes[0]) / 3 < 20 * 1_000
    reread = history.result(NIGHTS[3], results[7].cell)
    assert reread is not None
    assert_equal(reread, nights.reused(results[7]))


def test_references_move_by_acceptance_and_every_one_stays_on_record(history: History) -> None:
    cells = [nights.cell(), nights.cell(target="tensorrt")]
    keep(history, NIGHTS[0], nights.failed(), nights.unmeasured(cells[1]))
    keep(history, NIGHTS[1], nights.result(), nights.unmeasured(cells[1]))
    keep(history, NIGHTS[2], nights.result(), nights.result(cells[1]))
    assert [history.reference(cell) for cell in cells] == [NIGHTS[1], NIGHTS[2]]
    history.accept(cells, NIGHTS[2], who="A. Person", why="faster")
    history.accept(cells[:1], NIGHTS[1], who="B. Person", why="was wrong")
    assert [history.reference(cell) for cell in cells] == [NIGHTS[1], NIGHTS[2]]
    log = history.accepted(cells[0])
    assert [(one.night, one.who, one.why) for one in log] == [
        (NIGHTS[2], "A. Person", "faster"), (NIGHTS[1], "B. Person", "was wrong"),
    ]  # fmt: skip
    assert all(re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", one.at) for one in log)
    for night in (NIGHTS[0], NIGHTS[3]):
        with pytest.raises(InputError, match="small/openvino/int8 .*has no verdict in night"):
            history.accept(cells, night, who="", why="")
    assert len(history.accepted(cells[1])) == 1


def test_forgetting_leaves_figures_references_and_what_later_nights_share(history: History) -> None:
    one, other = (nights.result(nights.cell(target=name), seed=5) for name in ("openvino", "onnxruntime"))
    keep(history, NIGHTS[0], one, other)
    keep(history, NIGHTS[1], nights.result(one.cell, seed=6), nights.result(other.cell, seed=7))
    keep(history, NIGHTS[2], nights.result(one.cell, seed=8), nights.reused(nights.result(other.cell, seed=7)))
    history.accept([one.cell], NIGHTS[1], who="me", why="better")
    before = history.points()
    assert history.forget(NIGHTS[2]) == 2  # of one the first night, of other the second
    assert history.points() == before
    kept = {(night, cell): history.answers(night, cell) for night in NIGHTS[:3] for cell in (one.cell, other.cell)}
    assert [key for key, answers in kept.items() if answers is None] == [
        (NIGHTS[0], one.cell), (NIGHTS[1], other.cell),
    ]  # fmt: skip
    assert history.samples(NIGHTS[0], one.cell) == {}
    assert history.samples(NIGHTS[2], other.cell)
    forgotten = history.result(NIGHTS[0], one.cell)
    assert forgotten is not None
    assert forgotten.verdict == one.verdict
    assert history.forget(NIGHTS[2]) == 0


def test_a_night_ends_by_forgetting_what_is_older_than_is_kept(history: History, tmp_path: Path) -> None:
    first, second = nights.result(seed=5), nights.result(seed=6)
    keep(history, NIGHTS[0], nights.result(seed=4))  # the reference
    keep(history, NIGHTS[1], first)
    keep(history, NIGHTS[3], second)
    store = Store(str(tmp_path / "store"))
    store.put_bytes("old-stage", b"old")
    for path in [path for path in (tmp_path / "store").rglob("*") if path.is_file()]:
        os.utime(path, (time.time() - 86400 * 40,) * 2)
    store.put_bytes("new-stage", b"new")
    asked = Asked((), "all", (), tmp_path, tmp_path, store=str(tmp_path / "store"), keep_days=30)
    now = datetime.fromisoformat(NIGHTS[3])
    matrix._forget(asked, history, now)
    assert history.samples(NIGHTS[1], first.cell)
    assert store.get_bytes("old-stage") is None
    assert store.get_bytes("new-stage") == b"new"
    matrix._forget(replace(asked, keep_days=0, store=None), history, now)
    assert history.samples(NIGHTS[1], first.cell)
    matrix._forget(replace(asked, keep_days=1, store=None), history, now)
    assert not history.samples(NIGHTS[1], first.cell)
    assert history.samples(NIGHTS[0], first.cell)
    assert history.samples(NIGHTS[3], first.cell)
    assert [point.night for point in history.points()] == [NIGHTS[0], NIGHTS[1], NIGHTS[3]]


def test_a_verdict_of_another_schema_leaves_everything_else_readable(history: History) -> None:
    one = nights.result()
    keep(history, NIGHTS[0], nights.result(schema=2, headline="old"), nights.result(nights.cell("other")))
    with pytest.raises(InputError, match="verdict of small/openvino/int8 in 2026-11-01T02:00:00Z has schema 2"):
        history.result(NIGHTS[0], one.cell)
    assert history.points(one.cell)[0].percent == one.measured.accuracy.judged.percent  # type: ignore[union-attr]
    assert same(history.answers(NIGHTS[0], one.cell), one.answers)
    assert history.result(NIGHTS[0], nights.cell("other")) is not None


# The file.


def opened(path: Path) -> "closing[sqlite3.Connection]":
    """Open it as any other program would."""
    return closing(sqlite3.connect(path, isolation_level=None))


def old(folder: Path) -> Path:
    """Make a file as schema 1 wrote it."""
    path = folder / "nights.db"
    with opened(path) as connection:
        connection.executescript(OLD.read_text())
    return path


def test_an_old_file_is_copied_and_migrated(tmp_path: Path) -> None:
    path = old(tmp_path)
    with opened(path) as connection:
        before = list(connection.iterdump())
        text = connection.execute("SELECT verdict FROM results WHERE night = ? AND status = 'reused'", NIGHTS[1:2])
        (verdict_json,) = text.fetchone()
    with History(path) as history:
        with opened(tmp_path / "nights.db.v1.bak") as copy:
            assert list(copy.iterdump()) == before
            assert copy.execute("PRAGMA user_version").fetchone() == (1,)
        assert_migrated(history)
    with History(path) as history:
        assert_migrated(history)
        assert history._contents(NIGHTS[1], nights.cell(), ["verdict"]) == {"verdict": verdict_json.encode()}
    with opened(path) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (2,)
        assert connection.execute("SELECT count(*) FROM blobs").fetchone() == (9,)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["nights.db", "nights.db.v1.bak"]


def assert_migrated(history: History) -> None:
    cell, expected = nights.cell(), nights.result(images=5, percent=80, float_percent=100)
    assert history.nights() == NIGHTS[:3]
    assert history.unfinished() == NIGHTS[2]
    assert [(point.night, point.cell.name, point.status, point.percent) for point in history.points()] == [
        (NIGHTS[0], "small/openvino/int8", "measured", 80.0),
        (NIGHTS[1], "small/openvino/int8", "reused", 80.0),
        (NIGHTS[1], "small/tensorrt/int8", "measured", None),
        (NIGHTS[2], "other/openvino/int8", "failed", None),
    ]
    assert same(history.answers(NIGHTS[0], cell), expected.answers)
    assert history.inputs(NIGHTS[0], cell) == expected.inputs
    assert history.samples(NIGHTS[1], cell)[ARTIFACT].shape == (2, 3)
    unmeasured = history.answers(NIGHTS[1], nights.cell(target="tensorrt"))
    assert unmeasured is not None
    assert unmeasured.answers is None
    broken = history.result(NIGHTS[2], nights.cell("other"))
    assert broken is not None
    assert broken.error == "größer: 'x'"
    with pytest.raises(InputError, match="schema 2"):
        history.result(NIGHTS[0], cell)
    assert history._findings(NIGHTS[1])[0].changed == ("package pillow 12 → 13",)
    assert history.accepted(cell) == [Accepted(NIGHTS[1], "2026-11-02T08:00:00+00:00", "A. Person", "faster")]


def test_who_only_reads_leaves_an_old_file_as_it_is(tmp_path: Path) -> None:
    path = old(tmp_path)
    before = path.read_bytes()
    with History(path, read_only=True) as history:
        assert_migrated(history)
        with pytest.raises(InputError, match="may not be written"):
            history.begin(NIGHTS[3])
    assert path.read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["nights.db"]


def test_a_migration_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, script = old(tmp_path), tmp_path / "2.sql"
    script.write_text(f"{database.MIGRATIONS[1].read_text()}\nDROP TABLE nowhere;\n")
    monkeypatch.setattr(database, "MIGRATIONS", [database.MIGRATIONS[0], script])
    with pytest.raises(InputError, match="no such table: nowhere"):
        History(path)
    monkeypatch.undo()
    with History(path) as history:
        assert_migrated(history)


def test_the_first_migration_is_the_one_that_old_files_were_made_with(tmp_path: Path) -> None:
    with opened(old(tmp_path)) as connection:
        kept = dict(connection.execute("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL"))
    with opened(tmp_path / "new.db") as connection:
        connection.executescript(database.MIGRATIONS[0].read_text())
        assert dict(connection.execute("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL")) == kept


def test_a_newer_schema_names_both_versions(tmp_path: Path) -> None:
    path = old(tmp_path)
    with opened(path) as connection:
        connection.execute("PRAGMA user_version = 7")
    for read_only in (True, False):
        with pytest.raises(InputError, match="has schema 7; this bitferry reads up to schema 2"):
            History(path, read_only=read_only)


def test_what_is_no_history_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "nights.db"
    with pytest.raises(InputError, match="no history at .*nights.db"):
        History(path, read_only=True)
    assert not path.exists()
    for content, told in ((b"PK\3\4" * 500, "no SQLite database"), (b"x", "no SQLite database")):
        path.write_bytes(content)
        for read_only in (True, False):
            with pytest.raises(InputError, match=told):
                History(path, read_only=read_only)
        assert path.read_bytes() == content
    foreign = tmp_path / "foreign.db"
    with opened(foreign) as connection:
        connection.execute("CREATE TABLE bookmarks (url TEXT)")
    with pytest.raises(InputError, match="another program's database"):
        History(foreign)
    with pytest.raises(InputError, match="cannot be opened"):
        History(tmp_path)
    with pytest.raises(InputError, match="nights.db: .*(exists|directory)"):
        History(path / "nights.db")


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "nights.db"
    with History(path) as history:
        keep(history, NIGHTS[0], *(nights.result(nights.cell(f"r{index}"), seed=index) for index in range(10)))
    whole = path.read_bytes()
    middle = len(whole) // 2 // 4096 * 4096
    path.write_bytes(whole[:middle] + b"\xff" * 4096 + whole[middle + 4096 :])
    with pytest.raises(InputError, match="damaged; take an earlier copy"):
        History(path)
    path.write_bytes(whole[:middle])
    with pytest.raises(InputError, match="damaged; take an earlier copy"):
        History(path)


def test_a_content_that_was_changed_is_told_and_the_figures_stay(history: History, tmp_path: Path) -> None:
    keep(history, NIGHTS[0], nights.result())
    with opened(tmp_path / "nights.db") as connection:
        connection.execute("UPDATE blobs SET content = zeroblob(length(content))")
    with pytest.raises(InputError, match="small/openvino/int8 in 2026-11-01T02:00:00Z is damaged"):
        history.result(NIGHTS[0], nights.cell())
    assert len(history.points()) == 1


def test_a_file_that_stays_locked_is_told_and_reading_goes_on_beside_a_writer(tmp_path: Path) -> None:
    path = tmp_path / "nights.db"
    with History(path) as history:
        keep(history, NIGHTS[0], nights.result())
    with opened(path) as writer, History(path, patience=0.05) as history:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("DELETE FROM results")
        assert len(history.points()) == 1
        with History(path, read_only=True, patience=0.05) as reader:
            assert len(reader.points()) == 1
        with pytest.raises(InputError, match=r"another process has been writing to it for 0.05 s"):
            history.begin(NIGHTS[1])
        writer.execute("ROLLBACK")
        history.begin(NIGHTS[1])


def test_a_closed_file_may_be_copied_alone(tmp_path: Path) -> None:
    with History(tmp_path / "deep/er/nights.db") as history:
        keep(history, NIGHTS[0], nights.result())
    assert [one.name for one in (tmp_path / "deep/er").iterdir()] == ["nights.db"]
    copy = Path(shutil.copy(tmp_path / "deep/er/nights.db", tmp_path / "what? 100%#.db"))
    with History(copy, read_only=True) as history:
        assert len(history.night(NIGHTS[0]).results) == 1


KILLED = """
import sys, time
from pathlib import Path
from bitferry.pipeline.nightly.history import History
from tests import nights

with History(Path(sys.argv[1])) as history:
    first, second = nights.nights(2)
    history.begin(first)
    history.write(first, nights.result())
    history._file.run("PRAGMA cache_size = 1")  # so that SQLite writes to the file before the end
    insert = history._insert
    def slow(into, values):
        if into.endswith("results"):
            print("writing", flush=True)
            time.sleep(60)
        insert(into, values)
    history._insert = slow
    history.write(first, nights.result(percent=50.0, images=50_000), nights.result(nights.cell("other")))
"""


def test_a_writer_killed_in_the_middle_leaves_whole_rows(tmp_path: Path) -> None:
    path = tmp_path / "nights.db"
    with subprocess.Popen([sys.executable, "-c", KILLED, path], cwd=ROOT, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"writing\n"
        writer.send_signal(signal.SIGKILL)
    assert (tmp_path / "nights.db-journal").stat().st_size > 0  # it was in the middle
    with History(path, read_only=True) as history:
        assert [point.percent for point in history.points()] == [91.5]
        assert_equal(history.result(NIGHTS[0], nights.cell()), nights.result())
    assert not (tmp_path / "nights.db-journal").exists()
    with History(path) as history:
        assert history.unfinished() == NIGHTS[0]
        history.write(NIGHTS[0], nights.result(percent=50.0))
        history.finish(NIGHTS[0], (), 1.0)
    with opened(path) as connection:
        assert connection.execute("PRAGMA quick_check").fetchall() == [("ok",)]


def test_the_documented_queries_answer(tmp_path: Path) -> None:
    text = (ROOT / "docs/history.md").read_text()
    path = tmp_path / "nights.db"
    with History(path) as history:
        for night in NIGHTS[:2]:
            keep(history, night, nights.result(), nights.failed(nights.cell("other")))
    queries = re.findall(r"```sql\n(.*?)```", text, re.DOTALL)
    with opened(path) as connection:
        last, months = (connection.execute(query).fetchall() for query in queries)
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    assert last == [
        ("small", "openvino", "int8", "pass", 0.5, 0.5),
        ("other", "openvino", "int8", "failed", None, None),
    ]
    assert months == [("2026-11", "small", "openvino", "int8", 2, 0.5, 0.5, 0.5)]
    assert set(re.findall(r"^\| `(\w+)` ", text, re.MULTILINE)) == tables
    script = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert [line[:20] for line in done.stdout.splitlines()] == NIGHTS[:2]
    assert "'artifact': '1.0" in done.stdout or "'artifact': '0.9" in done.stdout
    assert f"now {database.VERSION}." in text


def test_a_verdict_is_kept_as_verdict_json_has_it(history: History, tmp_path: Path) -> None:
    one = nights.result()
    assert one.verdict is not None
    keep(history, NIGHTS[0], one)
    found = history.result(NIGHTS[0], one.cell)
    assert found is not None
    assert found.verdict is not None
    verdict.write(found.verdict, tmp_path / "found.json")
    verdict.write(one.verdict, tmp_path / "written.json")
    assert (tmp_path / "found.json").read_bytes() == (tmp_path / "written.json").read_bytes()


def test_a_cell_is_read_as_it_is_named() -> None:
    assert Cell.parse(nights.cell().name) == nights.cell()
