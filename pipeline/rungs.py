"""The steps between a deployment's float model and its artifact, each with how to load it: what a ladder climbs."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from bitferry import targets
from bitferry.device.arrays import Predict
from bitferry.pipeline.artifacts import FloatOnnx, QuantizedOnnx
from bitferry.pipeline.capture import read_program
from bitferry.pipeline.export import answer
from bitferry.pipeline.measure.ladder import Step, Steps
from bitferry.pipeline.onnx_in import way as onnx_way
from bitferry.pipeline.trace import torchscript
from bitferry.pipeline.verify import eager, load_artifact

if TYPE_CHECKING:
    from bitferry.pipeline.run import Deployment

INT8 = "PyTorch int8"


def of(deployment: "Deployment", *, measured: bool = True) -> Steps:
    """Name each step between the float model and what the target compiles; then the artifact, where it can run here."""
    form, program = targets.get(deployment.name).CONSUMES, deployment.program
    if isinstance(program, FloatOnnx | QuantizedOnnx):
        simplified = program.simplified if isinstance(program, QuantizedOnnx) else deployment.simplified.path
        return onnx_way.steps(program, simplified) | _last(deployment, measured)
    steps: dict[str, Callable[[], Predict]] = {}
    if program.quantized:
        steps[INT8] = lambda: eager(program.module())
    elif form == "exported":
        steps["torch.export"] = lambda: eager(read_program(deployment.captured.path))
    if form != "exported":
        steps["TorchScript"] = lambda: eager(torchscript(deployment.traced))
    if form == "onnx":
        steps["ONNX"] = lambda: partial(answer, deployment.exported.path)
        steps["simplified ONNX"] = lambda: partial(answer, deployment.simplified.path)
    return {name: Step(program.key, load, name == INT8) for name, load in steps.items()} | _last(deployment, measured)


def _last(deployment: "Deployment", measured: bool) -> dict[str, Step]:
    compiled = deployment.compiled
    return {deployment.name: Step(compiled.key, lambda: load_artifact(compiled))} if measured else {}
