"""What a runtime really ran, in words: per kind of layer, which precision, and the names of the exceptions."""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import onnx

from bitferry import targets
from bitferry.pipeline import export
from bitferry.pipeline.artifacts import Compiled, Program
from bitferry.pipeline.measure import reasons
from bitferry.pipeline.verdict import Execution
from bitferry.targets import Layer, Precision

MOST_NAMED = 3


@lru_cache(maxsize=64)
def executed(compiled: Compiled) -> tuple[Layer, ...]:
    """Ask the runtime, once in this process, what it runs of an artifact and how long each layer takes."""
    target = targets.get(compiled.target)
    return tuple(target.executed(compiled.path, precision=compiled.precision, options=compiled.options))


def summary(requested: Precision, layers: Sequence[Layer], *, expected: int | None = None) -> str:
    """Say it in one line, as in `int8 requested; 52 of 53 convolutions int8, 1 float32 (features.1)`.

    `expected` is how many layers the graph had; where the runtime tells of fewer, that is said.
    """
    kinds = dict.fromkeys(layer.kind for layer in layers)
    told = [_kind(requested, kind, [layer for layer in layers if layer.kind == kind]) for kind in kinds]
    if expected is not None and expected > len(layers):
        told.append(f"{expected - len(layers)} more in the graph that the runtime fused and does not report")
    return f"{requested} requested; " + ("; ".join(told) or "no convolution or matrix product found")


def precision(layers: Sequence[Layer], requested: Precision) -> str:
    """Name the precision that most layers ran in: what was asked for only where that is what ran."""
    counts = Counter(layer.precision for layer in layers)
    if not counts:
        return requested
    name, count = counts.most_common(1)[0]
    return name if 2 * count > len(layers) else "mixed"


def named(requested: Precision, layers: Sequence[Layer]) -> str:
    """Name an artifact by what ran: the precision asked for only where that is what most layers ran in."""
    ran = sum(layer.precision == requested for layer in layers)
    if not layers or 2 * ran > len(layers):
        return requested
    if ran:
        return f"{requested} in {ran} of {len(layers)} layers"
    return f"{precision(layers, requested)} ({requested} asked for)"


def _kind(requested: Precision, kind: str, layers: Sequence[Layer]) -> str:
    right = sum(layer.precision == requested for layer in layers)
    plural = kind if len(layers) == 1 else f"{kind}s"
    others: dict[tuple[str, str | None], list[str]] = {}
    for layer in layers:
        if layer.precision != requested:
            others.setdefault((layer.precision, layer.reason), []).append(layer.name)
    told = "".join(
        f", {len(names)} {name} ({_some(names)}{f': {why}' if why else ''})" for (name, why), names in others.items()
    )
    return f"{right} of {len(layers)} {plural} {requested}{told}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def told(program: Program, compiled: Compiled, runtime_float: Compiled | None) -> Execution:
    """Say what precision each layer ran in and why not int8, of the artifact and of the same runtime's float."""
    ran = reasons.explained(program, executed(compiled), compiled.precision, compiled.environment.runtime)
    floats = executed(runtime_float) if runtime_float else None
    count = _matrix_products_and_convolutions(compiled.source.path)
    return Execution(
        summary=summary(compiled.precision, ran, expected=count),
        layers=ran,
        float_summary=summary("float32", floats, expected=count) if floats is not None else None,
    )


def _matrix_products_and_convolutions(source: Path) -> int | None:
    """Count them in what the target compiled, to see whether its runtime tells of all; None for TorchScript."""
    if source.suffix != ".onnx":
        return None
    return sum(node.op_type in export.NAMED for node in onnx.load(source).graph.node)
