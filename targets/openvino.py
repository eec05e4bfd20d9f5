"""Intel OpenVINO on the CPU: ONNX → IR with batch 1."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import openvino as ov

from device.arrays import Images, Outputs, Predict
from targets import Environment, Form, Layer, Options, Precision, Scheme, cpu_isa, system

CONSUMES: Form = "onnx"
SUFFIX = ".xml"
SCHEMES: Mapping[Precision, Scheme | None] = {"int8": Scheme(), "float32": None, "bfloat16": None}

# Without a hint OpenVINO runs float layers in bfloat16 where the CPU can; what an int8 graph leaves in
# float must be the float32 that was verified, too.
HINTS = {"int8": "f32", "float32": "f32", "bfloat16": "bf16"}
KINDS: Mapping[str, Literal["convolution", "matrix product"]] = {
    "Convolution": "convolution",
    "Deconvolution": "convolution",
    "FullyConnected": "matrix product",
    "MatMul": "matrix product",
    "Gemm": "matrix product",
}


def environment(*, options: Options) -> Environment:
    device: str = ov.Core().get_property("CPU", "FULL_DEVICE_NAME")
    return Environment("openvino", ov.get_version().split("-")[0], device, cpu_isa(), system())


def compile(model: Path, out: Path, *, precision: Precision, options: Options) -> None:
    graph = ov.Core().read_model(model)
    # Batch 1 fixed: 2026.4 answers some int8 graphs wrongly when the batch is dynamic
    # (docs/decisions/0006-openvino-batch-1.md), and it is faster besides.
    graph.reshape([1, *(dimension.get_length() for dimension in list(graph.input(0).get_partial_shape())[1:])])
    _name_by_position(graph)
    ov.save_model(graph, out, compress_to_fp16=False)


def load(path: Path, *, precision: Precision, options: Options) -> Predict:
    request = _compiled(path, precision, options.threads).create_infer_request()

    def predict(images: Images) -> Outputs:
        rows = [request.infer([image[None]], share_inputs=True, share_outputs=False)[0] for image in images]
        return np.concatenate(rows)

    return predict


def executed(path: Path, *, precision: Precision, options: Options) -> Sequence[Layer]:
    layers = []
    for layer in _compiled(path, precision, None).get_runtime_model().get_ordered_ops():
        info = {name: str(value.value) for name, value in layer.get_rt_info().items()}
        if info["layerType"] in KINDS:
            ran = info["runtimePrecision"]
            name = layer.get_friendly_name().removesuffix("/WithoutBiases")
            layers.append(Layer(name, KINDS[info["layerType"]], _NAMES.get(ran, ran)))
    return layers


def _name_by_position(graph: ov.Model) -> None:
    """Replace the names that OpenVINO made by counting what this process has built; the same model, the same file."""
    for position, operation in enumerate(graph.get_ordered_ops()):
        if re.fullmatch(r"\w+_\d+", operation.get_friendly_name()):
            operation.set_friendly_name(f"{operation.get_type_name()}_{position}")


_NAMES = {"u8": "int8", "i8": "int8", "f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def _compiled(path: Path, precision: Precision, threads: int | None) -> ov.CompiledModel:
    options: dict[str, str | int] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": HINTS[precision],
    }
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    return ov.Core().compile_model(path, "CPU", options)
