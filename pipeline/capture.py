"""Program → torch.export program (`.pt2`), for the targets that compile from it."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from device.errors import StageFailed, first_line
from pipeline import cache, unsupported
from pipeline.artifacts import Captured, Program, Quantized, Split


def capture(program: Program, calibration: Split, build: cache.Cache) -> Captured:
    """Capture with torch.export, batch dynamic; a quantized program is one already.

    Raises StageFailed when the model cannot be captured.
    """
    if isinstance(program, Quantized):
        return Captured(program.path, program.precision, program.key)
    key = cache.key("capture", code=__file__, packages=("torch",), program=program.key, data=calibration.key)
    done = build.folder("capture", key, partial(_capture, program, calibration))
    return Captured(done / "program.pt2", program.precision, key)


def export_program(model: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    """Capture `model` with torch.export, batch dynamic; raise StageFailed when it cannot be captured."""
    try:
        return torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    except Exception as error:  # torch.export raises many kinds, some only once their own code gives up
        place = unsupported.in_code(error) or "run with --debug for the line in the model"
        raise StageFailed(f"torch.export cannot capture the model: {first_line(error)} ({place})") from error


def _capture(program: Program, calibration: Split, out: Path) -> None:
    example = torch.from_numpy(calibration.images[:1].repeat(2, axis=0))
    with torch.no_grad():
        torch.export.save(export_program(program.module(), example), out / "program.pt2")


def layer_name(node: fx.Node) -> str:
    """Give the path of the module that a node is of, as a reader of the model knows it; else the node's own name."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return (stack[-1][0].removeprefix("model.") if stack else "") or node.name
