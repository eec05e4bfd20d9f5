"""Intel OpenVINO on a CPU, GPU or NPU: ONNX → IR, every batch size compiled as a model of its own."""

# What is imported first keeps OpenVINO's own import from doing what a device did not ask for.
# ruff: noqa: E402

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self, cast

import numpy as np

# Its telemetry writes into the home folder, on import, and warns where it cannot; without it OpenVINO has a stub.
cast(dict[str, Any], sys.modules).setdefault("openvino_telemetry", None)

import openvino as ov
from openvino import opset13 as opset

from bitferry import targets
from bitferry.device import ir_file, ir_names
from bitferry.device.arrays import Images, Outputs, Predict, in_batches
from bitferry.device.errors import TargetUnavailable
from bitferry.targets import (
    Environment,
    Form,
    Kind,
    Layer,
    Needs,
    Precision,
    Scheme,
    cpu_isa,
    fast_on_cpu,
    since,
    system,
)

CORE = ov.Core()
"""The only one of this process.

OpenVINO 2026.4.1 gives the thread in which a Core loads its CPU plugin a stack for signal handlers, and unmaps that
when the Core goes. Of two the last to go restores the stack of the first, unmapped by then: the next Ctrl-C is a
segmentation fault.
"""
CONSUMES: Form = "onnx"
SUFFIX = ".xml"
SCHEMES: Mapping[Precision, Scheme | None] = {"int8": Scheme(), "float32": None, "bfloat16": None, "float16": None}

# Without a hint OpenVINO runs float layers in bfloat16 where the CPU can, and in float16 on a GPU; what an int8
# graph leaves in float must be the float32 that was verified, too.
HINTS: Mapping[Precision, str] = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
CAPABILITIES: Mapping[Precision, str] = {"int8": "INT8", "float32": "FP32", "bfloat16": "BF16", "float16": "FP16"}
KINDS: Mapping[str, Kind] = {
    "Convolution": "convolution",
    "Deconvolution": "convolution",
    "FullyConnected": "matrix product",
    "MatMul": "matrix product",
    "Gemm": "matrix product",
}
PLAIN = r"(?:CPU|GPU(?:\.\d+)?|NPU)"
DEVICE = re.compile(rf"{PLAIN}|AUTO|(?:AUTO|HETERO):{PLAIN}(?:,{PLAIN})*")
MOST_AT_ONCE = 64
"""Images of one call of the model with a dynamic batch; more are answered in several."""
MOST_SIZES = 4
"""How many batch sizes stay compiled, each with its own copy of the weights."""


@dataclass(frozen=True, kw_only=True)
class Options(targets.Options):
    device: str = "CPU"
    """`CPU`, `GPU`, `GPU.1`, `NPU`, `AUTO`, or several as in `AUTO:GPU,CPU` and `HETERO:GPU,CPU`."""
    hint: Literal["latency", "throughput"] = "latency"
    """What OpenVINO chooses its settings for; throughput answers a call of many images in several streams."""
    streams: int | None = None
    """How many calls of the model run at once and share the threads; None for what the hint makes of it."""
    rests: Literal["float32", "bfloat16", "float16"] = "float32"
    """What an int8 graph computes in that has no int8 of its own, and the layers that stay float."""
    half_weights: bool = False
    """Keep float weights in 16 bits: half the file, rounded. Precision float16 always does."""
    cache: str | None = None
    """A folder on the device for compiled models, which makes the next load faster; no manifest covers it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not DEVICE.fullmatch(self.device):
            raise ValueError(
                f"device '{self.device}' is none of OpenVINO's: CPU, GPU, GPU.1, NPU, AUTO, or several as AUTO:GPU,CPU "
                f"or HETERO:GPU,CPU; found here: {', '.join(_found())}"
            )
        if self.streams is not None and self.streams < 1:
            raise ValueError(f"streams must be 1 or more, not {self.streams}")
        if self.batch == "dynamic" and (self.hint == "throughput" or self.streams not in (None, 1)):
            raise ValueError('several streams share a call by fixed batches; with batch = "dynamic" leave them out')

    @property
    def needs_vnni(self) -> bool:
        return "CPU" in _plain(self.device)

    def alternatives(self, precision: Precision, fast: Sequence[Precision]) -> Iterator[Self]:
        """Add 16-bit rests. Hints and streams are about calls beside each other: no call is faster for them."""
        yield from super().alternatives(precision, fast)
        if precision == "int8" and self.rests == "float32":
            yield from (replace(self, rests=one) for one in ("bfloat16", "float16") if one in fast)


def environment(*, options: Options) -> Environment:
    missing = _missing(options.device)
    chosen = _plain(options.device)
    return Environment(
        runtime="openvino",
        version=ov.get_version().split("-")[0],
        device=options.device if missing else ", ".join(dict.fromkeys(map(_full_name, chosen))),
        isa=cpu_isa(),
        system=system(),
        devices=tuple(f"{device}: {_full_name(device)}" for device in _found()),
        fast=() if missing else tuple(p for p in SCHEMES if all(p in _fast(device) for device in chosen)),
        unmeasured=missing,
    )


def needs(path: Path, *, options: Options) -> Needs:
    return Needs({"openvino": since(ov.get_version())})


def exact(*, precision: Precision, options: Options) -> bool:
    return precision == "float32" and not options.half_weights and "NPU" not in _plain(options.device)  # all float16


def compile(model: Path, out: Path, *, precision: Precision, options: Options) -> None:
    try:
        graph = CORE.read_model(model)
    except RuntimeError as error:  # its first lines name places in OpenVINO's own source
        raise RuntimeError(str(error).strip().rpartition("\n")[2].strip()) from error
    if options.batch != "dynamic":
        _fix_batch(graph, options.batch)
    _part_zero_points(graph)
    ir_names.settle(graph)
    ov.save_model(graph, out, compress_to_fp16=options.half_weights or precision == "float16")


def load(path: Path, *, precision: Precision, options: Options) -> Predict:
    ir_file.check(path)
    if options.batch == "dynamic":
        return _of_any_size(path, precision, options)
    compiled = _compiled(path, precision, options, options.batch)
    at_once = compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
    predicts = [in_batches(_predict(compiled), options.batch) for _ in range(at_once)]
    return predicts[0] if at_once == 1 else _shared_out(predicts, options.batch)


def executed(path: Path, *, precision: Precision, options: Options) -> Sequence[Layer]:
    ir_file.check(path)
    batch = 1 if options.batch == "dynamic" else options.batch
    compiled = _compiled(path, precision, options, batch, {"PERF_COUNT": True})
    took, layers = _microseconds(compiled), []
    for layer in compiled.get_runtime_model().get_ordered_ops():
        info = {name: str(value.value) for name, value in layer.get_rt_info().items()}
        if info.get("layerType") in KINDS:
            kind, name = KINDS[info["layerType"]], layer.get_friendly_name()
            layers.append(Layer(name.partition(ir_names.APART)[0], kind, _precision(info), took.get(name)))
    return layers


def _microseconds(compiled: ov.CompiledModel) -> dict[str, float]:
    """Measure each layer in a few calls."""
    request = compiled.create_infer_request()
    images = np.zeros(compiled.input(0).shape, np.uint8)
    taken: dict[str, list[float]] = {}
    for _ in range(targets.TIMED_CALLS):
        request.infer([images])
        for one in request.profiling_info:
            taken.setdefault(one.node_name, []).append(one.real_time.total_seconds() * 1e6)
    return {name: float(np.median(values[1:])) for name, values in taken.items()}


def _precision(info: Mapping[str, str]) -> str:
    """Read the kernel's name, as `brgconv_avx512_f32`: beside it a float32 layer of 16-bit weights is called f16."""
    of_kernel = info["primitiveType"].rpartition("_")[2].lower()
    return _NAMES.get(of_kernel) or _NAMES.get(info["runtimePrecision"], info["runtimePrecision"])


_NAMES = {"u8": "int8", "i8": "int8", "f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def _predict(compiled: ov.CompiledModel) -> Predict:
    """Answer with one request, as many images as the model was compiled for."""
    request = compiled.create_infer_request()

    def predict(images: Images) -> Outputs:
        return cast(Outputs, request.infer([images], share_inputs=True, share_outputs=False)[0])

    return predict


def _of_any_size(path: Path, precision: Precision, options: Options) -> Predict:
    """Compile for each number of images that comes: a model compiled for any number can answer wrongly.

    See docs/decisions/0006-openvino-batch-1.md; tried with OpenVINO 2026.4.1.
    """
    sized = lru_cache(MOST_SIZES)(lambda images: _predict(_compiled(path, precision, options, images)))

    def predict(images: Images) -> Outputs:
        parts = [images[start : start + MOST_AT_ONCE] for start in range(0, len(images), MOST_AT_ONCE)]
        return np.concatenate([sized(len(part))(part) for part in parts])

    return predict


def _shared_out(predicts: Sequence[Predict], batch: int) -> Predict:
    """Give each of several requests its share of a call's batches, to be answered at once."""
    pool = ThreadPoolExecutor(len(predicts))

    def predict(images: Images) -> Outputs:
        share = batch * -(-len(images) // (batch * len(predicts)))
        parts = [images[start : start + share] for start in range(0, len(images), share)]
        return np.concatenate(list(pool.map(lambda answer, part: answer(part), predicts, parts)))

    return predict


def _compiled(
    path: Path, precision: Precision, options: Options, batch: int, more: Mapping[str, object] = MappingProxyType({})
) -> ov.CompiledModel:
    if missing := _missing(options.device):
        raise TargetUnavailable(missing)
    settings: dict[str, object] = {
        "PERFORMANCE_HINT": options.hint.upper(),
        "INFERENCE_PRECISION_HINT": HINTS[options.rests if precision == "int8" else precision],
        **more,
    }
    if options.threads is not None and "CPU" in _plain(options.device):  # other devices know no such setting
        settings["DEVICE_PROPERTIES"] = {"CPU": {"INFERENCE_NUM_THREADS": options.threads}}
    if options.streams is not None:
        settings["NUM_STREAMS"] = options.streams
    if options.device.startswith("AUTO"):  # or the CPU answers until another device is ready, in other time
        settings["ENABLE_STARTUP_FALLBACK"] = False
    if options.cache:
        settings["CACHE_DIR"] = str(Path(options.cache).expanduser())
    # Compiled from the path, a cached model would answer when the weights beside the .xml have changed.
    graph = CORE.read_model(path)
    _fix_batch(graph, batch)
    return CORE.compile_model(graph, options.device, settings)


def _fix_batch(graph: ov.Model, batch: int) -> None:
    shape = graph.input(0).get_partial_shape()
    shape[0] = batch
    graph.reshape(shape)


def _part_zero_points(graph: ov.Model) -> None:
    """Give weights of other shapes zero points of their own: OpenVINO 2026.4.1 runs in float what shares one constant.

    ONNX keeps equal constants once, as the zeros of a convolution and of a matrix product with as many outputs.
    """
    for operation in graph.get_ops():
        if operation.get_type_name() == "Convert" and operation.input_value(0).get_node().get_type_name() == "Constant":
            for taker in list(operation.output(0).get_target_inputs())[1:]:
                own = opset.convert(operation.input_value(0), operation.get_output_element_type(0).get_type_name())
                taker.replace_source_output(own.output(0))


def _found() -> list[str]:
    return list(CORE.available_devices)


def _plain(device: str) -> list[str]:
    """List the devices that a name stands for; `AUTO` alone for every one found."""
    return re.findall(PLAIN, device) or _found()


def _missing(device: str) -> str | None:
    """Say which of the devices named is not here, and why as far as OpenVINO tells; None where all are."""
    found = _found()
    for one in _plain(device):
        # The first of several GPUs answers to GPU as well, and the only one to GPU.0.
        if one not in found and f"{one}.0" not in found and one.removesuffix(".0") not in found:
            return f"OpenVINO finds no device '{one}' here{_why(one)}; it found {', '.join(found)}"
    return None


def _why(device: str) -> str:
    """Name the system library that a device's plugin asks for in vain; its absence hides a device that is there."""
    try:
        CORE.get_property(device, "FULL_DEVICE_NAME")
    except RuntimeError as error:
        lacking = re.search(r"(\S+): cannot open shared object", str(error))
        return f" (its plugin needs the system library {lacking[1]})" if lacking else ""
    return ""


def _full_name(device: str) -> str:
    return str(CORE.get_property(device, "FULL_DEVICE_NAME"))


def _fast(device: str) -> tuple[Precision, ...]:
    """List what a device has instructions for; the CPU plugin says INT8 of every CPU, hence the CPU's own word."""
    if device == "CPU":
        return fast_on_cpu(SCHEMES)
    able = CORE.get_property(device, "OPTIMIZATION_CAPABILITIES")
    return tuple(precision for precision, name in CAPABILITIES.items() if name in able)
