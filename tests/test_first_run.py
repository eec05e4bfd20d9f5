"""What a target runs wrongly, or not at all, is found when it is compiled, and named by operator, layer and line."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import targets
from device.errors import StageFailed
from pipeline.artifacts import FloatModel
from pipeline.cache import Cache
from pipeline.capture import capture
from pipeline.compile import compile
from pipeline.export import export, simplify
from pipeline.quantize import quantize
from pipeline.recipe import Quantization
from targets import Scheme
from tests.test_torchscript import float_model, split

BROKEN = '''
"""ONNX Runtime, with what a test makes wrong in the graph it is given."""
from targets.onnxruntime import *
from targets import onnxruntime as right

def compile(model, out, *, precision, options):
    import onnx
    right.compile(model, out, precision=precision, options=options)
    made = onnx.load(out)
    for node in made.graph.node:
        if node.op_type == "Tanh":
            {change}
    onnx.save(made, out)
'''
WRONG = "node.op_type = 'Softsign'"
FAILS = "node.domain = 'nowhere'"


class Bent(nn.Module):
    """A convolution, an activation that a target computes wrongly or cannot run, and what follows."""

    def __init__(self, bend: nn.Module) -> None:
        super().__init__()
        self.first, self.bend, self.second = nn.Conv2d(3, 8, (3, 5), 2), bend, nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(torch.relu(self.second(self.bend(self.first(x)))).mean((2, 3)))
        return scores


@pytest.fixture(scope="module")
def model() -> FloatModel:
    torch.manual_seed(0)
    return float_model(Bent(nn.Tanh()), split().images)


@pytest.mark.parametrize(("change", "told"), [(WRONG, "answers 8 calibration images otherwise"), (FAILS, "fails when")])
def test_the_operator_that_goes_wrong_is_named_with_its_layer(
    change: str, told: str, model: FloatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bent.py").write_text(BROKEN.format(change=change))
    monkeypatch.setattr(targets, "__path__", [*targets.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "targets.bent", raising=False)
    build = Cache(tmp_path / "build")
    simplified = simplify(export(model, split(), build), split(), build)
    with pytest.raises(StageFailed) as raised:
        compile(simplified, "bent", model, split(), build, options=targets.get("bent").Options(threads=1))
    assert told in str(raised.value)
    assert "what goes wrong first is the operator Tanh in the layer 'bend'; replace it" in str(raised.value)
    assert not list(build.root.glob("compile-*"))


def test_what_fails_only_when_it_runs_is_told_when_it_is_compiled(tmp_path: Path) -> None:
    torch.manual_seed(0)
    build, model = Cache(tmp_path / "build"), float_model(Bent(nn.Mish()), split().images)
    target, settings = (
        targets.get("executorch"),
        Quantization(observer="minmax", equalize=False, bias_correction="none"),
    )
    int8 = quantize(model, split(), targets.scheme(target, "int8", target.Options()) or Scheme(), settings, build)
    source, options = capture(int8, split(), build), target.Options(threads=1)
    with pytest.raises(StageFailed) as raised:
        compile(source, "executorch", int8, split(), build, options=options)
    told = str(raised.value)
    assert "executorch int8 was compiled, and fails when it runs: " in told
    assert "what goes wrong first is the operator aten.mish in the layer 'bend' (test_first_run.py:" in told
    assert "self.second(self.bend(self.first(x)))" in told
    assert "or try another target (coreml, onnxruntime, openvino" in told
