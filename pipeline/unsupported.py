"""Say which operator of which layer a tool cannot take, and what else can be done: the text of a StageFailed."""

import contextlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import torch
from torch import fx

from bitferry import targets
from bitferry.device.errors import TargetUnavailable, first_line
from bitferry.pipeline import failing

SHOWN = 3
NO_FUNCTION = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.]+)', overload='(\w+)'")
TRANSLATED = re.compile(r"translating node %(\w+)")
USER_CODE = re.compile(r'File "([^"<>]+)", line (\d+), in (?!<)\w+\n\s*(.+)')


def in_export(error: BaseException, capture: Callable[[], torch.export.ExportedProgram]) -> str:
    """Explain why torch.onnx.export refused a model: the operator it has no form for, or the cause and the line.

    `capture` gives the program that it tried to export.
    """
    text = _chain(error)
    found = NO_FUNCTION.search(text)
    if found is None:
        while error.__cause__:
            error = error.__cause__
        if failed := TRANSLATED.search(text):
            named = [node for node in _nodes(capture) if node.name == failed[1]]
            where = f"the operator {named[0].target} in {place(named[0])}: " if named else ""
            return f"{where}{first_line(error)}; {ways_out('onnx')}"
        return f"{first_line(error)} {in_code(error)}".strip()
    operator, overload = found.groups()
    places = [place(node) for node in _nodes(capture) if _is(node, re.split(r"::|\.", operator)[-1], overload)]
    where = "; ".join(dict.fromkeys(places[:SHOWN])) or "the model"
    return f"the operator {operator} in {where} has no form in ONNX; {ways_out('onnx')}"


def _nodes(capture: Callable[[], torch.export.ExportedProgram]) -> list[fx.Node]:
    """List the nodes of a program as it was captured, and of its decompositions where they can be made."""
    with torch.no_grad():
        program = capture()
        nodes = list(program.graph.nodes)
        with contextlib.suppress(Exception):  # what is being explained may stop this, too
            nodes += program.run_decompositions().graph.nodes
    return nodes


def _is(node: fx.Node, name: str, overload: str) -> bool:
    """Say whether a node is of an operator, or of one that it comes from, as prims.x does from aten.special_x."""
    _, found, given = (*str(node.target).split("."), "", "")[:3]
    return found.removeprefix("special_") == name.removeprefix("special_") and given == overload


def in_code(error: BaseException) -> str:
    """Name the line of the model's own source that a capture stopped at; nothing where the error tells none."""
    line = _own_line(_chain(error))
    return f"at {line}" if line else failing.place(error)


def in_compile(error: BaseException, model: Path, target: str) -> str:
    """Name the ONNX nodes that a target's compiler complains about, by operator and PyTorch module."""
    form = targets.get(target).CONSUMES
    if model.suffix != ".onnx":
        return ways_out(form, target)
    text, nodes = _chain(error), onnx.load(model, load_external_data=False).graph.node
    blamed = [n for n in nodes if n.name and re.search(rf"(?<![\w/.]){re.escape(n.name)}(?![\w/.])", text)]
    blamed = blamed or [n for n in nodes if re.search(rf"\b{n.op_type}\b", first_line(error))]
    told = dict.fromkeys(f"the operator {n.op_type} in the layer '{n.name.partition('/node_')[0]}'" for n in blamed)
    return "; ".join([*list(told)[:SHOWN], ways_out(form, target)])


def ways_out(form: targets.Form, target: str | None = None) -> str:
    """List the targets that might take what one, or every one fed by `form`, does not."""
    others = [name for name in targets.names() if name != target and (target or _form(name) not in (form, None))]
    return f"replace it in the model, or try another target ({', '.join(others)})"


def _form(name: str) -> targets.Form | None:
    try:
        return targets.get(name).CONSUMES
    except (TargetUnavailable, ImportError, OSError):
        return None


def place(node: fx.Node) -> str:
    """Name the layer that a node is of, with the line of the model."""
    stack: Sequence[tuple[str, object]] = list((node.meta.get("nn_module_stack") or {}).values())
    layer = re.sub(r"^L\['self'\]\.?", "", str(stack[-1][0])).removeprefix("model.") if stack else ""
    trace = node.meta.get("stack_trace") or ""
    line = _own_line(trace) or _line(USER_CODE.findall(trace))
    return f"the layer '{layer or 'model'}'{f' ({line})' if line else ''}"


def _own_line(text: str) -> str:
    """Quote the innermost line of a traceback's text that is not PyTorch's own; nothing where there is none."""
    return _line([match for match in USER_CODE.findall(text) if "/torch/" not in match[0]])


def _line(found: Sequence[Sequence[str]]) -> str:
    return f"{Path(found[-1][0]).name}:{found[-1][1]}: {found[-1][2].strip()}" if found else ""


def _chain(error: BaseException | None) -> str:
    """Join the texts of an error and of what caused it."""
    parts = []
    while error is not None:
        parts.append(str(error))
        error = error.__cause__
    return "\n".join(parts)
