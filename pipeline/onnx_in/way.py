"""How a file goes on: simplified, quantized, and every step of it run by itself for the ladder."""

from functools import partial
from pathlib import Path

from bitferry.pipeline.artifacts import FloatOnnx, Onnx, QuantizedOnnx
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.data.split import Split
from bitferry.pipeline.export import answer, simplify
from bitferry.pipeline.measure.ladder import Step
from bitferry.pipeline.onnx_in.load import as_given
from bitferry.pipeline.onnx_in.quantize import quantize
from bitferry.pipeline.recipe import Quantization
from bitferry.targets import Scheme


def quantized(
    model: FloatOnnx, calibration: Split, scheme: Scheme, settings: Quantization, build: Cache
) -> QuantizedOnnx:
    """Quantize what is simplified: batch norms folded, constants computed, nothing that does nothing."""
    simplified = simplify(Onnx(model.path, model, model.key), calibration, build)
    return quantize(model, simplified, calibration, scheme, settings, build)


def steps(program: FloatOnnx | QuantizedOnnx, simplified: Path) -> dict[str, Step]:
    """Name the steps from the file on, each with how to load it: the file itself, simplified, quantized."""
    model = program.baseline
    found = {
        "ONNX as given": Step(model.key, lambda: as_given(model.given, model.preprocessing)),
        "simplified ONNX": Step(program.key, lambda: partial(answer, simplified)),
    }
    if isinstance(program, QuantizedOnnx):
        found["int8 ONNX"] = Step(program.key, lambda: partial(answer, program.path), rounds=True)
    return found
