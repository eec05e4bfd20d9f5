"""TorchScript: frozen files that answer exactly as traced, without torchao; and the small model of three targets' tests."""

import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitferry import targets
from bitferry.device.arrays import Images, Outputs
from bitferry.device.errors import InputError, StageFailed
from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline.artifacts import FloatModel, TorchProgram
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.data.split import Split
from bitferry.pipeline.load import Deployable
from bitferry.pipeline.quantize import quantize
from bitferry.pipeline.recipe import Quantization
from bitferry.pipeline.statistics import sqnr_db
from bitferry.pipeline.trace import trace
from bitferry.pipeline.verify import eager
from bitferry.targets import Precision, Scheme
from tests.conftest import subset

torchscript = targets.get("torchscript")
Options: Callable[..., targets.Options] = torchscript.Options
LAYERS = ["stem.0", "deep.0", "deep.3", "head"]
PRECISIONS: tuple[Precision, ...] = ("float32", "int8")


class Small(nn.Module):
    """What runtimes fuse differently: ReLU6, max pooling, a depthwise convolution, a residual addition, a global mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.pool = nn.MaxPool2d(2)
        depthwise = [nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6()]
        self.deep = nn.Sequential(*depthwise, nn.Conv2d(16, 16, 1))
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        x = x + self.deep(x)
        scores: Tensor = self.head(self.mean(x).flatten(1))
        return scores


def float_model(model: nn.Module, images: Images) -> FloatModel:
    """Wrap `model` as a recipe would, its batch norms having seen `images`."""
    height, width = images.shape[1:3]
    contract = Preprocessing(height=height, width=width, mean=(0.3, 0.3, 0.3), std=(0.35, 0.35, 0.35))
    whole = Deployable(model, contract)
    with torch.no_grad():
        for _ in range(20):
            whole.train()(torch.from_numpy(images))
    return FloatModel(whole.eval(), contract, tuple("0123456789"), hashlib.sha256(repr(model).encode()).hexdigest())


def split() -> Split:
    grey = subset("calibration", 48)["images"]
    images = grey[..., None].repeat(3, axis=-1)
    return Split("calibration", images, np.zeros(48, np.int64), ("",) * 48, (b"",) * 48, "calibration")


def program(precision: Precision, target: targets.Target[targets.Options], build: Cache) -> TorchProgram:
    """Give the small model as a target wants it."""
    torch.manual_seed(0)
    model, scheme = float_model(Small(), split().images), targets.scheme(target, precision, target.Options())
    return quantize(model, split(), scheme, Quantization(), build) if scheme else model


def answers(made: TorchProgram, count: int = 9) -> tuple[Images, Outputs]:
    images = split().images[-count:].copy()
    return images, eager(made.module())(images)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[Precision, tuple[TorchProgram, Path, Path]]:
    """The program, its traced file and the compiled one, of each precision."""
    folder = tmp_path_factory.mktemp("torchscript")
    build, made = Cache(folder / "build"), {}
    for precision in PRECISIONS:
        small = program(precision, torchscript, build)
        traced = trace(small, split(), build).path
        out = folder / f"{precision}.ts"
        torchscript.compile(traced, out, precision=precision, options=Options())
        made[precision] = (small, traced, out)
    return made


Built = dict[Precision, tuple[TorchProgram, Path, Path]]


@pytest.mark.parametrize("batch", [1, 4, "dynamic"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_answers_as_pytorch_does(built: Built, precision: Precision, batch: targets.Batch) -> None:
    small, _, path = built[precision]
    images, expected = answers(small)
    found = torchscript.load(path, precision=precision, options=Options(threads=1, batch=batch))(images)
    assert found.dtype == np.float32
    assert sqnr_db(expected, found) > (100 if precision == "float32" else 30)


def test_plain_roundings_give_the_very_numbers_of_the_traced_ones(built: Built) -> None:
    _, traced, path = built["int8"]
    images = torch.from_numpy(split().images[:4].copy())
    with torch.inference_mode():
        before = torch.jit.freeze(torch.jit.load(traced).eval())  # type: ignore[no-untyped-call]
        after = torch.jit.load(path)  # type: ignore[no-untyped-call]
        roundings = [graph.count("aten::round_") for graph in (str(before.graph), str(after.graph))]
        assert roundings[0] == 0
        assert roundings[1] > len(LAYERS)
        torch.testing.assert_close(after(images), before(images), atol=1e-4, rtol=0)


def test_a_device_needs_no_torchao(built: Built) -> None:
    code = f"import sys, torch; torch.jit.load({str(built['int8'][2])!r}); sys.exit('torchao' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_says_that_pytorch_computes_in_float(built: Built, precision: Precision) -> None:
    found = torchscript.executed(built[precision][2], precision=precision, options=Options())
    kinds = ["convolution"] * 3 + ["matrix product"]
    assert [(layer.name, layer.kind, layer.precision) for layer in found] == [
        (name, kind, "float32") for name, kind in zip(LAYERS, kinds, strict=True)
    ]


def test_the_same_model_gives_the_same_file(built: Built, tmp_path: Path) -> None:
    _, traced, path = built["int8"]
    torchscript.compile(traced, tmp_path / path.name, precision="int8", options=Options())
    digests = {hashlib.sha256(file.read_bytes()).hexdigest() for file in (path, tmp_path / path.name)}
    assert len(digests) == 1


def test_two_models_keep_their_own_thread_counts(built: Built) -> None:
    path, images = built["float32"][2], split().images[:1].copy()
    models = [torchscript.load(path, precision="float32", options=Options(threads=count)) for count in (1, 2)]
    for count in (1, 2, 1):
        models[count - 1](images)
        assert torch.get_num_threads() == count


def test_a_trace_of_batch_1_is_refused_for_more(built: Built, tmp_path: Path) -> None:
    _, traced, _ = built["float32"]
    (tmp_path / "model.ts").write_bytes(traced.read_bytes())
    (tmp_path / "batch-1").touch()
    torchscript.compile(tmp_path / "model.ts", tmp_path / "out.ts", precision="float32", options=Options())
    with pytest.raises(InputError, match="tracing fixed the batch of this model at 1, but .* has batch = 'dynamic'"):
        torchscript.compile(
            tmp_path / "model.ts", tmp_path / "out.ts", precision="float32", options=Options(batch="dynamic")
        )


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "model.ts").write_bytes(b"PK\x03\x04 not a model")
    with pytest.raises(StageFailed, match=r"PyTorch .* cannot load .*model\.ts"):
        torchscript.load(tmp_path / "model.ts", precision="float32", options=Options())


class Table(nn.Module):
    """A layer of constants, as a table of positions has it, which freezing computes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.of_table, self.head = nn.Conv2d(3, 8, 3), nn.Linear(4, 8), nn.Linear(8, 10)
        self.register_buffer("table", torch.ones(1, 4))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(torch.relu(self.first(x)).mean((2, 3)) + torch.relu(self.of_table(self.table)))
        return scores


def test_a_layer_of_constants_is_computed_ahead_and_not_listed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    build = Cache(tmp_path / "build")
    made = quantize(float_model(Table(), split().images), split(), Scheme(), Quantization(), build)
    torchscript.compile(trace(made, split(), build).path, tmp_path / "a.ts", precision="int8", options=Options())
    found = torchscript.executed(tmp_path / "a.ts", precision="int8", options=Options())
    assert [layer.name for layer in found] == ["first", "head"]
