"""What quantization does to each layer of an ONNX graph: its error, its blame, and the shift of its mean."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, ValueInfoProto, helper, numpy_helper

from bitferry.device import pixels
from bitferry.device.arrays import Images
from bitferry.pipeline import progress
from bitferry.pipeline.artifacts import QuantizedOnnx
from bitferry.pipeline.onnx_in.plan import Wiring
from bitferry.pipeline.onnx_in.session import opened, predict
from bitferry.pipeline.statistics import decibels, noise_share
from bitferry.pipeline.verdict import Blame, LayerError

Values = NDArray[np.float32]
PREFIX = "alone/"
"""Of nodes that are put beside a graph's own."""


@dataclass(frozen=True)
class Layer:
    """A quantized layer: its node in the int8 graph and in the float one, and what it takes."""

    int8: NodeProto
    exact: NodeProto
    pair: tuple[NodeProto, NodeProto] | None
    """What quantizes its input; None where that is not."""
    weight: Values
    """As its int8 weight comes back."""
    exact_weight: Values


def layers(model: ModelProto, int8: ModelProto) -> list[Layer]:
    """List the layers whose weights are int8, in the order they run."""
    ours, theirs = Wiring(int8.graph), Wiring(model.graph)
    floats, found = {node.name: node for node in model.graph.node}, []
    for node in int8.graph.node:
        exact = floats.get(node.name)
        made = ours.maker.get(node.input[1]) if exact is not None and theirs.is_layer(exact) else None
        if exact is None or made is None or made.op_type != "DequantizeLinear":
            continue
        weight = np.asarray(numpy_helper.to_array(theirs.constants[exact.input[1]]), np.float32)
        found.append(Layer(node, exact, _pair(node, ours), _dequantized(made, ours), weight))
    return found


def _pair(node: NodeProto, wiring: Wiring) -> tuple[NodeProto, NodeProto] | None:
    last = wiring.maker.get(node.input[0])
    first = wiring.maker.get(last.input[0]) if last is not None and last.op_type == "DequantizeLinear" else None
    return (first, last) if first is not None and last is not None and first.op_type == "QuantizeLinear" else None


def _dequantized(node: NodeProto, wiring: Wiring) -> Values:
    """Compute what a DequantizeLinear of constants gives."""
    stored, scale, *zero = (numpy_helper.to_array(wiring.constants[name]) for name in node.input)
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    shape = [-1 if place == axis % max(1, stored.ndim) else 1 for place in range(stored.ndim)] if scale.size > 1 else []
    offset = zero[0].astype(np.int64).reshape(shape) if zero else 0
    return np.asarray((stored.astype(np.int64) - offset) * scale.reshape(shape), np.float32)


def corrected(model: ModelProto, int8: ModelProto, images: Images) -> ModelProto | None:
    """Give the float model with biases that make up for what rounding the weights shifts each channel's mean by.

    After Nagel et al. 2019: each layer alone, on what the float model feeds it. None where no layer has a bias.
    """
    wiring, made = Wiring(model.graph), ModelProto()
    made.CopyFrom(model)
    biases = [(layer, _bias(layer.exact, wiring)) for layer in layers(model, int8)]
    found = [(layer, bias) for layer, bias in biases if bias is not None]
    if not found:
        return None
    nodes = {node.name: node for node in made.graph.node}
    shifts = _shifts(model, [layer for layer, _ in found], images)
    for (layer, bias), shift in zip(found, shifts, strict=True):
        name = f"{layer.exact.name}/corrected"
        made.graph.initializer.append(numpy_helper.from_array((bias + shift).astype(np.float32), name))
        nodes[layer.exact.name].input[2] = name
    return made


def _bias(node: NodeProto, wiring: Wiring) -> Values | None:
    """Give a layer's constant bias, one number per channel; None where it has none."""
    if len(node.input) < 3 or node.input[2] not in wiring.constants:
        return None
    if any(a.name == "beta" and a.f != 1 for a in node.attribute):
        return None
    bias = np.asarray(numpy_helper.to_array(wiring.constants[node.input[2]]), np.float32)
    return bias if bias.ndim == 1 else None


def _shifts(model: ModelProto, found: Sequence[Layer], images: Images) -> list[Values]:
    """Give the mean of each channel of what a layer loses, over all images and places."""
    beside = ModelProto()
    beside.CopyFrom(model)
    for layer in found:
        _add_beside(beside, layer, [layer.exact.input[0]], layer.exact_weight - layer.weight, bias=None)
    names = [f"{PREFIX}{layer.exact.name}" for layer in found]
    totals, seen = [np.zeros(1)] * len(names), 0
    for values in _run(beside, names, images):
        totals = [total + _channel_sums(values[name]) for total, name in zip(totals, names, strict=True)]
        seen += len(values[names[0]])  # of a fixed batch the last images may be left out
    return [np.asarray(total / max(1, seen), np.float32) for total in totals]


def _channel_sums(values: Values) -> NDArray[np.float64]:
    """Sum over images the mean over places of each channel, of maps N×C×H×W and of rows N×C."""
    places = tuple(range(2, values.ndim))
    return np.asarray((values.mean(places) if places else values).sum(0, dtype=np.float64))


def _add_beside(model: ModelProto, layer: Layer, given: list[str], weight: Values, *, bias: Values | None) -> None:
    """Put a copy of a layer with another input and weight beside it."""
    name, node = f"{PREFIX}{layer.exact.name}", NodeProto()
    node.CopyFrom(layer.exact)
    node.name, node.output[0] = name, name
    model.graph.initializer.append(numpy_helper.from_array(weight, f"{name}/weight"))
    inputs = [given[0], f"{name}/weight"]
    if bias is not None:
        model.graph.initializer.append(numpy_helper.from_array(bias, f"{name}/bias"))
        inputs.append(f"{name}/bias")
    node.input[:] = inputs
    model.graph.node.append(node)


def _run(model: ModelProto, names: Sequence[str], images: Images) -> Iterator[dict[str, Values]]:
    """Run a graph, a batch at a time, and give the values named."""
    tapped = ModelProto()
    tapped.CopyFrom(model)
    given = {value.name for value in tapped.graph.output}
    tapped.graph.output.extend(ValueInfoProto(name=name) for name in dict.fromkeys(names) if name not in given)
    session = opened(tapped.SerializeToString())
    (taken,) = session.get_inputs()
    batch = taken.shape[0] if isinstance(taken.shape[0], int) else 1
    for start in range(0, len(images) - batch + 1, batch):
        found = session.run(list(names), {taken.name: images[start : start + batch]})
        yield dict(zip(names, found, strict=True))


def compare(program: QuantizedOnnx, images: Images) -> tuple[LayerError, ...]:
    """Give every quantized layer's SQNR, in the order they run; images N×H×W×3.

    Each is computed in the int8 graph, with the errors of all before it, and alone: of the float graph's values,
    rounded as the layer asks.
    """
    model, int8 = (onnx.load(path) for path in (program.simplified, program.path))
    found, ours = layers(model, int8), Wiring(int8.graph)
    if not found:
        return ()
    beside = ModelProto()
    beside.CopyFrom(model)
    for layer in found:
        _add_alone(beside, layer, ours)
    exact = [layer.exact.output[0] for layer in found]
    alone = [f"{PREFIX}{layer.exact.name}" for layer in found]
    rounded = [layer.int8.output[0] for layer in found]
    powers = np.zeros((3, len(found)))
    for floats, ints in zip(_run(beside, [*exact, *alone], images), _run(int8, rounded, images), strict=True):
        for place in range(len(found)):
            reference, own, through = floats[exact[place]], floats[alone[place]], ints[rounded[place]]
            powers[:, place] += [_square(one) for one in (reference, reference - through, reference - own)]
    rows = zip(found, powers.T.tolist(), strict=True)
    return tuple(LayerError(one.exact.name, decibels(s, n), decibels(s, own)) for one, (s, n, own) in rows)


def _square(values: Values) -> float:
    return float(np.square(values, dtype=np.float64).sum())


def _add_alone(model: ModelProto, layer: Layer, wiring: Wiring) -> None:
    """Put a layer as it is quantized beside the float one, on the float graph's own input."""
    given = layer.exact.input[0]
    if layer.pair:
        name = f"{PREFIX}{layer.exact.name}"
        for step, node in zip(("rounded", "back"), layer.pair, strict=True):
            names = [f"{name}/{step}/{place}" for place in range(1, len(node.input))]
            for own, theirs in zip(names, node.input[1:], strict=True):
                model.graph.initializer.append(
                    numpy_helper.from_array(numpy_helper.to_array(wiring.constants[theirs]), own)
                )
            model.graph.node.append(helper.make_node(node.op_type, [given, *names], [f"{name}/{step}"]))
            given = f"{name}/{step}"
    bias = None
    if len(layer.int8.input) > 2:
        made = wiring.maker.get(layer.int8.input[2])
        whole = made is not None and made.op_type == "DequantizeLinear"
        bias = _dequantized(made, wiring) if made is not None and whole else _constant(layer.int8.input[2], wiring)
    _add_beside(model, layer, [given], layer.weight, bias=bias)


def _constant(name: str, wiring: Wiring) -> Values | None:
    return np.asarray(numpy_helper.to_array(wiring.constants[name]), np.float32) if name in wiring.constants else None


def names(program: QuantizedOnnx) -> set[str]:
    """Name the layers of an int8 graph as `quantization.keep` knows them."""
    return {layer.exact.name for layer in layers(onnx.load(program.simplified), onnx.load(program.path))}


def blames(program: QuantizedOnnx, images: Images) -> tuple[Blame, ...]:
    """Give what noise (a share of the scores' power) would go with each layer in float, the largest share first."""
    model, int8 = (onnx.load(path) for path in (program.simplified, program.path))
    reference = pixels.thin(predict(program.simplified)(images))
    before = noise_share(reference, pixels.thin(predict(program.path)(images)))
    constants = Wiring(model.graph).constants
    found = []
    every = layers(model, int8)
    for layer in progress.track(every, "blame layers", total=len(every)):
        scores = pixels.thin(predict(_spared(int8, layer, constants).SerializeToString())(images))
        found.append(Blame(layer.exact.name, before - noise_share(reference, scores)))
    return tuple(sorted(found, key=lambda blame: -blame.noise))


def _spared(int8: ModelProto, layer: Layer, constants: Mapping[str, onnx.TensorProto]) -> ModelProto:
    """Give the int8 graph with one layer computed in float, of what its input was before it was rounded."""
    made = ModelProto()
    made.CopyFrom(int8)
    node = next(node for node in made.graph.node if node.name == layer.int8.name)
    node.input[0] = layer.pair[0].input[0] if layer.pair else node.input[0]
    for place, name in enumerate(layer.exact.input[1:], 1):
        own = f"{PREFIX}{layer.exact.name}/{place}"
        made.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(constants[name]), own))
        node.input[place] = own
    return made
