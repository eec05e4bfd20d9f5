"""PyTorch ExecuTorch with XNNPACK: torch.export program → `.pte` for phones and boards; its runtime runs it here."""

import contextlib
import io
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from executorch import version

from bitferry import targets
from bitferry.device.arrays import Images, Outputs, Predict, in_batches
from bitferry.device.errors import StageFailed, first_line
from bitferry.device.respell import Node, operator, respelled
from bitferry.targets import (
    MOST_BATCH,
    Environment,
    Form,
    Kind,
    Layer,
    Needs,
    Precision,
    Scheme,
    cpu_isa,
    fast_on_cpu,
    since,
    system,
    usable_cpus,
)

CONSUMES: Form = "exported"
SUFFIX = ".pte"
VERSION = version.__version__.partition("+")[0]
NAMES = ".layers.json"
"""Of a file beside it: the PyTorch module of each layer, by the number that XNNPACK knows it by."""
BESIDE = "beside XNNPACK"
"""In that file, the modules of the layers that ExecuTorch runs itself, in their order."""
INT8 = Scheme(activation="int8", outputs="int8", concatenations="shared")
SCHEMES: Mapping[Precision, Scheme | None] = {"int8": INT8, "float32": None}
LAYERS = "XNNConv2d XNNDepthwiseConv2d XNNConvTranspose2d XNNFullyConnected XNNBatchMatrixMultiply"
KERNELS = "aten::convolution aten::linear aten::addmm aten::mm aten::bmm"
KINDS: Mapping[str, Kind] = {
    name: "convolution" if "onv" in name else "matrix product" for name in f"{LAYERS} {KERNELS}".split()
}
DATATYPES = {"xnn_datatype_fp32": "float32", "xnn_datatype_fp16": "float16", "xnn_datatype_qint8": "int8"}


@dataclass(frozen=True, kw_only=True)
class Options(targets.Options):
    """What a recipe may set under `[targets.executorch]`."""

    max_batch: int = 32
    """With batch = "dynamic": the most images of one call, for which the file plans its memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.max_batch <= MOST_BATCH:
            raise ValueError(f"max_batch must be 2 to {MOST_BATCH}, not {self.max_batch}")


def environment(*, options: Options) -> Environment:
    return Environment("executorch", VERSION, "CPU", cpu_isa(), system(), fast=fast_on_cpu(SCHEMES))


def needs(path: Path, *, options: Options) -> Needs:
    return Needs({"executorch": since(VERSION)})


def compile(model: Path, out: Path, *, precision: Precision, options: Options) -> None:
    import torch  # noqa: PLC0415 - and what follows: the engineer's machine only

    _hush()
    import torchao.quantization.pt2e  # noqa: F401, PLC0415 - the operators of a quantized program
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner  # noqa: PLC0415
    from executorch.exir import to_edge_transform_and_lower  # noqa: PLC0415

    program = torch.export.load(model)
    images = program.example_inputs[0][0]
    example = torch.zeros((2 if options.batch == "dynamic" else options.batch, *images.shape[1:]), dtype=images.dtype)
    batch = {0: torch.export.Dim("batch", min=1, max=options.max_batch)} if options.batch == "dynamic" else {}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ExecuTorch about itself; failures come as exceptions
        exported = torch.export.export(respelled(program.module()), (example,), dynamic_shapes=(batch,))
        graphs = [exported.graph]
        try:
            edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
            graphs.append(edge.exported_program().graph)
            file = edge.to_executorch().buffer
            _method(file)  # the runtime refuses some graphs that the compiler has let pass
        except Exception as error:  # a tool of many passes, each with errors of its own
            raise _refusal(first_line(error), graphs) from error
    out.write_bytes(file)
    out.with_suffix(NAMES).write_text(json.dumps(_names(edge.exported_program()), indent=1))


def load(path: Path, *, precision: Precision, options: Options) -> Predict:
    import torch  # noqa: PLC0415 - the runtime's Python binding takes and gives tensors

    model = Loaded(path.read_bytes(), options.threads or usable_cpus())

    def predict(images: Images) -> Outputs:
        return np.asarray(model.ready()([torch.from_numpy(np.require(images, requirements=("C", "W")))])[0])

    if options.batch != "dynamic":
        return in_batches(predict, options.batch)
    return lambda images: in_batches(predict, min(len(images), options.max_batch))(images)


def executed(path: Path, *, precision: Precision, options: Options) -> Sequence[Layer]:
    _hush()
    from executorch.exir._serialize._program import deserialize_pte_binary  # noqa: PLC0415 - seconds to import

    names = json.loads(path.with_suffix(NAMES).read_text())
    program = deserialize_pte_binary(path.read_bytes()).program
    (plan,) = program.execution_plan
    layers: list[Layer] = []
    beside = iter(names[BESIDE])
    for call in [instruction.instr_args for instruction in plan.chains[0].instructions]:
        if hasattr(call, "delegate_index"):
            index = plan.delegates[call.delegate_index].processed.index
            layers += _delegated(bytes(program.backend_delegate_data[index].data), names)
        elif hasattr(call, "op_index") and (operator := plan.operators[call.op_index].name) in KINDS:
            named = next(beside, "") or operator
            layers.append(Layer(named, KINDS[operator], "float32", reason=_why_beside(operator)))
    return layers


def _why_beside(operator: str) -> str:
    return f"XNNPACK did not take it, and ExecuTorch's own {operator} computes in float32"


def _hush() -> None:
    """Keep off the screen what torchao logs of its own enum when it is imported."""
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


def _delegated(payload: bytes, names: Mapping[str, Any]) -> Iterator[Layer]:
    """Read the layers out of the graph that XNNPACK gets; its schema comes with the package."""
    from executorch.backends.xnnpack import serialization  # noqa: PLC0415
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader  # noqa: PLC0415
    from executorch.exir._serialize._flatbuffer import _flatc_decompile  # noqa: PLC0415

    header = XNNHeader.from_bytes(payload[: XNNHeader.EXPECTED_LENGTH])
    with tempfile.TemporaryDirectory() as folder:
        schema, binary = Path(folder, "schema.fbs"), Path(folder, "graph.bin")
        schema.write_bytes(resources.files(serialization).joinpath(schema.name).read_bytes())
        binary.write_bytes(payload[header.flatbuffer_offset : header.flatbuffer_offset + header.flatbuffer_size])
        _flatc_decompile(folder, str(schema), str(binary), ["--raw-binary"])
        text = binary.with_suffix(".json").read_text()
    graph = json.loads(re.sub(r"(?<=: )-?(inf|nan)\b", "null", text))  # the bound of a ReLU
    values = [value["xvalue_union"] for value in graph["xvalues"]]
    tensors = [value.get("tensor_value", value) for value in values]
    types = {tensor["id_out"]: DATATYPES.get(tensor["datatype"], tensor["datatype"]) for tensor in tensors}
    for node in graph["xnodes"]:
        kind, handle = node["xnode_union_type"], str(node["debug_handle"])
        if kind in KINDS:
            yield Layer(names.get(handle, f"{kind} {handle}"), KINDS[kind], types[node["xnode_union"]["input1_id"]])


class Loaded:
    """A model in the runtime, whose one thread pool all models share: loaded anew when another has changed it."""

    pools: ClassVar[list[int]] = []
    """The sizes of all pools so far. Only the last one lives, and a method keeps the one it was loaded with."""

    def __init__(self, program: bytes, threads: int) -> None:
        self.program, self.threads, self.pool = program, threads, 0
        self.ready()

    def ready(self) -> Any:
        """Give the method, loaded with the threads that it is to have."""
        if self.pools[-1:] != [self.threads]:
            with contextlib.redirect_stderr(io.StringIO()):  # where it tells what it finds about the CPU
                _runtime()._unsafe_reset_threadpool(self.threads)
            self.pools.append(self.threads)
        if self.pool != len(self.pools):
            self.method, self.pool = _method(self.program), len(self.pools)
        return self.method


def _method(program: bytes) -> Any:
    with contextlib.redirect_stderr(io.StringIO()) as log:
        try:
            return _runtime()._load_program_from_buffer(program).load_method("forward")
        except RuntimeError as error:
            told = [line.split("] ", 1)[-1] for line in log.getvalue().splitlines()[-3:]]
            why = "; ".join([*told, first_line(error)])
            raise StageFailed(f"ExecuTorch {VERSION} cannot load the model: {why}") from error


def _runtime() -> Any:
    """Give the runtime's binding; its public face `executorch.runtime` imports the whole compiler, for seconds."""
    import torch  # noqa: F401, PLC0415 - the binding is linked to its libraries
    from executorch.extension.pybindings import _C  # noqa: PLC0415

    return _C


def _names(program: Any) -> dict[str, Any]:
    parts = [child.original_module for child in program.graph_module.children() if hasattr(child, "original_module")]
    nodes = [node for part in parts for node in part.graph.nodes if "debug_handle" in node.meta and _module(node)]
    beside = [node for node in program.graph.nodes if operator(node).replace(".", "::") in KINDS]
    return {BESIDE: [_module(node) for node in beside]} | {
        str(node.meta["debug_handle"]): _module(node) for node in nodes
    }


def _module(node: Node) -> str:
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values() if path]
    return str(stack[-1]).removeprefix("model.") if stack else ""


def _refusal(told: str, graphs: Sequence[Any]) -> StageFailed:
    """Name the operator that ExecuTorch stopped at, and the layers that use it."""
    stopped = {name.replace("::", ".") for name in re.findall(r"\w+(?:::|\.)\w+", told)}
    nodes = (node for graph in graphs for node in graph.nodes)
    where = sorted({f"{operator(n)} in layer '{_module(n) or n.name}'" for n in nodes if operator(n) in stopped})
    return StageFailed(
        f"ExecuTorch cannot take this model{': ' if where else ''}{', '.join(where)} ({told}); replace the operator "
        "in the model, or deploy to a target that has it"
    )
