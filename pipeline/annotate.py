"""Scheme → annotations on a graph: which tensors become int8, and what observes their ranges (torchao PT2E)."""

from typing import Any

import torch
from torch import fx
from torchao.quantization.pt2e import HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from pipeline.recipe import Quantization
from targets import Scheme

aten = torch.ops.aten
WEIGHTED = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.linear.default}
ADDITIONS = {aten.add.Tensor, aten.add_.Tensor}
POOLS = {aten.adaptive_avg_pool2d.default}
OBSERVERS = {"histogram": HistogramObserver, "minmax": MinMaxObserver}


class SchemeQuantizer(Quantizer):  # type: ignore[misc]
    """Annotate a graph as a target's scheme asks: int8 into every convolution, matrix product and residual addition.

    Only inputs are annotated. What lies between two quantized layers (ReLU, pooling, reshaping) then stays
    between one layer's float output and the next one's input, where the runtimes fuse it.
    """

    def __init__(self, scheme: Scheme, settings: Quantization) -> None:
        super().__init__()
        self.scheme = scheme
        self.activation = _activation(scheme, settings)
        self.weight = _weight(scheme)

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        for node in model.graph.nodes:
            inputs = self._inputs(node)
            if inputs:
                node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(input_qspec_map=inputs, _annotated=True)
        return model

    def _inputs(self, node: fx.Node) -> dict[Any, QuantizationSpec]:
        if node.target in WEIGHTED and _is_weight(node.args[1]):
            return {node.args[0]: self.activation, node.args[1]: self.weight}
        if node.target in ADDITIONS and self.scheme.quantize_add and all(_is_activation(a) for a in node.args[:2]):
            return dict.fromkeys(node.args[:2], self.activation)
        if node.target in POOLS:
            return {node.args[0]: self.activation}
        return {}

    def validate(self, model: fx.GraphModule) -> None:
        """Nothing to refuse: what no rule annotates stays float."""


def _activation(scheme: Scheme, settings: Quantization) -> QuantizationSpec:
    low, high = (0, 255) if scheme.activation == "uint8" else (-128, 127)
    return QuantizationSpec(
        dtype=getattr(torch, scheme.activation),
        quant_min=low,
        quant_max=high,
        qscheme=torch.per_tensor_symmetric if scheme.activation_symmetric else torch.per_tensor_affine,
        is_dynamic=False,
        observer_or_fake_quant_ctr=OBSERVERS[settings.observer].with_args(eps=2**-12),
    )


def _weight(scheme: Scheme) -> QuantizationSpec:
    most = 2 ** (scheme.weight_bits - 1) - 1
    return QuantizationSpec(
        dtype=torch.int8,
        quant_min=-most,
        quant_max=most,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        is_dynamic=False,
        observer_or_fake_quant_ctr=PerChannelMinMaxObserver.with_args(eps=2**-24),
    )


def _is_weight(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _is_activation(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op != "get_attr"
