"""Which operator of a model a target runs wrongly: the model cut off behind one operator after the other.

Every cut is compiled by itself, and compared with what it was compiled from. The operator to blame is one whose value
is wrong while those that it is made of are right.
"""

import copy
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol, cast

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn

from bitferry import targets
from bitferry.device.arrays import Images, Outputs, Predict, in_batches
from bitferry.pipeline import conditioning, interrupt, progress, unsupported
from bitferry.pipeline.artifacts import Captured, Compiled, Simplified, Source, Traced
from bitferry.pipeline.capture import read
from bitferry.pipeline.onnx_in import session
from bitferry.pipeline.rewrites import open_axes
from bitferry.pipeline.trace import torchscript
from bitferry.pipeline.verify import eager

Alike = Callable[[Outputs, Outputs], bool]
LONGEST = 120.0
"""Seconds of looking; what was found until then is named."""


def reference(source: Source) -> Predict:
    """Give what answers as a target's source does, without the target."""
    if isinstance(source, Traced):
        return eager(torchscript(source))
    if isinstance(source, Captured):
        return _predict(read(source.path), read(source.path).module())
    return session.predict(source.path)


def disturbed(source: Source) -> Iterator[Predict]:
    """Yield what answers as a target's source does, its weights a few units in the last place apart."""
    if isinstance(source, Traced):
        yield from map(eager, conditioning.modules(torchscript(source)))
    elif isinstance(source, Captured):
        program = read(source.path)
        yield from (_predict(program, module) for module in conditioning.modules(program.module()))
    else:
        yield from conditioning.onnx_files(source.path)


def operator(compiled: Compiled, images: Images, alike: Alike | None) -> str | None:
    """Name the operator where a target begins to be wrong, with its layer; None where none can be found.

    Wrong is what is not `alike` the source's value; where `alike` is None, what fails when it runs. After LONGEST
    seconds the name is of one that is wrong, and not of the first.
    """
    if isinstance(compiled.source, Traced):
        return None
    progress.stage("compile", f"looks for the operator that {compiled.target} runs wrongly")
    cuts: _Cuts = (
        _OnnxCuts(compiled.source) if isinstance(compiled.source, Simplified) else _ProgramCuts(compiled.source)
    )
    try:
        return _first_wrong(cuts, lru_cache(None)(lambda at: _is_wrong(compiled, cuts, at, images, alike)))
    except Exception:  # noqa: BLE001 - what is being explained may stop this, too
        return None


class _Values(Protocol):
    """The values of a model in the order in which they are computed."""

    def __len__(self) -> int: ...

    def told(self, at: int) -> str:
        """Name the operator and its layer."""

    def inputs(self, at: int) -> Sequence[int]:
        """List the values that one is made of."""


class _Cuts(_Values, Protocol):
    """A model that can be cut off behind each of its values."""

    def source(self, at: int, folder: Path) -> Source:
        """Write the model that gives one value, as 1×… of a single image."""


def _first_wrong(cuts: _Values, wrong: Callable[[int], bool], longest: float = LONGEST) -> str | None:
    """Find a wrong value by bisection, then go back to one that is made of right ones alone."""
    until = time.monotonic() + longest
    right, found = -1, len(cuts) - 1
    if not wrong(found):
        return None
    while found - right > 1 and time.monotonic() < until:
        middle = (right + found) // 2
        right, found = (right, middle) if wrong(middle) else (middle, found)
    pending = iter(cuts.inputs(found))
    while time.monotonic() < until:
        before = next(pending, None)
        if before is None:
            return cuts.told(found)
        if wrong(before):
            found, pending = before, iter(cuts.inputs(before))
    return f"{cuts.told(found)}, or one before it ({longest:g} seconds were not enough to tell)"


def _is_wrong(compiled: Compiled, cuts: _Cuts, at: int, images: Images, alike: Alike | None) -> bool:
    """Compile the model up to one value, and say whether its own answers are wrong; a safe point for Ctrl-C."""
    interrupt.check()
    target, options = targets.get(compiled.target), replace(compiled.options, batch=1)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / f"compiled{target.SUFFIX}"
        try:
            source = cuts.source(at, Path(folder))
            target.compile(source.path, out, precision=compiled.precision, options=options)
        except Exception:  # noqa: BLE001 - a part that cannot be compiled by itself says nothing of the whole
            return False
        try:
            found = target.load(out, precision=compiled.precision, options=options)(images)
        except Exception:  # noqa: BLE001 - the vendor's runtime may raise anything
            return alike is None
        return alike is not None and not alike(in_batches(reference(source), 1)(images), found)


class _OnnxCuts:
    def __init__(self, source: Source) -> None:
        self.precision = source.precision
        self.model = onnx.shape_inference.infer_shapes(onnx.load(source.path))
        graph = self.model.graph
        types = {value.name: value.type.tensor_type for value in (*graph.value_info, *graph.output)}
        self.ranks = {name: len(kind.shape.dim) for name, kind in types.items() if kind.elem_type == TensorProto.FLOAT}
        self.nodes = [node for node in graph.node if node.output[0] in self.ranks]
        places = {node.output[0]: at for at, node in enumerate(self.nodes)}
        self.nearest: dict[str, list[int]] = {}
        """Of each computed value, the places that it is made at, or from: the nearest that can be cut at."""
        for node in graph.node:
            before = _merged(self.nearest.get(value, []) for value in node.input)
            self.nearest |= {value: [places[value]] if value in places else before for value in node.output}

    def __len__(self) -> int:
        return len(self.nodes)

    def told(self, at: int) -> str:
        node = self.nodes[at]
        return f"the operator {node.op_type} in the layer '{node.name.partition('/node_')[0]}'"

    def inputs(self, at: int) -> list[int]:
        return _merged(self.nearest.get(value, []) for value in self.nodes[at].input)

    def source(self, at: int, folder: Path) -> Source:
        graph, value = self.model.graph, self.nodes[at].output[0]
        wanted, nodes = {value}, [helper.make_node("Unsqueeze", [value, "cut/axis"], ["cut"], name="cut")]
        for node in reversed(graph.node):
            if not wanted.isdisjoint(node.output):
                nodes.insert(0, node)
                wanted.update(node.input)
        constants = [tensor for tensor in graph.initializer if tensor.name in wanted]
        constants.append(numpy_helper.from_array(np.array([0]), "cut/axis"))
        shape = [1, *[None] * self.ranks[value]]
        output = helper.make_tensor_value_info("cut", TensorProto.FLOAT, shape)
        cut = helper.make_graph(nodes, "cut", graph.input, [output], constants)
        made = helper.make_model(cut, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)
        onnx.save(made, folder / "cut.onnx")
        return Simplified(folder / "cut.onnx", self.precision, "")


class _ProgramCuts:
    def __init__(self, source: Source) -> None:
        self.precision, self.program = source.precision, read(source.path)
        self.module = cast(fx.GraphModule, self.program.module())
        self.nodes = [node for node in self.module.graph.nodes if _is_float(node)]
        places = {node: at for at, node in enumerate(self.nodes)}
        self.nearest: dict[fx.Node, list[int]] = {}
        for node in self.module.graph.nodes:
            before = _merged(self.nearest[one] for one in node.all_input_nodes)
            self.nearest[node] = [places[node]] if node in places else before

    def __len__(self) -> int:
        return len(self.nodes)

    def told(self, at: int) -> str:
        node = self.nodes[at]
        return f"the operator {str(node.target).rpartition('.')[0]} in {unsupported.place(node)}"

    def inputs(self, at: int) -> list[int]:
        return _merged(self.nearest[node] for node in self.nodes[at].all_input_nodes)

    def source(self, at: int, folder: Path) -> Source:
        cut, name = copy.deepcopy(self.module), self.nodes[at].name
        last = next(node for node in cut.graph.nodes if node.name == name)
        output = next(node for node in cut.graph.nodes if node.op == "output")
        with cut.graph.inserting_before(output):
            output.args = (cut.graph.call_function(torch.ops.aten.unsqueeze.default, (last, 0)),)
        cut.graph.eliminate_dead_code()
        cut.graph.set_codegen(fx.graph.CodeGen())
        cut.recompile()
        with torch.no_grad():
            exported = torch.export.export(cut, self.program.example_inputs[0], dynamic_shapes=(open_axes(cut),))
        torch.export.save(exported, folder / "cut.pt2")
        return Captured(folder / "cut.pt2", self.precision, "")


def _merged(lists: Iterable[Sequence[int]]) -> list[int]:
    """Join lists, with each number once."""
    return list(dict.fromkeys(at for some in lists for at in some))


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return node.op == "call_function" and isinstance(value, Tensor) and value.is_floating_point()


def _predict(program: torch.export.ExportedProgram, module: nn.Module) -> Predict:
    """Give what answers as a program's module does, as many images at once as it was captured for."""
    predict = eager(module)
    any_batch = 0 in open_axes(cast(fx.GraphModule, module))
    return predict if any_batch else in_batches(predict, program.example_inputs[0][0].shape[0])
