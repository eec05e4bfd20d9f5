"""A captured program writes over nothing, and quantization's graph answers like the model all the same."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from bitferry.pipeline.capture import export_program
from bitferry.pipeline.export import with_clamps
from bitferry.pipeline.functional import COMPUTED
from bitferry.pipeline.quantization.annotate import SchemeQuantizer
from bitferry.pipeline.quantization.folding import fold_constants
from bitferry.pipeline.quantization.graph import set_mode
from bitferry.pipeline.quantization.steps import calibrate
from bitferry.pipeline.recipe import Quantization
from bitferry.pipeline.statistics import sqnr_db
from bitferry.targets import Scheme

IMAGES = torch.rand(8, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1


def relu_and_add(y: Tensor) -> Tensor:
    return y.relu().add_(0.1)


def slice_doubled(y: Tensor) -> Tensor:
    z = y.clone()
    z[:, :4] = z[:, :4] * 2
    return z


def shifted(y: Tensor) -> Tensor:
    z = torch.zeros_like(y)
    z[:, :-1] = y[:, 1:]
    z[:, -1:, 1:] = y[:, -1:, :-1]
    return z


def slice_multiplied(y: Tensor) -> Tensor:
    y = y.relu()
    y[:, 2:5].mul_(3.0)
    return y


def masked(y: Tensor) -> Tensor:
    z = y.clone()
    return z.masked_fill_(z > 0.5, 0.25)


def slice_masked(y: Tensor) -> Tensor:
    z = y * 1.5
    part = z[:, ::2]
    part.masked_fill_(part < 0, -0.2)
    return z


def view_added(y: Tensor) -> Tensor:
    z = y * 1.0
    z.flatten(2).add_(torch.linspace(0, 1, y.shape[2] * y.shape[3]))
    return z


def transposed(y: Tensor) -> Tensor:
    z = y * 1.0
    z.transpose(2, 3)[..., 0] *= 2
    return z


def chunks_added(y: Tensor) -> Tensor:
    z = y * 1.0
    first, second = z.chunk(2, 1)
    first += second
    second.sub_(first)
    return z


def read_before_written(y: Tensor) -> Tensor:
    z = y * 1.0
    view = z[:, :8]
    before = view.clone()
    z.relu_()
    return torch.cat([view, before], 1)


def written_in_a_loop(y: Tensor) -> Tensor:
    z = torch.zeros_like(y)
    for channel in range(4):
        z[:, channel] = y[:, channel] * (channel % 3)
    return z


def borders_zeroed(y: Tensor) -> Tensor:
    z = y * 1.0
    z[..., 0].zero_()
    z[..., -1:, :].fill_(0.5)
    return z


def of_one_type(y: Tensor) -> Tensor:
    z = y * 1.0
    z.type_as(y).add_(0.3)
    return z


def at_least(y: Tensor) -> Tensor:
    z = y * 1.0
    cast(Tensor, torch.atleast_3d(z)).mul_(2.0)  # type: ignore[no-untyped-call]
    return z + y


def permuted(y: Tensor) -> Tensor:
    z = y * 1.0
    torch.einsum("nchw->nwhc", z).sub_(0.4)
    return z


def dropped(y: Tensor) -> Tensor:
    z = y * 1.0
    functional.dropout(z, 0.5, training=False).clamp_(-0.1, 0.5)
    return z * 2 - y


def reshaped(y: Tensor) -> Tensor:
    z = y * 1.0
    z.reshape(y.shape[0], -1).contiguous().relu_()
    return z


def padded_by_nothing(y: Tensor) -> Tensor:
    z = y * 1.0
    functional.pad(z, (0, 0, 0, 0)).fill_(1.0)
    return z.float().tanh_() + z.to(torch.float32).mul_(0.5)


def meshed(y: Tensor) -> Tensor:
    z = y * 1.0
    cast(Tensor, torch.broadcast_tensors(z, z[:, :1])[0]).mul_(3.0)  # type: ignore[no-untyped-call]
    return z


WRITES = (
    of_one_type, at_least, permuted, dropped, reshaped, padded_by_nothing, meshed,
    relu_and_add, slice_doubled, shifted, slice_multiplied, masked, slice_masked, view_added, transposed, chunks_added,
    read_before_written, written_in_a_loop, borders_zeroed,
)  # fmt: skip


class Between(nn.Module):
    """Two convolutions, each with its batch norm, and between them something that writes."""

    def __init__(self, write: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.write = write
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.second, self.other = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.drop, self.head = nn.Dropout(0.2, inplace=True), nn.Linear(16, 5)
        with torch.no_grad():
            for norm in (self.norm, self.other):
                cast(Tensor, norm.running_mean).add_(0.1)
                cast(Tensor, norm.running_var).mul_(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.write(self.norm(self.first(x)))
        x = functional.relu6(self.other(self.second(x)), inplace=True)
        scores: Tensor = self.head(self.drop(x).mean((2, 3)))
        return scores


def writing(graph: fx.Graph) -> list[str]:
    """Name the operators of a graph that write over an input."""
    schemas = {node: getattr(node.target, "_schema", None) for node in graph.nodes}
    return [str(node.target) for node, schema in schemas.items() if schema is not None and schema.is_mutable]


@pytest.mark.parametrize("write", WRITES)
def test_a_captured_program_writes_over_nothing_and_answers_alike(write: Callable[[Tensor], Tensor]) -> None:
    net = Between(write).eval()
    before = IMAGES.clone()
    with torch.no_grad():
        program = export_program(net, IMAGES[:2])
        assert writing(program.graph) == []
        torch.testing.assert_close(program.module()(IMAGES), net(IMAGES))
        assert torch.equal(IMAGES, before)
        graph = cast(fx.GraphModule, program.module())
        fold_constants(graph)
        assert "batch_norm" not in str(graph.graph)
        prepared = prepare_pt2e(graph, SchemeQuantizer(Scheme()))
        set_mode(prepared, "off")
        torch.testing.assert_close(prepared(IMAGES), net(IMAGES), rtol=1e-4, atol=1e-4)


def recurrent(gates: int, rows: Tensor) -> Any:
    """Give what `torch.lstm` (four gates) or `torch.gru` (three) takes besides rows N×T×3: states of size 3."""
    state = torch.zeros(1, rows.shape[0], 3)
    weights = [torch.ones(3 * gates, 3), torch.ones(3 * gates, 3) / 9]
    return ((state, state) if gates == 4 else state), weights, False, 1, 0.0, False, False, True


LAYERS: dict[str, Callable[[Tensor], Tensor]] = {
    "adaptive_avg_pool2d": lambda y: functional.adaptive_avg_pool2d(y, (y.shape[2], y.shape[3])),
    "adaptive_avg_pool2d to 1": lambda y: functional.adaptive_avg_pool2d(y[..., :1, :1], 1),
    "avg_pool1d": lambda y: functional.avg_pool1d(y.flatten(2), 1),
    "batch_norm": lambda y: functional.batch_norm(y, torch.zeros(16), torch.ones(16), eps=0.0),
    "conv1d": lambda y: functional.conv1d(y.flatten(2), torch.eye(16)[..., None]),
    "conv2d": lambda y: functional.conv2d(y, torch.eye(16)[..., None, None]),
    "conv2d, padding by name": lambda y: functional.conv2d(y, torch.ones(16, 1, 1, 1), padding="valid", groups=16),
    "conv3d": lambda y: functional.conv3d(y[:, None], torch.ones(1, 1, 1, 1, 1)),
    "conv_transpose1d": lambda y: functional.conv_transpose1d(y.flatten(2), torch.eye(16)[..., None]),
    "conv_transpose2d": lambda y: functional.conv_transpose2d(y, torch.eye(16)[..., None, None]),
    "conv_transpose3d": lambda y: functional.conv_transpose3d(y[:, None], torch.ones(1, 1, 1, 1, 1)),
    "cosine_similarity": lambda y: functional.cosine_similarity(y, y, 1),
    "grid_sampler": lambda y: functional.grid_sample(y, y[:, :2].movedim(1, 3), align_corners=True),
    "gru": lambda y: torch.gru(y[:, 0], *recurrent(3, y[:, 0]))[0],
    "group_norm": lambda y: functional.group_norm(y, 4),
    "instance_norm": functional.instance_norm,
    "layer_norm": lambda y: functional.layer_norm(y, y.shape[-1:]),
    "linear": lambda y: functional.linear(y, torch.eye(y.shape[-1])),
    "log_softmax": lambda y: torch.log_softmax(y[:, :1], 1),
    "lstm": lambda y: torch.lstm(y[:, 0], *recurrent(4, y[:, 0]))[0],
    "matmul": lambda y: torch.matmul(y, torch.eye(y.shape[-1])),
    "matmul of a vector": lambda y: torch.matmul(y, torch.ones(y.shape[-1])),
    "max_pool2d": lambda y: functional.max_pool2d(y, 1),
    "one_hot": lambda y: functional.one_hot(y.argmax(1), 16) + 0.0,
    "prelu": lambda y: functional.prelu(y, torch.ones(1)),
    "relu6": functional.relu6,
    "rms_norm": lambda y: functional.rms_norm(y, y.shape[-1:]),
    "scaled_dot_product_attention": lambda y: functional.scaled_dot_product_attention(y, y, y),
    "selu": functional.selu,
    "softmax": lambda y: torch.softmax(y, 1),
    "square": torch.square,
    "upsample_bicubic2d": lambda y: functional.interpolate(y, y.shape[2:], mode="bicubic"),
    "upsample_bilinear2d": lambda y: functional.interpolate(y, y.shape[2:], mode="bilinear"),
    "upsample_nearest2d": lambda y: functional.interpolate(y, scale_factor=1.0),
}


def test_what_is_taken_for_new_memory_is() -> None:
    """Each operator that is known to compute gives a value of its own, even where it changes nothing."""
    assert {f"aten::{name.split()[0].rstrip(',')}" for name in LAYERS} == COMPUTED
    for name, layer in LAYERS.items():
        given = torch.rand(2, 16, 3, 3)
        assert layer(given).untyped_storage().data_ptr() != given.untyped_storage().data_ptr(), name


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_written_over_a_computed_value_stays(name: str) -> None:
    class Written(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            found = LAYERS[name](x)
            found.mul_(0.5)
            return found.flatten(1).sum(1, keepdim=True) + x.mean((1, 2, 3))[:, None]

    images = torch.rand(2, 16, 3, 3) - 0.3
    program = export_program(Written(), images)
    assert writing(program.graph) == []
    torch.testing.assert_close(program.module()(images), Written()(images))


@pytest.mark.parametrize("write", [slice_doubled, relu_and_add, slice_masked, of_one_type, permuted, dropped, reshaped])
def test_int8_keeps_what_was_written(write: Callable[[Tensor], Tensor]) -> None:
    net, unwritten = Between(write).eval(), Between(torch.clone).eval()
    with torch.no_grad():
        graph = cast(fx.GraphModule, export_program(net, IMAGES[:2]).module())
        fold_constants(graph)
        prepared = prepare_pt2e(graph, SchemeQuantizer(Scheme()))
        calibrate(prepared, IMAGES, Quantization(observer="scores", ranges="learned", iterations=2))
        found = convert_pt2e(prepared)(IMAGES)
        wanted, without = net(IMAGES), unwritten(IMAGES)
    assert sqnr_db(wanted.numpy(), found.numpy()) > 30
    assert sqnr_db(without.numpy(), found.numpy()) < 25


def test_what_nobody_else_sees_becomes_the_operator_that_returns_it() -> None:
    class Activations(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, images: Tensor) -> Tensor:
            x = functional.relu6(self.first(images), inplace=True)
            x = functional.hardtanh(x, 0.0, 3.0, inplace=True)
            return functional.silu(self.second(x), inplace=True)

    net = Activations()
    program = export_program(net, IMAGES[:2])
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [name for name in names if "size" not in name] == [
        "aten.conv2d.default",
        "aten.relu6.default",
        "aten.hardtanh.default",
        "aten.conv2d.default",
        "aten.silu.default",
    ]
    torch.testing.assert_close(program.module()(IMAGES), net(IMAGES), rtol=0, atol=0)


def test_a_clamp_s_bounds_are_of_one_kind() -> None:
    """PyTorch's exporter to ONNX fails on a whole bound beside one that is not."""

    class Cut(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clamp(max=1).clamp(0, 0.5)

    model = nn.Sequential(nn.Hardtanh(0, 1), nn.Hardtanh(-0.5, 2), Cut())
    program = torch.export.export(model, (torch.rand(2, 3),))
    bounds = [node.args[1:] for node in with_clamps(program).graph.nodes if node.op == "call_function"]
    assert bounds == [(0.0, 1.0), (-0.5, 2.0), (None, 1.0), (0.0, 0.5)]
    assert all(isinstance(one, float | None) for pair in bounds for one in pair)
