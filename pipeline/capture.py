"""Program → torch.export program (`.pt2`), for the targets that compile from it; reading one, and its plain form."""

import contextlib
import logging
from functools import lru_cache, partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, fx, nn

from bitferry.device.errors import StageFailed, first_line
from bitferry.pipeline import cache, progress, unsupported
from bitferry.pipeline.artifacts import Captured, Quantized, TorchProgram
from bitferry.pipeline.data.split import Split
from bitferry.pipeline.functional import functional
from bitferry.pipeline.rewrites import rewrite


def capture(program: TorchProgram, calibration: Split, build: cache.Cache) -> Captured:
    """Capture with torch.export, batch dynamic where the model's code lets it; a quantized program is one already.

    Raises StageFailed when the model cannot be captured.
    """
    if isinstance(program, Quantized):
        return Captured(program.path, program.precision, program.key)
    rewritten = [cache.file_hash(Path(__file__).with_name(name)) for name in ("functional.py", "rewrites.py")]
    inputs = {"rewrites": rewritten, "program": program.key, "data": calibration.key}
    key = cache.key("capture", code=__file__, packages=("torch",), **inputs)
    done = build.folder("capture", key, partial(_capture, program))
    return Captured(done / "program.pt2", program.precision, key)


def captured(program: TorchProgram) -> torch.export.ExportedProgram:
    """Give a program as torch.export has it: a quantized one is one, a float one is captured once in this process.

    Take its `module()`, which is a copy, to change anything. Raises StageFailed when it cannot be captured.
    """
    if isinstance(program, Quantized):
        return read(program.path)
    return _captured(program.module(), program.baseline.preprocessing.shape)


def float_counterpart(program: TorchProgram) -> torch.export.ExportedProgram:
    """Return the float program that has the layers of this one, by the same names: of a float program itself."""
    if isinstance(program, Quantized) and program.float_counterpart:
        return read(program.float_counterpart)
    return captured(program.baseline)


@lru_cache(maxsize=8)
def read(path: Path) -> torch.export.ExportedProgram:
    """Load a program that a stage wrote; once in this process, for a large one takes seconds."""
    register_quantized_operators()
    return torch.export.load(path)


def read_program(path: Path) -> nn.Module:
    """Load a program that a stage wrote, as a module that takes any number of images."""
    module = read_graph(path)
    return module if fixed_batch(module) is None else OneByOne(module)


def read_graph(path: Path) -> fx.GraphModule:
    """Load a program that a stage wrote, as a graph; it takes as many images at once as it was captured for."""
    return cast(fx.GraphModule, read(path).module())


def fixed_batch(model: fx.GraphModule) -> int | None:
    """Return how many images a captured graph takes at once; None for any number."""
    images = next(node for node in model.graph.nodes if node.op == "placeholder")
    size = images.meta["val"].shape[0]
    return size if isinstance(size, int) else None


class OneByOne(nn.Module):
    """A model whose batch is fixed at 1, given its images one after the other."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([self.module(image) for image in torch.split(images, 1)])


def register_quantized_operators() -> None:
    """Make torch know the operators of a quantized program, before one is loaded."""
    quiet_imports()
    import torchao.quantization.pt2e  # noqa: F401, PLC0415 - seconds to import


def quiet_imports() -> None:
    """Keep a notice about torchao's own enum, logged on import by torch 2.14, off the user's screen."""
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


@lru_cache(maxsize=2)
def _captured(model: nn.Module, shape: tuple[int, ...]) -> torch.export.ExportedProgram:
    images = torch.zeros(2, *shape, dtype=torch.uint8)
    with torch.no_grad():
        try:
            return rewrite(export_program(model, images))
        except StageFailed as error:
            with contextlib.suppress(StageFailed):  # the error of the two images says more
                fixed = rewrite(export_program(model, images[:1], dynamic=False))
                why = "this model's code fixes the number of images, so it is captured for one at a time"
                progress.stage("capture", f"{why} ({unsupported.in_code(error) or first_line(error)})")
                return fixed
            raise


def export_program(model: nn.Module, images: Tensor, *, dynamic: bool = True) -> torch.export.ExportedProgram:
    """Capture `model` with torch.export, without in-place operators, for any batch or for that of `images` alone.

    Raises StageFailed when it cannot be captured.
    """
    batch = ({0: torch.export.Dim.DYNAMIC},) if dynamic else None

    def export(module: nn.Module) -> torch.export.ExportedProgram:
        return torch.export.export(module, (images,), dynamic_shapes=batch)

    try:
        return functional(export(model), export)
    except Exception as error:  # torch.export raises many kinds, some only once their own code gives up
        place = unsupported.in_code(error)
        where = f" ({place})" if place else ""
        raise StageFailed(f"torch.export cannot capture the model: {first_line(error)}{where}") from error


def _capture(program: TorchProgram, out: Path) -> None:
    torch.export.save(captured(program), out / "program.pt2")


def layer_name(node: fx.Node) -> str:
    """Give the path of the module that a node is of, as a reader of the model knows it; else the node's own name."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return (stack[-1][0].removeprefix("model.") if stack else "") or node.name
