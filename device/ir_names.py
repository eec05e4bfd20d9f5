"""The names of an OpenVINO graph's operations before it is saved: each layer's own, the others by their position."""

import re
from typing import Any

BACKWARD = ("ConvolutionBackpropData", "GroupConvolutionBackpropData")
WITH_BIASES = ("Convolution", "GroupConvolution", "MatMul", *BACKWARD)
AUTOMATIC = re.compile(r"(?!Conv_|ConvTranspose_|Gemm_)[A-Z]\w*_\d+")
"""A name that OpenVINO made from an operation's type and a count; it has none that ONNX calls a layer."""
APART = "/WithoutBiases"
"""After a layer's name, where OpenVINO makes two operations of it."""


def settle(graph: Any) -> None:
    """Name the operations of an `openvino.Model`."""
    _name_layers(graph)
    _name_by_position(graph)


def _name_layers(graph: Any) -> None:
    """Let the two operations of a layer with a bias have its name: of one of them OpenVINO knows none, or another.

    A transposed convolution gets a number, and the last layer's bias the name of the model's output.
    """
    for operation in graph.get_ops():
        if operation.get_type_name() in WITH_BIASES and (bias := _bias(operation)):
            name, whole = operation.get_friendly_name(), bias.get_friendly_name()
            if AUTOMATIC.fullmatch(name) and not AUTOMATIC.fullmatch(whole):
                operation.set_friendly_name(whole + APART)
            elif name.endswith(APART):
                bias.set_friendly_name(name.removesuffix(APART))


def _bias(operation: Any) -> Any:
    """Give the addition that a layer's output goes to, before it perhaps a multiplication; None where it has others."""
    takers = list(operation.output(0).get_target_inputs())
    taker = takers[0].get_node() if len(takers) == 1 else None
    kind = taker.get_type_name() if taker else ""
    return _bias(taker) if kind == "Multiply" else taker if kind == "Add" else None


def _name_by_position(graph: Any) -> None:
    """Replace the names that OpenVINO made by counting what this process has built; the same model, the same file."""
    for position, operation in enumerate(graph.get_ordered_ops()):
        if AUTOMATIC.fullmatch(operation.get_friendly_name()):
            operation.set_friendly_name(f"{operation.get_type_name()}_{position}")
