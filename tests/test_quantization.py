"""Each step of quantization alone, on real models and images: what it keeps as it was, and what it makes better."""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, fx, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from bitferry.device.errors import InputError
from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline import progress
from bitferry.pipeline.capture import export_program
from bitferry.pipeline.load import Deployable
from bitferry.pipeline.measure.layers import counterparts
from bitferry.pipeline.quantization import correct, effects, equalize, learned, steps
from bitferry.pipeline.quantization.annotate import SchemeQuantizer
from bitferry.pipeline.quantization.folding import fold_constants
from bitferry.pipeline.quantization.graph import (
    activations,
    answers,
    layers,
    own_tensors,
    quality,
    round_before_pools,
    rounded_answers,
    set_mode,
)
from bitferry.pipeline.quantization.grid import Grid
from bitferry.pipeline.quantization.observers import observe, set_ranges
from bitferry.pipeline.recipe import Quantization
from bitferry.targets import Scheme
from tests.conftest import subset

CONTRACT = Preprocessing(height=28, width=28, mean=(0.286,) * 3, std=(0.353,) * 3)
PLAIN = Quantization(observer="histogram", equalize=False, bias_correction="none")
SCHEMES = [
    Scheme(),
    Scheme(activation="int8", activation_symmetric=True, additions="skip"),
    Scheme(bias="int32", outputs="int8"),
    Scheme(activation="int8", outputs="int8"),
]


class Inverted(nn.Module):
    """What MobileNetV2 is made of, twice: 1×1, depthwise and 1×1 again with ReLU6 between, added to its input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), nn.ReLU6())
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(12, 24, 1),
                nn.ReLU6(),
                nn.Conv2d(24, 24, 3, 1, 1, groups=24),
                nn.ReLU6(),
                nn.Conv2d(24, 12, 1),
            )
            for _ in range(2)
        )
        self.head = nn.Linear(12, 5)
        with torch.no_grad():  # channels of very different size, as training leaves them
            for block in self.blocks:
                first = cast(nn.Conv2d, cast(nn.Sequential, block)[0])
                first.weight.mul_(torch.logspace(-1.5, 0.5, 24).view(-1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


@pytest.fixture(scope="module")
def images() -> Tensor:
    pixels = torch.from_numpy(subset("calibration", 48, classes=10)["images"])
    return (pixels if pixels.ndim == 4 else pixels[..., None].expand(-1, -1, -1, 3)).contiguous()


def prepared(images: Tensor, scheme: Scheme | None = None, net: nn.Module | None = None) -> fx.GraphModule:
    model = Deployable(net or Inverted(), CONTRACT).eval()
    with torch.no_grad():
        graph = cast(fx.GraphModule, export_program(model, images[:2]).module())
        fold_constants(graph)
        made = prepare_pt2e(graph, SchemeQuantizer(scheme or Scheme()))
    own_tensors(made)
    return cast(fx.GraphModule, made)


def ready(images: Tensor, settings: Quantization = PLAIN, **more: Any) -> tuple[fx.GraphModule, Tensor]:
    """Prepare, observe and fit; with the float answers."""
    model = prepared(images, **more)
    with torch.no_grad():
        _, count = observe(model, images, settings)
        assert count == len(images)
        set_ranges(model, images, None, settings)
        steps.fit(model)
        return model, answers(model, images)


def test_answers_are_held_only_where_they_teach(images: Tensor) -> None:
    model = prepared(images)
    with torch.no_grad():
        whole = answers(model, images)
        held, count = observe(model, images, PLAIN)
        every, _ = observe(model, images, PLAIN.model_copy(update={"ranges": "learned"}))
    assert count == len(images)
    assert len(held) == 0
    torch.testing.assert_close(every, whole)


@pytest.mark.parametrize("observer", ["minmax", "mean-minmax", "percentile", "mse", "histogram", "scores"])
def test_ranges_are_the_same_whatever_the_batch(observer: Any, images: Tensor) -> None:
    found = []
    for batch_size in (1, 7, 32):
        settings = Quantization(observer=observer, batch_size=batch_size)
        model, _ = ready(images, settings)
        found.append([(float(grid.scale), int(grid.zero_point)) for grid in activations(model)])
    for other in found[1:]:
        assert [zero for _, zero in other] == [zero for _, zero in found[0]]
        np.testing.assert_allclose([s for s, _ in other], [s for s, _ in found[0]], rtol=1e-5)
    assert len({scale for scale, _ in found[0]}) > 5


class Attention(nn.Module):
    """Tokens first, then images, as torch's own attention has them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.first, self.second = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).permute(2, 0, 1)
        scores: Tensor = self.second(torch.relu(self.first(tokens))).mean(0)
        return scores


@pytest.mark.parametrize("observer", ["mean-minmax", "histogram", "scores"])
def test_images_are_told_apart_where_they_are_not_the_first_axis(observer: Any, images: Tensor) -> None:
    found = []
    for batch_size in (1, 7, 8):
        settings = Quantization(observer=observer, batch_size=batch_size, bias_correction="full")
        model, _ = ready(images[:13], settings, net=Attention())
        assert {grid.batch_axis for grid in activations(model)} == {0, 1}
        found.append([float(grid.scale) for grid in activations(model)])
        steps.calibrate(prepared(images[:13], net=Attention()), images[:13], Quantization(batch_size=batch_size))
        steps.calibrate(prepared(images[:13], net=Attention()), images[:13], settings)
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-5)


@pytest.mark.parametrize(
    "steps_", [{}, {"images": "enough"}, {"rounding": "layers", "ranges": "learned", "iterations": 2}]
)
def test_one_image_is_enough_to_run_on(steps_: dict[str, Any], images: Tensor) -> None:
    model = prepared(images)
    found = steps.calibrate(model, images[:1], Quantization(**steps_))
    assert found.images == 1


def test_a_model_without_a_layer_to_quantize_is_left_as_it_is(images: Tensor) -> None:
    net = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())
    settings = Quantization(rounding="layers", ranges="learned", bias_correction="full", iterations=2)
    model = prepared(images, net=net)
    steps.calibrate(model, images, settings)
    with torch.no_grad():
        assert sqnr(Deployable(net, CONTRACT).eval()(images), convert_pt2e(model)(images)) > 30


def test_scores_that_are_not_finite_are_told_with_their_image(images: Tensor) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.log(x.mean((2, 3)) - x.mean((2, 3)).min())

    with pytest.raises(InputError, match=r"scores of a calibration image are not finite"):
        steps.calibrate(prepared(images, net=Broken()), images, Quantization())


def test_padding_by_name_is_quantized_too(images: Tensor) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same", dilation=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 5, stride=2, padding="valid"),
        nn.Conv2d(8, 8, 2, padding="same"),  # one more to the right: a padding before it
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    model = prepared(images, net=net)
    assert len(layers(model)) == 4
    with torch.no_grad():
        steps.calibrate(model, images, Quantization())
        assert sqnr(Deployable(net, CONTRACT).eval()(images), convert_pt2e(model)(images)) > 25


def test_one_odd_image_stretches_minmax_and_not_the_mean(images: Tensor) -> None:
    odd = images.clone()
    odd[1:] = odd[1:] // 4
    scales = {name: ready(odd, Quantization(observer=name))[0] for name in ("minmax", "mean-minmax")}
    largest = {name: activations(model)[1].scale for name, model in scales.items()}
    assert float(largest["mean-minmax"]) < 0.8 * float(largest["minmax"])


def test_equalization_keeps_the_float_answers_and_levels_the_channels(images: Tensor) -> None:
    model = prepared(images)
    set_mode(model, "off")
    before, spread = answers(model, images), channel_spread(model, images)
    assert equalize.equalize(model, images) == 4  # before and behind each depthwise one; the additions end in a mean
    torch.testing.assert_close(answers(model, images), before, atol=1e-4, rtol=1e-4)
    assert channel_spread(model, images) < 0.5 * spread


def test_layers_of_an_equalized_model_are_compared_with_the_equalized_float_one(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "is_less", lambda *noises: True)  # this model's answers gain nothing by it
    model = prepared(images)
    with torch.no_grad():
        counterpart = steps.calibrate(model, images, Quantization()).float_counterpart
        exported = cast(fx.GraphModule, export_program(counterpart, images[:2]).module())
        teacher = Deployable(Inverted(), CONTRACT).eval()(images)
        torch.testing.assert_close(exported(images), teacher, atol=1e-4, rtol=1e-4)
    pairs = counterparts(exported, export_program(convert_pt2e(model), images[:2]).module())
    assert len([name for name in pairs if name.startswith(("conv2d", "linear"))]) == 8


def channel_spread(model: fx.GraphModule, images: Tensor) -> float:
    """The largest channel over the median one, of what the depthwise convolutions are given."""
    wanted = {group.nodes[0] for group in equalize.groups(model) if group.clips}
    found = equalize.Ranges(model, wanted)
    with torch.no_grad():
        found.run(images)
    tops = [torch.cat(parts).mean(0) for parts in found.found.values()]
    return max(float(top.max() / top.median()) for top in tops)


def test_the_float_model_stays_as_it_is(images: Tensor) -> None:
    net = Inverted()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    settings = Quantization(ranges="learned", rounding="layers", iterations=2)
    with torch.no_grad():
        steps.calibrate(prepared(images, net=net), images, settings)
    for name, now in net.state_dict().items():
        assert torch.equal(now, before[name]), name


@pytest.mark.parametrize("way", ["fast", "full"])
def test_bias_correction_makes_the_mean_shift_smaller(way: Any, images: Tensor) -> None:
    model, teacher = ready(
        images, Quantization(observer="mean-minmax", bias_correction=way), scheme=Scheme(weight_bits=4)
    )
    before = float((rounded_answers(model, images) - teacher).mean(0).abs().mean())
    count = correct.fast(model) if way == "fast" else correct.full(model, images)
    assert count == len(layers(model)) == 8
    after = float((rounded_answers(model, images) - teacher).mean(0).abs().mean())
    assert after < 0.7 * before


def test_learning_makes_the_answers_better_and_is_repeatable(images: Tensor) -> None:
    settings = Quantization(iterations=40, ranges="learned")
    found = []
    for _ in range(2):
        model, teacher = ready(images, scheme=Scheme(weight_bits=4))
        before = quality(model, images, teacher)
        with torch.no_grad():
            learned.learn(model, images, teacher, settings)
        found.append(rounded_answers(model, images))
        assert quality(model, images, teacher) > before
    assert torch.equal(*found)


def test_what_a_range_costs_the_scores_is_what_plain_gradients_say(images: Tensor) -> None:
    model, _ = ready(images[:6], PLAIN.model_copy(update={"batch_size": 2}))
    set_mode(model, "off")
    with torch.no_grad():
        observe(model, images[:6], PLAIN)
        found = effects.weigh(model, images[:6])
    grid = activations(model)[3]
    edges, costs = found[grid].costs()
    low, high = 0, 200  # behind a ReLU6
    slopes, values = plain_gradients(model, grid, images[:6])
    beyond = [(g * (x - edges[high])).where(x > edges[high], 0).sum() for g, x in zip(slopes, values, strict=True)]
    power = sum(float(g[x != 0].square().sum()) for g, x in zip(slopes, values, strict=True))
    expected = sum(float(one) ** 2 for one in beyond) + float((edges[high] - edges[low]) / 255) ** 2 / 12 * power
    assert float(costs[low, high]) == pytest.approx(expected, rel=1e-3)
    assert sum(float(one) ** 2 for one in beyond) > 0


def plain_gradients(model: fx.GraphModule, grid: Grid, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Each image's gradient at an activation, of its scores with random signs, and the activation itself."""
    random, found = torch.Generator().manual_seed(0), []

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = x.detach().requires_grad_()
            return self.seen

    watched = Watched()
    grid.stand_in = watched
    slopes = []
    for image in images:
        with torch.enable_grad():
            scores = model(image[None])
            signs = torch.randint(0, 2, scores.shape, generator=random) * 2.0 - 1
            (gradient,) = torch.autograd.grad((scores * signs).sum(), watched.seen)
        slopes.append(gradient.double())
        found.append(watched.seen.detach().double())
    grid.stand_in = None
    return slopes, found


def test_ranges_by_their_effect_on_the_scores_answer_better_than_the_whole_range(images: Tensor) -> None:
    odd = images.clone()
    odd[5] = 255 - odd[5]
    found = {name: ready(odd, Quantization(observer=name)) for name in ("scores", "minmax")}
    worth = {name: quality(model, images, teacher, weights=False) for name, (model, teacher) in found.items()}
    assert worth["scores"] > worth["minmax"]


LAYERS = [
    lambda: nn.Conv2d(12, 8, 3, stride=2, padding=1, dilation=2),
    lambda: nn.Conv2d(12, 12, 5, padding=2, groups=12),
    lambda: nn.Conv2d(12, 8, 1, groups=2, bias=False),
]


@pytest.mark.parametrize("make", LAYERS)
def test_rounding_by_layers_errs_less_on_the_layer_s_outputs(make: Callable[[], nn.Conv2d], images: Tensor) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), make(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(5))
    with torch.no_grad():
        net(torch.zeros(1, 3, 28, 28))
        given = Deployable(net[:2], CONTRACT)(images)
        wanted = net[2](given)
    errors = {}
    for name in ("nearest", "layers"):
        settings = PLAIN.model_copy(update={"bias_correction": "fast", "rounding": name})
        model = prepared(images, Scheme(weight_bits=3), net)
        with torch.no_grad():
            steps.calibrate(model, images, settings)
            layer = layers(model)[1]
            made = layer.apply(given, layer.weight_grid.rounded(layer.weight))
            made += 0 if layer.bias is None else layer.bias.view(-1, 1, 1)
        errors[name] = float((made - wanted).square().mean())
    assert errors["layers"] < 0.8 * errors["nearest"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_step_together_in_every_scheme(scheme: Scheme, images: Tensor) -> None:
    settings = Quantization(rounding="layers", bias_correction="full", ranges="learned", iterations=4)
    model = prepared(images, scheme)
    with torch.no_grad():
        steps.calibrate(model, images, settings)
        simulated = rounded_answers(model, images)
        teacher = Deployable(Inverted(), CONTRACT).eval()(images)
        made = convert_pt2e(model)(images)
    assert sqnr(teacher, made) > 20
    if scheme.bias == "float32":
        assert sqnr(made, simulated) > 40  # what the steps judge by is what is shipped


def test_a_step_that_makes_it_worse_is_dropped_and_said(
    images: Tensor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(model: fx.GraphModule, images: Tensor) -> int:
        for layer in layers(model):
            layer.weight.add_(0.3)
        return 1

    progress.console.quiet = False
    plain, spoiled = prepared(images), prepared(images)
    settings = PLAIN.model_copy(update={"bias_correction": "full"})
    with torch.no_grad():
        monkeypatch.setattr(correct, "full", lambda model, images: 0)
        steps.calibrate(plain, images, settings)
        monkeypatch.setattr(correct, "full", spoil)
        steps.calibrate(spoiled, images, settings)
    assert "bias correction dropped" in capsys.readouterr().err
    assert torch.equal(rounded_answers(plain, images), rounded_answers(spoiled, images))


@pytest.mark.parametrize("make", [lambda: torchvision.models.resnet18(num_classes=5), nn.Flatten])
def test_what_does_not_apply_is_left_out(make: Callable[[], nn.Module], images: Tensor) -> None:
    torch.manual_seed(0)
    net = make()
    if isinstance(net, nn.Flatten):
        net = nn.Sequential(net, nn.Linear(28 * 28 * 3, 5, bias=False))
    model = prepared(images, net=net)
    with torch.no_grad():
        steps.calibrate(model, images, Quantization(equalize=True, bias_correction="fast"))
        teacher = Deployable(net, CONTRACT).eval()(images)
    assert sqnr(teacher, rounded_answers(model, images)) > 20


def sqnr(teacher: Tensor, found: Tensor) -> float:
    return float(10 * torch.log10(teacher.square().sum() / (teacher - found).square().sum().clamp(min=1e-12)))


class Joined(nn.Module):
    """A concatenation of tensors of very different size, and a channel whose weights are nothing beside its bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(12, 6, 3)
        self.head = nn.Linear(6, 5)
        with torch.no_grad():
            self.third.weight[0] *= 1e-12
            self.third.bias[0] = 2.0  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.first(x) / 50, torch.relu(self.second(x))], 1)
        scores: Tensor = self.head(torch.relu(self.third(x)).mean((2, 3)))
        return scores


@pytest.mark.parametrize("batch_size", [1, 8])
def test_what_shares_a_scale_has_the_range_of_all_of_it(batch_size: int, images: Tensor) -> None:
    scheme = Scheme(activation="int8", outputs="int8", concatenations="shared")
    model = prepared(images, scheme, Joined())
    steps.calibrate(model, images, Quantization(batch_size=batch_size, equalize=False))
    with torch.no_grad():
        teacher = Deployable(Joined(), CONTRACT).eval()(images)
        assert sqnr(teacher, convert_pt2e(model)(images)) > 30


def test_a_bias_fits_its_int32_whatever_the_steps_did_to_it(images: Tensor) -> None:
    model = prepared(images, Scheme(bias="int32", outputs="int8"), Joined())
    settings = Quantization(ranges="learned", rounding="layers", iterations=4)
    steps.calibrate(model, images, settings)
    for layer in layers(model):
        assert layer.bias is not None
        assert layer.data is not None
        stored = layer.bias / (layer.data.scale * layer.weight_grid.scale)
        assert float(stored.abs().max()) < 2**31 - 1
    with torch.no_grad():
        teacher = Deployable(Joined(), CONTRACT).eval()(images)
        assert sqnr(teacher, convert_pt2e(model)(images)) > 20


class Pooled(nn.Module):
    """Two convolutions with max pooling after each; what enters the second pooling is taken a second time."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.pool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.pool(self.first(x).relu())).relu()
        found: Tensor = self.third(self.pool(x)).mean((2, 3)) + x.mean((2, 3))
        return found


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounding_before_a_max_pooling_as_well_changes_no_value(images: Tensor, scheme: Scheme) -> None:
    def program(*, before: bool) -> fx.GraphModule:
        model, _ = ready(images, scheme=scheme, net=Pooled())
        if before:
            round_before_pools(model)
        return cast(fx.GraphModule, convert_pt2e(model))

    def rounded(model: fx.GraphModule) -> list[bool]:
        pools = [node for node in model.graph.nodes if node.target is torch.ops.aten.max_pool2d.default]
        return ["dequantize" in str(cast(fx.Node, pool.args[0]).target) for pool in pools]

    plain, pooled = program(before=False), program(before=True)
    with torch.no_grad():
        assert torch.equal(plain(images), pooled(images))
    branches = scheme.outputs == "int8"  # then what several take is int8 where it is made
    assert rounded(plain) == [False, branches]
    assert rounded(pooled) == [True, branches]
