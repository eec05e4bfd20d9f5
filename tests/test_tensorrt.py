"""TensorRT: typed ONNX and engines built without a GPU; what runs on one is not tested here."""

import json
import re
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bitferry import targets
from bitferry.device.errors import InputError, StageFailed, TargetUnavailable
from bitferry.device.gpu import Gpu
from bitferry.pipeline import recipe
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.compile import compile
from bitferry.pipeline.export import answer
from bitferry.pipeline.run import Deployment, Run
from bitferry.pipeline.statistics import sqnr_db
from tests.conftest import Project
from tests.test_targets import target_or_skip

LEAST_DB = {"int8": 30, "float16": 50, "float32": 100, "float8": 15}
"""SQNR of the typed ONNX against the simplified ONNX it was made from, both run by ONNX Runtime."""


@pytest.fixture
def tensorrt() -> Any:
    return target_or_skip("tensorrt")


@pytest.fixture
def rtx(tensorrt: Any) -> Any:
    if tensorrt.trt.__name__ != "tensorrt_rtx":
        pytest.skip("TensorRT itself builds on a GPU only")
    return tensorrt


@pytest.fixture(scope="session")
def run(deployed: Project) -> Run:
    return Run(recipe.read(deployed.recipe), deployed.recipe, Cache(deployed.folder / "build/small"))


def source(run: Run, precision: targets.Precision) -> Path:
    return Deployment(run, "tensorrt", precision).simplified.path


def build(target: Any, run: Run, folder: Path, precision: targets.Precision, **options: Any) -> Path:
    out = folder / "model.engine"
    chosen = target.Options(cache="", **options)
    target.compile(source(run, precision), out, precision=precision, options=chosen)
    return out


@pytest.mark.parametrize("batch", [1, 4, "dynamic"])
@pytest.mark.parametrize("precision", ["int8", "float16", "float32", "bfloat16"])
def test_an_engine_is_built_without_a_gpu(
    rtx: Any, run: Run, tmp_path: Path, precision: targets.Precision, batch: targets.Batch
) -> None:
    engine = build(rtx, run, tmp_path, precision, batch=batch, capabilities=("8.6", "8.9"))
    assert engine.stat().st_size > 10_000
    tied = json.loads(engine.with_suffix(".json").read_text())
    assert tied["capabilities"] == ["8.6", "8.9"]
    assert (tied["runtime"], tied["version"]) == ("tensorrt_rtx", rtx.trt.__version__)
    assert (tied["precision"], tied["batch"]) == (precision, batch)
    assert tied["layers"] == {"first.0": "convolution", "second.0": "convolution", "head": "matrix product"}


def test_an_engine_is_of_the_capabilities_it_says(rtx: Any, run: Run, tmp_path: Path) -> None:
    """TensorRT itself tells: it makes no float8 for SM86, so what it makes for SM89 is not the same."""
    made = {}
    for capabilities in (("8.6",), ("8.9",), ("8.6", "8.9")):
        made[capabilities] = build(rtx, run, tmp_path, "int8", capabilities=capabilities).read_bytes()
    assert len(set(made.values())) == 3
    with pytest.raises(RuntimeError, match="sm86"):
        rtx._build(rtx._typed(source(run, "float8"), "float8"), ("8.6",), rtx.Options(cache=""))
    assert build(rtx, run, tmp_path, "float8").stat().st_size > 10_000
    assert json.loads((tmp_path / "model.json").read_text())["capabilities"] == ["8.9"]


@pytest.mark.parametrize("precision", LEAST_DB)
def test_the_typed_onnx_answers_like_the_one_it_was_made_from(
    rtx: Any, run: Run, tmp_path: Path, precision: targets.Precision
) -> None:
    typed = build(rtx, run, tmp_path, precision).with_suffix(".onnx")
    graph = onnx.load(typed)
    onnx.checker.check_model(graph, full_check=True)
    images = run.evaluation.images[:64].copy()
    expected, found = answer(source(run, precision), images), answer(typed, images)
    assert found.dtype == np.float32
    assert sqnr_db(expected, found) > LEAST_DB[precision]
    kinds = Counter(helper.tensor_dtype_to_np_dtype(c.data_type).name for c in graph.graph.initializer)
    assert kinds["float32"] == 0 or precision == "float32"


@pytest.mark.parametrize(("precision", "kind"), [("int8", TensorProto.INT8), ("float8", TensorProto.FLOAT8E4M3FN)])
def test_what_is_quantized_is_symmetric(
    rtx: Any, run: Run, tmp_path: Path, precision: targets.Precision, kind: int
) -> None:
    graph = onnx.load(build(rtx, run, tmp_path, precision).with_suffix(".onnx")).graph
    constants = {constant.name: constant for constant in graph.initializer}
    nodes = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    quantized = {name for node in nodes for name in node.output if node.op_type == "DequantizeLinear"}
    for node in nodes:
        assert constants[node.input[2]].data_type == kind
        assert not numpy_helper.to_array(constants[node.input[2]]).astype(np.float32).any()
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            assert set(node.input[:2]) <= quantized  # and never the bias
            assert not set(node.input[2:]) & quantized
    (addition,) = (n for n in graph.node if n.op_type == "Add" and set(n.input) & quantized)
    assert len(set(addition.input) & quantized) == 1


def test_a_float8_scale_keeps_the_range(rtx: Any, run: Run, tmp_path: Path) -> None:
    largest = []
    for precision, most in (("int8", 127), ("float8", 448)):
        graph = onnx.load(build(rtx, run, tmp_path, precision).with_suffix(".onnx")).graph  # type: ignore[arg-type]
        constants = {constant.name: numpy_helper.to_array(constant) for constant in graph.initializer}
        scales = [constants[node.input[1]] for node in graph.node if node.op_type == "DequantizeLinear"]
        largest.append(np.concatenate([np.atleast_1d(scale).astype(np.float32) * most for scale in scales]))
    np.testing.assert_allclose(largest[0], largest[1], rtol=2e-3)


def test_a_device_builds_again_without_onnx(
    rtx: Any, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(rtx, run, tmp_path, "int8")
    again = tmp_path / "again"
    again.mkdir()
    monkeypatch.setitem(sys.modules, "onnx", None)
    options = rtx.Options(cache="")
    rtx.compile(first.with_suffix(".onnx"), again / "model.engine", precision="int8", options=options)
    assert (again / "model.onnx").read_bytes() == first.with_suffix(".onnx").read_bytes()
    assert (again / "model.json").read_text() == first.with_suffix(".json").read_text()


def test_without_a_gpu_it_is_built_and_not_measured(rtx: Any, run: Run, tmp_path: Path) -> None:
    found = rtx.environment(options=rtx.Options())
    if not found.unmeasured:
        pytest.skip("there is a GPU here")
    assert found.device.startswith("SM86, SM89")
    assert "no NVIDIA GPU" in found.unmeasured
    engine = build(rtx, run, tmp_path, "int8")
    for ask in (rtx.load, rtx.executed):
        with pytest.raises(TargetUnavailable, match="no NVIDIA GPU"):
            ask(engine, precision="int8", options=rtx.Options())


@pytest.mark.parametrize("capability", ["9.0", "8.65"])
def test_a_capability_that_is_not_listed_is_refused(rtx: Any, run: Run, tmp_path: Path, capability: str) -> None:
    known = r"builds for 7\.5, 8\.0, 8\.6, 8\.9, 12\.0.*; TensorRT itself"
    with pytest.raises(InputError, match=rf"names '{capability}', but TensorRT for RTX .* {known}"):
        build(rtx, run, tmp_path, "int8", capabilities=("8.6", capability))


def test_a_data_centre_gpu_is_told_what_it_needs(rtx: Any) -> None:
    told = rtx.engine.unfit(Gpu("NVIDIA H100", "9.0"))
    assert re.search(
        r"has kernels for SM75, .*SM89.*, not for NVIDIA H100 \(SM90\); .*the Python package 'tensorrt'", told
    )
    assert rtx.engine.unfit(Gpu("NVIDIA RTX A4000", "8.6")) is None
    assert rtx._capabilities(rtx.Options(), Gpu("NVIDIA RTX 5090", "12.0")) == ("8.6", "8.9", "12.0")
    assert rtx._capabilities(rtx.Options(), Gpu("NVIDIA H100", "9.0")) == ("8.6", "8.9")


def test_a_precision_that_the_gpu_lacks_is_refused(rtx: Any, run: Run, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"SM75 cannot compute in bfloat16.*capabilities to those from 8\.0 on"):
        build(rtx, run, tmp_path, "bfloat16", capabilities=("7.5", "8.6"))


@pytest.mark.parametrize("option", [{"max_batch": 0}, {"workspace_mb": 0}, {"device": -1}, {"batch": 0}])
def test_an_impossible_option_is_refused(tensorrt: Any, option: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be"):
        tensorrt.Options(**option)


def test_operators_that_it_does_not_take_are_all_named(rtx: Any, run: Run, tmp_path: Path) -> None:
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", 8, 8, 3])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, None)
    nodes = [
        helper.make_node("Cast", ["images"], ["a"], to=TensorProto.FLOAT),
        helper.make_node("Bernoulli", ["a"], ["b"], name="noise"),
        helper.make_node("Relu", ["b"], ["c"], name="first.relu"),
        helper.make_node("Det", ["c"], ["scores"], name="head/node_det"),
    ]
    graph = helper.make_graph(nodes, "graph", [images], [scores])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)
    given = replace(Deployment(run, "tensorrt", "float32").simplified, path=path, key="unsupported")
    with pytest.raises(StageFailed) as refused:
        compile(given, "tensorrt", run.model, run.calibration, Cache(tmp_path / "build"), options=rtx.Options(cache=""))
    told = str(refused.value)
    assert "Bernoulli at 'noise'; Det at 'head/node_det'" in told
    assert "first.relu" not in told
    assert "another target" in told


def test_the_inspector_s_words_are_read_as_documented() -> None:
    """Excerpts as NVIDIA prints them: of TensorRT 10, and with 11's `DataType` of its own."""
    pytest.importorskip("tensorrt_rtx")
    from bitferry.device.engine import ran  # noqa: PLC0415

    engine = [
        {"Name": "Reformatting CopyNode for Input Tensor 0 to conv1", "LayerType": "Reformat",
         "Inputs": [{"Name": "x", "Format/Datatype": "Row major linear FP32"}]},
        {"Name": "conv1 + relu", "LayerType": "CaskConvolution", "Metadata": "[ONNX Layer: conv1]",
         "Inputs": [{"Name": "x", "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format."}]},
        {"Name": "block.conv1", "LayerType": "CaskConvolution",
         "Inputs": [{"Name": "y", "Format": "Row major linear", "DataType": "Half"}]},
        {"Name": "fc_myl0", "LayerType": "gemm", "Metadata": "[ONNX Layer: fc]\x1e[ONNX Layer: fc_bias]",
         "Inputs": [{"Name": "z", "Format": "Row major linear", "DataType": "BFloat16"}]},
    ]  # fmt: skip
    layers = ["conv1", "block.conv1", "fc", "lost"]
    assert ran(engine, layers) == ["int8", "float16", "bfloat16", "unknown"]


def test_an_unmeasured_bundle_says_so_and_cannot_be_built_again_here(
    rtx: Any, deployed: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not rtx.environment(options=rtx.Options()).unmeasured:
        pytest.skip("there is a GPU here")
    again = Project(shutil.copytree(deployed.folder, tmp_path / "project"))
    again.edit(("[targets.openvino]", '[targets.tensorrt]\ncache = ""'))
    done = again.bitferry("deploy", "small.toml", "--quick", "--json", "--allow-unmeasured")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    assert found["outcome"] == "unmeasured"
    assert "SM86, SM89" in found["headline"]
    assert "not measured: no NVIDIA GPU" in found["headline"]
    bundle = again.folder / "dist/small-tensorrt-1.0.0"
    assert {path.name for path in bundle.glob("model.*")} == {"model.engine", "model.json", "model.onnx"}
    from bitferry.device import commands  # noqa: PLC0415

    assert commands.main(rtx, bundle, ["check"]) == 2
    assert "does not fit this machine: no NVIDIA GPU" in capsys.readouterr().err
    assert commands.main(rtx, bundle, ["rebuild"]) == 2
    assert commands.main(rtx, bundle, ["selftest"]) == 2


@pytest.mark.parametrize("capability", ["ampere", "", "86"])
def test_a_capability_is_written_with_a_point(rtx: Any, capability: str) -> None:
    with pytest.raises(ValueError, match=f"capabilities are written as '8.6', not '{capability}'"):
        rtx.Options(capabilities=("8.6", capability))


def test_float32_is_no_tf32(tensorrt: Any) -> None:
    trt = tensorrt.trt
    builder = trt.Builder(trt.Logger())
    assert builder.create_builder_config().get_flag(trt.BuilderFlag.TF32)
    assert not tensorrt._config(builder, tensorrt.Options(cache="")).get_flag(trt.BuilderFlag.TF32)
