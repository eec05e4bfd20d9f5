"""The comparison with other tools: the README's table is what was kept, and the peers that need no more run through."""

import importlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bitferry.pipeline import search
from tests.conftest import ROOT, Project

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Import the script as it is when it is run: its folder is on the path."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    yield importlib.import_module("peers")
    torch.set_num_threads(threads)
    logging.disable(logging.NOTSET)


def pins(lock: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, number in re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / lock).read_text(), re.MULTILINE):
        found.setdefault(name, set()).add(number)
    return found


def test_the_tables_are_what_was_kept(peers: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/peers.md"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    peers.write(tmp_path)
    for name in ("README.md", "docs/peers.md"):
        kept = (ROOT / name).read_text()
        assert (tmp_path / name).read_text() == kept, "python benchmarks/peers.py --readme writes it anew"
    assert all(peers.markdown(one) in kept for one in peers.newest())


def test_a_readme_without_marks_is_refused(peers: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing\n")
    with pytest.raises(peers.InputError, match=r"lacks the lines <!-- peers --> and <!-- /peers -->"):
        peers.write(tmp_path)


def test_the_newest_of_each_recipe_is_shown(peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "RESULTS", tmp_path)
    with pytest.raises(peers.InputError, match="no results of this benchmark"):
        peers.newest()
    for day, name in (("2026-11-02", "b"), ("2026-11-03", "a"), ("2026-10-30", "b")):
        (tmp_path / f"{day}-peers-{name}-avx2.json").write_text(json.dumps([name, day]))
    assert peers.newest() == [["a", "2026-11-03"], ["b", "2026-11-02"]]


def test_nncf_s_lock_has_bitferry_s_versions_and_names_no_host() -> None:
    wanted = re.findall(r"^([\w.-]+)==([\d.]+)$", (BENCHMARKS / "peers.in").read_text(), re.MULTILINE)
    assert {"openvino", "onnx", "torch", "torchvision"} <= {name for name, _ in wanted}
    ours, theirs = pins("requirements.lock"), pins("benchmarks/peers.lock")
    for name, number in wanted:
        assert ours[name] == theirs[name] == {number}
    assert "nncf" in theirs
    assert "://" not in (BENCHMARKS / "peers.lock").read_text()


def test_the_peers_that_need_no_environment_of_their_own(
    peers: ModuleType,
    project: Project,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(search, "SECONDS", 0.3)
    monkeypatch.setattr(peers, "result_path", lambda name: tmp_path / f"{name}.json")
    nobody = str(tmp_path / "python")
    options = ["--seconds", "0.5", "--threads", "1", "--build", str(tmp_path / "build"), "--nncf", nobody]
    peers.main([str(project.recipe), *options])
    kept = json.loads((tmp_path / "peers-small.json").read_text())
    printed = capsys.readouterr().out
    assert printed.strip() == peers.markdown(kept).strip()
    rows = {(row["peer"], row["runtime"]): row for row in kept["recipe"]["ways"]}
    runs = [("bitferry", "openvino"), ("auto", "openvino"), ("float", "openvino"), ("bitferry", "onnxruntime"),
            ("float", "onnxruntime"), ("onnxruntime", "onnxruntime")]  # fmt: skip
    for place in runs:
        assert not rows[place]["why"], place
        assert rows[place]["bytes"] > 1000
        assert len(rows[place]["microseconds"]) == 40
        assert rows[place]["sqnr_db"] is None or rows[place]["sqnr_db"] > 15
    floats = {
        row["name"]: row["sqnr_db"]
        for row in kept["recipe"]["ways"]
        if (row["peer"], row["runtime"]) == ("float", "openvino")
    }
    assert floats["float32"] > 60
    assert floats.get("bfloat16", 60) > 30  # there where this processor computes in it
    assert rows["nncf", "openvino"]["why"] == f"{nobody} cannot be run: No such file or directory"
    assert f"| NNCF | OpenVINO |  | {nobody} cannot be run" in printed
    assert "partition" in rows["pt2e", "openvino"]["why"] or not rows["pt2e", "openvino"]["why"]
    assert re.search(r"^- int8 on ONNX Runtime takes [\d.]+ \([\d.]+ to [\d.]+\) of the time of quan", printed, re.M)


def test_an_unknown_peer_is_refused(peers: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        peers.main(["any.toml", "--peers", "nncf,none"])
    assert stop.value.code == 2
    assert "no such peer: none; there are nncf, onnxruntime, pt2e, olive" in capsys.readouterr().err


def test_the_scripts_of_the_peers_use_nothing_of_bitferry_s() -> None:
    for name in ("by_hand", "peer_nncf", "peer_olive"):
        text = (BENCHMARKS / f"{name}.py").read_text()
        assert not re.search(r"^\s*(from|import) (pipeline|targets|device)\b", text, re.MULTILINE), name
