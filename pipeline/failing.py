"""Whatever the tools of a stage raise, told as a failure of the stage, with the layer and the line of the model."""

import linecache
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from bitferry.device.errors import BitferryError, StageFailed, first_line

if TYPE_CHECKING:
    from torch import fx

OURS = Path(__file__).parents[1]
FOREIGN = re.compile(r"/(?:site|dist)-packages/|/lib/python3[.\d]*/|^<")
"""Of files that are no model's source: installed packages, Python's own, code that was generated."""
GENERATED = "<eval_with_key>"
"""What a file's name begins with that is no file but the code of a graph of torch.fx."""


@contextmanager
def stage(name: str, of: str = "") -> Iterator[None]:
    """Make any error of a tool in here a StageFailed that names the stage, and what of the model was being run.

    A failed read or write of a file stays an OSError, which says all itself.
    """
    try:
        yield
    except (BitferryError, OSError):
        raise
    except Exception as error:  # torch, torchao, onnx and the runtimes raise anything
        raise StageFailed(f"{f'{name} {of}'.strip()} failed: {told(error)}") from error


def told(error: BaseException) -> str:
    """Give an error's first line with its kind, and the place in the model where one is found."""
    kind, found = type(error).__name__, place(error)
    text = first_line(error)
    return f"{kind if text == kind else f'{kind}: {text}'}{f'; {found}' if found else ''}"


def place(error: BaseException) -> str:
    """Name the layer that was being run and the line of the model's own source; nothing where none was."""
    while error.__cause__ is not None:
        error = error.__cause__
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    for frame, line in reversed(frames):
        if frame.f_code.co_filename.startswith(GENERATED) and (node := _node(frame, line)) is not None:
            from bitferry.pipeline.unsupported import place as of_node  # noqa: PLC0415 - torch and onnx come with it

            return f"in {of_node(node)}"
    layer, source = _layer([frame for frame, _ in frames]), _source(frames)
    return " ".join(part for part in (f"in the layer '{layer}'" if layer else "", source) if part)


def _node(frame: FrameType, line: int) -> "fx.Node | None":
    """Find the node of a graph that its generated code was at."""
    found = re.match(r"\s*(\w+)\s*(?::.*)?=", linecache.getline(frame.f_code.co_filename, line))
    graph = getattr(frame.f_locals.get("self"), "graph", None)
    nodes = graph.nodes if found and graph is not None else ()
    return next((node for node in nodes if node.name == found[1]), None) if found else None


def _layer(frames: list[FrameType]) -> str:
    """Give the path of the innermost module that was running, within the outermost one that holds it."""
    kind = getattr(getattr(sys.modules.get("torch"), "nn", None), "Module", type(None))
    selves: list[Any] = [frame.f_locals.get("self") for frame in frames]
    running: list[Any] = [one for one in selves if one is not None and isinstance(one, kind)]
    for whole in running:
        for name, module in whole.named_modules():
            if module is running[-1] and name:
                return str(name.removeprefix("model."))
    return ""


def _source(frames: list[tuple[FrameType, int]]) -> str:
    """Quote the innermost line that is neither ours nor a package's: the model's own."""
    for frame, line in reversed(frames):
        name = frame.f_code.co_filename
        if not FOREIGN.search(name) and not _is_ours(Path(name)):
            return f"({Path(name).name}:{line}: {linecache.getline(name, line).strip()})"
    return ""


def _is_ours(path: Path) -> bool:
    return any(path.is_relative_to(OURS / package) for package in ("pipeline", "targets", "device"))
