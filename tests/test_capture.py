"""Capturing a program, and its copy without operators that write over their input."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.capture import export_program, without_in_place


class Writes(nn.Module):
    """In-place activations: of new values, which may as well return theirs, and of some that others see."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.relu6(self.first(images), inplace=True)
        x = functional.hardtanh(x, 0.0, 3.0, inplace=True)
        x = functional.silu(self.second(x), inplace=True)
        seen = self.second(x)
        view = seen[:, :2]
        seen.relu_()  # the view sees it
        later = self.first(images)
        later.clamp_(0, 1)
        total: Tensor = x.mean() + view.mean() + later.sum() + seen.sum()
        return total


def operators(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def test_what_nobody_else_sees_is_returned_and_not_written() -> None:
    torch.manual_seed(0)
    images, net = torch.randn(2, 3, 8, 8), Writes()
    program = export_program(net, images)
    plain = without_in_place(program)
    torch.testing.assert_close(plain.module()(images), net(images), rtol=0, atol=0)
    assert {"aten.relu6_.default", "aten.hardtanh_.default", "aten.silu_.default", "aten.relu_.default"} <= set(
        operators(program)
    )
    assert {"aten.clamp.default", "aten.silu.default"} <= set(operators(plain))
    assert {name for name in operators(plain) if name.split(".")[1].endswith("_")} == {"aten.relu_.default"}


def test_the_program_given_stays_as_it_is() -> None:
    program = export_program(Writes(), torch.randn(2, 3, 8, 8))
    before = operators(program)
    without_in_place(program)
    assert operators(program) == before


def test_a_clamp_s_bounds_are_of_one_kind() -> None:
    """PyTorch's exporter to ONNX fails on a whole bound beside one that is not."""
    model = nn.Sequential(nn.Hardtanh(0, 1), nn.Hardtanh(-0.5, 2), Cut())
    program = torch.export.export(model, (torch.rand(2, 3),))
    bounds = [node.args[1:] for node in without_in_place(program).graph.nodes if node.op == "call_function"]
    assert bounds == [(0.0, 1.0), (-0.5, 2.0), (None, 1.0), (0.0, 0.5)]
    assert all(isinstance(one, float | None) for pair in bounds for one in pair)


class Cut(nn.Module):
    """Bounds as people write them."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(max=1).clamp(0, 0.5)
