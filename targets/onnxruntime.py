"""Microsoft ONNX Runtime on the CPU: runs the simplified ONNX as it is."""

import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnxruntime as ort

from device.arrays import Images, Outputs, Predict
from targets import Environment, Form, Layer, Options, Precision, Scheme, cpu_isa, system

CONSUMES: Form = "onnx"
SUFFIX = ".onnx"
SCHEMES: Mapping[Precision, Scheme | None] = {"int8": Scheme(), "float32": None}

INT8_KERNELS = {
    "QLinearConv",
    "QLinearMatMul",
    "QGemm",
    "ConvInteger",
    "MatMulInteger",
    "DynamicQuantizeMatMul",
    "MatMulIntegerToFloat",
    "QAttention",
}
FLOAT_KERNELS = {
    "Conv",
    "FusedConv",
    "Gemm",
    "FusedGemm",
    "MatMul",
    "FusedMatMul",
    "ConvTranspose",
    "Attention",
    "MultiHeadAttention",
}


def environment(*, options: Options) -> Environment:
    return Environment("onnxruntime", ort.__version__, "CPU", cpu_isa(), system())


def compile(model: Path, out: Path, *, precision: Precision, options: Options) -> None:
    shutil.copyfile(model, out)


def load(path: Path, *, precision: Precision, options: Options) -> Predict:
    session = ort.InferenceSession(path, _options(options.threads), providers=["CPUExecutionProvider"])
    name: str = session.get_inputs()[0].name

    def predict(images: Images) -> Outputs:
        scores: Outputs = session.run(None, {name: images})[0]
        return scores

    return predict


def executed(path: Path, *, precision: Precision, options: Options) -> Sequence[Layer]:
    import onnx  # noqa: PLC0415 - only the engineer's machine has it

    with tempfile.TemporaryDirectory() as folder:
        session_options = _options(None)
        # The one step left out, the NCHWc layout of float convolutions, renames them and changes no precision.
        session_options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        session_options.optimized_model_filepath = f"{folder}/optimized.onnx"
        ort.InferenceSession(path, session_options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(f"{folder}/optimized.onnx").graph.node
    return [
        Layer(
            re.sub(r"_token_\d+$", "", node.name),  # which fusing appends
            "convolution" if "Conv" in node.op_type else "matrix product",
            "int8" if node.op_type in INT8_KERNELS else "float32",
        )
        for node in nodes
        if node.op_type in INT8_KERNELS | FLOAT_KERNELS
    ]


def _options(threads: int | None) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    return options
