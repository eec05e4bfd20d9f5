"""OpenVINO: batches, devices, streams, the model cache, half weights; checked against ONNX Runtime's plain answers."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import openvino as ov
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from bitferry import targets
from bitferry.device.arrays import Images
from bitferry.device.errors import InputError, TargetUnavailable
from bitferry.pipeline.export import answer
from bitferry.pipeline.recipe import read
from bitferry.pipeline.statistics import sqnr_db
from bitferry.targets.openvino import CORE
from tests.conftest import Project

openvino = targets.get("openvino")
Options: Callable[..., targets.Options] = openvino.Options
ABSENT = "GPU.7"


class Graph:
    """Builds an ONNX graph node by node; each method gives the name of what it adds."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(0)

    def constant(self, value: NDArray[np.generic] | np.generic) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), f"c{len(self.constants)}"))
        return str(self.constants[-1].name)

    def node(self, kind: str, *inputs: str, name: str = "", output: str = "", **attributes: int | list[int]) -> str:
        output = output or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], name or output, **attributes))  # type: ignore[arg-type]
        return output

    def weight(self, *shape: int) -> NDArray[np.float32]:
        return self.random.normal(0, 1 / np.sqrt(np.prod(shape[1:])), shape).astype(np.float32)

    def save(self, path: Path, height_and_before: tuple[int, ...]) -> Path:
        images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", *height_and_before, 3])
        scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "g", [images], [scores], self.constants)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
        return path


def classifier(path: Path, *, int8: bool) -> Path:
    """Write convolution, ReLU, convolution, addition, mean, matrix product; int8 with Q/DQ at each layer's inputs."""
    g = Graph()

    def activation(name: str, scale: float) -> str:
        if not int8:
            return name
        pair = g.constant(np.float32(scale)), g.constant(np.uint8(0))
        return g.node("DequantizeLinear", g.node("QuantizeLinear", name, *pair), *pair)

    def weight(*shape: int) -> str:
        found = g.weight(*shape)
        if not int8:
            return g.constant(found)
        scales = np.abs(found).reshape(len(found), -1).max(1) / 127
        stored = np.rint(found / scales.reshape(-1, *[1] * (found.ndim - 1))).astype(np.int8)
        zeros = g.constant(np.zeros(len(found), np.int8))
        return g.node("DequantizeLinear", g.constant(stored), g.constant(scales), zeros, axis=0)

    x = g.node("Transpose", g.node("Cast", "images", to=TensorProto.FLOAT), perm=[0, 3, 1, 2])
    x = activation(g.node("Mul", x, g.constant(np.float32(1 / 64))), 0.02)
    x = g.node("Relu", g.node("Conv", x, weight(16, 3, 3, 3), name="first", pads=[1] * 4))
    x = activation(x, 0.03)
    x = g.node("Add", x, g.node("Conv", x, weight(16, 16, 3, 3), name="second", pads=[1] * 4))
    x = g.node("ReduceMean", activation(g.node("Relu", x), 0.04), g.constant(np.array([2, 3])), keepdims=0)
    g.node("Gemm", activation(x, 0.02), weight(10, 16), name="head", transB=1, output="scores")
    return g.save(path, (8, 8))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("onnx")
    int8, float32 = (classifier(folder / f"{i}.onnx", int8=bool(i)) for i in (1, 0))
    return dict.fromkeys(("float32", "bfloat16", "float16"), float32) | {"int8": int8}


@pytest.fixture(scope="module")
def images() -> Images:
    return np.random.default_rng(1).integers(0, 256, (9, 8, 8, 3), np.uint8)


def compiled(models: dict[str, Path], folder: Path, precision: targets.Precision, options: targets.Options) -> Path:
    folder.mkdir(exist_ok=True)
    openvino.compile(models[precision], folder / "model.xml", precision=precision, options=options)
    return folder / "model.xml"


@pytest.mark.parametrize("precision", ["int8", "float32"])
@pytest.mark.parametrize("batch", [1, 4, "dynamic"])
def test_every_batch_answers_any_number_of_images(
    models: dict[str, Path], images: Images, tmp_path: Path, batch: targets.Batch, precision: targets.Precision
) -> None:
    options = Options(batch=batch, threads=1)
    predict = openvino.load(compiled(models, tmp_path, precision, options), precision=precision, options=options)
    expected = answer(models[precision], images)
    assert expected.std() > 0.1
    for count in (1, 4, 9):
        found = predict(images[:count])
        assert found.shape == (count, 10)
        assert found.dtype == np.float32
        assert sqnr_db(expected[:count], found) > (100 if precision == "float32" else 30)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ov.PartialShape, ov.CompiledModel]]:
    """Collect the input's shape and the result of every compilation."""
    seen = []

    class Core:
        def __getattr__(self, name: str) -> object:
            return getattr(CORE, name)

        def compile_model(self, model: ov.Model, *rest: object) -> ov.CompiledModel:
            seen.append((model.input(0).get_partial_shape(), CORE.compile_model(model, *rest)))
            return seen[-1][1]

    monkeypatch.setattr(openvino, "CORE", Core())
    return seen


def test_a_dynamic_batch_is_never_compiled_as_one(
    models: dict[str, Path], images: Images, tmp_path: Path, made: list[tuple[ov.PartialShape, ov.CompiledModel]]
) -> None:
    """A model compiled for any number of images answers wrongly for some int8 graphs (decision 6)."""
    options = Options(batch="dynamic")
    path = compiled(models, tmp_path, "int8", options)
    assert CORE.read_model(path).input(0).get_partial_shape()[0].is_dynamic
    predict = openvino.load(path, precision="int8", options=options)
    many = np.concatenate([images] * 8)
    np.testing.assert_array_equal(predict(many)[:9], predict(images))
    predict(images)
    openvino.executed(path, precision="int8", options=options)
    assert all(shape.is_static for shape, _ in made)
    assert [shape[0].get_length() for shape, _ in made] == [64, 8, 9, 1]


def test_only_a_few_batch_sizes_stay_compiled(
    models: dict[str, Path], images: Images, tmp_path: Path, made: list[tuple[ov.PartialShape, ov.CompiledModel]]
) -> None:
    options = Options(batch="dynamic")
    predict = openvino.load(compiled(models, tmp_path, "float32", options), precision="float32", options=options)
    first = predict(images[:1])
    for count in (2, 3, 4, 5, 5, 4, 3, 2):
        assert len(predict(images[:count])) == count
    assert len(made) == 5
    np.testing.assert_array_equal(predict(images[:1]), first)
    assert len(made) == 6


@pytest.mark.parametrize("chosen", [{"hint": "throughput"}, {"streams": 2}])
def test_streams_share_a_call_and_keep_the_order(
    models: dict[str, Path],
    images: Images,
    tmp_path: Path,
    chosen: dict[str, object],
    made: list[tuple[ov.PartialShape, ov.CompiledModel]],
) -> None:
    options = Options(batch=2, threads=2, **chosen)
    path = compiled(models, tmp_path, "float32", options)
    predict = openvino.load(path, precision="float32", options=options)
    assert made[0][1].get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS") == min(2, targets.usable_cpus())
    for count in (1, 2, 5, 9):
        assert sqnr_db(answer(models["float32"], images[:count]), predict(images[:count])) > 100


def test_threads_are_what_was_asked_for(
    models: dict[str, Path], tmp_path: Path, made: list[tuple[ov.PartialShape, ov.CompiledModel]]
) -> None:
    path = compiled(models, tmp_path, "float32", Options())
    openvino.load(path, precision="float32", options=Options(threads=1))
    assert made[0][1].get_property("INFERENCE_NUM_THREADS") == 1
    assert made[0][1].get_property("NUM_STREAMS") == 1


@pytest.mark.parametrize("device", ["AUTO", "AUTO:CPU", "HETERO:CPU"])
def test_a_device_of_devices_answers_alike(
    models: dict[str, Path], images: Images, tmp_path: Path, device: str
) -> None:
    options = Options(device=device, threads=1)
    path = compiled(models, tmp_path, "int8", options)
    found = openvino.load(path, precision="int8", options=options)(images)
    assert sqnr_db(answer(models["int8"], images), found) > 30
    assert openvino.environment(options=options).unmeasured is None
    assert len(openvino.executed(path, precision="int8", options=options)) == 3


@pytest.mark.parametrize("device", [ABSENT, f"AUTO:{ABSENT},CPU", f"HETERO:CPU,{ABSENT}"])
def test_an_absent_device_is_compiled_for_and_not_run(models: dict[str, Path], tmp_path: Path, device: str) -> None:
    options = Options(device=device)
    found = openvino.environment(options=options)
    assert found.device == device
    assert found.fast == ()
    assert found.unmeasured is not None
    assert f"no device '{ABSENT}' here" in found.unmeasured
    assert "it found CPU" in found.unmeasured
    path = compiled(models, tmp_path, "int8", options)
    for use in (openvino.load, openvino.executed):
        with pytest.raises(TargetUnavailable) as refused:
            use(path, precision="int8", options=options)
        assert str(refused.value) == found.unmeasured
    here = openvino.load(path, precision="int8", options=Options())  # the file itself is tied to no device
    assert here(np.zeros((1, 8, 8, 3), np.uint8)).shape == (1, 10)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"device": "CUDA"}, "device 'CUDA' is none of OpenVINO's: CPU, GPU, GPU.1, NPU, AUTO, or several"),
        ({"device": "cpu"}, "device 'cpu' is none of OpenVINO's"),
        ({"device": "AUTO:"}, "device 'AUTO:' is none of OpenVINO's"),
        ({"streams": 0}, "streams must be 1 or more, not 0"),
        ({"batch": "dynamic", "streams": 2}, "several streams share a call by fixed batches"),
        ({"batch": "dynamic", "hint": "throughput"}, "several streams share a call by fixed batches"),
        ({"threads": 0}, "threads must be 1 to"),
    ],
)
def test_options_that_mean_nothing_are_refused(given: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Options(**given)


def test_a_recipe_s_options_are_told_with_the_recipe_s_name(project: Project) -> None:
    project.edit(("[targets.openvino]\n", '[targets.openvino]\ndevice = "CUDA"\n'))
    with pytest.raises(InputError, match="recipe 'small': targets.openvino: device 'CUDA' is none of OpenVINO's"):
        read(project.recipe).options("openvino")


def test_half_weights_halve_a_float_file_and_leave_an_int8_one(
    models: dict[str, Path], images: Images, tmp_path: Path
) -> None:
    half, sizes = Options(half_weights=True), {}
    for precision, options in (("float32", Options()), ("float32", half), ("float16", Options())):
        path = compiled(models, tmp_path, cast(targets.Precision, precision), options)
        sizes[precision, options] = path.with_suffix(".bin").stat().st_size
    assert len(set(sizes.values())) == 2
    assert sizes["float32", half] == sizes["float16", Options()] < 0.55 * sizes["float32", Options()]
    expected = answer(models["float32"], images)
    found = openvino.load(path, precision="float32", options=half)(images)
    assert 50 < sqnr_db(expected, found) < 90
    whole, halved = (compiled(models, tmp_path / n, "int8", o) for n, o in (("a", Options()), ("b", half)))
    assert whole.with_suffix(".bin").read_bytes() == halved.with_suffix(".bin").read_bytes()


def test_the_cache_is_used_and_gives_no_stale_answers(models: dict[str, Path], images: Images, tmp_path: Path) -> None:
    options = Options(cache=str(tmp_path / "cache"))
    path = compiled(models, tmp_path / "model", "float32", options)

    def load() -> NDArray[np.float32]:
        found: NDArray[np.float32] = openvino.load(path, precision="float32", options=options)(images)
        return found

    first = load()
    (blob,) = (tmp_path / "cache").iterdir()
    written = blob.stat().st_mtime_ns
    np.testing.assert_array_equal(load(), first)
    assert [p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()] == [written]
    weights = path.with_suffix(".bin")
    times = weights.stat()
    stored = max((one.raw_data for one in onnx.load(models["float32"]).graph.initializer), key=len)
    assert stored in weights.read_bytes()
    weights.write_bytes(weights.read_bytes().replace(stored, bytes(len(stored))))  # the .xml and the times as before
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    plain = openvino.load(path, precision="float32", options=replace(options, cache=None))(images)  # type: ignore[call-arg]
    assert not np.array_equal(plain, first)
    np.testing.assert_array_equal(load(), plain)


def test_by_default_nothing_is_kept(models: dict[str, Path], images: Images, tmp_path: Path) -> None:
    path = compiled(models, tmp_path, "int8", Options())
    openvino.load(path, precision="int8", options=Options())(images)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.bin", "model.xml"]


def test_rests_of_an_int8_graph_are_asked_of_the_device(
    models: dict[str, Path], images: Images, tmp_path: Path
) -> None:
    path = compiled(models, tmp_path, "int8", Options())
    half = Options(rests="bfloat16")
    most = "bf16" if "avx512f" in targets.cpu_isa() else "f32"  # OpenVINO's choice where no instruction would serve
    for options, wanted in ((Options(), "f32"), (half, most)):
        made = vars(openvino)["_compiled"](path, "int8", options, 1)
        assert made.get_property("INFERENCE_PRECISION_HINT").to_string() == wanted
    assert (
        sqnr_db(
            openvino.load(path, precision="int8", options=Options())(images),
            openvino.load(path, precision="int8", options=half)(images),
        )
        > 30
    )


def test_a_search_is_offered_what_may_be_faster_and_is_left_open() -> None:
    cpus = targets.usable_cpus()
    fewer = [Options(threads=cpus >> shift) for shift in range(1, 9) if cpus >> shift]
    assert list(Options().alternatives("int8", ("int8", "float32"))) == fewer
    assert list(Options(threads=2).alternatives("float32", ("float32", "bfloat16"))) == []
    assert list(Options().alternatives("int8", ("int8", "bfloat16"))) == [*fewer, Options(rests="bfloat16")]


@pytest.mark.parametrize("precision", ["int8", "float32", "bfloat16", "float16"])
def test_executed_tells_what_ran_not_what_was_asked(
    models: dict[str, Path], tmp_path: Path, precision: targets.Precision
) -> None:
    path = compiled(models, tmp_path, precision, Options())
    layers = openvino.executed(path, precision=precision, options=Options())
    ran = {layer.name: layer.precision for layer in layers}
    assert all(layer.microseconds is not None and layer.microseconds >= 0 for layer in layers)
    assert sum(layer.microseconds or 0 for layer in layers) > 0
    assert {"first", "second"} < set(ran)
    assert len(ran) == 3
    fast = openvino.environment(options=Options()).fast
    if precision in fast or precision in ("int8", "float32"):
        assert set(ran.values()) == {precision}
    elif precision == "float16":
        assert set(ran.values()) == {"bfloat16" if "bfloat16" in fast else "float32"}


def test_the_same_model_gives_the_same_file(models: dict[str, Path], tmp_path: Path) -> None:
    one, two = (compiled(models, tmp_path / name, "int8", Options()) for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("batch", [1, 2, "dynamic"])
def test_several_images_per_sample_and_maps_as_outputs(tmp_path: Path, batch: targets.Batch) -> None:
    g = Graph()
    x = g.node("ReduceMean", g.node("Cast", "images", to=TensorProto.FLOAT), g.constant(np.array([1])), keepdims=0)
    g.node("Transpose", x, perm=[0, 3, 1, 2], output="scores")
    model = g.save(tmp_path / "views.onnx", (2, 8, 6))
    views = np.random.default_rng(2).integers(0, 256, (3, 2, 8, 6, 3), np.uint8)
    options = Options(batch=batch)
    openvino.compile(model, tmp_path / "model.xml", precision="float32", options=options)
    found = openvino.load(tmp_path / "model.xml", precision="float32", options=options)(views)
    np.testing.assert_allclose(found, views.astype(np.float32).mean(1).transpose(0, 3, 1, 2), rtol=1e-6)


def test_a_convolution_and_a_matrix_product_of_as_many_outputs_both_run_on_int8(images: Images, tmp_path: Path) -> None:
    """ONNX keeps their equal zero points once, and OpenVINO runs in float what shares a constant so."""
    g = Graph()
    zeros, pair = g.constant(np.zeros(16, np.int8)), (g.constant(np.float32(0.02)), g.constant(np.uint8(0)))

    def activation(name: str) -> str:
        return g.node("DequantizeLinear", g.node("QuantizeLinear", name, *pair), *pair)

    def weight(*shape: int) -> str:
        stored = g.random.integers(-63, 64, shape).astype(np.int8)
        return g.node("DequantizeLinear", g.constant(stored), g.constant(np.full(16, 0.01, np.float32)), zeros, axis=0)

    x = g.node("Transpose", g.node("Cast", "images", to=TensorProto.FLOAT), perm=[0, 3, 1, 2])
    x = activation(g.node("Mul", x, g.constant(np.float32(1 / 64))))
    x = activation(g.node("Relu", g.node("Conv", x, weight(16, 3, 3, 3), name="conv")))
    x = g.node("Transpose", g.node("Reshape", x, g.constant(np.array([0, 16, 36]))), perm=[0, 2, 1])
    x = g.node("MatMul", x, g.node("Transpose", weight(16, 16), perm=[1, 0]), name="product")
    g.node("ReduceMean", x, g.constant(np.array([1])), keepdims=0, output="scores")
    source = g.save(tmp_path / "source.onnx", (8, 8))
    openvino.compile(source, tmp_path / "model.xml", precision="int8", options=Options())
    layers = openvino.executed(tmp_path / "model.xml", precision="int8", options=Options())
    assert [layer.precision for layer in layers] == ["int8", "int8"]
    predict = openvino.load(tmp_path / "model.xml", precision="int8", options=Options(threads=1))
    assert sqnr_db(answer(source, images), predict(images)) > 30


def test_an_empty_cache_is_none(
    models: dict[str, Path], images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = Options(cache="")
    openvino.load(compiled(models, tmp_path / "made", "int8", options), precision="int8", options=options)(images)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize(("bias", "groups"), [(True, 1), (True, 2), (True, 8), (False, 2)])
def test_a_layer_goes_by_its_name_in_onnx(bias: bool, groups: int, tmp_path: Path) -> None:
    """OpenVINO numbers a transposed convolution, and calls the last layer by the model's output."""
    node, rng = onnx.helper.make_node, np.random.default_rng(0)
    shapes = {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 8 // groups, 2, 2), "b2": (8,), "w3": (4, 8), "b3": (4,)}
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    nodes = [
        node("Cast", ["images"], ["whole"], to=onnx.TensorProto.FLOAT),
        node("Transpose", ["whole"], ["x"], perm=[0, 3, 1, 2]),
        node("Conv", ["x", "w1", "b1"], ["first"], name="stem.Conv_0"),
        node("Relu", ["first"], ["r"]),
        node("ConvTranspose", ["r", "w2", *(["b2"] if bias else [])], ["up"], name="up", strides=[2, 2], group=groups),
        node("Relu", ["up"], ["u"]),
        node("GlobalAveragePool", ["u"], ["p"]),
        node("Flatten", ["p"], ["f"]),
        node("Gemm", ["f", "w3", "b3"], ["scores"], name="head", transB=1),
    ]
    used = {name for one in nodes for name in one.input}
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in weights.items() if name in used]
    given = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["n", 8, 8, 3])
    scores = onnx.helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, ["n", 4])
    graph = onnx.helper.make_graph(nodes, "given", [given], [scores], tensors)
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "given.onnx")
    openvino.compile(tmp_path / "given.onnx", tmp_path / "model.xml", precision="float32", options=Options())
    found = openvino.executed(tmp_path / "model.xml", precision="float32", options=Options())
    assert [layer.name for layer in found] == ["stem.Conv_0", "up", "head"]
