"""What a tool cannot take is told by operator, layer, line of the model, and what else there is."""

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from torch import nn

from bitferry.device.errors import StageFailed
from bitferry.pipeline import unsupported
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.export import export
from tests.test_coreml import Odd
from tests.test_torchscript import float_model, split


def test_an_operator_without_a_form_in_onnx_is_named_with_its_layer_and_line(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 10, 3), Odd(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(StageFailed) as raised:
        export(float_model(model, split().images), split(), Cache(tmp_path / "build"))
    told = str(raised.value)
    assert "bessel_j0 in the layer '1' (test_coreml.py:" in told
    assert "torch.special.bessel_j0(x)) has no form in ONNX" in told
    assert "try another target" in told


@pytest.mark.parametrize(
    ("text", "blamed"),
    [
        ("cannot convert first/node_Abs: not implemented", "the operator Abs in the layer 'first'"),
        ("Conversion failed for Erf", "the operator Erf in the layer 'second'"),
        ("workspace is too small", "replace it in the model, or try another target"),
    ],
)
def test_a_compiler_s_complaint_is_matched_to_the_nodes_it_names(tmp_path: Path, text: str, blamed: str) -> None:
    nodes = [
        helper.make_node("Abs", ["images"], ["a"], name="first/node_Abs"),
        helper.make_node("Erf", ["a"], ["scores"], name="second/node_Erf"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("images", "scores")]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:])), tmp_path / "model.onnx")
    told = unsupported.in_compile(RuntimeError(text), tmp_path / "model.onnx", "openvino")
    assert told.startswith(blamed)
    assert "onnxruntime" in told
