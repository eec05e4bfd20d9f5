"""Quantize, trace, export, simplify on real models: what they give, and that their checks catch a fault."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torchvision
from onnx import numpy_helper

from bitferry.device.errors import InputError, StageFailed
from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline import dataset, progress
from bitferry.pipeline.artifacts import FloatModel, Quantized
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.data.split import Split
from bitferry.pipeline.export import answer, export, simplify
from bitferry.pipeline.load import Deployable
from bitferry.pipeline.quantize import quantize
from bitferry.pipeline.recipe import Quantization
from bitferry.pipeline.statistics import sqnr_db
from bitferry.pipeline.trace import trace
from bitferry.pipeline.verify import eager
from bitferry.targets import Scheme
from tests.conftest import subset

CONTRACT = Preprocessing(height=32, width=32, mean=(0.286,) * 3, std=(0.353,) * 3)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache(tmp_path_factory.mktemp("build") / "stages")


@pytest.fixture(scope="module")
def images(build: Cache, tmp_path_factory: pytest.TempPathFactory) -> Split:
    path = tmp_path_factory.mktemp("data") / "calibration.npz"
    np.savez(path, **subset("calibration", 48, classes=10))  # type: ignore[arg-type]
    return dataset.split("calibration", path, [str(i) for i in range(10)], CONTRACT, build)


@pytest.fixture(scope="module")
def model() -> FloatModel:
    """A ResNet-18 with the branches and the shared ReLU modules of the real one; its weights do not matter here."""
    torch.manual_seed(0)
    net = Deployable(torchvision.models.resnet18(num_classes=10), CONTRACT).eval()
    return FloatModel(net, CONTRACT, tuple(str(i) for i in range(10)), key="resnet18")


@pytest.fixture(scope="module")
def quantized(model: FloatModel, images: Split, build: Cache) -> Quantized:
    return quantize(model, images, Scheme(), Quantization(), build)


def initializers(path: Path) -> dict[str, Any]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def test_every_convolution_and_the_classifier_are_quantized_per_channel(
    quantized: Quantized, images: Split, build: Cache
) -> None:
    simplified = simplify(export(quantized, images, build), images, build)
    graph = onnx.load(simplified.path).graph
    makers = {output: node for node in graph.node for output in node.output}
    values = initializers(simplified.path)
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert len(layers) == 21
    for layer in layers:
        activation, weight = makers[layer.input[0]], makers[layer.input[1]]
        assert activation.op_type == weight.op_type == "DequantizeLinear", layer.name
        stored = values[weight.input[0]]
        assert stored.dtype == np.int8
        assert np.abs(stored.astype(int)).max() <= 127
        assert values[weight.input[1]].shape == (stored.shape[0],)
    for addition in (node for node in graph.node if node.op_type == "Add" and node.input[0] in makers):
        assert {makers[i].op_type for i in addition.input if i in makers} <= {"DequantizeLinear", "Mul"}


def test_the_scheme_decides(model: FloatModel, images: Split, build: Cache) -> None:
    scheme = Scheme(activation="int8", activation_symmetric=True, weight_bits=4, additions="none")
    made = quantize(model, images, scheme, Quantization(observer="minmax"), build)
    onnx_file = export(made, images, build).path
    values = initializers(onnx_file)
    graph = onnx.load(onnx_file).graph
    weights = [v for v in values.values() if v.dtype == np.int8 and v.ndim >= 2]
    assert weights
    assert max(int(np.abs(w.astype(int)).max()) for w in weights) == 7
    pairs = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert pairs
    assert all(not np.any(values[node.input[2]]) for node in pairs if len(node.input) > 2)


def test_int8_answers_like_float(model: FloatModel, quantized: Quantized, images: Split) -> None:
    pixels = images.images[:32].copy()
    assert sqnr_db(eager(model.module())(pixels), eager(quantized.module())(pixels)) > 20


def test_every_calibration_image_is_used_and_counted(model: FloatModel, images: Split, build: Cache) -> None:
    some = quantize(model, images, Scheme(), Quantization(images=10), build)
    everything = quantize(model, images, Scheme(), Quantization(images=4000), build)
    assert (some.calibration.images, everything.calibration.images) == (10, 48)
    assert some.key != everything.key


def test_one_picture_repeated_is_no_calibration_data(model: FloatModel, images: Split, build: Cache) -> None:
    same = Split("calibration", np.repeat(images.images[:1], 8, axis=0), images.labels[:8], (), (), key="same")
    with pytest.raises(InputError, match="all 8 calibration images are the same picture"):
        quantize(model, same, Scheme(), Quantization(), build)


def test_torchscript_equals_pytorch_at_any_batch(quantized: Quantized, images: Split, build: Cache) -> None:
    loaded = torch.jit.load(str(trace(quantized, images, build).path))  # type: ignore[no-untyped-call]
    for count in (1, 2, 7):
        pixels = images.images[:count].copy()
        np.testing.assert_array_equal(eager(loaded)(pixels), eager(quantized.module())(pixels))


def test_float_onnx_is_within_1e4_of_eager_at_any_batch(model: FloatModel, images: Split, build: Cache) -> None:
    simplified = simplify(export(model, images, build), images, build)
    graph = onnx.load(simplified.path)
    assert graph.opset_import[0].version >= 18
    assert [d.dim_value for d in graph.graph.input[0].type.tensor_type.shape.dim][1:] == [32, 32, 3]
    assert graph.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    for count in (1, 2, 7):
        pixels = images.images[20 : 20 + count].copy()
        np.testing.assert_allclose(answer(simplified.path, pixels), eager(model.module())(pixels), atol=1e-4)


def test_what_is_shipped_names_no_path_of_this_machine(quantized: Quantized, images: Split, build: Cache) -> None:
    content = simplify(export(quantized, images, build), images, build).path.read_bytes()
    for word in (b"/site-packages", str(Path.home()).encode(), str(Path(__file__).parents[1]).encode(), b"Traceback"):
        assert word not in content


def test_a_trace_that_bakes_in_a_branch_is_caught(images: Split, build: Cache) -> None:
    class Branch(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            x = pixels.float().mean((1, 2))
            return x if int(pixels.sum()) % 2 else -x  # the tracer sees one of the two only

    program = FloatModel(Branch(), CONTRACT, ("a", "b", "c"), key="branch")
    with pytest.raises(StageFailed, match="the TorchScript model answers 16 images differently"):
        trace(program, images, build)


def test_a_trace_that_bakes_in_the_batch_is_made_for_batch_1(
    images: Split, build: Cache, capsys: pytest.CaptureFixture[str]
) -> None:
    class Fixed(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels.float().mean((1, 2)) + torch.ones(int(pixels.shape[0]), 3).cumsum(0)

    program = FloatModel(Fixed(), CONTRACT, ("a", "b", "c"), key="fixed")
    progress.console.quiet = False
    loaded = torch.jit.load(str(trace(program, images, build).path))  # type: ignore[no-untyped-call]
    assert "the TorchScript file is for batch 1" in capsys.readouterr().err
    one = images.images[3:4].copy()
    np.testing.assert_array_equal(eager(loaded)(one), eager(program.module())(one))


def test_a_model_that_cannot_be_captured_is_told_in_one_line(images: Split, build: Cache) -> None:
    class Wild(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            x = pixels.float().mean((1, 2))
            return x * 2 if float(x.sum()) > 3 else x

    program = FloatModel(Wild(), CONTRACT, ("a", "b", "c"), key="wild")
    with pytest.raises(StageFailed, match="torch.export cannot capture the model") as caught:
        quantize(program, images, Scheme(), Quantization(), build)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None
