"""An OpenVINO IR looked over before the runtime opens it: plain XML, one graph, every constant inside the .bin."""

import math
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn
from xml.parsers import expat

from bitferry.device.errors import InputError

MOST_BYTES = 256_000_000
"""Of the XML; the constants are in the other file."""
MOST_DEPTH = 64
MOST_ELEMENTS = 2**31
"""Of any one tensor."""
OPSET = re.compile(r"opset\d{1,2}")
BITS = {"boolean": 8, "u1": 1, "u4": 4, "i4": 4, "nf4": 4, "f4e2m1": 4} | {
    f"{kind}{bits}": bits for kind in "uif" for bits in (8, 16, 32, 64) if f"{kind}{bits}" != "f8"
}
BITS |= {"bf16": 16, "f8e4m3": 8, "f8e5m2": 8, "f8e8m0": 8}
"""Of one element of each type a constant may have."""


@dataclass
class _Graph:
    """A graph, or the body of a loop: what its layers are and what they take."""

    layers: dict[str, str] = field(default_factory=dict)
    """Names by id."""
    takes: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class _Reader:
    """What was seen of the XML so far."""

    weights: int
    """Bytes of the .bin."""
    end: int = 0
    """Where its last constant ends."""
    path: list[str] = field(default_factory=list)
    graphs: list[_Graph] = field(default_factory=list)
    done: int = 0
    layer: str = ""
    kind: str = ""
    shape: list[int] = field(default_factory=list)
    text: str = ""

    def start(self, tag: str, given: dict[str, str]) -> None:
        self.path.append(tag)
        if len(self.path) > MOST_DEPTH:
            raise ValueError(f"elements inside elements, more than {MOST_DEPTH} deep")
        self.text = ""
        if tag == "layers":
            self.graphs.append(_Graph())
        elif tag == "layer":
            self._layer(given)
        elif tag == "edge" and self.path[-2:-1] == ["edges"]:  # others are those of a loop to itself
            self._edge(given)
        elif tag == "data" and self.path[-2:-1] == ["layer"]:
            self._data(given)
        elif tag in ("input", "output", "port"):
            self.shape = []

    def finish(self, tag: str) -> None:
        self.path.pop()
        if tag == "dim":
            self.shape.append(_number(self.text.strip(), f"a size of the layer {self.layer!r}", least=-1))
        elif tag == "port" and (0 in self.shape or math.prod(abs(size) for size in self.shape) > MOST_ELEMENTS):
            raise ValueError(f"the layer {self.layer!r} has a tensor of shape {self.shape}")
        elif tag == "edges" and self.graphs:
            _refuse_cycle(self.graphs.pop())
            self.done += 1

    def data(self, text: str) -> None:
        if self.path[-1] == "dim":
            self.text += text

    def _layer(self, given: dict[str, str]) -> None:
        if not self.graphs:
            raise ValueError("a layer outside the layers")
        layers = self.graphs[-1].layers
        self.layer, self.kind = given.get("name", "without a name"), given.get("type", "")
        if given.get("id", "") in layers:
            raise ValueError(f"the layers {layers[given['id']]!r} and {self.layer!r} have one id, {given['id']}")
        if not OPSET.fullmatch(given.get("version", "")):
            raise ValueError(
                f"the layer {self.layer!r} is of {given.get('version', 'no operator set')!r}, which OpenVINO does not "
                "have by itself; extensions are never loaded"
            )
        layers[given.get("id", "")] = self.layer

    def _edge(self, given: dict[str, str]) -> None:
        source, to = given.get("from-layer", ""), given.get("to-layer", "")
        layers = self.graphs[-1].layers if self.graphs else {}
        if source not in layers or to not in layers:
            raise ValueError(f"an edge from layer {source!r} to {to!r}, of which one is not there")
        self.graphs[-1].takes.setdefault(to, []).append(source)

    def _data(self, given: dict[str, str]) -> None:
        if self.kind == "Const":
            self._constant(given)
        elif self.kind == "Parameter":  # beside numbers, a size left open is ? or a range of two
            sizes = [int(size) for size in re.findall(r"-?[0-9]+", given.get("shape", "")[:1000])]
            if any(size < 1 for size in sizes) or math.prod(sizes) > MOST_ELEMENTS:
                raise ValueError(f"the input {self.layer!r} is of shape {given['shape'][:60]}")

    def _constant(self, given: dict[str, str]) -> None:
        what = f"of the constant {self.layer!r}"
        offset = _number(given.get("offset", ""), f"the offset {what}")
        size = _number(given.get("size", ""), f"the size {what}")
        sizes = [
            _number(part.strip(), f"the shape {what}") for part in given.get("shape", "").split(",") if part.strip()
        ]
        kind = given.get("element_type", "")
        if offset + size > self.weights:
            raise ValueError(
                f"the constant {self.layer!r} is at {offset} to {offset + size} of the weights, which have "
                f"{self.weights} bytes"
            )
        if kind not in BITS or size != -(-math.prod(sizes) * BITS[kind] // 8):
            raise ValueError(f"the constant {self.layer!r} of shape {sizes} and type {kind} has {size} bytes")
        self.end = max(self.end, offset + size)


def check(path: Path) -> None:
    """Raise InputError, naming what was found, for an IR that its own runtime had better not open.

    Sizes fit and a graph is whole: what the layers compute is for the runtime, and the right weights for a hash.
    """
    try:
        _read(path, path.with_suffix(".bin"))
    except OSError as error:
        raise InputError(f"{error.filename or path} cannot be read: {error.strerror}") from error
    except (ValueError, expat.ExpatError) as error:
        raise InputError(
            f"{path} is no OpenVINO model that can be opened: {error}; copy the bundle again from where it was made"
        ) from error


def _read(path: Path, weights: Path) -> None:
    reader = _Reader(weights=_size(weights))
    if not 0 < _size(path) <= MOST_BYTES:
        raise ValueError(f"the XML has {path.stat().st_size} bytes, 1 to {MOST_BYTES} expected")
    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = reader.start, reader.finish
    parser.CharacterDataHandler = reader.data
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = _refuse_declaration
    with path.open("rb") as stream:
        parser.ParseFile(stream)
    if reader.done == 0 or reader.graphs:
        raise ValueError("no graph of layers and edges in it")
    if reader.end != reader.weights:
        raise ValueError(f"its constants take {reader.end} bytes of {weights.name}, which has {reader.weights}")


def _size(path: Path) -> int:
    """Give a file's size; an opened pipe would wait for ever, and a device never ends."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise ValueError(f"{path.name} is missing") from None
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path.name} is no plain file")
    return found.st_size


def _refuse_declaration(*_: object) -> NoReturn:
    raise ValueError("it declares a document type or entities, which an IR never does")


def _number(text: str, what: str, *, least: int = 0) -> int:
    if not re.fullmatch(r"-?[0-9]{1,18}", text) or int(text) < least:
        raise ValueError(f"{what} is {text[:40]!r}")
    return int(text)


def _refuse_cycle(graph: _Graph) -> None:
    """Take away, again and again, what takes nothing that is left; what stays takes itself."""
    open_inputs = {layer: len(graph.takes.get(layer, ())) for layer in graph.layers}
    users: dict[str, list[str]] = {}
    for layer, sources in graph.takes.items():
        for source in sources:
            users.setdefault(source, []).append(layer)
    ready = [layer for layer, count in open_inputs.items() if count == 0]
    while ready:
        for user in users.get(ready.pop(), ()):
            open_inputs[user] -= 1
            if open_inputs[user] == 0:
                ready.append(user)
    if stuck := [graph.layers[layer] for layer, count in open_inputs.items() if count]:
        raise ValueError(f"its layers take each other in a circle: {_some(stuck)}")


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
