"""The ONNX project's own reference evaluator, plain NumPy, as a target: slow, and right by definition."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import version_converter
from onnx.reference import ReferenceEvaluator

from bitferry.device.arrays import Images, Outputs, Predict, in_batches
from bitferry.targets import Environment, Form, Layer, Options, Precision, Scheme, system

CONSUMES: Form = "onnx"
SUFFIX = ".onnx"
SCHEMES: Mapping[Precision, Scheme | None] = {"int8": Scheme(), "float32": None}


def environment(*, options: Options) -> Environment:
    return Environment("onnx", onnx.__version__, "NumPy", (), system())


def compile(model: Path, out: Path, *, precision: Precision, options: Options) -> None:
    newer = version_converter.convert_version(onnx.load(model), 21)  # the first whose quantizers it has
    onnx.save(newer, out)


def load(path: Path, *, precision: Precision, options: Options) -> Predict:
    evaluator = ReferenceEvaluator(str(path))

    def predict(images: Images) -> Outputs:
        (scores,) = evaluator.run(None, {"images": images})
        return np.asarray(scores, np.float32)

    return predict if options.batch == "dynamic" else in_batches(predict, options.batch)


def executed(path: Path, *, precision: Precision, options: Options) -> Sequence[Layer]:
    # It dequantizes first, so that every layer is computed in float32, whatever was asked for.
    nodes = onnx.load(path).graph.node
    return [
        Layer(node.name, "convolution" if node.op_type == "Conv" else "matrix product", "float32")
        for node in nodes
        if node.op_type in {"Conv", "Gemm", "MatMul"}
    ]
