"""PyTorch's TorchScript on the CPU, frozen and with channels last: for who runs PyTorch anyway."""

import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from bitferry.device.arrays import Images, Outputs, Predict, in_batches
from bitferry.device.errors import InputError, StageFailed, first_line
from bitferry.targets import (
    Environment,
    Form,
    Kind,
    Layer,
    Needs,
    Options,
    Precision,
    Scheme,
    cpu_isa,
    fast_on_cpu,
    since,
    system,
    usable_cpus,
)

if find_spec("torch") is None:  # looked for, but not imported: it takes seconds
    raise ModuleNotFoundError("No module named 'torch'", name="torch")

CONSUMES: Form = "torchscript"
SUFFIX = ".ts"
NAMES = ".layers.json"
"""Of a file beside it: the PyTorch module of each layer, in the order in which they run."""
SCHEMES: Mapping[Precision, Scheme | None] = {"int8": Scheme(), "float32": None}
KINDS: Mapping[str, Kind] = {
    "aten::conv1d": "convolution",
    "aten::conv2d": "convolution",
    "aten::conv3d": "convolution",
    "aten::_convolution": "convolution",
    "aten::linear": "matrix product",
    "aten::addmm": "matrix product",
    "aten::matmul": "matrix product",
    "aten::bmm": "matrix product",
}
BATCH_1 = "batch-1"
"""A file beside a TorchScript model whose tracing fixed the batch at 1."""

ROUNDED = """
graph(%x, %scale, %zero, %low, %high, %type, %none):
  %q = quantized_decomposed::quantize_per_tensor(%x, %scale, %zero, %low, %high, %type)
  %y = quantized_decomposed::dequantize_per_tensor(%q, %scale, %zero, %low, %high, %type, %none)
  return (%y)
"""
ROUNDED_FASTER = """
graph(%x, %scale, %zero, %low, %high, %type, %none):
  %one : float = prim::Constant[value=1.]()
  %inverse : float = aten::div(%one, %scale)
  %least : int = aten::sub(%low, %zero)
  %most : int = aten::sub(%high, %zero)
  %scaled = aten::mul(%x, %inverse)
  %whole = aten::round_(%scaled)
  %bounded = aten::clamp_(%whole, %least, %most)
  %y = aten::mul_(%bounded, %scale)
  return (%y)
"""
"""The same numbers, exactly, without a detour through int8, and without torchao's operators, which a device lacks."""


def environment(*, options: Options) -> Environment:
    version = metadata.version("torch").partition("+")[0]
    return Environment("torch", version, "CPU", cpu_isa(), system(), fast=fast_on_cpu(("float32",)))


def needs(path: Path, *, options: Options) -> Needs:
    return Needs({"torch": since(metadata.version("torch"))})


def compile(model: Path, out: Path, *, precision: Precision, options: Options) -> None:
    if options.batch != 1 and (model.parent / BATCH_1).exists():
        raise InputError(
            f"tracing fixed the batch of this model at 1, but [targets.torchscript] has batch = {options.batch!r}; "
            "set batch = 1, or deploy to a target that is not made from TorchScript"
        )
    import torch  # noqa: PLC0415 - seconds to import

    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # a notice about torchao's own enum
    import torchao.quantization.pt2e  # noqa: F401, PLC0415 - the operators of a quantized program

    traced = _read(model)
    layers = _layers(traced.inlined_graph)
    out.with_suffix(NAMES).write_text(json.dumps([_module(node) for node in layers], indent=1))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated upstream; users still ask for it
        frozen = torch.jit.freeze(traced)
        _simplify(frozen.graph)
        torch.jit.save(frozen, str(out))


def load(path: Path, *, precision: Precision, options: Options) -> Predict:
    import torch  # noqa: PLC0415 - seconds to import

    threads, model = options.threads or usable_cpus(), _read(path)

    def predict(images: Images) -> Outputs:
        if torch.get_num_threads() != threads:  # the process has one setting, which another model may have changed
            torch.set_num_threads(threads)
        with torch.inference_mode():
            scores: Outputs = model(torch.from_numpy(np.require(images, requirements=("C", "W")))).numpy()
        return scores

    return predict if options.batch == "dynamic" else in_batches(predict, options.batch)


def executed(path: Path, *, precision: Precision, options: Options) -> Sequence[Layer]:
    names = json.loads(path.with_suffix(NAMES).read_text())
    nodes = _layers(_read(path).inlined_graph)
    reason = "TorchScript computes rounded values in float32" if precision == "int8" else None
    return [
        Layer(name, KINDS[node.kind()], _precision(node), reason=reason)
        for name, node in zip(names, nodes, strict=True)
    ]


def _read(path: Path) -> Any:
    import torch  # noqa: PLC0415

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise StageFailed(f"PyTorch {torch.__version__} cannot load {path}: {first_line(error)}") from error


def _layers(graph: Any) -> list[Any]:
    """List a graph's convolutions and matrix products of images, in the order in which they run.

    One of constants alone, as of a table of positions, is computed when the model is frozen, and does not run.
    """
    (_, *given), found = list(graph.inputs()), []
    moving = {value.debugName() for value in given or list(graph.inputs())}
    for node in graph.nodes():
        if any(value.debugName() in moving for value in node.inputs()):
            moving |= {value.debugName() for value in node.outputs()}
            found += [node] if node.kind() in KINDS else []
    return found


def _module(node: Any) -> str:
    """Name the module that a layer's weight comes from, or its bias where the weight is a quantized one."""
    paths = [_attribute(value.node()) for value in list(node.inputs())[1:3]]
    found = next((path[:-1] for path in paths if len(path) > 1), [node.kind()])
    return ".".join(found).removeprefix("model.")


def _attribute(node: Any) -> list[str]:
    """Follow `model.layer.weight` back from the attribute to the whole model."""
    path: list[str] = []
    while node.kind() == "prim::GetAttr":
        path.insert(0, node.s("name"))
        node = node.inputsAt(0).node()
    return path


def _precision(node: Any) -> str:
    weight = node.inputsAt(1).toIValue()
    return str(getattr(weight, "dtype", "torch.float32")).removeprefix("torch.")


def _simplify(graph: Any) -> None:
    """Write the roundings of an int8 program plainly, and lay weights out as a convolution reads them fastest.

    Where an activation has one pixel, its layout is ambiguous, and PyTorch copies contiguous weights at every call.
    """
    import torch  # noqa: PLC0415

    torch._C._jit_pass_cse(graph)
    torch._C._jit_pass_custom_pattern_based_rewrite_graph(ROUNDED, ROUNDED_FASTER, graph)
    torch._C._jit_pass_constant_propagation(graph)
    for node in graph.findAllNodes("prim::Constant"):
        value = node.output().toIValue()
        if isinstance(value, torch.Tensor) and value.dim() == 4:
            node.t_("value", value.contiguous(memory_format=torch.channels_last))
