"""Scheme → annotations on a graph: which tensors become int8, and where a grid goes (torchao PT2E)."""

from collections.abc import Sequence
from difflib import get_close_matches
from operator import attrgetter
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, fx
from torchao.quantization.pt2e import ObserverBase
from torchao.quantization.pt2e.quantizer import (
    DerivedQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from bitferry.device.errors import InputError
from bitferry.pipeline.capture import layer_name
from bitferry.pipeline.quantization.grid import Grid
from bitferry.pipeline.quantization.layout import feature_maps
from bitferry.targets import Scheme

aten = torch.ops.aten
WEIGHTED = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default}
ADDITIONS = {aten.add.Tensor, aten.add_.Tensor}
JOINS = {aten.mul.Tensor, aten.mul_.Tensor, aten.cat.default, aten.avg_pool2d.default}
"""What runs on int8 as well, where layers give it."""
NORM, POOL, MEAN = aten.batch_norm.default, aten.adaptive_avg_pool2d.default, aten.mean.dim
RELUS = {getattr(aten, name + place).default for name in ("relu", "relu6", "hardtanh", "clamp") for place in ("", "_")}
"""What every runtime fuses into the layer before it."""
CARRIERS = {
    aten.contiguous.default,
    aten.dropout.default,
    aten.dropout_.default,
    aten.flatten.using_ints,
    aten.max_pool2d.default,
    aten.permute.default,
    aten.reshape.default,
    aten.squeeze.dim,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.view.default,
}
"""What moves values and makes no new ones, so that it runs on int8 as it is."""
MOST_BIAS = 2**30
"""Of an int32 bias; as much again is left for the sum that it is added to."""
Spec: TypeAlias = QuantizationSpec | DerivedQuantizationSpec | SharedQuantizationSpec
Inputs = dict[fx.Node, Spec]


class SchemeQuantizer(Quantizer):  # type: ignore[misc]
    """Annotate a graph as a target's scheme asks: int8 into every convolution, matrix product and residual addition.

    Inputs are annotated, and an output only where nothing that takes it is int8 and the scheme wants it. What lies
    between two quantized layers (ReLU, pooling, reshaping) then stays between one layer's float output and the next
    one's input, where the runtimes fuse it.
    """

    def __init__(self, scheme: Scheme, keep: Sequence[str] = ()) -> None:
        super().__init__()
        self.scheme, self.keep = scheme, frozenset(keep)
        self.activation = _activation(scheme)
        self.maps: set[fx.Node] = set()

    def transform_for_annotation(self, model: fx.GraphModule) -> fx.GraphModule:
        """Prepare what no annotation can say.

        Each layer gets a bias node of its own: layers that share one have other input scales, so other biases.
        Pooling to 1×1 becomes the mean that it is: on its way to ONNX it would end in a gather of every value from
        where it already is, to keep the memory format. And where layers give int8, a batch norm that no convolution
        could take in becomes one itself, channel by channel.
        """
        for node in [node for node in model.graph.nodes if node.target is POOL and _to_one(node)]:
            node.target, node.args = MEAN, (node.args[0], [-1, -2], True)
        if self.scheme.outputs == "int8":
            for node in [node for node in model.graph.nodes if node.target is NORM]:
                _as_convolution(model, node)
        for node in [node for node in model.graph.nodes if node.target in WEIGHTED]:
            bias = _bias(node)
            if bias is not None and len(bias.users) > 1:
                with model.graph.inserting_before(node):
                    own = model.graph.get_attr(str(bias.target))
                own.meta = dict(bias.meta)
                node.replace_input_with(bias, own)
        return model

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        self.maps = feature_maps(model)
        for node in model.graph.nodes:
            inputs = self._inputs(node)
            if inputs and node.target is aten.cat.default and self.scheme.concatenations == "shared":
                _annotate(node, *_with_one_scale(node, self.activation))
            else:
                _annotate(node, inputs)
        if self.scheme.outputs == "int8":
            for node in [node for node in model.graph.nodes if node.target in WEIGHTED]:
                last = _fused(node)
                if _annotation(node) and not _taken_as_int8(last):
                    _annotate(last, {}, self.activation)
        return model

    def _inputs(self, node: fx.Node) -> Inputs:
        if node.target in WEIGHTED and _is_weight(node.args[1]):
            return {} if layer_name(node) in self.keep else self._layer(node)
        if node.target in ADDITIONS and all(map(_is_activation, node.args[:2])) and node in self.maps:
            return dict.fromkeys(self._added(node), self.activation)
        if node.target in JOINS and self.scheme.outputs == "int8" and node in self.maps and _joins_activations(node):
            return dict.fromkeys(node.all_input_nodes, self.activation)
        if node.target is POOL or _is_global_mean(node):
            return {_node(node.args[0]): self.activation}
        return {}

    def _layer(self, node: fx.Node) -> Inputs:
        data, weight, bias = _node(node.args[0]), _node(node.args[1]), _bias(node)
        if bias is None or self.scheme.bias == "float32":
            return {data: self.activation, weight: _weight(self.scheme)}
        return {data: self.activation, weight: _weight(self.scheme), bias: _int32_bias((data, node), (weight, node))}

    def _added(self, node: fx.Node) -> list[fx.Node]:
        """Choose the inputs of an addition of maps that are quantized."""
        both = [_node(argument) for argument in node.args[:2]]
        if self.scheme.additions == "skip":
            direct = [given for given in both if given.target in WEIGHTED and len(given.users) == 1]
            return [given for given in both if given is not (direct or both)[0]]
        return both if self.scheme.additions == "both" else []

    def validate(self, model: fx.GraphModule) -> None:
        """Refuse to keep what is no layer of this model."""
        names = [layer_name(node) for node in model.graph.nodes if node.target in WEIGHTED]
        for name in sorted(self.keep - set(names)):
            close = get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f"did you mean '{close[0]}'?" if close else f"it has {', '.join(names[:5])}, …"
            raise InputError(f"quantization.keep names '{name}', which is no convolution or matrix product; {hint}")


def _with_one_scale(node: fx.Node, spec: QuantizationSpec) -> tuple[Inputs, Spec]:
    """Give a node's inputs and its output the scale of them all together."""
    first, *others = node.all_input_nodes
    shared = SharedQuantizationSpec((first, node))
    return {first: spec, **dict.fromkeys(others, shared)}, shared


def _annotate(node: fx.Node, inputs: Inputs, output: Spec | None = None) -> None:
    if inputs or output:
        before = _annotation(node)
        node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(
            input_qspec_map=before.input_qspec_map if before else inputs, output_qspec=output, _annotated=True
        )


def _annotation(node: fx.Node) -> QuantizationAnnotation | None:
    return node.meta.get(Q_ANNOTATION_KEY)


def _fused(node: fx.Node) -> fx.Node:
    """Follow a layer's output through the ReLUs that are its only use."""
    while len(node.users) == 1 and (user := next(iter(node.users))).target in RELUS:
        node = user
    return node


def _taken_as_int8(node: fx.Node, *, moved: bool = False) -> bool:
    """Say whether everything that takes this value, through what only moves it, quantizes it on one grid.

    Where a value branches and a branch moves it, each branch would have a grid of its own.
    """
    if len(node.users) > 1 and (moved or any(user.target in CARRIERS for user in node.users)):
        return False
    for user in node.users:
        found = _annotation(user)
        quantized = found is not None and node in found.input_qspec_map
        if not quantized and not (user.target in CARRIERS and _taken_as_int8(user, moved=True)):
            return False
    return bool(node.users)


def _activation(scheme: Scheme) -> QuantizationSpec:
    low, high = (0, 255) if scheme.activation == "uint8" else (-128, 127)
    return QuantizationSpec(
        dtype=getattr(torch, scheme.activation),
        quant_min=low,
        quant_max=high,
        qscheme=torch.per_tensor_symmetric if scheme.activation_symmetric else torch.per_tensor_affine,
        is_dynamic=False,
        observer_or_fake_quant_ctr=Grid.with_args(),
    )


def _most(scheme: Scheme) -> int:
    return int(2 ** (scheme.weight_bits - 1) - 1)


def _weight(scheme: Scheme) -> QuantizationSpec:
    return QuantizationSpec(
        dtype=torch.int8,
        quant_min=-_most(scheme),
        quant_max=_most(scheme),
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        is_dynamic=False,
        observer_or_fake_quant_ctr=Grid.with_args(),
    )


def _int32_bias(data: tuple[fx.Node, fx.Node], weight: tuple[fx.Node, fx.Node]) -> DerivedQuantizationSpec:
    return DerivedQuantizationSpec(
        derived_from=[data, weight],
        derive_qparams_fn=_product_of_scales,
        dtype=torch.int32,
        quant_min=-MOST_BIAS,
        quant_max=MOST_BIAS,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )


def _product_of_scales(observers: Sequence[ObserverBase]) -> tuple[Tensor, Tensor]:
    (data, _), (weight, _) = (observer.calculate_qparams() for observer in observers)
    scale = data * weight
    return scale, torch.zeros_like(scale, dtype=torch.int64)


def _value(model: fx.GraphModule, node: fx.Node) -> Tensor:
    value: Tensor = attrgetter(str(node.target))(model)
    return value.detach()


def _bias(node: fx.Node) -> fx.Node | None:
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    return bias if isinstance(bias, fx.Node) and _is_weight(bias) else None


def _node(argument: Any) -> fx.Node:
    return cast(fx.Node, argument)


def _as_convolution(model: fx.GraphModule, norm: fx.Node) -> None:
    """Make a batch norm of N×C×H×W in evaluation mode a convolution of each channel with one weight."""
    data, weight, bias, mean, variance, training, _, eps, _ = norm.args
    if training or _node(data).meta["val"].ndim != 4:
        return
    scale = (_value(model, _node(variance)) + cast(float, eps)).rsqrt()
    scale = scale * _value(model, weight) if isinstance(weight, fx.Node) else scale
    shift = -_value(model, _node(mean)) * scale
    shift = shift + _value(model, bias) if isinstance(bias, fx.Node) else shift
    made = []
    for name, value in (("weight", scale.view(-1, 1, 1, 1)), ("bias", shift)):
        model.register_buffer(f"{norm.name}_{name}", value.clone())
        with model.graph.inserting_before(norm):
            made.append(model.graph.get_attr(f"{norm.name}_{name}"))
    norm.target = aten.conv2d.default
    norm.args = (data, *made, [1, 1], [0, 0], [1, 1], len(scale))


def _joins_activations(node: fx.Node) -> bool:
    values = [value.meta["val"] for value in node.all_input_nodes if _is_activation(value)]
    tensors = all(isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 4 for value in values)
    wanted = 2 if node.target in (aten.mul.Tensor, aten.mul_.Tensor) else 1
    return tensors and len(values) == len(node.all_input_nodes) >= wanted


def _to_one(pool: fx.Node) -> bool:
    return list(cast(Sequence[Any], pool.args[1])) in ([1], [1, 1])


def _is_global_mean(node: fx.Node) -> bool:
    """Say whether a node takes the mean of N×C×H×W over height and width."""
    if node.target is not MEAN or _node(node.args[0]).meta["val"].ndim != 4:
        return False
    return sorted(axis % 4 for axis in cast(Sequence[int], node.args[1])) == [2, 3]


def _is_weight(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _is_activation(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op != "get_attr"
