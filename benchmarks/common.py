"""What several benchmarks share: every way of ONNX Runtime's `quantize_static`, and where results are kept."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from bitferry import targets
from bitferry.device.arrays import Images

RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Static:
    """One way that `quantize_static` has."""

    style: QuantFormat
    per_channel: bool
    activation: QuantType
    spared: bool
    """Whether the normalization of the pixels stays in float."""

    @property
    def label(self) -> str:
        where = "channel" if self.per_channel else "tensor"
        spared = " normalization float" if self.spared else ""
        return f"{self.style.name} {where} {self.activation.name[1:]}{spared}"


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Hand out the calibration images one by one."""

    def __init__(self, images: Images) -> None:
        self.images = iter(images)

    def get_next(self) -> dict[str, Images] | None:
        image = next(self.images, None)
        return None if image is None else {"images": image[None]}


def every_static() -> Iterator[Static]:
    """List all combinations of format, granularity of the weights, type of the activations, normalization."""
    formats, types = (QuantFormat.QDQ, QuantFormat.QOperator), (QuantType.QUInt8, QuantType.QInt8)
    for combination in itertools.product(formats, (True, False), types, (False, True)):
        yield Static(*combination)


def static(way: Static, given: Path, images: Images, folder: Path) -> Path:
    """Quantize a float ONNX in one way."""
    path = folder / f"{way.label.replace(' ', '-')}.onnx"
    quantize_static(
        given,
        path,
        Reader(images),
        quant_format=way.style,
        per_channel=way.per_channel,
        activation_type=way.activation,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=first_arithmetic(given) if way.spared else [],
    )
    return path


def first_arithmetic(path: Path) -> list[str]:
    """Name the nodes between the images and the first layer."""
    names: list[str] = []
    for node in onnx.load(path).graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            break
        names.append(node.name)
    return names


def batch_of_one(model: Path, out: Path) -> Path:
    """Fix the batch and let ONNX Runtime prepare the graph, as its guide to quantization asks."""
    made = onnx.load(model)
    made.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    del made.graph.value_info[:]
    onnx.save(made, out)
    quant_pre_process(out, out, skip_symbolic_shape=True)
    return out


def result_path(name: str) -> Path:
    """Give where today's samples of a benchmark are kept; the newest instruction set tells machines apart."""
    machine = "-".join(targets.cpu_isa()[-1:]) or "cpu"
    return RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-{name}-{machine}.json"
