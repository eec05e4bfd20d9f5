"""Which operator of a program its exported ONNX computes otherwise: all their values side by side, in order."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper
from torch import Tensor, fx

from bitferry.device.arrays import Images
from bitferry.pipeline.onnx_in import session
from bitferry.pipeline.unsupported import place

Values = Mapping[str, NDArray[np.generic]]


def first_difference(module: fx.GraphModule, model: Path, images: Images, allowed: float) -> str | None:
    """Name the first operator of a float graph whose value in the ONNX file `model` differs, and its layer.

    The exporter gives a value the name that its node has in `module`. What differs by more than `allowed` of the
    largest value, or of 1, is different. Returns None where no named value is, or where the values cannot be had.
    """
    try:
        return _find(module, model, images, allowed)
    except Exception:  # noqa: BLE001 - what is being explained may stop this, too
        return None


def _find(module: fx.GraphModule, model: Path, images: Images, allowed: float) -> str | None:
    recorded = _Recorder(module)
    with torch.no_grad():
        recorded.run(torch.from_numpy(images.copy()))
    exported = _values(model, images, set(recorded.values))
    for node in module.graph.nodes:
        if node.name in exported and _differs(recorded.values[node.name], exported[node.name], allowed):
            operator = str(node.target).removeprefix("aten.").rpartition(".")[0]
            return f"the operator {operator} in {place(node)}"
    return None


class _Recorder(fx.Interpreter):
    """Run a graph and keep each floating-point value by its node's name."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, NDArray[np.generic]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function" and isinstance(value, Tensor) and value.is_floating_point():
            self.values[n.name] = value.numpy().copy()  # an operator after it may write over it
        return value


def _values(model: Path, images: Images, names: set[str]) -> Values:
    """Run an ONNX file operator by operator for the values of these names, as far as it has them."""
    opened = onnx.load(model)
    made = {name for node in opened.graph.node for name in node.output} & names
    own = {output.name for output in opened.graph.output}
    opened.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in sorted(made - own))
    running = session.opened(opened.SerializeToString())
    outputs = [output.name for output in running.get_outputs()]
    found = running.run(outputs, {running.get_inputs()[0].name: images})
    return {name: cast(NDArray[np.generic], value) for name, value in zip(outputs, found, strict=True) if name in made}


def _differs(expected: NDArray[Any], found: NDArray[Any], allowed: float) -> bool:
    if expected.shape != found.shape:
        return True
    if not np.array_equal(np.isfinite(expected), np.isfinite(found)):
        return True
    known = np.isfinite(expected)
    scale = max(1.0, float(np.abs(expected[known]).max(initial=0.0)))
    return float(np.abs(expected - found)[known].max(initial=0.0)) > allowed * scale
