"""A recipe that gives an ONNX file: the same verdict, ladder, report and bundle, and refusals that say what to do."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from PIL import Image

from bitferry.device.arrays import Images, Outputs
from bitferry.device.errors import InputError
from bitferry.pipeline.artifacts import FloatOnnx, QuantizedOnnx
from bitferry.pipeline.cache import Cache, file_hash
from bitferry.pipeline.measure import layers, sensitivity
from bitferry.pipeline.nightly import inputs, parcel
from bitferry.pipeline.nightly.night import Cell
from bitferry.pipeline.nightly.store import Store
from bitferry.pipeline.onnx_in.load import as_given, load
from bitferry.pipeline.recipe import read
from bitferry.pipeline.run import Deployment, Run
from bitferry.pipeline.statistics import sqnr_db
from bitferry.pipeline.verify import eager, load_artifact
from bitferry.targets import Precision
from tests.conftest import Project, subset
from tests.given import CONTRACT, MEAN, STD, Fitted, changed, exported, fitted, project, written

UINT8 = ("mean = [0.3, 0.3, 0.3]\nstd = [0.35, 0.35, 0.35]", "scale = 1.0")


@pytest.fixture(scope="module")
def model() -> Fitted:
    return fitted()


@pytest.fixture(scope="module")
def images() -> Images:
    return np.stack([CONTRACT.fit(image) for image in subset("evaluation", 60)["images"]])


@pytest.fixture(scope="module")
def deployed_onnx(model: Fitted, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A file that PyTorch exported, deployed to both targets; tests must not change it."""
    made = project(tmp_path_factory.mktemp("onnx") / "project")
    exported(model, made.folder / "model.onnx")
    done = made.bitferry("deploy", "small.toml", "--target", "openvino,onnxruntime", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    (made.folder / "verdicts.json").write_text(done.stdout)
    (made.folder / "stderr.txt").write_text(done.stderr)
    return made


def scores(model: Fitted, images: Images) -> Outputs:
    """Compute with PyTorch what a file's scores must be."""
    with torch.no_grad():
        pixels = torch.from_numpy(images.copy()).permute(0, 3, 1, 2) / 255
        found: Outputs = model((pixels - MEAN) / STD).numpy()
    return found


def loaded(made: Project) -> FloatOnnx:
    return load(read(made.recipe), made.folder, Cache(made.folder / "build/small"))


def run(made: Project) -> Run:
    return Run(read(made.recipe), made.recipe, Cache(made.folder / "build/small"))


def int8(made: Project, target: str = "openvino", **more: object) -> QuantizedOnnx:
    return cast(QuantizedOnnx, Deployment(run(made), target, "int8", **more).program)  # type: ignore[arg-type]


def test_the_verdict_and_the_report_say_what_the_float_model_is(deployed_onnx: Project) -> None:
    for found in json.loads((deployed_onnx.folder / "verdicts.json").read_text()):
        assert found["outcome"] == "pass"
        names = [rung["name"] for rung in found["ladder"]["rungs"]]
        assert names == ["float ONNX", "ONNX as given", "simplified ONNX", "int8 ONNX", found["target"]]
        decibels = [rung["sqnr_db"] for rung in found["ladder"]["rungs"][1:]]
        assert all(one is None or one > 100 for one in decibels[:2])
        assert decibels[2] == pytest.approx(decibels[3], abs=3)
        assert not found["ladder"]["suspects"]
        assert found["ladder"]["lost_most"] == "int8 ONNX"
        assert len(found["ladder"]["layers"]) == 3
        assert found["latency"]["candidates"][0]["name"] == "float ONNX by ONNX Runtime float32"
        assert "than float ONNX" in found["headline"]
        assert "2 of 2 convolutions int8; 1 of 1 matrix product int8" in found["execution"]["summary"]
        page = (deployed_onnx.folder / f"build/small/reports/{found['target']}-int8/report.html").read_text()
        assert "Speed-up over float ONNX" in page
        assert "eager" not in page
        assert "PyTorch" not in page
    told = (deployed_onnx.folder / "stderr.txt").read_text()
    assert "equalization is left out: it is a step of PyTorch's way" in told
    assert "observer" in told


def test_the_bundle_says_where_it_comes_from_and_runs_alone(deployed_onnx: Project) -> None:
    for target in ("openvino", "onnxruntime"):
        bundle = deployed_onnx.folder / f"dist/small-{target}-1.0.0"
        manifest = json.loads((bundle / "manifest.json").read_text())
        origin = manifest["provenance"]
        assert origin["recipe"]["model"]["source"] == "onnx:model.onnx"
        assert origin["model"]["trained"] is False
        assert origin["model"]["weights_sha256"] == file_hash(deployed_onnx.folder / "model.onnx")
        assert (manifest["calibration"]["images"], manifest["calibration"]["validation"]) == (64, 32)
        card = json.loads((bundle / "bom.cdx.json").read_text())["components"][0]["modelCard"]
        assert card["modelParameters"]["modelArchitecture"] == "onnx:model.onnx"
        assert "approach" not in card["modelParameters"]
        for command in (["selftest"], ["predict", "golden/golden-1.jpg"]):
            done = subprocess.run(
                [sys.executable, "run.pyz", *command], cwd=bundle, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr


def test_the_same_file_gives_the_same_bundle_in_another_process(deployed_onnx: Project) -> None:
    done = deployed_onnx.bitferry_process("reproduce", "dist/small-onnxruntime-1.0.0", "--recipe", "small.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every file came out the same" in done.stdout


def test_a_night_knows_the_file(deployed_onnx: Project, tmp_path: Path) -> None:
    recipe, cell = read(deployed_onnx.recipe), Cell("small", "openvino", "int8")
    found = inputs.inputs(recipe, deployed_onnx.recipe, cell, {})
    assert found.weights == file_hash(deployed_onnx.folder / "model.onnx")
    assert found.recipe["model.source"] == '"onnx:model.onnx"'
    assert {"onnx", "onnxruntime"} <= inputs.used(cell, found)
    name, _ = parcel.pack(recipe, deployed_onnx.recipe, Store(f"file://{tmp_path}/store"))
    unpacked = parcel.unpack(name, "small.toml", f"file://{tmp_path}/store", tmp_path / "node")
    assert (unpacked.parent / "model.onnx").is_file()


def test_pick_asks_the_file(deployed_onnx: Project, tmp_path: Path) -> None:
    for place, image in enumerate(subset("train", 8, skip=1000)["images"]):
        Image.fromarray(image).save(tmp_path / f"{place}.png")
    done = deployed_onnx.bitferry(
        "pick", "small.toml", str(tmp_path), "--count", "4", "--output", str(tmp_path / "out.tsv")
    )
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "out.tsv").read_text().splitlines()) == 4


def test_precision_auto_searches_with_mixes_of_the_files_nodes(deployed_onnx: Project) -> None:
    made = run(deployed_onnx)
    program = int8(deployed_onnx)
    blamed = sensitivity.blames(program, made.calibration.images[:16].copy())
    assert {one.name for one in blamed} == sensitivity.layer_names(program)
    assert blamed[0].noise > 0
    way = Deployment(made, "openvino", "int8", keep=(blamed[0].name,))
    exact = eager(made.model.module())(made.evaluation.images[:64].copy())
    found = [sqnr_db(exact, load_artifact(one.compiled)(made.evaluation.images[:64].copy()))
             for one in (Deployment(made, "openvino", "int8"), way)]  # fmt: skip
    assert found[1] > found[0] + 1


def test_a_layers_error_is_found_where_it_was_made(deployed_onnx: Project, tmp_path: Path) -> None:
    program, sample = int8(deployed_onnx), run(deployed_onnx).evaluation.images[:16].copy()
    before = {one.name: one for one in layers.compare(program, sample)}
    assert all(one.own_sqnr_db is not None and one.own_sqnr_db > 25 for one in before.values())
    first, *others = before.values()
    assert first.sqnr_db == pytest.approx(first.own_sqnr_db)  # before it only the images were rounded
    assert all(one.sqnr_db != one.own_sqnr_db for one in others)  # what comes from before adds to it, or takes away
    broken, name = onnx.load(program.path), list(before)[1]
    node = next(one for one in broken.graph.node if one.name == name)
    stored = next(one for one in broken.graph.node if one.output[0] == node.input[1]).input[0]
    weight = next(one for one in broken.graph.initializer if one.name == stored)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) // 3, stored))
    onnx.save(broken, tmp_path / "broken.onnx")
    after = {one.name: one for one in layers.compare(replaced(program, tmp_path / "broken.onnx"), sample)}
    assert after[name].own_sqnr_db is not None
    assert cast(float, after[name].own_sqnr_db) < 10
    assert all(after[one].own_sqnr_db == before[one].own_sqnr_db for one in before if one != name)


def replaced(program: QuantizedOnnx, path: Path) -> QuantizedOnnx:
    return QuantizedOnnx(path, program.baseline, program.simplified, program.scheme, program.calibration, "broken")


def test_int8_is_nearly_as_near_to_float_as_on_pytorchs_way(
    deployed_onnx: Project, model: Fitted, tmp_path: Path
) -> None:
    (deployed_onnx.folder / "fitted.pt2").unlink(missing_ok=True)
    batch = torch.export.Dim("batch")
    torch.export.save(
        torch.export.export(model, (torch.zeros(2, 3, 16, 16),), dynamic_shapes=({0: batch},)), tmp_path / "model.pt2"
    )
    text = deployed_onnx.recipe.read_text().replace("onnx:model.onnx", f"pt2:{tmp_path}/model.pt2")
    (deployed_onnx.folder / "torch.toml").write_text(text)
    recipe, made = read(deployed_onnx.folder / "torch.toml"), run(deployed_onnx)
    other = Run(recipe, deployed_onnx.folder / "torch.toml", Cache(tmp_path / "build"), trust=True)
    sample = made.evaluation.images[:256].copy()
    exact = scores(model, sample)
    found = [sqnr_db(exact, eager(Deployment(one, "openvino", "int8").program.module())(sample))
             for one in (made, other)]  # fmt: skip
    assert found[0] > found[1] - 6, found
    assert found[0] > 28, found


@pytest.mark.parametrize(
    ("more", "changes"),
    [
        ({}, ()),
        ({"last": True}, ()),
        ({"batch": "n", "last": True}, ()),
        ({"batch": 4}, ()),
        ({"kind": TensorProto.UINT8, "last": True}, (UINT8,)),
        ({"kind": TensorProto.UINT8}, (UINT8,)),
        ({"opset": 11}, ()),
        ({"opset": 22}, ()),
    ],
    ids=["NCHW", "NHWC", "dynamic", "batch 4", "uint8 NHWC", "uint8 NCHW", "opset 11", "opset 22"],
)
def test_every_form_answers_as_pytorch_does(
    model: Fitted, images: Images, tmp_path: Path, more: dict[str, int], changes: tuple[tuple[str, str], ...]
) -> None:
    made = project(tmp_path, written(model, **more), *changes)  # type: ignore[arg-type]
    found, contract = loaded(made), read(made.recipe).preprocessing
    assert found.batch is None
    np.testing.assert_allclose(eager(found.module())(images), scores(model, images), atol=1e-4)
    np.testing.assert_allclose(as_given(found.given, contract)(images), scores(model, images), atol=1e-4)


def test_half_floats_are_made_whole_and_said_so(
    model: Fitted, images: Images, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = loaded(project(tmp_path, written(model, kind=TensorProto.FLOAT16)))
    assert sqnr_db(scores(model, images), eager(found.module())(images)) > 40
    assert "has floats of 16 bits; made 32-bit, it is the float model" in capfd.readouterr().err
    assert {one.data_type for one in onnx.load(found.path).graph.initializer} == {TensorProto.FLOAT, TensorProto.INT64}


def rows(model: ModelProto) -> None:
    """Fix the batch in a way that no edit opens: every image has a row of its own."""
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    model.graph.node[-1].output[0] = "before"
    model.graph.node.append(helper.make_node("Add", ["before", "rows"], ["score"]))
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((batch, 3), np.float32), "rows"))


def test_a_batch_that_stays_fixed_is_answered_in_batches(model: Fitted, images: Images, tmp_path: Path) -> None:
    made = project(
        tmp_path, changed(written(model, batch=2), rows), ("[targets.openvino]", "[targets.openvino]\nbatch = 2")
    )
    found = loaded(made)
    assert found.batch == 2
    np.testing.assert_allclose(eager(found.module())(images[:5]), scores(model, images[:5]), atol=1e-4)
    for precision in cast(tuple[Precision, ...], ("float32", "int8")):
        way = Deployment(run(made), "openvino", precision)
        assert sqnr_db(scores(model, images[:5]), load_artifact(way.compiled)(images[:5])) > 25
    made.edit(("batch = 2", "batch = 3"))
    with pytest.raises(
        InputError, match=r"fixes its batch at 2, and \[targets.openvino\] asks for 3; set batch = 2 there"
    ):
        _ = Deployment(run(made), "openvino", "float32").compiled


def test_two_views_are_two_inputs(model: Fitted, images: Images, tmp_path: Path) -> None:
    one = written(model, batch="n")
    other = changed(one, lambda made: onnx.compose.add_prefix_graph(made.graph, "right_", inplace=True))
    merged = onnx.compose.merge_graphs(one.graph, other.graph, [])
    merged.node.append(helper.make_node("Sub", ["score", "right_score"], ["difference"]))
    del merged.output[:]
    merged.output.append(helper.make_tensor_value_info("difference", TensorProto.FLOAT, ["n", 3]))
    both = helper.make_model(merged, opset_imports=one.opset_import, ir_version=8)
    made = project(tmp_path, both, ("height = 16", "height = 16\nviews = 2"))
    pairs = np.stack([images[:30], images[30:]], 1)
    expected = scores(model, images[:30]) - scores(model, images[30:])
    np.testing.assert_allclose(eager(loaded(made).module())(pairs), expected, atol=1e-4)
    for name in ("calibration", "evaluation"):
        with np.load(tmp_path / f"{name}.npz") as arrays:
            halves = arrays["images"][: len(arrays["labels"]) // 2 * 2].reshape(-1, 2, 28, 28)
            np.savez(tmp_path / f"{name}.npz", images=halves, labels=arrays["labels"][: len(halves)])
    for target in ("openvino", "onnxruntime"):
        way = Deployment(run(made), target, "int8")
        assert sqnr_db(expected, load_artifact(way.compiled)(pairs)) > 15


def test_segmentation_of_a_file(model: Fitted, images: Images, tmp_path: Path) -> None:
    made = project(
        tmp_path, written(model, maps=True), ('precision = "int8"', 'precision = "int8"\ntask = "segmentation"')
    )
    for name in ("calibration", "evaluation"):
        with np.load(tmp_path / f"{name}.npz") as arrays:
            labels = (arrays["images"] > 100).astype(np.uint8)
            np.savez(tmp_path / f"{name}.npz", images=arrays["images"], labels=labels)
    exact = eager(loaded(made).module())(images)
    assert exact.shape == (60, 3, 16, 16)
    found = load_artifact(Deployment(run(made), "openvino", "int8").compiled)(images)
    assert sqnr_db(exact, found) > 20


def test_each_scheme_gets_its_own_graph(deployed_onnx: Project) -> None:
    kinds = {}
    for name in ("openvino", "onnxruntime", "tensorrt"):
        graph = onnx.load(int8(deployed_onnx, name).path).graph
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        pairs = [node for node in graph.node if node.op_type == "QuantizeLinear"]
        kinds[name] = {constants[node.input[2]].dtype.name for node in pairs}
        convolution = next(node for node in graph.node if node.op_type == "Conv")
        made = {node.output[0]: node for node in graph.node}
        weight = made[convolution.input[1]]
        assert constants[weight.input[0]].dtype == np.int8
        assert constants[weight.input[1]].shape == (24,)
        assert not np.any(constants[weight.input[2]])
        assert (convolution.input[2] in made) is (name == "onnxruntime")  # an int32 bias
        last = [node for node in graph.node if graph.output[0].name in node.output]
        assert (last[0].op_type == "DequantizeLinear") is (name == "onnxruntime")
        rounded = [made[value].op_type == "DequantizeLinear" for node in graph.node if node.op_type == "Add"
                   for value in node.input if value in made and not node.name.startswith("contract/")]  # fmt: skip
        assert sum(rounded) == (1 if name == "tensorrt" else 2)
        if name == "tensorrt":
            assert all(not np.any(constants[node.input[2]]) for node in pairs)
    assert kinds == {"openvino": {"uint8"}, "onnxruntime": {"uint8"}, "tensorrt": {"int8"}}


def test_what_is_kept_stays_float(deployed_onnx: Project) -> None:
    names = [one.name for one in layers.compare(int8(deployed_onnx), run(deployed_onnx).calibration.images[:4])]
    kept = int8(deployed_onnx, keep=(names[0],))
    assert sensitivity.layer_names(kept) == set(names[1:])
    graph = onnx.load(int8(deployed_onnx, keep=(names[1],)).path).graph
    made = {node.output[0]: node for node in graph.node}
    (node,) = (
        node for node in graph.node if node.name == names[1]
    )  # its input goes, rounded, into an addition as well
    assert made[node.input[0]].op_type == "Relu"
    assert any(made[taken.input[0]].op_type == "Relu" for taken in graph.node if taken.op_type == "QuantizeLinear")
    with pytest.raises(
        InputError, match=f"names '{names[0]}x', which is no .* of the ONNX file; did you mean '{names[0]}'"
    ):
        int8(deployed_onnx, keep=(f"{names[0]}x",))


def test_enough_images_and_a_named_observer(model: Fitted, tmp_path: Path) -> None:
    made = project(
        tmp_path,
        written(model),
        ("[budget]", '[quantization]\nimages = "enough"\nobserver = "percentile"\nbias_correction = "none"\n[budget]'),
    )
    found = int8(made).calibration
    assert found.validation == 32
    assert 16 <= found.images - found.validation <= 32
    assert next(iter(found.sqnr_db_by_count)) == "16"


def quantized(model: ModelProto) -> None:
    node = model.graph.node[1]
    model.graph.node.insert(1, helper.make_node("QuantizeLinear", ["c1", "std"], ["q"]))
    model.graph.node.insert(2, helper.make_node("DequantizeLinear", ["q", "std"], ["d"]))
    node.input[0] = "d"


def two_outputs(model: ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("r2", TensorProto.FLOAT, [1, 24, 8, 8]))


def two_inputs(model: ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, [1, 3]))


def another_size(model: ModelProto) -> None:
    for place in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[place].dim_value = 224


def tokens(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64


def unknown_domain(model: ModelProto) -> None:
    model.graph.node[1].domain = "com.stranger"
    model.opset_import.append(helper.make_opsetid("com.stranger", 1))


def outside(model: ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")


def older(model: ModelProto) -> None:
    model.opset_import[0].version = 6


def crossed(model: ModelProto) -> None:
    model.graph.node[0].input[0] = "score"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            quantized,
            "is quantized already (1 QuantizeLinear, 1 DequantizeLinear); give the float model that it was made",
        ),
        (
            two_outputs,
            "gives 2 outputs ('score' (float32 1×3), 'r2' (float32 1×24×8×8)); one tensor of scores is judged",
        ),
        (
            two_inputs,
            "takes 2 inputs ('image' (float32 1×3×16×16), 'other' (float32 1×3)), and preprocessing.views is 1",
        ),
        (another_size, "set preprocessing height = 224, width = 224"),
        (tokens, "takes 'image' (int64 1×3×16×16); expected float32 (or uint8) images of N×3×16×16 or N×16×16×3"),
        (unknown_domain, "is a Relu of 'com.stranger', which is no part of ONNX; save it as one plain file"),
        (outside, "is kept in another file; all must be in this one; save it as one plain file, weights inside"),
        (older, "its operator set is 6; 7 to 23 are read"),
        (crossed, "takes 'score', which nothing before it gives: a cycle, or a gap"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_files_that_cannot_be_taken(
    model: Fitted, tmp_path: Path, change: Callable[[ModelProto], None], told: str
) -> None:
    made = project(tmp_path, changed(written(model), change))
    line = made.refused("deploy", "small.toml", "--quick")
    assert told in line
    assert "model.onnx" in line


def test_recipes_that_ask_for_what_a_file_cannot_give(model: Fitted, tmp_path: Path) -> None:
    made = project(tmp_path, written(model))
    assert "compiles a torch.export program, which cannot be made of an ONNX file" in made.refused(
        "deploy", "small.toml", "-t", "executorch"
    )
    assert "take a target that ONNX feeds: onnxruntime, openvino" in made.refused(
        "export", "small.toml", "-t", "coreml"
    )
    assert "compiles TorchScript" in made.refused("compile", "small.toml", "-t", "torchscript")
    assert "which cannot be traced" in made.refused("trace", "small.toml")
    assert "has an ONNX file, which is not trained" in made.refused("train", "small.toml")
    given = made.recipe.read_text()
    for line, told in {
        'method = "qat"': "quantization.method = 'qat': not for an ONNX file, whose graph is not PyTorch's; give the",
        "equalize = true": "quantization.equalize = true: not for an ONNX file",
        'observer = "mse"': "observer = 'mse' (there are minmax, mean-minmax, percentile, histogram and best)",
        'rounding = "layers"\nranges = "learned"': "rounding = 'layers'; quantization.ranges = 'learned': not for",
        'bias_correction = "full"': "quantization.bias_correction = 'full' (there are none and fast)",
    }.items():
        made.recipe.write_text(given.replace("[budget]", f"[quantization]\n{line}\n[budget]"))
        assert told in made.refused("quantize", "small.toml")
    made.recipe.write_text(given.replace("onnx:model.onnx", "onnx:absent.onnx"))
    assert "absent.onnx does not exist" in made.refused("export", "small.toml")
    made.recipe.write_text(given.replace('onnx:model.onnx"', 'onnx:model.onnx"\nweights = "w.pt"'))
    assert "the ONNX file model.onnx is whole; take `weights` and `options` out" in made.refused(
        "compile", "small.toml"
    )


def test_uint8_files_want_a_recipe_without_arithmetic(model: Fitted, tmp_path: Path) -> None:
    made = project(tmp_path, written(model, kind=TensorProto.UINT8))
    assert "so its arithmetic is inside it; say so in the recipe: under [preprocessing] scale = 1.0" in made.refused(
        "export", "small.toml"
    )
