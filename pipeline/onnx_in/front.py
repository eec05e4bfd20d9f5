"""What a file's inputs want, and the contract's arithmetic put in front of them: uint8 N×H×W×3 in, batch dynamic."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from bitferry.device.arrays import Images
from bitferry.device.errors import InputError
from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline.scores import told_channels

KINDS: dict[int, type[np.generic]] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.DOUBLE: np.float64,
    TensorProto.UINT8: np.uint8,
}
"""What images may be for a model."""
PREFIX = "contract/"
"""Of the nodes and constants that are put in front."""


@dataclass(frozen=True)
class Input:
    """One image that a model takes, and the form it wants it in."""

    name: str
    kind: int
    """Of its elements, by ONNX's numbers."""
    channels_last: bool
    batch: int | None
    """What the file fixes; None for any."""


def inputs(model: ModelProto, contract: Preprocessing, path: Path) -> list[Input]:
    """Say what form each view is wanted in; raise InputError where the file and the recipe do not agree."""
    constants = {tensor.name for tensor in model.graph.initializer}
    values = [value for value in model.graph.input if value.name not in constants]
    if len(values) != contract.views:
        every = ", ".join(map(told, values)) or "none"
        raise InputError(
            f"{path} takes {len(values)} input{'s'[: len(values) != 1]} ({every}), and preprocessing.views is "
            f"{contract.views}; where all are images, set views = {max(1, len(values))}, and what is no image must "
            "become a constant of the graph"
        )
    if len(model.graph.output) == 1 and not model.graph.output[0].type.HasField("tensor_type"):
        raise InputError(f"{path} gives {told(model.graph.output[0])}; expected one tensor of scores, N×K or N×K×H×W")
    if len(model.graph.output) != 1:
        one = model.graph.output[0].name if model.graph.output else "NAME"
        raise InputError(
            f"{path} gives {len(model.graph.output)} outputs ({', '.join(map(told, model.graph.output))}); one tensor "
            f"of scores is judged, so keep that alone: onnx.utils.extract_model('{path.name}', 'scores.onnx', "
            f"{[value.name for value in values]}, ['{one}'])"
        )
    return [_input(value, contract, path) for value in values]


def _input(value: ValueInfoProto, contract: Preprocessing, path: Path) -> Input:
    kind, sizes = value.type.tensor_type.elem_type, _sizes(value)
    h, w = contract.height, contract.width
    fits = {"NCHW": (3, h, w), "NHWC": (h, w, 3)}
    found = [form for form, wanted in fits.items() if len(sizes) == 4 and _may_be(sizes[1:], wanted)]
    if not found or kind not in KINDS:
        raise InputError(
            f"{path} takes {told(value)}; expected float32 (or uint8) images of N×3×{h}×{w} or N×{h}×{w}×3, as the "
            f"recipe's preprocessing makes them{_other_size(sizes, contract) or _channels(sizes)}"
        )
    if kind == TensorProto.UINT8 and (contract.scale, *contract.mean, *contract.std) != (1, 0, 0, 0, 1, 1, 1):
        raise InputError(
            f"{path} takes {told(value)}, so its arithmetic is inside it; say so in the recipe: under [preprocessing] "
            "scale = 1.0, and neither mean nor std"
        )
    return Input(value.name, kind, found[0] == "NHWC", sizes[0] or None)


def _may_be(sizes: Sequence[int], wanted: Sequence[int]) -> bool:
    return all(size in (0, one) for size, one in zip(sizes, wanted, strict=True))


def _other_size(sizes: Sequence[int], contract: Preprocessing) -> str:
    """Say which size the recipe would have to name."""
    places = [place for place in (1, 3) if len(sizes) == 4 and sizes[place] == 3]
    if not places:
        return ""
    h, w = (sizes[2:], sizes[1:3])[places[0] != 1]
    return (
        f"; set preprocessing height = {h}, width = {w}"
        if h and w and (h, w) != (contract.height, contract.width)
        else ""
    )


def _channels(sizes: Sequence[int]) -> str:
    """Say so where images of other channels than three are wanted."""
    found = min((sizes[place] for place in (1, 3) if sizes[place]), default=3) if len(sizes) == 4 else 3
    return f"; it takes images of {told_channels(found)}" if found != 3 else ""


def told(value: ValueInfoProto) -> str:
    """Describe a value, as in `'x' (float32 N×3×224×224)`."""
    if not value.type.HasField("tensor_type"):
        return f"'{value.name}' ({str(value.type.WhichOneof('value')).removesuffix('_type')})"
    shape = value.type.tensor_type.shape
    sizes = [str(one.dim_value or one.dim_param or "?") for one in shape.dim]
    kind = TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()
    return f"'{value.name}' ({'float32' if kind == 'float' else kind} {'×'.join(sizes)})"


def _sizes(value: ValueInfoProto) -> list[int]:
    """Give a value's sizes, 0 for what is open."""
    return [int(one.dim_value) for one in value.type.tensor_type.shape.dim]


def fed(images: Images, wanted: Sequence[Input], contract: Preprocessing) -> dict[str, NDArray[np.generic]]:
    """Make by NumPy what a file as given wants of uint8 images N×H×W×3: the contract's arithmetic, done outside."""
    views = images[:, None] if contract.views == 1 else images
    found: dict[str, NDArray[np.generic]] = {}
    for place, one in enumerate(wanted):
        pixels: NDArray[np.generic] = views[:, place]
        if one.kind != TensorProto.UINT8:
            mean, std = (np.asarray(given, np.float32) for given in (contract.mean, contract.std))
            pixels = (views[:, place].astype(np.float32) * np.float32(contract.scale) - mean) / std
        laid = pixels if one.channels_last else pixels.transpose(0, 3, 1, 2)
        found[one.name] = np.ascontiguousarray(laid.astype(KINDS[one.kind]))
    return found


def with_contract(model: ModelProto, wanted: Sequence[Input], contract: Preprocessing) -> ModelProto:
    """Give the graph that is shipped: one uint8 input of every view, the arithmetic in front, nothing else changed."""
    made = ModelProto()
    made.CopyFrom(model)
    graph, batch = made.graph, wanted[0].batch
    name = _free("images", graph)
    nodes, constants = _front(name, wanted, contract)
    constant = {tensor.name for tensor in graph.initializer}
    kept = [value for value in graph.input if value.name in constant]
    del graph.input[:], graph.value_info[:]
    graph.input.append(helper.make_tensor_value_info(name, TensorProto.UINT8, [batch or "N", *contract.shape]))
    graph.input.extend(value for value in kept if made.ir_version < 4)
    for node in reversed(nodes):
        graph.node.insert(0, node)
    graph.initializer.extend(constants)
    scores = graph.output[0].type.tensor_type.shape.dim
    if scores and batch is None:
        scores[0].dim_param = "N"
    return onnx.shape_inference.infer_shapes(made)


def _front(name: str, wanted: Sequence[Input], contract: Preprocessing) -> tuple[list[NodeProto], list[TensorProto]]:
    nodes: list[NodeProto] = []
    constants: list[TensorProto] = []

    def add(kind: str, given: list[str], step: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, given, [f"{PREFIX}{step}"], name=f"{PREFIX}{step}", **attributes))
        return f"{PREFIX}{step}"

    def constant(step: str, value: NDArray[np.generic]) -> str:
        constants.append(numpy_helper.from_array(value, f"{PREFIX}{step}"))
        return f"{PREFIX}{step}"

    mean, std = (np.asarray(given, np.float32) for given in (contract.mean, contract.std))
    several, plain = contract.views > 1, wanted[0].kind == TensorProto.UINT8
    # Of several views a cast first: TensorRT does nothing else with uint8.
    pixels = add("Cast", [name], "float", to=TensorProto.FLOAT) if several and not plain else name
    for place, one in enumerate(wanted):
        shape = (1, 1, 1, 3) if one.channels_last else (1, 3, 1, 1)
        step = f"view_{place}/" if several else ""
        value = pixels
        if several:
            value = add("Gather", [value, constant(f"{step}place", np.array(place))], f"{step}view", axis=1)
        if not one.channels_last:
            value = add("Transpose", [value], f"{step}channels_first", perm=[0, 3, 1, 2])
        if not plain:
            value = value if several else add("Cast", [value], f"{step}float", to=TensorProto.FLOAT)
            scale = constant(f"{step}multiplier", (np.float32(contract.scale) / std).reshape(shape))
            value = add("Mul", [value, scale], f"{step}scaled")
            value = add("Add", [value, constant(f"{step}offset", (-mean / std).reshape(shape))], f"{step}normalized")
        nodes.append(helper.make_node("Identity", [value], [one.name], name=f"{PREFIX}{step}given"))
    return nodes, constants


def _free(name: str, graph: GraphProto) -> str:
    """Give a name that nothing in the graph has."""
    taken = {value for node in graph.node for value in (*node.input, *node.output)}
    while name in taken:
        name += "_"
    return name


def any_batch(model: ModelProto, wanted: Sequence[Input]) -> ModelProto:
    """Open the batch that a graph fixes, in reshapes with a constant shape as well; what comes of it must be tried."""
    made, fixed = ModelProto(), wanted[0].batch
    made.CopyFrom(model)
    names = {one.name for one in wanted}
    for value in (*(value for value in made.graph.input if value.name in names), *made.graph.output):
        if value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_param = "N"
    del made.graph.value_info[:]
    shapes = {node.input[1] for node in made.graph.node if node.op_type == "Reshape"}
    constants = [tensor for tensor in made.graph.initializer if tensor.name in shapes]
    constants += [a.t for node in made.graph.node if node.op_type == "Constant" and node.output[0] in shapes
                  for a in node.attribute if a.name == "value"]  # fmt: skip
    for tensor in constants:
        sizes = numpy_helper.to_array(tensor).copy()
        if sizes.ndim == 1 and len(sizes) and sizes[0] == fixed:
            sizes[0] = 0  # as the input has it
            tensor.CopyFrom(numpy_helper.from_array(sizes, tensor.name))
    return made
