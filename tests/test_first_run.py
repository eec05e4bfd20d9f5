"""What a target runs wrongly, or not at all, is found when it is compiled, and named by operator, layer and line."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from bitferry import targets
from bitferry.device.errors import StageFailed
from bitferry.pipeline import conditioning, fault, first_run, interrupt
from bitferry.pipeline.artifacts import Captured, Compiled, FloatModel, Simplified, Source
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.capture import capture
from bitferry.pipeline.compile import compile
from bitferry.pipeline.export import export, simplify
from bitferry.pipeline.quantize import quantize
from bitferry.pipeline.recipe import Quantization
from bitferry.pipeline.statistics import sqnr_db
from bitferry.pipeline.trace import trace
from bitferry.targets import Scheme, openvino
from tests.test_torchscript import float_model, split

BROKEN = '''
"""ONNX Runtime, with what a test makes wrong in the graph it is given."""
from bitferry.targets.onnxruntime import *
from bitferry.targets import onnxruntime as right

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


class Amplifying(nn.Module):
    """Sines of much more than a turn, again and again: the last bit of a sum becomes a hundredth of the scores."""

    def __init__(self, turns: int) -> None:
        super().__init__()
        self.first, self.bend, self.head = nn.Conv2d(3, 8, (3, 5), 2), nn.Tanh(), nn.Linear(8, 10)
        self.turns = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(turns))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for turn in self.turns:
            x = torch.sin(turn(x) * 8)
        scores: Tensor = self.head(self.bend(x).mean((2, 3)))
        return scores


@pytest.fixture(scope="module")
def model() -> FloatModel:
    torch.manual_seed(0)
    return float_model(Bent(nn.Tanh()), split().images)


@pytest.fixture(scope="module")
def amplifying() -> FloatModel:
    torch.manual_seed(0)
    return float_model(Amplifying(10), split().images)


@pytest.fixture(scope="module")
def simplified(amplifying: FloatModel, tmp_path_factory: pytest.TempPathFactory) -> Simplified:
    build = Cache(tmp_path_factory.mktemp("amplifying"))
    return simplify(export(amplifying, split(), build), split(), build)


@pytest.fixture
def bent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Give the name of a target that computes one operator wrongly."""
    (tmp_path / "bent.py").write_text(BROKEN.format(change=WRONG))
    monkeypatch.setattr(targets, "__path__", [*targets.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "bitferry.targets.bent", raising=False)
    return "bent"


@pytest.mark.parametrize(("change", "told"), [(WRONG, "answers 8 calibration images otherwise"), (FAILS, "fails when")])
def test_the_operator_that_goes_wrong_is_named_with_its_layer(
    change: str, told: str, model: FloatModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bent.py").write_text(BROKEN.format(change=change))
    monkeypatch.setattr(targets, "__path__", [*targets.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "bitferry.targets.bent", raising=False)
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


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_model_that_amplifies_the_last_bit_is_held_against_its_own_answers(
    name: str, amplifying: FloatModel, simplified: Simplified, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, images = targets.get(name).Options(threads=1), split().images[:8]
    compiled = compile(simplified, name, amplifying, split(), Cache(tmp_path / "build"), options=options)
    found = targets.get(name).load(compiled.path, precision="float32", options=options)(images)
    assert sqnr_db(fault.reference(simplified)(images), found) < first_run.LEAST_DB
    assert "the order of sums decides them" in " ".join(capsys.readouterr().err.split())


def test_an_operator_computed_wrongly_in_such_a_model_is_named_all_the_same(
    bent: str, amplifying: FloatModel, simplified: Simplified, tmp_path: Path
) -> None:
    options = targets.get(bent).Options(threads=1)
    with pytest.raises(StageFailed, match="what goes wrong first is the operator Tanh in the layer 'bend'"):
        compile(simplified, bent, amplifying, split(), Cache(tmp_path / "build"), options=options)


def test_every_form_of_a_model_has_answers_of_its_own_that_differ(
    amplifying: FloatModel, simplified: Simplified, tmp_path: Path
) -> None:
    build, images = Cache(tmp_path), split().images[:8].copy()
    sources: list[Source] = [simplified, capture(amplifying, split(), build), trace(amplifying, split(), build)]
    for source in sources:
        expected = fault.reference(source)(images)
        own = [sqnr_db(expected, predict(images)) for predict in fault.disturbed(source)]
        assert len(own) == conditioning.DRAWS
        assert all(25 < one < 60 for one in own), (source, own)
        assert np.array_equal(fault.reference(source)(images), expected)


def test_weights_of_16_bits_are_no_fault_of_the_compiler(
    amplifying: FloatModel, simplified: Simplified, tmp_path: Path
) -> None:
    options = openvino.Options(threads=1, half_weights=True)
    compiled = compile(simplified, "openvino", amplifying, split(), Cache(tmp_path / "build"), options=options)
    assert compiled.path.exists()


@pytest.mark.parametrize(
    ("options", "exact"),
    [({}, True), ({"half_weights": True}, False), ({"device": "HETERO:NPU,CPU"}, False), ({"rests": "float16"}, True)],
)
def test_openvino_is_exact_where_nothing_is_rounded_on_purpose(options: dict[str, object], exact: bool) -> None:
    made = openvino.Options(**options)  # type: ignore[arg-type]
    assert openvino.exact(precision="float32", options=made) is exact
    assert not openvino.exact(precision="float16", options=made)


@dataclass
class Chain:
    """Values each made of the one before; which are wrong is the test's."""

    count: int

    def __len__(self) -> int:
        return self.count

    def told(self, at: int) -> str:
        return f"operator {at}"

    def inputs(self, at: int) -> Sequence[int]:
        return [at - 1] if at else []


def test_looking_ends_after_a_time_with_what_was_found() -> None:
    found = fault._first_wrong(Chain(100), lambda at: at >= 37)
    assert found == "operator 37"
    stopped = fault._first_wrong(Chain(100), lambda at: at >= 37, longest=0)
    assert stopped == "operator 99, or one before it (0 seconds were not enough to tell)"
    assert fault._first_wrong(Chain(100), lambda at: False) is None


def test_ctrl_c_ends_the_looking(bent: str, amplifying: FloatModel, simplified: Simplified, tmp_path: Path) -> None:
    options = targets.get(bent).Options(threads=1)
    targets.get(bent).compile(simplified.path, tmp_path / "model.onnx", precision="float32", options=options)
    compiled = Compiled(tmp_path / "model.onnx", bent, "float32", simplified, options, "key")
    with pytest.raises(interrupt.Stopped), interrupt.stopping(lambda: True):
        fault.operator(compiled, split().images[:2].copy(), first_run.alike)


def lengthy(folder: Path, *, doubled: bool) -> Path:
    """Write an ONNX model whose shape is worked out by a long chain, or by one where every link takes a value twice."""
    nodes = [helper.make_node("Cast", ["images"], ["x"], "x", to=TensorProto.FLOAT)]
    nodes += [helper.make_node("Sigmoid", ["x"], ["y"], "y"), helper.make_node("Shape", ["y"], ["shape0"], "shape")]
    for at in range(40 if doubled else 2000):
        given = [f"shape{at}", f"shape{at}"] if doubled else [f"shape{at}", "zero"]
        nodes.append(helper.make_node("Max" if doubled else "Add", given, [f"shape{at + 1}"], f"link{at}"))
    nodes.append(helper.make_node("Reshape", ["y", nodes[-1].output[0]], ["scores"], "last"))
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, [2, 3])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, [2, 3])
    graph = helper.make_graph(nodes, "lengthy", [images], [scores], [numpy_helper.from_array(np.array([0]), "zero")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), folder / "it.onnx")
    return folder / "it.onnx"


@pytest.mark.parametrize("doubled", [False, True])
def test_long_ways_back_through_a_graph_are_gone_once(doubled: bool, tmp_path: Path) -> None:
    cuts = fault._OnnxCuts(Simplified(lengthy(tmp_path, doubled=doubled), "float32", ""))
    assert [cuts.nodes[at].op_type for at in cuts.inputs(len(cuts) - 1)] == ["Sigmoid"]


def test_long_ways_back_through_a_program_are_gone_once(tmp_path: Path) -> None:
    class Whole(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            count = images.float().sigmoid().long()
            for _ in range(40):
                count = count.flip(0) + count
            return count.float()

    torch.export.save(torch.export.export(Whole(), (torch.zeros(2, 3, dtype=torch.uint8),)), tmp_path / "it.pt2")
    cuts = fault._ProgramCuts(Captured(tmp_path / "it.pt2", "float32", ""))
    assert [cuts.told(at).split()[2] for at in cuts.inputs(len(cuts) - 1)] == ["aten.sigmoid"]


def test_an_operator_that_costs_an_int8_artifact_its_accuracy_is_named(
    bent: str, model: FloatModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build, target = Cache(tmp_path / "build"), targets.get(bent)
    options = target.Options(threads=1)
    scheme = targets.scheme(target, "int8", options)
    assert scheme
    settings = Quantization(observer="minmax", equalize=False, bias_correction="none")
    program = quantize(model, split(), scheme, settings, build)
    simplified = simplify(export(program, split(), build), split(), build)
    compile(simplified, bent, program, split(), build, options=options)
    said = capsys.readouterr().err
    assert "its kernels compute something else than the program says; what goes wrong first is the operator" in said
    assert "in the layer 'bend'" in said
