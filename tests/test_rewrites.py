"""Operators that runtimes compute otherwise: written so that eager PyTorch, ONNX and the runtimes give one answer."""

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitferry import targets
from bitferry.device.errors import StageFailed
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.capture import captured
from bitferry.pipeline.compile import compile
from bitferry.pipeline.export import answer, export, simplify
from bitferry.pipeline.rewrites import rewrite
from bitferry.pipeline.statistics import sqnr_db
from bitferry.pipeline.verify import eager, load_artifact
from tests.test_torchscript import float_model, split

POOLS = [
    {"kernel_size": kernel, "stride": stride, "padding": padding, "count_include_pad": counted, "divisor_override": by}
    for kernel, stride, padding, counted, by in product((2, 3), (2, 3), (0, 1), (True, False), (None, 5))
]
RESIZES = [
    *(
        {"size": size, "mode": mode, "antialias": True}
        for size in ((8, 7), (34, 30))
        for mode in ("bilinear", "bicubic")
    ),
    {"scale_factor": 0.7, "mode": "bilinear", "antialias": True},
    {"scale_factor": 0.7, "mode": "bilinear"},
    {"scale_factor": (1.5, 0.4), "mode": "bilinear"},
    {"size": (5, 15), "mode": "bicubic"},
    {"size": (9, 23), "mode": "bicubic", "align_corners": True},
    {"scale_factor": 0.7, "mode": "bicubic", "align_corners": False},
    {"scale_factor": (2.7, 0.7), "mode": "nearest"},
    {"scale_factor": (1.3, 2.7), "mode": "nearest-exact"},
]
PADS = [(1, 2, 0, 3), (4, 0), (0, 0, 2, 2), (-1, 2, 3, -2), (2, 1, 1, 1, 2, 0)]


class Call(nn.Module):
    """One function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def rewritten(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[torch.export.ExportedProgram, bool]:
    """Capture a function with an open batch; give it rewritten, and whether it was."""
    program = torch.export.export(Call(function), (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    again = rewrite(program)
    return again, again is not program


def operators(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target).split(".")[1] for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_average_pooling_over_the_edge_is_what_pytorch_gives(pool: dict[str, object]) -> None:
    x = torch.randn(3, 2, 17, 14)
    function = nn.AvgPool2d(ceil_mode=True, **pool)  # type: ignore[arg-type]
    program, changed = rewritten(function, x)
    assert changed
    assert operators(program) <= {"avg_pool2d", "pad", "mul"}
    (pooled,) = [node for node in program.graph.nodes if str(node.target) == "aten.avg_pool2d.default"]
    assert len(pooled.args) == 3  # nothing but kernel and stride is left to a runtime
    torch.testing.assert_close(program.module()(x), function(x))


@pytest.mark.parametrize("kind", [nn.AvgPool1d, nn.AvgPool3d])
def test_it_is_alike_along_one_axis_and_three(kind: type[nn.Module]) -> None:
    function = kind(3, 2, 1, ceil_mode=True, count_include_pad=False)
    x = torch.randn(2, 3, 10) if kind is nn.AvgPool1d else torch.randn(2, 3, 8, 10, 7)
    program, changed = rewritten(function, x)
    assert changed
    torch.testing.assert_close(program.module()(x), function(x))


@pytest.mark.parametrize("resize", RESIZES, ids=str)
def test_resizing_is_what_pytorch_gives(resize: dict[str, object]) -> None:
    x = torch.randn(3, 2, 17, 15)
    function: Callable[[Tensor], Tensor] = partial(F.interpolate, **cast(Any, resize))
    program, changed = rewritten(function, x)
    assert changed
    assert operators(program) == {"matmul"}
    torch.testing.assert_close(program.module()(x), function(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pads", PADS, ids=str)
def test_circular_padding_is_what_pytorch_gives(pads: tuple[int, ...]) -> None:
    x = torch.randn(3, 2, 7, 6)[:, None] if len(pads) == 6 else torch.randn(3, 2, 7, 6)
    function = partial(F.pad, pad=pads, mode="circular")
    if len(pads) == 2:
        x = x.flatten(2)
    program, changed = rewritten(function, x)
    assert changed
    assert operators(program) <= {"cat", "narrow", "slice"}
    torch.testing.assert_close(program.module()(x), function(x), atol=0, rtol=0)


@pytest.mark.parametrize(
    "function",
    [
        nn.AvgPool2d(3, 2, 1),
        partial(F.interpolate, size=(34, 30), mode="bilinear"),
        partial(F.interpolate, scale_factor=2, mode="bilinear"),
        partial(F.interpolate, scale_factor=2, mode="nearest"),
    ],
)
def test_what_runtimes_compute_alike_stays(function: Callable[[Tensor], Tensor]) -> None:
    program, changed = rewritten(function, torch.randn(2, 2, 16, 15))
    assert not changed
    assert not {"matmul", "pad"} & operators(program)


class Edges(nn.Module):
    """Convolutions, the second padded circularly, and what lies between: pooling over the edge, a resizing."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, (4, 4))
        self.second = nn.Conv2d(8, 8, 4, padding=(1, 1), padding_mode="circular")
        self.pool = nn.AvgPool2d(3, 2, padding=1, ceil_mode=True)
        self.head = nn.Linear(8 * 6 * 6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(self.pool(torch.relu(self.first(x))), (7, 7), mode="bilinear", antialias=True)
        scores: Tensor = self.head(torch.relu(self.second(x)).flatten(1))
        return scores


def test_layers_keep_their_names_and_runtimes_give_what_pytorch_gives(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, build = float_model(Edges(), split().images), Cache(tmp_path / "build")
    places = [node.meta["nn_module_stack"] for node in captured(model).graph.nodes if "avg_pool2d" in str(node.target)]
    assert [list(place.values())[-1][0] for place in places] == ["model.pool"]
    images = split().images[-9:].copy()
    expected = eager(model.module())(images)
    simplified = simplify(export(model, split(), build), split(), build)
    np.testing.assert_allclose(answer(simplified.path, images), expected, atol=1e-4)
    for name in ("openvino", "onnxruntime"):
        made = compile(simplified, name, model, split(), build, options=targets.get(name).Options(threads=1))
        assert sqnr_db(expected, load_artifact(made)(images)) > 100


MASKS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "none": lambda _: None,
    "L×S": lambda x: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(),
    "N×L×S": lambda x: x @ x.mT,
}


@pytest.mark.parametrize("mask", MASKS)
def test_attention_without_heads_is_what_pytorch_gives(mask: str) -> None:
    def attend(x: Tensor) -> Tensor:
        tokens = x.mean(1)
        value: Tensor = F.scaled_dot_product_attention(
            tokens, tokens + 1, tokens.abs(), attn_mask=MASKS[mask](tokens), scale=0.3
        )
        return value

    x = torch.randn(2, 3, 7, 5)
    program, changed = rewritten(attend, x)
    assert changed
    assert next(n for n in program.graph.nodes if "attention" in str(n.target)).args[0].meta["val"].ndim == 4
    torch.testing.assert_close(program.module()(x), attend(x))


class Deep(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x[:, None, None]
        value: Tensor = F.scaled_dot_product_attention(tokens, tokens, tokens).mean((1, 2, 3, 4, 5))
        return value[:, None]


def test_an_operator_that_the_exporter_cannot_write_is_named_with_its_layer(tmp_path: Path) -> None:
    model = float_model(nn.Sequential(nn.Conv2d(3, 4, 3), Deep(), nn.Linear(1, 10)), split().images)
    with pytest.raises(StageFailed, match=r"scaled_dot_product_attention.default in the layer '1' \(test_rewrites.py"):
        export(model, split(), Cache(tmp_path / "build"))


class Masked(nn.Module):
    """Attention among the rows of an image, of which one may look at none: the exporter writes that otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Linear(84, 16)
        self.attention = Attention()
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.tokens(x.permute(0, 2, 1, 3).flatten(2))
        scores: Tensor = self.head(self.attention(tokens).mean(1))
        return scores


class Attention(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = torch.arange(length).expand(length, length) < torch.arange(length)[:, None]
        return F.scaled_dot_product_attention(tokens, tokens, tokens, attn_mask=mask)


def test_an_operator_that_onnx_computes_otherwise_is_named_with_its_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = float_model(Masked(), split().images)
    with pytest.raises(StageFailed) as raised:
        export(model, split(), Cache(tmp_path / "build"))
    assert "what goes wrong first is the operator scaled_dot_product_attention in the layer 'attention'" in str(
        raised.value
    )
