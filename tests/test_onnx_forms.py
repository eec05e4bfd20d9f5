"""Older and stranger forms of an ONNX file: read where they mean the same, refused by name where they do not."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from bitferry.device.errors import InputError
from bitferry.pipeline import recipe
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.onnx_in.load import load

RECIPE = {
    "name": "t", "classes": 5, "model": {"source": "onnx:m.onnx"}, "preprocessing": {"height": 16, "width": 16},
    "data": {"calibration": "c", "evaluation": "e"},
}  # fmt: skip


def built(kind: str = "", *, ir: int = 8, opset: int = 17, batch: int | str = "N") -> ModelProto:
    """Give a convolution, its mean and a matrix product, in the form `kind`."""
    random, width = np.random.default_rng(0), np.float64 if kind == "double" else np.float32
    weights = {
        "w": random.standard_normal((8, 3, 3, 3)).astype(width),
        "f": random.standard_normal((8, 5)).astype(width),
    }
    between = {
        "dropout": helper.make_node("Dropout", ["c", "ratio", "mode"], ["d"]),
        "random": helper.make_node("RandomNormalLike", ["c"], ["d"]),
        "norm": helper.make_node("BatchNormalization", ["c", *4 * ["one"]], ["d", "m", "v"], training_mode=1),
    }
    weights |= {"ratio": np.array(0.5, np.float32), "mode": np.array(True)} if kind == "dropout" else {}
    weights |= {"one": np.ones(8, np.float32)} if kind == "norm" else {}
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"]), *([between[kind]] if kind in between else []),
             helper.make_node("GlobalAveragePool", ["d" if kind in between else "c"], ["g"]),
             helper.make_node("Flatten", ["g"], ["l"]), helper.make_node("MatMul", ["l", "f"], ["s"])]  # fmt: skip
    element = TensorProto.DOUBLE if kind == "double" else TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info("x", element, [batch, 3, 16, 16])]
    if kind == "listed":
        inputs += [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in tensors]
    if kind == "constants":
        nodes = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in tensors] + nodes
    output = helper.make_tensor_value_info("s", element, [batch, 5])
    if kind == "sequence":
        nodes.append(helper.make_node("SequenceConstruct", ["s"], ["q"]))
        output = helper.make_tensor_sequence_value_info("q", element, None)
    graph = helper.make_graph(nodes, "g", inputs, [output], [] if kind == "constants" else tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)


@pytest.mark.parametrize(
    "model",
    [
        built("listed", ir=3, opset=7), built("listed", ir=3, opset=8), built("constants", ir=3, opset=9),
        built("constants"), built("double"), built(batch=-1), built(batch=0), built(ir=10, opset=21),
    ],
    ids=["opset 7", "opset 8", "old constants", "constants", "double", "minus one", "zero", "opset 21"],
)  # fmt: skip
def test_forms_that_mean_the_same_are_read(model: ModelProto, tmp_path: Path) -> None:
    onnx.save(model, tmp_path / "m.onnx")
    found = load(recipe.Recipe.model_validate(RECIPE), tmp_path, Cache(tmp_path / "build"))
    assert found.batch is None
    made = onnx.load(found.path)
    assert [value.name for value in made.graph.input] == ["images"]
    assert not any(node.op_type == "Constant" for node in made.graph.node)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("dropout", "the Dropout 'd' is in training mode, so an answer depends on chance"),
        ("norm", "the BatchNormalization 'd' is in training mode, so an answer depends on the others in its batch"),
        ("random", "the RandomNormalLike 'd' draws random numbers"),
        ("sequence", r"gives 'q' \(sequence\); expected one tensor of scores"),
    ],
)
def test_forms_that_are_no_classifier_are_refused_by_node(kind: str, told: str, tmp_path: Path) -> None:
    onnx.save(built(kind), tmp_path / "m.onnx")
    with pytest.raises(InputError, match=told):
        load(recipe.Recipe.model_validate(RECIPE), tmp_path, Cache(tmp_path / "build"))
