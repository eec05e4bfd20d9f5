"""Scheme → annotations: which tensors each field of a scheme makes int8, and that an int32 bias is the right one."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor, fx, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from bitferry.pipeline.quantization.annotate import SchemeQuantizer
from bitferry.pipeline.quantization.steps import calibrate
from bitferry.pipeline.recipe import Quantization
from bitferry.pipeline.statistics import sqnr_db
from bitferry.targets import Scheme

INPUT = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 4 - 1
INT32 = Scheme(bias="int32")


class Residual(nn.Module):
    """Additions of every kind: of the input and a layer, of two layers, of two activations."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        one = x + self.first(x)
        two = self.second(one) + self.third(one)
        return torch.relu(one) + torch.sigmoid(two)


class Branches(nn.Module):
    """A ReLU between two layers, one whose value a sigmoid takes as well, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.classifier = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = nn.functional.relu6(self.second(x))
        scores: Tensor = self.classifier((x * torch.sigmoid(x)).mean((2, 3)))
        return scores


def annotated(net: nn.Module, scheme: Scheme) -> list[fx.Node]:
    quantizer = SchemeQuantizer(scheme)
    graph = cast(fx.GraphModule, torch.export.export(net.eval(), (INPUT,)).module())
    graph = quantizer.transform_for_annotation(graph)
    return list(quantizer.annotate(graph).graph.nodes)


def quantized_inputs(nodes: list[fx.Node], target: Any) -> list[list[str]]:
    """For each node of an operator, the operators of those of its inputs that are quantized."""
    asked = [node for node in nodes if node.target is target]
    specs = [node.meta[Q_ANNOTATION_KEY].input_qspec_map if Q_ANNOTATION_KEY in node.meta else {} for node in asked]
    return [[given.name for given in n.all_input_nodes if given in spec] for n, spec in zip(asked, specs, strict=True)]


def with_output(nodes: list[fx.Node]) -> list[str]:
    return [n.name for n in nodes if Q_ANNOTATION_KEY in n.meta and n.meta[Q_ANNOTATION_KEY].output_qspec is not None]


def converted(net: nn.Module, scheme: Scheme) -> fx.GraphModule:
    with torch.no_grad():
        prepared = prepare_pt2e(torch.export.export(net.eval(), (INPUT,)).module(), SchemeQuantizer(scheme))
        calibrate(prepared, INPUT, Quantization(observer="minmax", equalize=False, bias_correction="none"))
        made: fx.GraphModule = convert_pt2e(prepared)
    return made


def layers(module: fx.GraphModule, target: Any) -> list[tuple[float, Tensor, Tensor, Tensor]]:
    """For each layer: its input's scale, its weights' scales, its bias as stored and its bias's scales."""
    found = []
    for node in module.graph.nodes:
        if node.target is target:
            data, weight, bias = (argument.args for argument in node.args[:3])
            stored, scale, zero = (module.get_buffer(argument.target) for argument in bias[:3])
            assert stored.dtype == torch.int32
            assert not zero.any()
            found.append((data[1], module.get_buffer(weight[1].target), stored, scale))
    return found


@pytest.mark.parametrize(
    ("additions", "expected"),
    [
        ("both", [["x", "conv2d"], ["conv2d_1", "conv2d_2"], ["relu", "sigmoid"]]),
        ("skip", [["x"], ["conv2d_2"], ["sigmoid"]]),
        ("none", [[], [], []]),
    ],
)
def test_additions_quantize_both_inputs_the_other_one_or_none(additions: Any, expected: list[list[str]]) -> None:
    nodes = annotated(Residual(), Scheme(additions=additions))
    assert quantized_inputs(nodes, torch.ops.aten.add.Tensor) == expected


def test_a_value_taken_twice_is_no_direct_input_of_an_addition() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x)
            return x + y + y.sum()

    nodes = annotated(Twice(), Scheme(additions="skip"))
    assert len(quantized_inputs(nodes, torch.ops.aten.add.Tensor)[0]) == 1


def test_outputs_are_quantized_where_nothing_int8_takes_them() -> None:
    assert with_output(annotated(Branches(), Scheme())) == []
    assert with_output(annotated(Branches(), Scheme(outputs="int8"))) == ["relu6", "linear"]


@pytest.mark.parametrize(("concatenations", "scales"), [("own", 2), ("shared", 1)])
def test_a_concatenation_has_scales_of_its_inputs_or_one_for_all(concatenations: Any, scales: int) -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.third = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.third(torch.cat([self.first(x), 9 * self.second(x)], 1))
            return scores

    scheme = Scheme(outputs="int8", concatenations=concatenations)
    graph = cast(fx.GraphModule, torch.export.export(Joined().eval(), (INPUT,)).module())
    prepared = prepare_pt2e(graph, SchemeQuantizer(scheme))
    calibrate(prepared, INPUT, Quantization(equalize=False, bias_correction="none"))
    (joined,) = [node for node in convert_pt2e(prepared).graph.nodes if node.target is torch.ops.aten.cat.default]
    assert len({dequantized.args[1:3] for dequantized in joined.all_input_nodes}) == scales


def test_with_int8_outputs_a_product_takes_int8_and_so_does_what_feeds_a_sigmoid() -> None:
    nodes = annotated(Branches(), Scheme(outputs="int8"))
    assert quantized_inputs(nodes, torch.ops.aten.mul.Tensor) == [["relu6", "sigmoid"]]
    assert quantized_inputs(annotated(Branches(), Scheme()), torch.ops.aten.mul.Tensor) == [[]]


@pytest.mark.parametrize("bias", [True, False])
def test_an_int32_bias_has_the_scale_of_input_times_weight(bias: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3, bias=bias), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(180, 2))
    made = converted(net, INT32)
    found = layers(made, torch.ops.aten.conv2d.default) + layers(made, torch.ops.aten.linear.default)
    assert len(found) == 2
    for data, weight, _, scale in found:
        torch.testing.assert_close(scale, data * weight)
    _, _, stored, scale = found[1]
    torch.testing.assert_close(stored * scale, net.get_parameter("4.bias").detach(), atol=float(scale.max()), rtol=0)
    torch.testing.assert_close(made(INPUT), net(INPUT), atol=0.05, rtol=0)


def test_a_layer_without_a_bias_stays_without() -> None:
    made = converted(nn.Conv2d(3, 5, 3, bias=False), INT32)
    assert not any(tensor.dtype == torch.int32 for tensor in made.buffers())


def test_the_bias_of_a_dead_channel_does_not_overflow() -> None:
    torch.manual_seed(0)
    net = nn.Conv2d(3, 2, 1)
    with torch.no_grad():
        net.weight[0] = 1e-12
        net.get_parameter("bias")[0] = 300.0
    found = converted(net, INT32)(INPUT)
    torch.testing.assert_close(found[:, 0], torch.full_like(found[:, 0], 300.0), atol=0.01, rtol=0)
    torch.testing.assert_close(found[:, 1], net(INPUT)[:, 1], atol=0.05, rtol=0)


def test_layers_that_share_a_bias_have_each_its_own_scale() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.conv(self.conv(x) * 20))

    net = Shared()
    made = converted(net, INT32)
    first, second = layers(made, torch.ops.aten.conv2d.default)
    for data, weight, stored, scale in (first, second):
        torch.testing.assert_close(scale, data * weight)
        torch.testing.assert_close(stored * scale, net.get_parameter("conv.bias").detach(), atol=1e-3, rtol=0)
    assert not torch.equal(first[3], second[3])


def test_pooling_to_one_pixel_is_a_mean_and_other_pooling_stays() -> None:
    net = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.AdaptiveAvgPool2d(1))
    targets = [node.target for node in annotated(net, Scheme())]
    assert targets.count(torch.ops.aten.adaptive_avg_pool2d.default) == 1
    assert targets.count(torch.ops.aten.mean.dim) == 1


def test_a_norm_that_no_convolution_takes_in_becomes_one_where_layers_give_int8() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    norm.running_mean, norm.running_var = torch.rand(3), torch.rand(3) + 0.5
    net = nn.Sequential(nn.ReLU(), norm, nn.ReLU(), nn.Conv2d(3, 2, 1))
    made = converted(net, Scheme(outputs="int8"))
    assert [node.target for node in made.graph.nodes].count(torch.ops.aten.conv2d.default) == 2
    torch.testing.assert_close(made(INPUT), net(INPUT), atol=0.05, rtol=0)
    left = [node.target for node in annotated(net, Scheme())]
    assert left.count(torch.ops.aten.batch_norm.default) == left.count(torch.ops.aten.conv2d.default) == 1


def test_additions_of_tokens_stay_float() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            tokens = x.flatten(1, 2)
            scores: Tensor = tokens + self.layer(tokens)
            return scores

    assert quantized_inputs(annotated(Tokens(), Scheme()), torch.ops.aten.add.Tensor) == [[]]


class Stream(nn.Module):
    """Two blocks on one residual stream, kept as N×H×W×C, N×L×C or N×C×H×W, with a large channel if asked for."""

    def __init__(self, kept: str, outlier: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kept = kept
        self.stem, self.head = nn.Conv2d(3, 16, 2, 2), nn.Linear(16, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.up, self.down = (nn.ModuleList(nn.Linear(*size) for _ in range(2)) for size in ((16, 32), (32, 16)))
        with torch.no_grad():  # of the stream's first channel; the head takes it back
            for last in cast(list[nn.Linear], [self.stem, *self.down]):
                last.weight[0] *= outlier
                cast(Tensor, last.bias)[0] *= outlier
            self.head.weight[:, 0] /= outlier

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = {"NHWC": x.permute(0, 2, 3, 1), "NLC": x.flatten(2).transpose(1, 2)}.get(self.kept, x)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            tokens = norm(x.permute(0, 2, 3, 1) if self.kept == "NCHW" else x)
            tokens = down(nn.functional.gelu(up(tokens.roll(1, 1))))
            x = x + (tokens.permute(0, 3, 1, 2) if self.kept == "NCHW" else tokens)
        tokens = x.permute(0, 2, 3, 1) if self.kept == "NCHW" else x
        scores: Tensor = self.head(tokens.flatten(1, -2).mean(1))
        return scores


class Shuffled(nn.Module):
    """Additions and a product of maps between which channels are shuffled by views, and one of attention scores."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        self.bias, self.index = nn.Parameter(torch.randn(2, 9)), torch.arange(36 * 36).remainder(9).view(36, 36)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        n, c, h, w = x.shape
        shuffled = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        x = shuffled + self.second(x)
        rows = x.reshape(n, 2, c // 2, h * w)
        scores = rows.transpose(2, 3) @ rows + self.bias[:, self.index]
        x = (rows @ scores.softmax(-1)).reshape(n, c, h, w)
        found: Tensor = self.last(x * torch.sigmoid(x)).mean((2, 3))
        return found


@pytest.mark.parametrize(("kept", "expected"), [("NHWC", 0), ("NLC", 0), ("NCHW", 2)])
def test_additions_of_tokens_stay_float_however_many_axes_they_have(kept: str, expected: int) -> None:
    nodes = annotated(Stream(kept), Scheme())
    assert sum(bool(given) for given in quantized_inputs(nodes, torch.ops.aten.add.Tensor)) == expected
    assert len(quantized_inputs(nodes, torch.ops.aten.linear.default)) == 5


@pytest.mark.parametrize("scheme", [Scheme(), Scheme(outputs="int8")])
def test_a_large_channel_of_tokens_costs_as_little_with_four_axes_as_with_three(scheme: Scheme) -> None:
    def quality(kept: str, outlier: float) -> float:
        net = Stream(kept, outlier)
        with torch.no_grad():
            return sqnr_db(net(INPUT).numpy(), converted(net, scheme)(INPUT).numpy())

    assert quality("NHWC", 200.0) > quality("NLC", 200.0) - 1


def test_maps_are_known_behind_views_and_attention_scores_are_none() -> None:
    nodes = annotated(Shuffled(), Scheme(outputs="int8"))
    assert quantized_inputs(nodes, torch.ops.aten.add.Tensor) == [["reshape", "conv2d_1"], []]
    assert quantized_inputs(nodes, torch.ops.aten.mul.Tensor) == [["reshape_2", "sigmoid"]]


class Carried(nn.Module):
    """A value that two take, one of them after a move; and one that only moves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 3, 3), nn.Conv2d(6, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        y = self.second(torch.cat([nn.functional.max_pool2d(y, 3, 1, 1), y], 1))
        found: Tensor = self.third(nn.functional.max_pool2d(y, 2))
        return found


def test_a_value_that_branches_is_quantized_once_before_it_does() -> None:
    nodes = annotated(Carried(), Scheme(outputs="int8"))
    given = {node.name for node in nodes if (found := node.meta.get(Q_ANNOTATION_KEY)) and found.output_qspec}
    assert given == {"relu", "conv2d_2"}  # of the second layer the pooling's output is, which the third takes
