"""What goes wrong in a stage is told with the stage, the layer and the line, ends with 2, and stops no other target."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bitferry import targets
from bitferry.device.errors import InputError, StageFailed
from bitferry.pipeline import failing
from tests.conftest import Project

BROKEN = '''
"""ONNX Runtime whose compiler gives up, as a tool of its own kind would."""
from bitferry.targets.onnxruntime import *

def compile(model, out, *, precision, options):
    raise KeyError("no kernel")
'''


class Odd(nn.Module):
    """A view that fits one size of its input alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layer(x)).view(-1, 3)


def failure(model: nn.Module, x: Tensor) -> str:
    with pytest.raises(StageFailed) as raised, failing.stage("verify", "openvino"):
        model(x)
    assert isinstance(raised.value.__cause__, RuntimeError)
    return str(raised.value)


def test_the_stage_the_layer_and_the_line_are_named() -> None:
    told = failure(nn.Sequential(nn.Identity(), Odd()), torch.zeros(2, 4))
    assert told.startswith("verify openvino failed: RuntimeError: shape '[-1, 3]' is invalid")
    assert re.search(r"in the layer '1' \(test_failing.py:\d+: return torch.relu\(self.layer\(x\)\).view", told)
    assert "in the layer '0.layer' (test_failing.py:" in failure(nn.Sequential(Odd(), Odd()), torch.zeros(3, 5))


def test_the_layer_of_a_captured_graph_is_named() -> None:
    graph = torch.export.export(nn.Sequential(nn.Identity(), Odd()), (torch.zeros(3, 4),)).module()
    graph.get_submodule("1.layer").weight = nn.Parameter(torch.zeros(4, 9))
    assert re.search(
        r"in the layer '1.layer' \(test_failing.py:\d+: return torch.relu", failure(graph, torch.zeros(3, 4))
    )


def test_what_is_told_already_stays_as_it_is() -> None:
    for error in (InputError("a file"), StageFailed("a tool"), FileNotFoundError("gone")):
        with pytest.raises(type(error)) as raised, failing.stage("load"):
            raise error
        assert raised.value is error


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.setattr(targets, "__path__", [*targets.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "bitferry.targets.broken", raising=False)


@pytest.mark.usefixtures("broken")
def test_one_target_s_failure_leaves_the_others_their_results(deployed: Project, tmp_path: Path) -> None:
    made = Project(Path(shutil.copytree(deployed.folder, tmp_path / "made")))
    ways = ("small.toml", "--target", "broken,onnxruntime", "--precision", "int8")
    done = made.bitferry("deploy", *ways, "--quick", "--json", "--out", "new")
    assert done.returncode == 2, done.stderr
    failed, passed = json.loads(done.stdout)
    assert (failed["target"], failed["outcome"], failed["bundle"]) == ("broken", "failed", None)
    assert "broken's compiler refused" in failed["error"]
    assert passed["outcome"] == "pass"
    assert (made.folder / passed["bundle"] / "manifest.json").is_file()
    done = made.bitferry("compile", *ways)
    assert done.returncode == 2
    assert [line.split("\t")[0] for line in done.stdout.splitlines()] == ["onnxruntime"]
    assert "error: broken: broken's compiler refused" in done.stderr
    assert "broken's compiler refused" in made.refused("compile", "small.toml", "--target", "broken")
