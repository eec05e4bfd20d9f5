"""ExecuTorch: what XNNPACK really took, read out of the `.pte`; batches, threads, and what it cannot take."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bitferry import targets
from bitferry.device.arrays import Images
from bitferry.device.errors import StageFailed
from bitferry.device.respell import respelled
from bitferry.pipeline.artifacts import TorchProgram
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.capture import capture, read_program
from bitferry.pipeline.quantize import quantize
from bitferry.pipeline.recipe import Quantization
from bitferry.pipeline.statistics import sqnr_db
from bitferry.targets import Scheme
from tests.test_coreml import Odd
from tests.test_torchscript import LAYERS, Small, answers, float_model, program, split

executorch = targets.get("executorch")
Options: Callable[..., targets.Options] = executorch.Options


class Dense(nn.Module):
    """What one layer gives goes into two concatenations, as in a dense block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8, 16))
        self.head = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = self.first(x)
        two = torch.cat([one, torch.relu(self.second(one))], 1)
        scores: torch.Tensor = self.head(torch.cat([one, self.third(two), one], 1).mean((2, 3)))
        return scores


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache(tmp_path_factory.mktemp("executorch") / "build")


def compiled(made: TorchProgram, build: Cache, options: targets.Options) -> Path:
    out = build.root / f"{made.key}-{options.batch}.pte"
    source = capture(made, split(), build).path
    executorch.compile(source, out, precision=made.precision, options=options)
    return out


@pytest.fixture(scope="module")
def int8(build: Cache) -> TorchProgram:
    return program("int8", executorch, build)


@pytest.fixture(scope="module")
def dynamic(int8: TorchProgram, build: Cache) -> Path:
    return compiled(int8, build, Options(batch="dynamic", max_batch=4))


def test_every_layer_runs_on_int8_at_any_batch(int8: TorchProgram, dynamic: Path) -> None:
    options = Options(threads=1, batch="dynamic", max_batch=4)
    predict = executorch.load(dynamic, precision="int8", options=options)
    images, expected = answers(int8)
    found = predict(images)
    assert found.dtype == np.float32
    assert sqnr_db(expected, found) > 30
    np.testing.assert_array_equal(np.concatenate([predict(image[None]) for image in images]), found)
    layers = executorch.executed(dynamic, precision="int8", options=options)
    assert [layer.name for layer in layers] == LAYERS
    assert [layer.kind for layer in layers] == ["convolution"] * 3 + ["matrix product"]
    assert {layer.precision for layer in layers} == {"int8"}


def test_a_layer_whose_output_stays_float_runs_in_float_and_is_told_so(build: Cache) -> None:
    torch.manual_seed(0)
    model = float_model(Small(), split().images)
    made = quantize(model, split(), Scheme(activation="int8"), Quantization(), build)
    options = Options(threads=1, batch=3)
    path = compiled(made, build, options)
    images, expected = answers(made, 4)
    assert sqnr_db(expected, executorch.load(path, precision="int8", options=options)(images)) > 30
    found = {layer.name: layer.precision for layer in executorch.executed(path, precision="int8", options=options)}
    assert found == dict.fromkeys(LAYERS, "int8") | {"head": "float32"}


def test_concatenations_run_on_int8(build: Cache) -> None:
    torch.manual_seed(0)
    scheme = executorch.SCHEMES["int8"]
    assert scheme
    made = quantize(float_model(Dense(), split().images), split(), scheme, Quantization(), build)
    path = compiled(made, build, Options(threads=1))
    images, expected = answers(made, 4)
    assert sqnr_db(expected, executorch.load(path, precision="int8", options=Options(threads=1))(images)) > 30
    found = executorch.executed(path, precision="int8", options=Options())
    assert [(layer.name, layer.precision) for layer in found] == [
        (n, "int8") for n in ("first", "second", "third", "head")
    ]


def shuffled(y: torch.Tensor, *, permute: bool = False) -> torch.Tensor:
    """Mix the channels of two groups, as ShuffleNet does."""
    n, c, h, w = y.shape
    if permute:
        return y.reshape(n, 2, c // 2, h, w).permute(0, 2, 1, 3, 4).reshape(n, c, h, w)
    return y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


BETWEEN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "shuffled": shuffled,
    "permuted": lambda y: shuffled(y, permute=True),
    "cut": lambda y: y.clamp(-0.5, 1),
    "pooled_too": lambda y: torch.cat([nn.functional.max_pool2d(y, 3, 1, 1), y], 1)[:, :8],
    "taken_twice": lambda y: nn.functional.max_pool2d(y, 3, 1, 1) + y,
    "flat": lambda y: y.clone().flatten(1).view(y.shape),
}


class Moved(nn.Module):
    """Two layers with a move between them, for each kind of move."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleDict({name: nn.Conv2d(3, 8, 3, padding=1) for name in BETWEEN})
        self.second = nn.ModuleDict({name: nn.Conv2d(8, 8, 3, padding=1) for name in BETWEEN})
        self.head = nn.Linear(8 * len(BETWEEN), 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ends = [self.second[name](BETWEEN[name](self.first[name](x))).mean((2, 3)) for name in BETWEEN]
        scores: torch.Tensor = self.head(torch.cat(ends, 1))
        return scores


def test_what_is_moved_or_cut_off_between_layers_leaves_both_on_int8(build: Cache) -> None:
    torch.manual_seed(0)
    scheme = executorch.SCHEMES["int8"]
    assert scheme
    settings = Quantization(observer="minmax", equalize=False, bias_correction="none")
    made = quantize(float_model(Moved(), split().images), split(), scheme, settings, build)
    path = compiled(made, build, Options(threads=1))
    images, expected = answers(made, 4)
    assert sqnr_db(expected, executorch.load(path, precision="int8", options=Options(threads=1))(images)) > 30
    found = executorch.executed(path, precision="int8", options=Options())
    assert {layer.name: layer.precision for layer in found if layer.precision != "int8"} == {}
    assert len(found) == 2 * len(BETWEEN) + 1


def test_respelling_changes_no_answer(int8: TorchProgram, build: Cache) -> None:
    images = torch.from_numpy(split().images[:4].copy())
    for made in (int8, program("float32", executorch, build)):
        module = read_program(capture(made, split(), build).path)
        with torch.no_grad():
            before = module(images)
            rewritten = respelled(module)
            after = rewritten(images)
        torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
        permutes = [str(node.target) for node in rewritten.graph.nodes]
        assert permutes.index("aten.permute.default") > permutes.index("aten.add.Tensor")


def test_models_with_other_thread_counts_take_turns(dynamic: Path) -> None:
    images: Images = split().images[:2].copy()
    shared = [Options(threads=count, batch="dynamic", max_batch=4) for count in (1, 2)]
    one, two = (executorch.load(dynamic, precision="int8", options=options) for options in shared)
    expected = one(images)
    runtime = executorch._runtime()  # type: ignore[attr-defined]
    for predict, count in ((two, 2), (one, 1), (two, 2)):
        np.testing.assert_array_equal(predict(images), expected)
        assert runtime._threadpool_get_thread_count() == count


def test_an_operator_it_lacks_is_named_with_its_layer(build: Cache) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Odd(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(
        StageFailed, match="cannot take this model: aten.special_bessel_j0 in layer '1' .*replace the operator"
    ):
        compiled(float_model(model, split().images), build, Options())


def test_a_damaged_file_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.pte").write_bytes(b"\0" * 64)
    with pytest.raises(StageFailed, match=r"ExecuTorch [\d.]+ cannot load the model: .*"):
        executorch.load(tmp_path / "model.pte", precision="float32", options=Options(threads=1))
    assert capfd.readouterr().err == ""


def test_a_batch_that_cannot_be_is_told() -> None:
    with pytest.raises(ValueError, match="max_batch must be 2 to 4096, not 1"):
        Options(max_batch=1)


class Shared(nn.Module):
    """One layer used twice, on inputs of other ranges, as the branch of a model of two images is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = (nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8))
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.twice(torch.relu(self.twice(9 * torch.relu(self.first(x))))))
        scores: torch.Tensor = self.head(x.mean((2, 3)))
        return scores


def test_a_layer_that_is_used_twice_answers_right(build: Cache) -> None:
    torch.manual_seed(0)
    scheme = executorch.SCHEMES["int8"]
    assert scheme
    made = quantize(float_model(Shared(), split().images), split(), scheme, Quantization(), build)
    images, expected = answers(made, 4)
    predict = executorch.load(compiled(made, build, Options(threads=1)), precision="int8", options=Options(threads=1))
    assert sqnr_db(expected, predict(images)) > 30


def test_images_that_may_not_be_written_are_taken_without_a_warning(dynamic: Path) -> None:
    images = split().images[:2].copy()
    images.flags.writeable = False
    predict = executorch.load(dynamic, precision="int8", options=Options(batch="dynamic", max_batch=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict(images)
