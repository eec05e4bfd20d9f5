"""Program → torch.export program (`.pt2`), for the targets that compile from it; reading one, and its plain form."""

import copy
import logging
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from device.errors import StageFailed, first_line
from pipeline import cache, unsupported
from pipeline.artifacts import Captured, Quantized, TorchProgram
from pipeline.data.split import Split

aten = torch.ops.aten


def capture(program: TorchProgram, calibration: Split, build: cache.Cache) -> Captured:
    """Capture with torch.export, batch dynamic; a quantized program is one already.

    Raises StageFailed when the model cannot be captured.
    """
    if isinstance(program, Quantized):
        return Captured(program.path, program.precision, program.key)
    key = cache.key("capture", code=__file__, packages=("torch",), program=program.key, data=calibration.key)
    done = build.folder("capture", key, partial(_capture, program))
    return Captured(done / "program.pt2", program.precision, key)


def captured(program: TorchProgram) -> torch.export.ExportedProgram:
    """Give a program as torch.export has it: a quantized one is one, a float one is captured once in this process.

    Take its `module()`, which is a copy, to change anything. Raises StageFailed when it cannot be captured.
    """
    if isinstance(program, Quantized):
        return read(program.path)
    return _captured(program.module(), program.baseline.preprocessing.shape)


def twin(program: TorchProgram) -> torch.export.ExportedProgram:
    """Give the float program whose tensors inside this one's are nearest to: the equalized one, or the baseline's."""
    if isinstance(program, Quantized) and program.equalized:
        return read(program.equalized)
    return captured(program.baseline)


@lru_cache(maxsize=8)
def read(path: Path) -> torch.export.ExportedProgram:
    """Load a program that a stage wrote; once in this process, for a large one takes seconds."""
    register_quantized_operators()
    return torch.export.load(path)


def read_program(path: Path) -> nn.Module:
    """Load a program that a stage wrote, as a module."""
    module: nn.Module = read(path).module()
    return module


def register_quantized_operators() -> None:
    """Make torch know the operators of a quantized program, before one is loaded."""
    quiet_imports()
    import torchao.quantization.pt2e  # noqa: F401, PLC0415 - seconds to import


def quiet_imports() -> None:
    """Keep a notice about torchao's own enum, logged on import by torch 2.14, off the user's screen."""
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


@lru_cache(maxsize=2)
def _captured(model: nn.Module, shape: tuple[int, ...]) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return export_program(model, torch.zeros(2, *shape, dtype=torch.uint8))


def export_program(model: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    """Capture `model` with torch.export, batch dynamic; raise StageFailed when it cannot be captured."""
    try:
        return torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    except Exception as error:  # torch.export raises many kinds, some only once their own code gives up
        place = unsupported.in_code(error) or "run with --debug for the line in the model"
        raise StageFailed(f"torch.export cannot capture the model: {first_line(error)} ({place})") from error


def _capture(program: TorchProgram, out: Path) -> None:
    torch.export.save(captured(program), out / "program.pt2")


def without_in_place(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Copy a program with operators that return their result in place of those that write it over their input.

    And ReLU6 as the clamp that it is: else the ONNX exporter has to find that out, symbolically and slowly.
    """
    copied = copy.deepcopy(program)
    for node in copied.graph.nodes:
        if node.op == "call_function" and _may_return(node):
            name, overload = node.target._schema.name.removeprefix("aten::"), node.target._overloadname
            node.target = getattr(getattr(aten, name[:-1]), overload)
        if node.target is aten.relu6.default:
            node.target, node.args = aten.clamp.default, (node.args[0], 0.0, 6.0)
        if node.target is aten.hardtanh.default and len(node.args) == 3:
            node.target = aten.clamp.default
        if node.target is aten.clamp.default and node.meta["val"].is_floating_point():
            bounds = (float(bound) if isinstance(bound, int) else bound for bound in node.args[1:])
            node.args = (node.args[0], *bounds)  # of a whole one the exporter makes a tensor, of the other it does not
    copied.graph_module.recompile()
    return copied


def _may_return(node: fx.Node) -> bool:
    """Say whether nothing but `node` sees what it writes: its input is new, and read by no view and nothing later."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.name.startswith("aten::") or not schema.name.endswith("_"):
        return False
    written = [bool(one.alias_info and one.alias_info.is_write) for one in schema.arguments]
    plain = getattr(aten, schema.name.removeprefix("aten::")[:-1], None)
    given = next(iter(node.args), None)
    if written[:1] != [True] or any(written[1:]) or not hasattr(plain, schema.overload_name or "default"):
        return False
    if not isinstance(given, fx.Node) or not _is_new(given):
        return False
    return all(other is node or (other < node and _is_new(other)) for other in given.users)


def _is_new(node: fx.Node) -> bool:
    """Say whether a node's value shares no memory with another's; a dropout may give its input, and says not so."""
    schema: Any = getattr(node.target, "_schema", None)
    return schema is not None and not any(one.alias_info for one in schema.returns) and "dropout" not in schema.name


def layer_name(node: fx.Node) -> str:
    """Give the path of the module that a node is of, as a reader of the model knows it; else the node's own name."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return (stack[-1][0].removeprefix("model.") if stack else "") or node.name
