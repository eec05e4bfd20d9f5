"""Core ML: packages converted here and read back, since only a Mac can run them; the prediction by a stand-in."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitferry import targets
from bitferry.device.arrays import Images
from bitferry.device.errors import InputError, StageFailed, TargetUnavailable
from bitferry.pipeline.artifacts import TorchProgram
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.capture import capture
from bitferry.targets import Layer
from tests.test_torchscript import LAYERS, float_model, program, split

coreml = targets.get("coreml")
Options: Callable[..., targets.Options] = coreml.Options
BGR = 30
"""Core ML's number for images with blue first."""
KINDS = ["convolution"] * 3 + ["matrix product"]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache(tmp_path_factory.mktemp("coreml") / "build")


@pytest.fixture(scope="module")
def int8(build: Cache) -> Path:
    return exported(program("int8", coreml, build), build)


@pytest.fixture(scope="module")
def converted(int8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = tmp_path_factory.mktemp("converted") / "model.mlpackage"
    coreml.compile(int8, package, precision="int8", options=Options())
    return package


def exported(made: TorchProgram, build: Cache) -> Path:
    return capture(made, split(), build).path


def layers(package: Path) -> list[Layer]:
    found: list[Layer] = coreml._layers(coreml._spec(package))  # type: ignore[attr-defined]
    return found


def files(package: Path) -> dict[str, bytes]:
    return {path.relative_to(package).as_posix(): path.read_bytes() for path in package.rglob("*") if path.is_file()}


def test_int8_weights_and_activations_reach_every_layer(converted: Path) -> None:
    assert layers(converted) == [Layer(name, kind, "int8") for name, kind in zip(LAYERS, KINDS, strict=True)]  # type: ignore[arg-type]
    spec = coreml._spec(converted)  # type: ignore[attr-defined]
    (image,), (scores,) = spec.description.input, spec.description.output
    assert image.type.WhichOneof("Type") == "imageType"
    assert (image.type.imageType.height, image.type.imageType.width) == split().images.shape[1:3]
    assert (image.name, scores.name) == ("image", "scores")
    operations = coreml._operations(spec).values()  # type: ignore[attr-defined]
    assert sum(operation.type == "quantize" for operation in operations) > len(LAYERS)
    weights = [o.attributes["quantized_data"] for o in operations if o.type == "constexpr_affine_dequantize"]
    assert len(weights) == len(LAYERS)
    assert {weight.type.tensorType.dataType for weight in weights} == {21}  # int8, of Core ML's numbers for types


def test_the_same_model_gives_the_same_files(converted: Path, int8: Path, tmp_path: Path) -> None:
    coreml.compile(int8, tmp_path / "again.mlpackage", precision="int8", options=Options())
    first, second = files(converted), files(tmp_path / "again.mlpackage")
    assert first == second
    assert set(first) == {
        "Manifest.json",
        "Data/com.apple.CoreML/model.mlmodel",
        "Data/com.apple.CoreML/weights/weight.bin",
    }
    assert (
        json.loads(first["Manifest.json"])["rootModelIdentifier"]
        in json.loads(first["Manifest.json"])["itemInfoEntries"]
    )


@pytest.mark.parametrize(
    ("precision", "batch", "shape"),
    [("float16", 1, None), ("float32", 4, (4, 28, 28, 3)), ("int8", "dynamic", (1, 28, 28, 3))],
)
def test_float_precisions_batches_and_arrays(
    precision: targets.Precision, batch: targets.Batch, shape: tuple[int, ...] | None, build: Cache, tmp_path: Path
) -> None:
    package = tmp_path / "model.mlpackage"
    source = exported(program(precision, coreml, build), build)
    coreml.compile(source, package, precision=precision, options=Options(batch=batch, max_batch=8, color="BGR"))
    assert [(layer.name, layer.precision) for layer in layers(package)] == [(name, precision) for name in LAYERS]
    taken = coreml._spec(package).description.input[0].type  # type: ignore[attr-defined]
    assert taken.HasField("imageType") == (shape is None)
    assert taken.imageType.colorSpace == (BGR if shape is None else 0)
    assert tuple(taken.multiArrayType.shape) == (shape or ())
    if batch == "dynamic":
        batches = taken.multiArrayType.shapeRange.sizeRanges[0]
        assert (batches.lowerBound, batches.upperBound) == (1, 8)


def test_a_program_that_lost_its_int8_is_refused(converted: Path, int8: Path, tmp_path: Path) -> None:
    package = Path(shutil.copytree(converted, tmp_path / "model.mlpackage"))
    spec = coreml._spec(package)  # type: ignore[attr-defined]
    for operation in coreml._operations(spec).values():  # type: ignore[attr-defined]
        if operation.type == "dequantize":
            operation.type = "cast"
    (package / coreml.MODEL).write_bytes(spec.SerializeToString())  # type: ignore[attr-defined]
    graph = torch.export.load(int8).graph
    weighted = [node for node in graph.nodes if coreml._operator(node) in coreml.WEIGHTED]  # type: ignore[attr-defined]
    with pytest.raises(
        StageFailed, match="another program than it was given: 0 int8 and 4 float16 layers where PyTorch has 4 and 0"
    ):
        coreml._check(package, "int8", weighted)  # type: ignore[attr-defined]


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = torch.special.bessel_j0(x)
        return found


def test_an_operator_without_a_conversion_is_named_with_its_layer(build: Cache, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Odd(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    source = exported(float_model(model, split().images), build)
    with pytest.raises(
        StageFailed, match="cannot take this model: aten.special_bessel_j0 in layer '1' .*replace the operator"
    ):
        coreml.compile(source, tmp_path / "model.mlpackage", precision="float32", options=Options())


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac runs it")
def test_elsewhere_it_is_built_and_not_measured(tmp_path: Path) -> None:
    assert coreml.environment(options=Options()).unmeasured == "Core ML runs on macOS only"
    for ask in (coreml.load, coreml.executed):
        with pytest.raises(TargetUnavailable, match="Core ML runs on macOS only; this is .*: copy the bundle to a Mac"):
            ask(tmp_path / "model.mlpackage", precision="int8", options=Options())


@pytest.mark.parametrize("color", ["RGB", "BGR"])
def test_on_a_mac_each_image_is_handed_over_as_a_picture(
    color: str, converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import coremltools  # noqa: PLC0415 - seconds to import

    options, seen = Options(color=color), list[Images]()

    def model(path: str, compute_units: object) -> SimpleNamespace:
        def predict(given: dict[str, object]) -> dict[str, object]:
            seen.append(np.asarray(given["image"]))
            return {"scores": np.full((1, 10), len(seen), np.float64)}

        return SimpleNamespace(get_spec=lambda: coreml._spec(Path(path)), predict=predict)  # type: ignore[attr-defined]

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(coremltools.models, "MLModel", model)
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3), np.uint8)
    scores = coreml.load(converted, precision="int8", options=options)(images)
    assert scores.dtype == np.float32
    assert scores[:, 0].tolist() == [1, 2, 3]
    np.testing.assert_array_equal(np.stack(seen), images if color == "RGB" else images[..., ::-1])


def test_options_that_cannot_be_are_told() -> None:
    with pytest.raises(ValueError, match="image_input takes one image, so batch must be 1, not 4"):
        Options(image_input=True, batch=4)
    with pytest.raises(ValueError, match="max_batch must be 2 to"):
        Options(max_batch=1)
    with pytest.raises(InputError, match="image_input takes images of H×W×3, and this model's are 2×28×28×3"):
        coreml._as_image(Options(image_input=True), (2, 28, 28, 3))  # type: ignore[attr-defined]
