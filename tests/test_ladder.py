"""The ladder names the step that lost accuracy: real faults built into each step of a real way, and layers by name."""

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from bitferry import targets
from bitferry.device.arrays import Predict
from bitferry.device.errors import StageFailed
from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline import dataset
from bitferry.pipeline.artifacts import FloatModel
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.compile import compile
from bitferry.pipeline.data.split import Split
from bitferry.pipeline.export import answer, export, simplify
from bitferry.pipeline.load import Deployable
from bitferry.pipeline.measure import ladder, layers
from bitferry.pipeline.measure.ladder import Step
from bitferry.pipeline.quantize import quantize
from bitferry.pipeline.recipe import Quantization
from bitferry.pipeline.trace import torchscript, trace
from bitferry.pipeline.verdict import Ladder
from bitferry.pipeline.verify import eager, load_artifact
from bitferry.targets import Scheme

CONTRACT = Preprocessing(height=32, width=32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CLASSES = ("warm", "cold", "green")
TARGET = "openvino"
PLAIN = Quantization(observer="histogram", equalize=False, bias_correction="none")
STEPS = ("PyTorch int8", "TorchScript", "ONNX", "simplified ONNX", TARGET)


class Net(nn.Module):
    """Two square convolutions, so that a weight can be transposed, and ReLUs that can be dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, 2, 1)
        self.second = nn.Conv2d(16, 16, 3, 1, 1)
        self.relu = nn.ReLU()
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.second(self.relu(self.first(x))))
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


def wrong_mean(model: Deployable) -> None:
    model.offset += 0.5


def bgr(model: Deployable) -> None:
    first = model.model.get_submodule("first")
    assert isinstance(first, nn.Conv2d)
    first.weight.data = first.weight.data.flip(1)
    model.multiplier = model.multiplier.flip(1)
    model.offset = model.offset.flip(1)


def transposed_weight(model: Deployable) -> None:
    second = model.model.get_submodule("second")
    assert isinstance(second, nn.Conv2d)
    second.weight.data = second.weight.data.transpose(0, 1).contiguous()


def dropped_relu(model: Deployable) -> None:
    model.model.relu = nn.Identity()


FAULTS: Mapping[str, Callable[[Deployable], None]] = {
    "a wrong mean": wrong_mean,
    "BGR for RGB": bgr,
    "a transposed weight": transposed_weight,
    "a dropped ReLU": dropped_relu,
}


def float_model(fault: Callable[[Deployable], None] | None = None) -> FloatModel:
    torch.manual_seed(1)
    net = Deployable(Net(), CONTRACT).eval()
    if fault is not None:
        fault(net)
    return FloatModel(net, CONTRACT, CLASSES, key=f"net-{getattr(fault, '__name__', 'right')}")


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache(tmp_path_factory.mktemp("build") / "ladder")


@pytest.fixture(scope="module")
def images(build: Cache, tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Coloured pictures: smooth random fields, a class being the strongest channel."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (160, 8, 8, 3), dtype=np.uint8)
    pixels = coarse.repeat(4, axis=1).repeat(4, axis=2)
    path = tmp_path_factory.mktemp("data") / "images.npz"
    np.savez(path, images=pixels, labels=pixels.mean((1, 2)).argmax(axis=1))
    return dataset.split("evaluation", path, CLASSES, CONTRACT, build)


def steps(model: FloatModel, images: Split, build: Cache) -> dict[str, Step]:
    """Build every step of the way for one model, with the pipeline's own stages."""
    target = targets.get(TARGET)
    scheme = targets.scheme(target, "int8", target.Options()) or Scheme()
    program = quantize(model, images, scheme, Quantization(), build)
    traced = trace(program, images, build)
    exported = export(program, images, build)
    simplified = simplify(exported, images, build)
    compiled = compile(simplified, TARGET, program, images, build, options=targets.get(TARGET).Options(threads=1))
    loads: dict[str, Callable[[], Predict]] = dict(
        zip(
            STEPS,
            (
                lambda: eager(program.module()),
                lambda: eager(torchscript(traced)),
                lambda: partial(answer, exported.path),
                lambda: partial(answer, simplified.path),
                lambda: load_artifact(compiled),
            ),
            strict=True,
        )
    )
    return {name: Step(name, load) for name, load in loads.items()}


@pytest.fixture(scope="module")
def ways(images: Split, build: Cache) -> dict[str, dict[str, Step]]:
    """Every step without a fault, and with each."""
    return {"": steps(float_model(), images, build)} | {
        name: steps(float_model(fault), images, build) for name, fault in FAULTS.items()
    }


def climb(images: Split, way: Mapping[str, Step]) -> Ladder:
    baseline = eager(float_model().module())(images.images[:].copy())
    return ladder.climb(ladder.sample(images, baseline), way, lossy=STEPS[0])


def test_a_healthy_way_loses_in_quantization_and_nowhere_else(images: Split, ways: dict[str, dict[str, Step]]) -> None:
    found = climb(images, ways[""])
    assert [rung.name for rung in found.rungs] == ["float PyTorch", *STEPS]
    assert found.lost_most == STEPS[0]
    assert found.suspects == ()
    assert all(rung.sqnr_db is not None and rung.sqnr_db > 20 for rung in found.rungs[1:])


@pytest.mark.parametrize("step", range(len(STEPS)), ids=lambda i: STEPS[i].replace(" ", "-"))
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_by_its_step(fault: str, step: int, images: Split, ways: dict[str, dict[str, Step]]) -> None:
    """The steps before are right; from the faulty one on, each is made from it."""
    way = {name: ways["" if i < step else fault][name] for i, name in enumerate(STEPS)}
    found = climb(images, way)
    assert found.lost_most == STEPS[step]
    assert found.suspects == ((STEPS[step],) if step else ())


def test_a_step_that_cannot_run_is_kept_with_its_reason(images: Split, ways: dict[str, dict[str, Step]]) -> None:
    def untraceable() -> Predict:
        raise StageFailed("torch.jit.trace cannot trace the model: a loop")

    found = climb(images, {**ways[""], "TorchScript": Step("", untraceable)})
    (missing,) = [rung for rung in found.rungs if rung.missing]
    assert missing.name == "TorchScript"
    assert missing.missing == "torch.jit.trace cannot trace the model: a loop"
    assert found.lost_most == STEPS[0]


def test_a_float_way_may_lose_nothing(images: Split) -> None:
    right, wrong = (eager(float_model(fault).module()) for fault in (None, dropped_relu))
    baseline = right(images.images[:].copy())
    found = ladder.climb(
        ladder.sample(images, baseline), {"ONNX": Step("", lambda: right), "x": Step("", lambda: wrong)}, lossy=None
    )
    assert found.suspects == ("x",)
    assert found.rungs[1].sqnr_db is None


def test_the_layers_that_lose_most_are_named(images: Split, build: Cache) -> None:
    model = float_model()
    program = quantize(model, images, Scheme(), Quantization(), build)
    found = layers.compare(program, images.images[:24])
    assert [layer.name for layer in found] == ["first", "second", "head"]
    assert all(layer.own_sqnr_db is not None and layer.own_sqnr_db > 25 for layer in found)
    coarse = quantize(model, images, Scheme(weight_bits=2), Quantization(), build)
    rough = layers.compare(coarse, images.images[:24])
    assert all((b.own_sqnr_db or 0) < (a.own_sqnr_db or 0) - 10 for a, b in zip(found, rough, strict=True))


def test_a_layer_s_own_error_is_that_of_a_plain_computation(images: Split, build: Cache) -> None:
    """The second layer alone: its float input rounded with the program's own scales, its weights likewise."""
    model = float_model()
    program = quantize(model, images, Scheme(), PLAIN, build)
    graph = program.module()
    pixels = torch.from_numpy(images.images[:24].copy())
    net = model.eager
    assert isinstance(net, Deployable)
    with torch.no_grad():
        x = pixels.permute(0, 3, 1, 2).float() * net.multiplier + net.offset
        hidden = torch.relu(net.model.first(x))  # type: ignore[operator]
        scales = [
            node.args[1:3]
            for node in graph.graph.nodes  # type: ignore[union-attr]
            if "quantize_per_tensor" in str(node.target) and "dequantize" not in str(node.target)
        ]
        scale, zero = (float(value) if not hasattr(value, "name") else None for value in scales[1])
        assert scale is not None
        assert zero is not None
        rounded = ((hidden / scale + zero).round().clamp(0, 255) - zero) * scale
        second = net.model.second
        assert isinstance(second, nn.Conv2d)
        step = second.weight.abs().amax((1, 2, 3), keepdim=True) / 127
        weight = (second.weight / step).round().clamp(-127, 127) * step
        expected = second(hidden)
        noisy = torch.nn.functional.conv2d(rounded, weight, second.bias, 1, 1)
        plain = 10 * float(torch.log10(expected.square().sum() / (expected - noisy).square().sum()))
    found = layers.compare(program, images.images[:24])[1]
    assert found.own_sqnr_db == pytest.approx(plain, abs=0.3)


def test_batch_norm_branches_and_in_place_operations_are_followed(build: Cache, images: Split) -> None:
    torch.manual_seed(0)
    net = Deployable(torchvision.models.resnet18(num_classes=3), CONTRACT).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.add_(0.1)
            module.weight.data *= 1.3
    model = FloatModel(net, CONTRACT, CLASSES, key="resnet18-bn")
    found = layers.compare(quantize(model, images, Scheme(), Quantization(), build), images.images[:16])
    assert len(found) == 21
    assert found[0].name == "conv1"
    assert found[-1].name == "fc"
    assert all(layer.own_sqnr_db is not None and layer.own_sqnr_db > 20 for layer in found)
    assert all((layer.sqnr_db or 0) <= (layer.own_sqnr_db or 0) + 1 for layer in found)


def test_the_sample_is_spread_over_sorted_data() -> None:
    labels = np.repeat(np.arange(10), 100)
    pixels = np.zeros((1000, 224, 224, 3), np.uint8)
    split = Split("evaluation", pixels, labels, (), (), "key")
    taken = ladder.sample(split, np.zeros((1000, 10), np.float32))
    assert len(taken.images) == 64
    assert set(taken.labels.tolist()) == set(range(10))
