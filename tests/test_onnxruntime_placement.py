"""ONNX Runtime: a quantization goes before what moves or cuts off what a layer gives, for the layer to run on int8."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from bitferry.targets import onnxruntime
from bitferry.targets.onnxruntime import Options

Grid = tuple[float, int]
SIXTH: Grid = (6 / 255, 0)
HALVES: Grid = (2 / 255, 128)
node = helper.make_node


def cut(low: float | None, high: float | None) -> list[NodeProto]:
    """Cut a convolution's output off; None for no bound."""
    bounds = [name if value is not None else "" for name, value in (("low", low), ("high", high))]
    return [node("Clip", ["convolved", *bounds], ["moved"])]


def mean(*, keep: bool) -> list[NodeProto]:
    pair = [node("QuantizeLinear", ["rectified", "scale", "zero"], ["whole"]),
            node("DequantizeLinear", ["whole", "scale", "zero"], ["again"])]  # fmt: skip
    flat = [node("Flatten", ["kept"], ["moved"])] if keep else []
    pooled = node("ReduceMean", ["again", "axes"], ["kept" if keep else "moved"], keepdims=int(keep))
    return [node("Relu", ["convolved"], ["rectified"]), *pair, pooled, *flat]


BETWEEN: dict[str, tuple[list[NodeProto], Grid, tuple[float | None, float | None], bool]] = {
    "ReLU": ([node("Relu", ["convolved"], ["moved"])], SIXTH, (None, None), True),
    "ReLU on a grid of a sum's": ([node("Relu", ["convolved"], ["moved"])], (6 / 255, 30), (None, None), True),
    "ReLU6": (cut(0, 6), SIXTH, (0, 6), True),
    "hardtanh": (cut(-1, 1), HALVES, (-1, 1), True),
    "hardtanh that calibration never filled": (cut(-1, 1), (1.8 / 255, 140), (-1, 1), True),
    "hardtanh within a wider grid": (cut(-1, 1), (4 / 255, 128), (-1, 1), True),
    "clip above nought": (cut(0.5, 6), SIXTH, (0.5, 6), True),
    "clip at the top": (cut(None, 1), HALVES, (None, 1), True),
    "clip and pooling": (
        [node("Clip", ["convolved", "low", "high"], ["clipped"]),
         node("MaxPool", ["clipped"], ["moved"], kernel_shape=[2, 2], strides=[2, 2])], HALVES, (-1, 1), True,
    ),
    "channel shuffle": (
        [node("Reshape", ["convolved", "parted"], ["groups"]), node("Transpose", ["groups"], ["t"], perm=[0, 2, 1, 3, 4]),
         node("Reshape", ["t", "joined"], ["moved"])], HALVES, (None, None), True,
    ),
    "pooling to a vector": (
        [node("MaxPool", ["convolved"], ["p"], kernel_shape=[8, 8]), node("Flatten", ["p"], ["moved"])],
        HALVES, (None, None), False,
    ),
    "mean": (mean(keep=False), SIXTH, (None, None), False),
    "mean of kept sizes": (mean(keep=True), SIXTH, (None, None), False),
}  # fmt: skip


def quantized(
    between: Sequence[NodeProto], grid: Grid, bounds: tuple[float | None, float | None], maps: bool
) -> ModelProto:
    """Write uint8 images → convolution → `between`, quantized on a grid → a convolution, or else a linear layer."""
    rng, out = np.random.default_rng(0), 8 if maps else 4

    def weights(*shape: int) -> NDArray[np.int8]:
        return rng.integers(-40, 40, shape).astype(np.int8)  # of which two products fit into 16 bits on any CPU

    constants: dict[str, NDArray[np.generic]] = {
        "w": weights(8, 3, 3, 3), "last": weights(8, 8, 1, 1) if maps else weights(4, 8),
        "w_scale": np.full(8, 0.01, np.float32), "w_zero": np.zeros(8, np.int8),
        "b": rng.integers(-500, 500, 8).astype(np.int32), "b_scale": np.full(8, 0.01 / 64, np.float32),
        "b_zero": np.zeros(8, np.int32), "last_scale": np.full(out, 0.01, np.float32),
        "last_zero": np.zeros(out, np.int8), "unit": np.array(1 / 64, np.float32), "middle": np.array(128, np.uint8),
        "scale": np.array(grid[0], np.float32), "zero": np.array(grid[1], np.uint8), "axes": np.array([2, 3]),
        "parted": np.array([0, 2, 4, 8, 8]), "joined": np.array([0, 8, 8, 8]),
    }  # fmt: skip
    constants |= {n: np.array(v, np.float32) for n, v in zip(("low", "high"), bounds, strict=True) if v is not None}
    first = [
        node("Cast", ["images"], ["whole_images"], to=TensorProto.FLOAT), node("Mul", ["whole_images", "unit"], ["scaled"]),
        node("Transpose", ["scaled"], ["x"], perm=[0, 3, 1, 2]), node("QuantizeLinear", ["x", "unit", "middle"], ["xq"]),
        node("DequantizeLinear", ["xq", "unit", "middle"], ["xd"]),
        node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["wd"], axis=0),
        node("DequantizeLinear", ["b", "b_scale", "b_zero"], ["bd"], axis=0),
        node("Conv", ["xd", "wd", "bd"], ["convolved"], name="first", pads=[1] * 4),
    ]  # fmt: skip
    then = [
        node("QuantizeLinear", ["moved", "scale", "zero"], ["mq"]),
        node("DequantizeLinear", ["mq", "scale", "zero"], ["md"]),
        node("DequantizeLinear", ["last", "last_scale", "last_zero"], ["ld"], axis=0),
    ]
    ended = [
        node("Conv", ["md", "ld"], ["o"], name="second"), node("QuantizeLinear", ["o", "scale", "zero"], ["oq"]),
        node("DequantizeLinear", ["oq", "scale", "zero"], ["od"]), node("Flatten", ["od"], ["scores"]),
    ] if maps else [node("Gemm", ["md", "ld"], ["scores"], name="second", transB=1)]  # fmt: skip
    nodes = [*first, *between, *then, *ended]
    used = {name for one in nodes for name in one.input}
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items() if name in used]
    given = helper.make_tensor_value_info("images", TensorProto.UINT8, ["n", 8, 8, 3])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", None])
    graph = helper.make_graph(nodes, "quantized", [given], [scores], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


@pytest.mark.parametrize("name", BETWEEN)
def test_a_layer_runs_on_int8_whatever_moves_or_cuts_off_what_it_gives(name: str, tmp_path: Path) -> None:
    model = quantized(*BETWEEN[name])
    onnx.save(model, tmp_path / "given.onnx")
    options = Options(batch=4)
    onnxruntime.compile(tmp_path / "given.onnx", tmp_path / "model.onnx", precision="int8", options=options)
    layers = onnxruntime.executed(tmp_path / "model.onnx", precision="int8", options=options)
    assert {layer.name: layer.precision for layer in layers} == {"first": "int8", "second": "int8"}
    if "mean" in name:
        assert optimized(tmp_path / "model.onnx", tmp_path)["QLinearGlobalAveragePool"] == 1
    images = np.random.default_rng(1).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    exact, found = plainly(tmp_path / "given.onnx", images), plainly(tmp_path / "model.onnx", images)
    step = 0 if "mean" not in name else 2 * np.abs(exact).max() / 255  # averages of int8 are rounded once more
    assert np.abs(found - exact).max() <= step + 1e-5


def plainly(path: Path, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Answer operator by operator, without the int8 kernels of this CPU."""
    settings = ort.SessionOptions()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    found: NDArray[np.float32] = session.run(None, {"images": images})[0]
    return found


def optimized(path: Path, folder: Path) -> Counter[str]:
    """Count the operators of the graph that ONNX Runtime makes of a file."""
    settings = ort.SessionOptions()
    settings.optimized_model_filepath = str(folder / "optimized.onnx")
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    settings.log_severity_level = 4
    ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    return Counter(one.op_type for one in onnx.load(folder / "optimized.onnx").graph.node)
