"""An ONNX file looked over before any runtime opens it: all of it inside the file, and of the sizes it really has."""

import math
import mmap
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bitferry.device.errors import InputError
from bitferry.device.protobuf import fields, numbers, signed

MOST_BYTES = 2**31
"""Of a file: protocol buffers have no more."""
MOST_ELEMENTS = 2**31
"""Of any one tensor."""
OPEN = -1
"""How some exporters write a size that is open."""
MOST_DEPTH = 8
"""Of graphs inside graphs."""
OPSETS = range(13, 24)
REMEDY = "copy the bundle again from where it was made"
DOMAINS = {"", "ai.onnx", "com.microsoft"}
BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 16: 16} | {
    **dict.fromkeys((17, 18, 19, 20), 8),
    **dict.fromkeys((21, 22), 4),
}
"""Of one element of each type a tensor may have, by ONNX's numbers: no text, no complex numbers."""
FLOATS = {1: "<f4", 10: "<f2", 11: "<f8"}
UNITS = {4: 4, 10: 8}
"""Bytes of one element in the fields that hold floats; the others hold varints."""
RANGES = {2: (0, 255), 3: (-128, 127), 4: (0, 65535), 5: (-32768, 32767)}
SHAPED_BY = {"ConstantOfShape": 0, "Expand": 1, "Reshape": 1, "Tile": 1, "Pad": 1, "Resize": 3}
"""Which input says how large the output is."""


@dataclass(frozen=True)
class _Tensor:
    name: str
    kind: int
    shape: tuple[int, ...]
    raw: memoryview | None
    listed: Sequence[int]
    """Where it is written number by number."""


@dataclass
class _Graph:
    """What is known so far, before the next node."""

    values: set[str]
    constants: dict[str, _Tensor]
    own: set[str] = field(default_factory=set)
    """What this graph itself gives; a graph around it may use the same names."""

    def give(self, name: str) -> None:
        if name in self.own:
            raise ValueError(f"two values are called {name!r}")
        if name:
            self.own.add(name)
            self.values.add(name)


def check(path: Path, *, opsets: range = OPSETS, remedy: str = REMEDY) -> None:
    """Raise InputError, naming what was found and the remedy, for a file that is not just one whole ONNX model.

    External data, whatever it points at, is refused: a bundle's model is one file. What remains to the runtime is
    whether it knows the operators.
    """
    try:
        _model(_content(path), opsets)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no ONNX model that can be opened: {error}; {remedy}") from error


def _content(path: Path) -> memoryview:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode) or not 0 < found.st_size < MOST_BYTES:  # opening a pipe would wait for ever
        raise ValueError(f"{found.st_size} bytes found, a plain file of 1 to {MOST_BYTES - 1} expected")
    with path.open("rb") as stream:
        return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))


def _model(message: memoryview, known: range) -> None:
    graphs = opsets = 0
    for number, value in fields(message):
        if number == 8:
            opsets += 1
            _opset(_bytes(value), known)
        elif number in (20, 25):
            raise ValueError("it holds functions or a training of its own")
        elif number == 7:
            graphs += 1
            _graph(_bytes(value), _Graph(set(), {}), depth=0)
    if graphs != 1 or not opsets:
        raise ValueError(f"it holds {graphs} graphs and {opsets} operator sets, one of each or more were expected")


def _opset(message: memoryview, known: range) -> None:
    found = dict(fields(message))
    domain, version = _text(found.get(1, memoryview(b""))), found.get(2, 0)
    if domain in ("", "ai.onnx") and version not in known:
        raise ValueError(f"its operator set is {version}; {known[0]} to {known[-1]} are read")


def _graph(message: memoryview, graph: _Graph, depth: int) -> None:
    """Check a graph in the order its parts are used in; nodes must come after what they take."""
    if depth > MOST_DEPTH:
        raise ValueError(f"graphs inside graphs, more than {MOST_DEPTH} deep")
    parts: dict[int, list[memoryview]] = {}
    for number, value in fields(message):
        if number in (1, 5, 11, 12, 13, 15):
            parts.setdefault(number, []).append(_bytes(value))
    if 15 in parts:
        raise ValueError("it holds sparse tensors")
    tensors = [_tensor(part) for part in parts.get(5, [])]
    inputs = [_value(part) for part in parts.get(11, [])]
    for name in (*(tensor.name for tensor in tensors), *(set(inputs) - {tensor.name for tensor in tensors})):
        graph.give(name)
    graph.constants.update((tensor.name, tensor) for tensor in tensors)
    for part in parts.get(1, []):
        _node(part, graph, depth)
    for name in (_value(part) for part in parts.get(12, [])):
        if name not in graph.values:
            raise ValueError(f"nothing gives its result {name!r}")
    for part in parts.get(13, []):
        _value(part)


def _node(message: memoryview, graph: _Graph, depth: int) -> None:
    inputs: list[str] = []
    outputs: list[str] = []
    words, attributes = {3: "", 4: "", 7: ""}, []
    for number, value in fields(message):
        if number in (1, 2):
            (inputs if number == 1 else outputs).append(_text(value))
        elif number in words:
            words[number] = _text(value)
        elif number == 5:
            attributes.append(_bytes(value))
    name, kind = words[3] or "without a name", words[4]
    if words[7] not in DOMAINS:
        raise ValueError(f"the node {name} is a {kind} of {words[7]!r}, which is no part of ONNX")
    if unknown := [one for one in inputs if one and one not in graph.values]:
        raise ValueError(f"the node {name} takes {unknown[0]!r}, which nothing before it gives: a cycle, or a gap")
    axis = 1
    for attribute in attributes:
        found = _attribute(attribute, graph, depth, outputs[:1] if kind == "Constant" else [])
        axis = found if found is not None else axis
    if kind in ("QuantizeLinear", "DequantizeLinear"):
        _scale(name, [graph.constants.get(one) for one in inputs], axis)
    shape = inputs[SHAPED_BY[kind] :][:1] if kind in SHAPED_BY else []
    for tensor in (graph.constants[one] for one in shape if one in graph.constants):
        if math.prod(max(1, abs(int(size))) for size in _integers(tensor)) > MOST_ELEMENTS:
            raise ValueError(f"the node {name} makes a tensor of more than {MOST_ELEMENTS} elements")
    for one in outputs:
        graph.give(one)


def _attribute(message: memoryview, graph: _Graph, depth: int, gives: Sequence[str]) -> int | None:
    """Check the tensors and graphs of an attribute; give its number where it is called axis."""
    axis = name = None
    for number, value in fields(message):
        if number == 1:
            name = _text(value)
        elif number == 3 and isinstance(value, int):
            axis = signed(value)
        elif number in (5, 10):
            tensor = _tensor(_bytes(value))
            graph.constants.update(dict.fromkeys(gives, tensor))
        elif number in (22, 23):
            raise ValueError("it holds sparse tensors")
        elif number in (6, 11):
            _graph(_bytes(value), _Graph(set(graph.values), dict(graph.constants)), depth + 1)
        elif number == 8 and any(abs(one) > MOST_ELEMENTS for one in numbers(value)):
            raise ValueError(f"an attribute {name} of more than {MOST_ELEMENTS}")
    return axis if name == "axis" else None


def _tensor(message: memoryview) -> _Tensor:
    shape: list[int] = []
    listed: list[int] = []
    count, kind, name, raw = 0, 0, "", None
    for number, value in fields(message):
        if number == 1:
            shape += numbers(value)
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8:
            name = _text(value)
        elif number == 9:
            raw = _bytes(value)
        elif number == 13 or (number == 14 and value):
            raise ValueError(f"the tensor {name or 'before its name'} is kept in another file; all must be in this one")
        elif number in UNITS:
            count += len(_bytes(value)) // UNITS[number] if not isinstance(value, int) else 1
        elif number in (5, 7, 11):
            listed += numbers(value)
    tensor = _Tensor(name, kind, tuple(shape), raw, listed)
    _refuse_size(tensor, count + len(listed))
    return tensor


def _refuse_size(tensor: _Tensor, listed: int) -> None:
    told = f"the tensor {tensor.name!r} of shape {list(tensor.shape)}"
    if tensor.kind not in BITS:
        raise ValueError(f"{told} is of type {tensor.kind}, which no model for images has")
    if any(size < 0 for size in tensor.shape) or math.prod(tensor.shape) > MOST_ELEMENTS:
        raise ValueError(f"{told} is of a size that cannot be")
    elements = math.prod(tensor.shape)
    wanted = -(-elements * BITS[tensor.kind] // 8)
    if tensor.raw is not None and len(tensor.raw) != wanted:
        raise ValueError(f"{told} has {len(tensor.raw)} bytes, {wanted} were expected")
    if tensor.raw is None and listed not in {elements, -(-elements * BITS[tensor.kind] // 8)}:
        raise ValueError(f"{told} has {listed} elements, {elements} were expected")


def _value(message: memoryview) -> str:
    """Give a value's name; raise ValueError for a shape that cannot be."""
    name, shape = "", []
    for number, value in fields(message):
        if number == 1:
            name = _text(value)
        elif number == 2:
            shape = _shape(_bytes(value))
    if any(size < OPEN for size in shape) or math.prod(map(abs, shape)) > MOST_ELEMENTS:
        raise ValueError(f"the value {name!r} of shape {shape} is of a size that cannot be")
    return name


def _shape(message: memoryview) -> list[int]:
    """Read the sizes that are numbers out of a type."""
    tensors = [_bytes(value) for number, value in fields(message) if number == 1]
    shapes = [_bytes(value) for one in tensors for number, value in fields(one) if number == 2]
    sizes = [_bytes(value) for one in shapes for number, value in fields(one) if number == 1]
    return [signed(value) for one in sizes for number, value in fields(one) if number == 1 and isinstance(value, int)]


def _scale(name: str, inputs: Sequence[_Tensor | None], axis: int) -> None:
    """Refuse a quantization whose scale, zero point or axis makes no sense."""
    data, scale, zero = (*inputs, None, None, None)[:3]
    if scale and scale.kind in FLOATS and scale.raw is not None:
        values = np.frombuffer(scale.raw, FLOATS[scale.kind])
        if not np.all(np.isfinite(values) & (values > 0)):
            raise ValueError(f"the node {name} has a scale of {_worst(values)}; a scale is above zero")
    if zero and zero.kind in RANGES and zero.raw is None:
        low, high = RANGES[zero.kind]
        if any(not low <= value <= high for value in zero.listed):
            raise ValueError(f"the node {name} has a zero point outside {low} to {high}")
    if scale and data and math.prod(scale.shape) > 1:
        rank = len(data.shape)
        if not -rank <= axis < rank or data.shape[axis] != math.prod(scale.shape):
            found = f"axis {axis} and {math.prod(scale.shape)} scales for a tensor of shape {list(data.shape)}"
            raise ValueError(f"the node {name} has {found}")


def _worst(values: Iterable[float]) -> float:
    return next(float(value) for value in values if not (math.isfinite(value) and value > 0))


def _integers(tensor: _Tensor) -> Sequence[int]:
    if tensor.kind != 7 or tensor.raw is None:
        return tensor.listed
    found: list[int] = np.frombuffer(tensor.raw, "<i8").tolist()
    return found


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message was expected")  # noqa: TRY004 - of the file, not of the program
    return value


def _text(value: int | memoryview) -> str:
    return bytes(_bytes(value)).decode()
