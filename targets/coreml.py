"""Apple Core ML: torch.export program → `.mlpackage`; converted and checked anywhere, run on macOS."""

import contextlib
import io
import json
import logging
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from uuid import NAMESPACE_URL, uuid5

import numpy as np

from bitferry import targets
from bitferry.device.arrays import Images, Outputs, Predict, in_batches
from bitferry.device.errors import InputError, StageFailed, TargetUnavailable, first_line
from bitferry.targets import MOST_BATCH, Environment, Form, Kind, Layer, Needs, Precision, Scheme, since, system

if find_spec("coremltools") is None:  # found, but not imported: it takes seconds, and PyTorch along where that is
    raise ModuleNotFoundError("No module named 'coremltools'", name="coremltools")

CONSUMES: Form = "exported"
SUFFIX = ".mlpackage"
SCHEMES: Mapping[Precision, Scheme | None] = {
    "int8": Scheme(activation="int8", activation_symmetric=True),
    "float16": None,
    "float32": None,
}
KINDS: Mapping[str, Kind] = {
    "conv": "convolution",
    "conv_transpose": "convolution",
    "linear": "matrix product",
    "matmul": "matrix product",
}
UNITS = {"all": "ALL", "cpu": "CPU_ONLY", "cpu+gpu": "CPU_AND_GPU", "cpu+ane": "CPU_AND_NE"}
NAMES = "bitferry.layers"
"""Of an entry in the model's metadata: the PyTorch module of each layer, by the operation's name, as JSON."""
MACOS_ONLY = "Core ML runs on macOS only"
MODEL = "Data/com.apple.CoreML/model.mlmodel"
HALF = 10
"""Core ML's number for 16-bit floats."""
WEIGHTED = {"aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution", "aten.linear", "aten.addmm"}


@dataclass(frozen=True, kw_only=True)
class Options(targets.Options):
    """What a recipe may set under `[targets.coreml]`."""

    image_input: bool | None = None
    """Take an image, as apps have it, and not an array; None for an image where the batch is 1 and it is one image."""
    compute_units: Literal["all", "cpu", "cpu+gpu", "cpu+ane"] = "all"
    """What Core ML may use when it is run on a Mac from here."""
    max_batch: int = 32
    """With batch = "dynamic": the most images of one call."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.max_batch <= MOST_BATCH:
            raise ValueError(f"max_batch must be 2 to {MOST_BATCH}, not {self.max_batch}")
        if self.image_input and self.batch != 1:
            raise ValueError(f"image_input takes one image, so batch must be 1, not {self.batch!r}")


def environment(*, options: Options) -> Environment:
    here = sys.platform == "darwin"
    return Environment(
        "coremltools",
        metadata.version("coremltools"),
        f"Core ML ({options.compute_units})",
        (),
        system(),
        fast=("float32", "float16", "int8") if here else (),
        unmeasured=None if here else MACOS_ONLY,
    )


def needs(path: Path, *, options: Options) -> Needs:
    return Needs({"coremltools": since(metadata.version("coremltools"))}, system="Darwin")


def compile(model: Path, out: Path, *, precision: Precision, options: Options) -> None:
    import torch  # noqa: PLC0415 - and what follows: the engineer's machine only

    _hush()
    import coremltools as ct  # noqa: PLC0415
    import torchao.quantization.pt2e  # noqa: F401, PLC0415 - the operators of a quantized program

    program = torch.export.load(model)
    shape = tuple(program.example_inputs[0][0].shape[1:])
    as_image = _as_image(options, shape)
    order = getattr(ct.colorlayout, options.color)
    image = [ct.ImageType("image", (1, 3, *shape[:2]), color_layout=order)] if as_image else None
    with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # of progress bars
        warnings.simplefilter("ignore")
        exported = _exported(program, shape, as_image, options)
        try:
            converted = ct.convert(
                exported,
                convert_to="mlprogram",
                inputs=image,
                outputs=[ct.TensorType("scores", dtype=np.float32)],
                minimum_deployment_target=ct.target.iOS17,
                compute_precision=ct.precision.FLOAT32 if precision == "float32" else ct.precision.FLOAT16,
                skip_model_load=True,
            )
        except Exception as error:  # a converter of many passes, each with errors of its own
            raise _refusal(error, exported.graph) from error
    converted.save(str(out))
    layers = [node for node in exported.graph.nodes if _operator(node) in WEIGHTED]
    norms = {node.name: _module(node.args[0]) for node in exported.graph.nodes if "batch_norm" in _operator(node)}
    names = norms | {node.name: _module(node) for node in layers}  # a layer that takes a norm in takes its name
    _finish(out, names | {"scores": _module(layers[-1]) if layers else ""})
    _check(out, precision, layers)


def load(path: Path, *, precision: Precision, options: Options) -> Predict:
    _refuse_elsewhere()
    _hush()
    import coremltools as ct  # noqa: PLC0415
    from PIL import Image  # noqa: PLC0415 - as Core ML takes an image in Python

    model = ct.models.MLModel(str(path), compute_units=ct.ComputeUnit[UNITS[options.compute_units]])
    as_image = model.get_spec().description.input[0].type.HasField("imageType")

    def predict(images: Images) -> Outputs:
        if as_image:  # which Core ML wants as RGB, whatever order it then gives to the model
            picture = images[0] if options.color == "RGB" else images[0, :, :, ::-1]
            return np.asarray(model.predict({"image": Image.fromarray(picture)})["scores"], np.float32)
        return np.asarray(model.predict({"images": images.astype(np.float32)})["scores"], np.float32)

    if options.batch != "dynamic":
        return in_batches(predict, options.batch)
    most = options.max_batch
    return lambda images: np.concatenate([predict(images[i : i + most]) for i in range(0, len(images), most)])


def executed(path: Path, *, precision: Precision, options: Options) -> Sequence[Layer]:
    _refuse_elsewhere()
    return _layers(_spec(path))


def _refuse_elsewhere() -> None:
    if sys.platform != "darwin":
        raise TargetUnavailable(
            f"{MACOS_ONLY}; this is {system()}: copy the bundle to a Mac and run `bitferry verify` there"
        )


def _hush() -> None:
    """Keep coremltools' notices on import (no macOS, newer packages than it was tested with) off the user's screen."""
    for name in ("coremltools", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _as_image(options: Options, shape: Sequence[int]) -> bool:
    if options.image_input and len(shape) != 3:
        raise InputError(
            f"image_input takes images of H×W×3, and this model's are {'×'.join(map(str, shape))}; leave it out"
        )
    return options.batch == 1 and len(shape) == 3 if options.image_input is None else options.image_input


def _exported(program: Any, shape: Sequence[int], as_image: bool, options: Options) -> Any:
    """Export again with what Core ML can take, an image as 1×3×H×W or an array of floats: it knows no uint8 arrays."""
    import torch  # noqa: PLC0415

    module = program.module()
    for node in list(module.graph.nodes):
        if node.op == "call_module" or str(node.target) == "aten._assert_tensor_metadata.default":
            module.graph.erase_node(node)  # checks that the images are uint8
    if as_image:
        images = next(node for node in module.graph.nodes if node.op == "placeholder")
        with module.graph.inserting_after(images):
            pixels = module.graph.call_function(torch.ops.aten.permute.default, (images, [0, 2, 3, 1]))
        images.replace_all_uses_with(pixels, delete_user_cb=lambda user: user is not pixels)
    module.recompile()
    count = 2 if options.batch == "dynamic" else options.batch
    batch = {0: torch.export.Dim("batch", min=1, max=options.max_batch)} if options.batch == "dynamic" else {}
    example = torch.zeros((1, 3, *shape[:2]) if as_image else (count, *shape))
    return torch.export.export(module, (example,), dynamic_shapes=(batch,)).run_decompositions({})


def _finish(package: Path, modules: Mapping[str, str]) -> None:
    """Add the layers' names; take out what differs from run to run, and what is about the conversion only."""
    for stray in package.glob("*debug_handle_mapping.json"):
        stray.unlink()
    file = package / "Manifest.json"
    manifest = json.loads(file.read_text())
    items = manifest["itemInfoEntries"]
    ids = {old: str(uuid5(NAMESPACE_URL, item["path"])) for old, item in items.items()}  # not random ones
    manifest["itemInfoEntries"] = {ids[old]: items[old] for old in sorted(items, key=ids.__getitem__)}
    manifest["rootModelIdentifier"] = ids[manifest["rootModelIdentifier"]]
    file.write_text(json.dumps(manifest, indent=4))
    spec = _spec(package)
    notes = spec.description.metadata.userDefined
    notes.pop("com.github.apple.coremltools.conversion_date", None)
    made_of = {name: re.sub(r"(_0)?(_cast_fp16)?$", "", name) for name in _operations(spec)}
    notes[NAMES] = json.dumps({name: modules[node] for name, node in made_of.items() if modules.get(node)})
    (package / MODEL).write_bytes(spec.SerializeToString(deterministic=True))


def _spec(package: Path) -> Any:
    _hush()
    import coremltools as ct  # noqa: PLC0415

    return ct.utils.load_spec(str(package / MODEL))


def _layers(spec: Any) -> list[Layer]:
    """List the layers of a program, int8 where both weight and input come out of a dequantization."""
    made, names = _operations(spec), json.loads(spec.description.metadata.userDefined[NAMES])
    return [
        Layer(names.get(name, name), KINDS[operation.type], _precision(operation, made))
        for name, operation in made.items()
        if operation.type in KINDS
    ]


def _operations(spec: Any) -> dict[str, Any]:
    """Give every operation of a program, in order, by the name of what it makes."""
    (block,) = spec.mlProgram.functions["main"].block_specializations.values()
    return {operation.outputs[0].name: operation for operation in block.operations if operation.outputs}


def _precision(operation: Any, made: Mapping[str, Any]) -> str:
    makers = [
        made.get(operation.inputs[name].arguments[0].name) for name in ("x", "weight", "y") if name in operation.inputs
    ]
    if all("dequantize" in getattr(maker, "type", "") for maker in makers):
        return "int8"
    return "float16" if operation.outputs[0].type.tensorType.dataType == HALF else "float32"


def _check(package: Path, precision: Precision, layers: Sequence[Any]) -> None:
    """Raise StageFailed where the package is not what was asked for: nothing can be run here that would show it."""
    spec = _spec(package)
    found, wanted = _layers(spec), "float16" if precision == "int8" else precision
    int8 = sum("dequantize" in _operator(node.args[0]) and "dequantize" in _operator(node.args[1]) for node in layers)
    expected = [int8, len(layers) - int8]
    counted = [sum(layer.precision == kind for layer in found) for kind in ("int8", wanted)]
    names = [output.name for output in spec.description.output]
    if counted[0] != int8 or counted[1] < expected[1] or names != ["scores"]:  # attention is more matrix products
        raise StageFailed(
            f"coremltools made another program than it was given: {counted[0]} int8 and {counted[1]} {wanted} layers "
            f"where PyTorch has {expected[0]} and {expected[1]}; outputs {', '.join(names)}, expected scores"
        )


def _refusal(error: Exception, graph: Any) -> StageFailed:
    """Name the operator that coremltools has no conversion for, and the layers that use it."""
    told = first_line(error)
    stopped = {name.replace("::", ".") for name in re.findall(r"\w+", told)}
    nodes = [node for node in graph.nodes if _operator(node).rpartition(".")[2] in stopped]
    where = sorted({f"{_operator(node)} in layer '{_module(node) or node.name}'" for node in nodes})
    return StageFailed(
        f"coremltools cannot take this model{': ' if where else ''}{', '.join(where)} ({told}); replace the operator "
        "in the model, or deploy to a target that has it"
    )


def _module(node: Any) -> str:
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values() if path]
    return str(stack[-1]).removeprefix("model.") if stack else ""


def _operator(node: Any) -> str:
    return str(getattr(node, "target", "")).rpartition(".")[0]
