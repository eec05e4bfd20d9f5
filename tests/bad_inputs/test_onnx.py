"""ONNX files of strangers: with ways out of their file, of sizes that cannot be, crossed; no runtime opens them."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import onnxsim
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from bitferry import targets
from bitferry.device import commands
from tests.bad_inputs import foreign, put
from tests.conftest import Project, half_made

Change = Callable[[ModelProto], None]


@pytest.fixture
def bundle(deployed: Project, tmp_path: Path) -> Path:
    return foreign(deployed, "onnxruntime", tmp_path)


def refused(deployed: Project, bundle: Path, content: bytes) -> str:
    """Give the line that a bundle with another `model.onnx` is refused with."""
    put(bundle, "model.onnx", content)
    return deployed.refused("verify", str(bundle), "--quick")


def changed(deployed: Project, bundle: Path, change: Change) -> str:
    model = onnx.load(bundle / "model.onnx")
    change(model)
    return refused(deployed, bundle, model.SerializeToString())


def weights(model: ModelProto) -> TensorProto:
    return cast(TensorProto, max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data)))


def quantizer(model: ModelProto, kind: str = "QuantizeLinear") -> NodeProto:
    return cast(NodeProto, next(node for node in model.graph.node if node.op_type == kind))


def outside(location: str, **more: str) -> Change:
    """Keep the largest tensor in another file."""

    def change(model: ModelProto) -> None:
        tensor = weights(model)
        entries = {"location": location, "offset": "0", "length": str(len(tensor.raw_data))} | more
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)

    return change


EXTERNAL = "is kept in another file; all must be in this one"


@pytest.mark.parametrize("location", ["../secret.bin", "{absolute}", "secret\0.bin", "secret.bin"])
def test_15_data_in_another_file(deployed: Project, bundle: Path, tmp_path: Path, location: str) -> None:
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(1_000_000))
    assert EXTERNAL in changed(deployed, bundle, outside(location.format(absolute=secret)))


@pytest.mark.parametrize("kind", ["symlink", "hard link", "pipe", "device"])
def test_16_data_through_a_link_a_pipe_or_a_device(deployed: Project, bundle: Path, tmp_path: Path, kind: str) -> None:
    secret, way = tmp_path / "secret.bin", bundle / "data.bin"
    secret.write_bytes(bytes(1_000_000))
    put(bundle, "data.bin", secret.read_bytes())
    way.unlink()
    if kind == "symlink":
        way.symlink_to(secret)
    elif kind == "hard link":
        way.hardlink_to(secret)
    elif kind == "pipe":
        os.mkfifo(bundle.parent / "pipe")
    location = {"pipe": "../pipe", "device": "/dev/zero"}.get(kind, "data.bin")
    if kind in ("pipe", "device"):
        put(bundle, "data.bin", b"")
    told = "is no plain file; a bundle has nothing else" if kind == "symlink" else EXTERNAL
    assert told in changed(deployed, bundle, outside(location))


@pytest.mark.parametrize(
    "more", [{"offset": "-5"}, {"offset": "9" * 30}, {"length": "1e9"}, {"length": "-1"}, {"offset": "x"}]
)
def test_17_offsets_and_lengths_that_are_none(deployed: Project, bundle: Path, more: dict[str, str]) -> None:
    put(bundle, "data.bin", bytes(100_000))
    assert EXTERNAL in changed(deployed, bundle, outside("data.bin", **more))


def nested(depth: int) -> bytes:
    """Put a graph into a graph into a graph …, each in a node's attribute."""
    graph = b""
    for _ in range(depth):
        attribute = field(5, field(1, b"body") + field(6, graph))
        graph = field(1, field(4, b"If") + attribute)
    return b"\x08\x0a" + field(8, b"\x10\x12") + field(7, graph)


def field(number: int, content: bytes) -> bytes:
    size, count = b"", len(content)
    while count > 127:
        size, count = size + bytes([count & 127 | 128]), count >> 7
    return bytes([number << 3 | 2]) + size + bytes([count]) + content


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "0 bytes found, a plain file"),
        (b"not a model", "is no ONNX model that can be opened: "),
        (np.random.default_rng(0).bytes(10_000), "is no ONNX model that can be opened: "),
        (b"\xff" * 1000, "a number of more than 64 bits"),
        (field(7, b"")[:-1] + b"\x7f", "a field of 127 bytes where 0 are left"),
        (nested(3000), "graphs inside graphs, more than 8 deep"),
    ],
    ids=["empty", "text", "noise", "number", "beyond", "nested"],
)
def test_18_what_is_no_model(deployed: Project, bundle: Path, content: bytes, told: str) -> None:
    assert told in refused(deployed, bundle, content)
    assert "is no ONNX model that can be opened" in refused(deployed, bundle, content + b"\x00")


def cycle(model: ModelProto) -> None:
    quantizer(model).input[0] = model.graph.output[0].name


def same_values(model: ModelProto) -> None:
    model.graph.node[3].output[0] = model.graph.node[2].output[0]


def same_tensors(model: ModelProto) -> None:
    model.graph.initializer.add().CopyFrom(model.graph.initializer[0])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (cycle, "takes 'scores', which nothing before it gives: a cycle, or a gap"),
        (same_values, "two values are called"),
        (same_tensors, "two values are called"),
    ],
)
def test_19_graphs_that_are_crossed(deployed: Project, bundle: Path, change: Change, told: str) -> None:
    assert told in changed(deployed, bundle, change)


def unknown(model: ModelProto) -> None:
    quantizer(model).op_type = "Unheard"


def foreign_domain(model: ModelProto) -> None:
    quantizer(model).domain = "com.stranger"
    model.opset_import.append(helper.make_opsetid("com.stranger", 1))


def opset(model: ModelProto) -> None:
    model.opset_import[0].version = 99


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (unknown, "Unheard"),
        (foreign_domain, "'com.stranger', which is no part of ONNX"),
        (opset, "its operator set is 99; 13 to 23 are read"),
    ],
)
def test_20_operators_that_are_not_known(deployed: Project, bundle: Path, change: Change, told: str) -> None:
    assert told in changed(deployed, bundle, change)


def scale(value: float) -> Change:
    def change(model: ModelProto) -> None:
        name = quantizer(model).input[1]
        tensor = next(one for one in model.graph.initializer if one.name == name)
        tensor.CopyFrom(numpy_helper.from_array(np.full(tuple(tensor.dims), value, np.float32), name))

    return change


def zero_point(model: ModelProto) -> None:
    name = quantizer(model).input[2]
    tensor = next(one for one in model.graph.initializer if one.name == name)
    tensor.ClearField("raw_data")
    tensor.int32_data.append(300)


def axis(model: ModelProto) -> None:
    sizes = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    node = next(
        n for n in model.graph.node if n.op_type == "DequantizeLinear" and np.prod(sizes.get(n.input[1], [1])) > 1
    )
    del node.attribute[:]
    node.attribute.append(helper.make_attribute("axis", 9))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (scale(0), "has a scale of 0.0; a scale is above zero"),
        (scale(-1), "has a scale of -1.0; a scale is above zero"),
        (scale(np.nan), "has a scale of nan; a scale is above zero"),
        (scale(np.inf), "has a scale of inf; a scale is above zero"),
        (zero_point, "has a zero point outside 0 to 255"),
        (axis, "has axis 9 and "),
    ],
    ids=["0", "negative", "nan", "inf", "zero point", "axis"],
)
def test_21_quantization_that_makes_no_sense(deployed: Project, bundle: Path, change: Change, told: str) -> None:
    assert told in changed(deployed, bundle, change)


def dims(*sizes: int) -> Change:
    def change(model: ModelProto) -> None:
        weights(model).dims[:] = sizes

    return change


def huge_input(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 10**12


def huge_fill(model: ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([10**6, 10**6]), "sizes"))
    model.graph.node.insert(0, helper.make_node("ConstantOfShape", ["sizes"], ["filled"], name="fill"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (dims(10**12), "of shape [1000000000000] is of a size that cannot be"),
        (dims(10**6, 10**6, 10**6, 10**6), "is of a size that cannot be"),
        (dims(-1), "of shape [-1] is of a size that cannot be"),
        (dims(10**6), "000000 were expected"),
        (huge_input, "is of a size that cannot be"),
        (huge_fill, "the node fill makes a tensor of more than 2147483648 elements"),
    ],
    ids=["one", "product", "negative", "more than its data", "input", "fill"],
)
def test_22_sizes_beyond_all_bounds(deployed: Project, bundle: Path, change: Change, told: str) -> None:
    assert told in changed(deployed, bundle, change)


def layout(model: ModelProto) -> None:
    sizes = [1, 3, 16, 16]
    for dim, size in zip(model.graph.input[0].type.tensor_type.shape.dim, sizes, strict=True):
        dim.dim_value = size


def fixed_batch(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4


@pytest.mark.parametrize("change", [layout, fixed_batch])
def test_23_another_layout_or_batch(deployed: Project, bundle: Path, change: Change) -> None:
    assert "this runtime cannot run" in changed(deployed, bundle, change)


@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_24_a_simplifier_that_changes_answers(
    deployed: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    really = onnxsim.simplify

    def wrong(graph: ModelProto) -> tuple[ModelProto, bool]:
        simplified, same = really(graph)
        turned = np.ascontiguousarray(numpy_helper.to_array(weights(simplified))[::-1])
        weights(simplified).CopyFrom(numpy_helper.from_array(turned, weights(simplified).name))
        return simplified, same

    monkeypatch.setattr(onnxsim, "simplify", wrong)
    copied = Path(shutil.copytree(deployed.folder, tmp_path / "project"))
    for folder in (copied / "build/small").glob("simplify-*"):
        shutil.rmtree(folder)
    line = Project(copied).refused("-q", "export", "small.toml", "-t", "onnxruntime", "--precision", precision)
    assert "the simplified ONNX answers 32 calibration images differently" in line
    assert not half_made(copied / "build/small", "simplify")
    assert not list((copied / "build/small").glob("simplify-*"))


@pytest.mark.parametrize(
    "change", [outside("../secret.bin"), cycle, dims(10**12), scale(0)], ids=["15", "19", "22", "21"]
)
def test_15_to_22_a_compiler_on_the_device_never_sees_them(
    deployed: Project, tmp_path: Path, change: Change, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = foreign(deployed, "openvino", tmp_path)
    model = onnx.load(bundle / "model.onnx")
    change(model)
    put(bundle, "model.onnx", model.SerializeToString())
    put(bundle, "model.xml", b"<net/>")  # what loads is not built again
    assert commands.main(targets.get("openvino"), bundle, ["rebuild"]) == 2
    assert "model.onnx is no ONNX model that can be opened: " in capsys.readouterr().err
    assert not [path for path in bundle.iterdir() if "rebuilt" in path.name]
