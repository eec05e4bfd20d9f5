"""Batch norms, computed weights and named paddings are worked out in the graph, and its answers stay."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, weight_norm
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from bitferry.pipeline.cache import Cache
from bitferry.pipeline.capture import export_program
from bitferry.pipeline.quantization.annotate import WEIGHTED, SchemeQuantizer
from bitferry.pipeline.quantization.folding import fold_constants, fold_weights
from bitferry.pipeline.quantization.graph import layers, set_mode
from bitferry.pipeline.quantize import quantize
from bitferry.pipeline.recipe import Quantization
from bitferry.pipeline.statistics import sqnr_db
from bitferry.pipeline.verify import eager
from bitferry.targets import Scheme
from tests.test_torchscript import float_model, split

IMAGES = torch.rand(6, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
Make = Callable[[], nn.Module]
aten = torch.ops.aten


class Used(nn.Module):
    """A layer called twice, or whose output is taken twice, with batch norms that differ."""

    def __init__(self, layer: Make, *, branch: bool) -> None:
        super().__init__()
        self.branch = branch
        self.stem, self.layer = nn.Conv2d(3, 16, 3, padding=1), layer()
        self.left, self.right = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.down = nn.Conv2d(16, 8, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = self.layer(x)
        y = self.left(y) + (y if self.branch else self.right(self.layer(x.flip(3))))
        scores: Tensor = self.down(y.relu()).mean((2, 3))
        return scores


class Volume(nn.Module):
    """Convolutions of one and three dimensions whose padding goes by a name, the kernels even, with batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Conv1d(36, 8, 4, padding="same", dilation=3, bias=False)
        self.row_norm = nn.BatchNorm1d(8)
        self.cube, self.cube_norm = nn.Conv3d(1, 8, (2, 3, 4), padding="same"), nn.BatchNorm3d(8)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.row_norm(self.row(x.flatten(1, 2))).relu()
        cubes = self.cube_norm(self.cube(x[:, None])).relu()
        scores: Tensor = rows.mean(2) + cubes.mean((2, 3, 4))
        return scores


class Standardized(nn.Conv2d):
    """A convolution whose weights have mean 0 and variance 1, by a batch norm that is in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = functional.batch_norm(rows, None, None, training=True, momentum=0.0, eps=1e-5)
        return functional.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


class Scaled(nn.Conv2d):
    """A convolution whose weight and bias are worked out from several tensors."""

    def __init__(self, *given: int, **more: int) -> None:
        super().__init__(*given, **more)  # type: ignore[arg-type]
        self.gain = nn.Parameter(torch.linspace(0.5, 2, self.out_channels))
        self.low, self.high = nn.Parameter(torch.randn(self.out_channels, 2)), nn.Parameter(torch.randn(2, 27) / 9)

    def forward(self, x: Tensor) -> Tensor:
        change = (self.low @ self.high).view_as(self.weight)
        weight = (self.weight + change) * self.gain.view(-1, 1, 1, 1)
        return functional.conv2d(x, weight, cast(Tensor, self.bias) * self.gain, self.stride, self.padding)


class Products(nn.Module):
    """Matrix products by a parameter, and a blur by a constant made in the model's code."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(48, 16, bias=False), nn.BatchNorm1d(16)
        self.matrix, self.shift = nn.Parameter(torch.randn(16, 12) / 4), nn.Parameter(torch.randn(12))
        self.last, self.tokens = nn.Parameter(torch.randn(12, 8) / 3), nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.conv2d(x, torch.ones(3, 1, 3, 3) / 9, stride=3, groups=3)
        x = (x.movedim(1, -1) @ self.tokens).movedim(-1, 1)
        x = self.norm(self.first(x.flatten(1))).relu()
        return torch.addmm(self.shift, x, self.matrix).relu().matmul(self.last)


class ManyTokens(nn.Module):
    """A batch norm over the tokens of N×T×C, not over what a linear layer gives: it cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(12, 12), nn.BatchNorm1d(36)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(self.layer(x.flatten(1, 2))).mean(1)
        return found


def sequence(*parts: Make) -> nn.Module:
    return nn.Sequential(*(part() for part in parts), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def plain(groups: int = 1, **more: object) -> Make:
    return partial(nn.Conv2d, 16, 16, 3, groups=groups, bias=False, **more)  # type: ignore[arg-type]


def transposed(groups: int = 1, out: int = 16) -> Make:
    return partial(nn.ConvTranspose2d, 16, out, 3, 2, 1, 1, groups=groups, bias=groups == 4)


STEM = partial(nn.Conv2d, 3, 16, 3, 2, 1)
NETS: dict[str, tuple[Make, int]] = {
    "same padding, used twice": (partial(Used, plain(padding="same"), branch=False), 4),
    "same padding, taken twice": (partial(Used, plain(padding="same"), branch=True), 4),
    "grouped, used twice": (partial(Used, plain(4, padding=1), branch=False), 4),
    "transposed, used twice": (partial(Used, transposed(), branch=False), 2),
    "transposed, taken twice": (partial(Used, transposed(4), branch=True), 2),
    "transposed, grouped, more channels": (
        lambda: sequence(STEM, transposed(4, 24), lambda: nn.BatchNorm2d(24), nn.ReLU),
        1,
    ),
    "transposed, depthwise": (lambda: sequence(STEM, transposed(16), lambda: nn.BatchNorm2d(16, affine=False)), 1),
    "even kernels": (Volume, 2),
    "weight normalization": (lambda: sequence(lambda: parametrizations.weight_norm(STEM(), dim=0), nn.ReLU), 1),
    "weight normalization by a hook": (lambda: sequence(lambda: weight_norm(STEM()), nn.ReLU), 1),
    "spectral normalization": (lambda: sequence(lambda: parametrizations.spectral_norm(STEM()), nn.ReLU), 1),
    "weight standardization": (lambda: sequence(partial(Standardized, 3, 16, 3, 2, 1), lambda: nn.BatchNorm2d(16)), 1),
    "low-rank change and gain": (lambda: sequence(partial(Scaled, 3, 16, 3, stride=2, padding=1), nn.ReLU), 1),
    "matrix products": (Products, 5),
    "norm over tokens": (ManyTokens, 1),
}


@pytest.mark.parametrize("name", NETS)
def test_layers_have_constant_weights_and_no_norms_behind_them(name: str) -> None:
    torch.manual_seed(0)
    make, quantized = NETS[name]
    net = make()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                for values in (module.running_mean, module.running_var, module.weight, module.bias):
                    if values is not None:
                        values.add_(torch.rand_like(values))
        net.eval()
        wanted = net(IMAGES)
        graph = cast(fx.GraphModule, export_program(net, IMAGES[:2]).module())
        fold_constants(graph)
        torch.testing.assert_close(graph(IMAGES), wanted, rtol=1e-4, atol=1e-4)
        assert ("batch_norm" in str(graph.graph)) == (name == "norm over tokens")
        prepared = prepare_pt2e(graph, SchemeQuantizer(Scheme()))
        set_mode(prepared, "off")
        torch.testing.assert_close(prepared(IMAGES), wanted, rtol=1e-4, atol=1e-4)
    assert len(layers(prepared)) == quantized
    assert sum(node.target in WEIGHTED for node in prepared.graph.nodes) == quantized
    torch.testing.assert_close(net(IMAGES), wanted)  # the model itself has its own weights still


@pytest.mark.parametrize("doubled", [False, True])
def test_a_constant_made_of_many_others_is_worked_out_once(doubled: bool) -> None:
    """It is no parameter's, so its product is no linear layer; a walk back by recursion would not end."""
    root, graph = nn.Module(), fx.Graph()
    root.register_buffer("matrix", torch.eye(3))
    x, value = graph.placeholder("x"), graph.get_attr("matrix")
    for _ in range(40 if doubled else 2000):
        given = (graph.call_function(aten.relu.default, (value,)), value) if doubled else (value, value)
        value = graph.call_function(aten.maximum.default, given)
    product = graph.call_function(aten.matmul.default, (x, value))
    graph.output(product)
    model = fx.GraphModule(root, graph)
    fold_weights(model)
    assert product.target is aten.matmul.default
    assert torch.equal(model(torch.ones(2, 3)), torch.ones(2, 3))


class Tiny(nn.Module):
    """Two layers of which the first gives very small values, and the second has very large weights; or the reverse."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, 2, bias=False), nn.Conv2d(16, 16, 3, bias=False)
        with torch.no_grad():
            self.first.weight.mul_(factor)
            self.second.weight.div_(factor)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.first(x).relu()).relu().mean((2, 3))
        return found


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_values_and_weights_of_any_size_have_scales_that_resolve_them(factor: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = float_model(Tiny(factor), split().images)
    settings = Quantization(observer="minmax", equalize=False, bias_correction="none")
    program = quantize(model, split(), Scheme(), settings, Cache(tmp_path / "build"))
    images = split().images[:8].copy()
    assert sqnr_db(eager(model.module())(images), eager(program.module())(images)) > 30
