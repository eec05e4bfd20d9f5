"""ONNX Runtime: which kernels take a small network with every kind of activation, at any batch, and what it refuses."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from bitferry import targets
from bitferry.device.errors import TargetUnavailable
from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline import dataset
from bitferry.pipeline.artifacts import FloatModel
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.data.split import Split
from bitferry.pipeline.export import answer, export, simplify
from bitferry.pipeline.load import Deployable
from bitferry.pipeline.quantize import quantize
from bitferry.pipeline.recipe import Quantization
from bitferry.pipeline.statistics import sqnr_db
from bitferry.pipeline.verify import eager
from bitferry.targets import Precision, onnxruntime
from bitferry.targets.onnxruntime import Options
from tests.conftest import subset

CONTRACT = Preprocessing(height=16, width=16, mean=(0.286, 0.3, 0.25), std=(0.353, 0.3, 0.4))
LAYERS = ["first", "second", "branch", "preact", "squeeze", "excite", "third", "fourth"]


class Network(nn.Module):
    """A residual addition, ReLU6, DenseNet's norm, hard-swish, SiLU, squeeze and excitation, pooling, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.branch, self.preact = nn.Conv2d(16, 8, 1), nn.BatchNorm2d(24)
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.third, self.fourth = nn.Conv2d(24, 16, 1), nn.Conv2d(16, 16, 1)
        self.classifier = nn.Linear(16, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        f = nn.functional
        x = f.max_pool2d(f.relu6(self.first(pixels)), 2)
        x = x + self.norm(self.second(x))
        x = f.relu(self.preact(torch.cat([x, self.branch(x)], 1)))
        x = f.hardswish(self.third(x))
        gate = self.excite(f.relu(self.squeeze(f.adaptive_avg_pool2d(x, 1))))
        x = f.silu(self.fourth(x * f.hardsigmoid(gate)))
        scores: Tensor = self.classifier(f.adaptive_avg_pool2d(x, 1).flatten(1))
        return scores


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache(tmp_path_factory.mktemp("build") / "network")


@pytest.fixture(scope="module")
def images(build: Cache, tmp_path_factory: pytest.TempPathFactory) -> Split:
    path = tmp_path_factory.mktemp("data") / "calibration.npz"
    np.savez(path, **subset("calibration", 48, classes=10))  # type: ignore[arg-type]
    return dataset.split("calibration", path, [str(i) for i in range(10)], CONTRACT, build)


@pytest.fixture(scope="module")
def model() -> FloatModel:
    return FloatModel(Deployable(Network(), CONTRACT).eval(), CONTRACT, tuple("0123456789"), key="network")


@pytest.fixture(scope="module")
def exported(model: FloatModel, images: Split, build: Cache) -> dict[Precision, Path]:
    scheme = targets.scheme(targets.get("onnxruntime"), "int8", Options())
    assert scheme is not None
    made = quantize(model, images, scheme, Quantization(observer="minmax"), build)
    programs: dict[Precision, FloatModel | object] = {"int8": made, "float32": model}
    return {p: simplify(export(program, images, build), images, build).path for p, program in programs.items()}  # type: ignore[arg-type]


def optimized(path: Path, folder: Path) -> Counter[str]:
    """Count the kernels that ONNX Runtime makes of a file."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


@pytest.mark.parametrize("batch", [1, "dynamic"])
def test_every_layer_runs_on_int8(batch: int, exported: dict[Precision, Path], tmp_path: Path) -> None:
    options = Options(threads=1, batch=batch)
    onnxruntime.compile(exported["int8"], tmp_path / "model.onnx", precision="int8", options=options)
    layers = onnxruntime.executed(tmp_path / "model.onnx", precision="int8", options=options)
    assert {layer.name for layer in layers} == {*LAYERS, "classifier"}
    assert {layer.precision for layer in layers} == {"int8"}
    kernels = optimized(tmp_path / "model.onnx", tmp_path)
    assert kernels["QLinearConv"] == 8
    assert kernels["QLinearConcat"] == 1
    assert kernels["QLinearGlobalAveragePool"] == 2
    assert kernels["QLinearMul"] == 3  # hard-swish, excitation, SiLU
    assert kernels["QLinearSigmoid"] == 1
    assert kernels["QLinearAdd"] == 3  # the residual, and two hard sigmoids
    assert kernels["QuantizeLinear"] == 1  # of the images
    assert not {
        "Conv",
        "FusedConv",
        "Clip",
        "Relu",
        "HardSigmoid",
        "HardSwish",
        "ReduceMean",
        "BatchNormalization",
    } & set(kernels)


def test_its_int8_answers_like_float_pytorch(
    model: FloatModel, exported: dict[Precision, Path], images: Split, tmp_path: Path
) -> None:
    onnxruntime.compile(exported["int8"], tmp_path / "model.onnx", precision="int8", options=Options())
    pixels = images.images.copy()
    expected = eager(model.module())(pixels)
    before = sqnr_db(expected, answer(exported["int8"], pixels))
    after = sqnr_db(expected, onnxruntime.load(tmp_path / "model.onnx", precision="int8", options=Options())(pixels))
    assert after > max(20, before - 1)


def test_its_float_graph_gives_the_same_answers(exported: dict[Precision, Path], images: Split, tmp_path: Path) -> None:
    options = Options(threads=1)
    onnxruntime.compile(exported["float32"], tmp_path / "model.onnx", precision="float32", options=options)
    pixels = images.images[:5].copy()
    found = onnxruntime.load(tmp_path / "model.onnx", precision="float32", options=options)(pixels)
    np.testing.assert_allclose(found, answer(exported["float32"], pixels), atol=1e-5)
    layers = onnxruntime.executed(tmp_path / "model.onnx", precision="float32", options=options)
    assert {layer.precision for layer in layers} == {"float32"}


@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_any_number_of_images_at_any_batch(
    precision: Precision, exported: dict[Precision, Path], images: Split, tmp_path: Path
) -> None:
    answers = []
    for batch in (1, 4, "dynamic"):
        options = Options(threads=1, batch=batch)
        path = tmp_path / f"{batch}.onnx"
        onnxruntime.compile(exported[precision], path, precision=precision, options=options)
        predict = onnxruntime.load(path, precision=precision, options=options)
        answers.append(np.concatenate([predict(images.images[:7].copy()), predict(images.images[7:8].copy())]))
        size = onnx.load(path).graph.input[0].type.tensor_type.shape.dim[0]
        assert size.dim_value == (0 if batch == "dynamic" else batch)
    for other in answers[1:]:
        np.testing.assert_allclose(other, answers[0], atol=1e-5)


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="this ONNX Runtime has CUDA")
def test_a_provider_that_is_not_there_is_named_with_its_package(
    exported: dict[Precision, Path], tmp_path: Path
) -> None:
    options = Options(provider="CUDA")
    onnxruntime.compile(exported["int8"], tmp_path / "model.onnx", precision="int8", options=options)
    told = r"has no CUDA provider \(it has .*CPU.*\); install the package onnxruntime-gpu"
    for ask in (onnxruntime.load, onnxruntime.executed):
        with pytest.raises(TargetUnavailable, match=told):
            ask(tmp_path / "model.onnx", precision="int8", options=options)
    found = onnxruntime.environment(options=options)
    assert found.unmeasured is not None
    assert "onnxruntime-gpu" in found.unmeasured
    assert found.fast == ()
    assert onnxruntime.environment(options=replace(options, provider="CPU")).unmeasured is None


def test_a_gate_that_is_the_answer_stays_float(images: Split, build: Cache, tmp_path: Path) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(9 * self.head(torch.relu(self.first(x)).mean((2, 3))))

    model = FloatModel(Deployable(Gated(), CONTRACT).eval(), CONTRACT, tuple("0123456789"), key="gated")
    scheme = targets.scheme(targets.get("onnxruntime"), "int8", Options())
    assert scheme is not None
    made = simplify(export(quantize(model, images, scheme, Quantization(), build), images, build), images, build)
    onnxruntime.compile(made.path, tmp_path / "model.onnx", precision="int8", options=Options())
    pixels = images.images.copy()
    found = onnxruntime.load(tmp_path / "model.onnx", precision="int8", options=Options())(pixels)
    assert sqnr_db(eager(model.module())(pixels), found) > 30
    assert np.abs(found * 255 - np.rint(found * 255)).max() > 0.1


def test_float32_on_cuda_is_no_tf32() -> None:
    assert onnxruntime._providers("CUDAExecutionProvider") == [
        ("CUDAExecutionProvider", {"use_tf32": "0"}),
        ("CPUExecutionProvider", {}),
    ]
    assert onnxruntime._providers("CPUExecutionProvider") == [("CPUExecutionProvider", {})]
