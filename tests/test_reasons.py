"""Why a layer is float where int8 was asked for: read from the quantized program, told by the module's name."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from bitferry.pipeline.artifacts import FloatOnnx, Program, QuantizedOnnx
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.measure import execution, reasons
from bitferry.pipeline.quantize import quantize
from bitferry.pipeline.recipe import Quantization
from bitferry.targets import Kind, Layer, Scheme
from tests.given import CONTRACT
from tests.test_torchscript import float_model, split


class Gate(nn.Module):
    """A convolution whose weight the image decides."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Linear(8, 64)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weights(x.mean((0, 2, 3))).view(8, 8, 1, 1)
        return F.conv2d(x, weight)


class Attention(nn.Module):
    """Two products of activations between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x.flatten(2).transpose(1, 2))
        found: Tensor = self.after((y @ y.transpose(1, 2)).softmax(-1) @ y)
        return found.mean(1)


class Mixed(nn.Module):
    """A layer for each reason, and one that nothing keeps from int8."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.kept = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.up, self.gate, self.attention = nn.ConvTranspose2d(8, 8, 2, 2), Gate(), Attention()
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.kept(F.relu(self.first(x))))
        scores: Tensor = self.head(self.attention(self.gate(self.up(x))))
        return scores


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    torch.manual_seed(0)
    settings = Quantization(observer="minmax", equalize=False, bias_correction="none", keep=("kept",))
    build = Cache(tmp_path_factory.mktemp("reasons") / "build")
    return quantize(float_model(Mixed(), split().images), split(), Scheme(outputs="int8"), settings, build)


def told(program: Program, name: str, kind: Kind, precision: str = "float32") -> str | None:
    (found,) = reasons.explained(program, [Layer(name, kind, precision)], "int8", "a runtime")
    assert found.name == name
    return found.reason


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("kept", "convolution", "kept in float, as asked"),
        ("up", "convolution", "a transposed convolution is not quantized"),
        ("gate/node_conv2d_2", "convolution", "its weight is computed at each call, not constant"),
        ("gate", "convolution", "its weight is computed at each call, not constant"),
        ("attention/node_matmul", "matrix product", "a product of two activations"),
        ("attention", "matrix product", "a product of two activations"),
        ("first", "convolution", "it is quantized, but a runtime chose a float kernel"),
        ("head", "matrix product", "it is quantized, but a runtime chose a float kernel"),
        ("fused_7", "convolution", "a runtime made it of something else than a layer of the model"),
    ],
)
def test_a_layer_in_float_has_its_reason(program: Program, name: str, kind: Kind, reason: str) -> None:
    assert told(program, name, kind) == reason


def test_what_ran_as_asked_or_was_not_asked_has_none(program: Program) -> None:
    assert told(program, "first", "convolution", "int8") is None
    assert told(program, "up", "convolution", "unknown") is None
    layer = Layer("up", "convolution", "float32")
    assert reasons.explained(program, [layer], "float32", "a runtime") == (layer,)
    assert reasons.explained(program.baseline, [layer], "int8", "a runtime") == (layer,)


def test_a_target_s_own_reason_stands(program: Program) -> None:
    layer = Layer("up", "convolution", "float32", reason="its own")
    assert reasons.explained(program, [layer], "int8", "a runtime") == (layer,)


def test_the_summary_gives_each_reason_once() -> None:
    layers = [Layer(name, "convolution", "float32", reason="kept in float, as asked") for name in "ab"]
    layers += [Layer("up", "convolution", "float32", reason="a transposed convolution is not quantized")]
    layers += [Layer("c", "convolution", "int8")]
    assert execution.summary("int8", layers) == (
        "int8 requested; 1 of 4 convolutions int8, 2 float32 (a, b: kept in float, as asked), "
        "1 float32 (up: a transposed convolution is not quantized)"
    )
    assert json.loads(json.dumps(asdict(layers[2])))["reason"].startswith("a transposed")


def test_an_onnx_file_s_layers_go_by_their_nodes(tmp_path: Path) -> None:
    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(kind, inputs, [output], name=output, **attributes)

    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], "xq"), node("DequantizeLinear", ["xq", "s", "z"], "xd"),
        node("DequantizeLinear", ["w", "s", "z"], "wd"), node("Conv", ["xd", "wd"], "first"),
        node("Tanh", ["first"], "t"), node("Conv", ["t", "f"], "plain"), node("ConvTranspose", ["plain", "f"], "up"),
        node("MatMul", ["up", "up"], "product"),
    ]  # fmt: skip
    constants = {"s": np.float32(0.1), "z": np.uint8(0), "w": np.ones((3, 3, 1, 1), np.uint8),
                 "f": np.ones((3, 3, 1, 1), np.float32)}  # fmt: skip
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, 4, 4]) for name in ("x", "product")]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:], tensors)), tmp_path / "m.onnx")
    given = FloatOnnx(tmp_path / "m.onnx", tmp_path / "m.onnx", CONTRACT, (), "")
    made = QuantizedOnnx(tmp_path / "m.onnx", given, tmp_path / "m.onnx", Scheme(), None, "")  # type: ignore[arg-type]
    assert told(made, "first", "convolution") == (
        "it is quantized, but a runtime chose a float kernel; what it gives goes to Tanh in float"
    )
    assert told(made, "plain", "convolution") == "its weight was not quantized"
    assert told(made, "up", "convolution") == "a transposed convolution is not quantized"
    assert told(made, "product", "matrix product") == "a product of two activations"
