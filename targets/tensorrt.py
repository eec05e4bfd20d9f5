"""NVIDIA TensorRT, or TensorRT for RTX where that is installed instead: ONNX → ONNX of settled types → an engine."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitferry import targets
from bitferry.device import engine, gpu
from bitferry.device.arrays import Images, Outputs, Predict, in_batches
from bitferry.device.engine import NAME, RTX, sm, sms, trt
from bitferry.device.errors import InputError, TargetUnavailable
from bitferry.targets import Environment, Form, Kind, Layer, Needs, Precision, Scheme, system

CONSUMES: Form = "onnx"
SUFFIX = ".engine"
# Zero point 0 and no quantized bias are all that TensorRT takes; an addition fuses with the layer before it when the
# other input alone is quantized (docs/targets/tensorrt.md).
INT8 = Scheme(activation="int8", activation_symmetric=True, additions="skip")
SCHEMES: Mapping[Precision, Scheme | None] = {
    "int8": INT8,
    "float16": None,
    "float32": None,
    "bfloat16": None,
    "float8": INT8,
}
DEFAULT = ("8.6", "8.9")
"""Compute capabilities that TensorRT for RTX builds for where none are named."""
MOST_WORKSPACE_MB = 1 << 20
"""A terabyte: more is a slip of the hand, and does not fit the number that TensorRT takes."""
TIMED = "TensorRT chooses kernels by how fast they are when it builds"
REST: Mapping[Precision, str] = {"int8": "FLOAT16", "float8": "FLOAT16", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}
"""What a precision computes in where nothing is quantized, as ONNX names it; FLOAT for float32."""
SINCE: Mapping[Precision, str] = {
    "float32": "5.0",
    "float16": "7.0",
    "int8": "7.2",
    "bfloat16": "8.0",
    "float8": "8.9",
}
"""The first compute capability that has instructions for the precision."""
KINDS: Mapping[str, Kind] = {
    "CONVOLUTION": "convolution",
    "DECONVOLUTION": "convolution",
    "MATRIX_MULTIPLY": "matrix product",
}


@dataclass(frozen=True, kw_only=True)
class Options(targets.Options):
    """`[targets.tensorrt]`; threads mean nothing to a GPU."""

    capabilities: tuple[str, ...] = ()
    """Compute capabilities of the GPUs that the engine is for, as "8.6"; the GPU at hand is always among them.
    None given are 8.6 and 8.9 with TensorRT for RTX; TensorRT itself builds for the GPU at hand only."""
    max_batch: int = 16
    """The largest batch of a dynamic one, for which the engine is tuned; more images are answered in parts."""
    workspace_mb: int | None = None
    """Memory that a layer may borrow while it runs; None for all of the GPU's."""
    device: int = 0
    """Index of the GPU, as CUDA counts them."""
    cache: str = "~/.cache/bitferry/tensorrt"
    """Folder that keeps TensorRT's timings, or the kernels that TensorRT for RTX makes when it loads; "" for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.max_batch <= targets.MOST_BATCH:
            raise ValueError(f"max_batch must be 1 to {targets.MOST_BATCH}, not {self.max_batch}")
        if self.workspace_mb is not None and not 1 <= self.workspace_mb <= MOST_WORKSPACE_MB:
            raise ValueError(f"workspace_mb must be 1 to {MOST_WORKSPACE_MB}, not {self.workspace_mb}")
        if strange := [one for one in self.capabilities if not re.fullmatch(r"\d+\.\d+", one)]:
            raise ValueError(f"capabilities are written as '8.6', not {', '.join(map(repr, strange))}")
        if self.device < 0:
            raise ValueError(f"device must be 0 or more, not {self.device}")


def environment(*, options: Options) -> Environment:
    here = gpu.find(options.device)
    built, unmeasured = _capabilities(options, here), engine.unfit(here)
    own = here if isinstance(here, gpu.Gpu) and not unmeasured else None
    float8 = _able(built, "float8")
    only = f" (only {sms(float8)} for float8)" if float8 and float8 != built else ""
    meant = (own.capability,) if own else built
    return Environment(
        runtime=trt.__name__,
        version=trt.__version__,
        device=own.name if own else sms(built) + only or "the GPU at hand",
        isa=(sm(own.capability),) if own else (),
        system=system(),
        devices=(f"{here.name} ({sm(here.capability)})",) if isinstance(here, gpu.Gpu) else (),
        fast=tuple(precision for precision in SCHEMES if meant and _able(meant, precision) == meant),
        unmeasured=unmeasured,
    )


def needs(path: Path, *, options: Options) -> Needs:
    packages = {trt.__name__.replace("_", "-"): f"=={trt.__version__}", "cuda-bindings": ">=13"}
    varies = {} if RTX else {path.name: TIMED}  # without a GPU nothing is timed
    return Needs(packages, tuple(engine.tied_to(path)["capabilities"]), varies=varies)


def compile(model: Path, out: Path, *, precision: Precision, options: Options) -> None:
    here = gpu.find(options.device)
    capabilities = _capabilities(options, here)
    if not capabilities:
        raise TargetUnavailable(f"{NAME} builds for the GPU at hand only: {here}")
    wanted = _able(capabilities, precision)
    needed = {*options.capabilities, here.capability if isinstance(here, gpu.Gpu) else ""} & set(capabilities)
    lacking = sorted(needed - set(wanted)) or capabilities
    if not wanted or needed - set(wanted):
        raise InputError(
            f"{sms(lacking)} cannot compute in {precision}: under [targets.tensorrt] set capabilities to those "
            f"from {SINCE[precision]} on, or take another precision"
        )
    typed = _typed(model, precision)
    built, layers = _build(typed, wanted, options)
    out.write_bytes(built)
    out.with_suffix(".onnx").write_bytes(typed)
    tied = {
        "runtime": trt.__name__,
        "version": trt.__version__,
        "capabilities": wanted,
        "precision": precision,
        "batch": options.batch,
        "layers": layers,
    }
    out.with_suffix(".json").write_text(json.dumps(tied, indent=2) + "\n")


def load(path: Path, *, precision: Precision, options: Options) -> Predict:
    session = _session(path, options)
    if options.batch != "dynamic":
        return in_batches(session, options.batch)

    def predict(images: Images) -> Outputs:
        starts = range(0, len(images), options.max_batch)
        return np.concatenate([session(images[start : start + options.max_batch]) for start in starts])

    return predict


def executed(path: Path, *, precision: Precision, options: Options) -> Sequence[Layer]:
    session = _session(path, options)
    layers = engine.tied_to(path)["layers"]
    precisions = engine.ran(session.inspect(), list(layers))
    return [Layer(name, kind, ran) for (name, kind), ran in zip(layers.items(), precisions, strict=True)]


def _session(path: Path, options: Options) -> engine.Session:
    return engine.Session(path, device=options.device, max_batch=options.max_batch, cache=options.cache)


def _capabilities(options: Options, here: gpu.Gpu | str) -> tuple[str, ...]:
    """Give what an engine is built for: what was asked and the GPU at hand; nothing where it cannot be built."""
    own = (here.capability,) if isinstance(here, gpu.Gpu) and not engine.unfit(here) else ()
    listed, asked = (engine.listed(), options.capabilities or DEFAULT) if RTX else (own, options.capabilities)
    strange = [capability for capability in asked if capability not in listed]
    if strange:
        other = "TensorRT itself, on such a GPU," if RTX else "TensorRT for RTX, which needs no GPU to build,"
        raise InputError(
            f"[targets.tensorrt] capabilities names {', '.join(map(repr, strange))}, but {NAME} builds for "
            f"{', '.join(listed) or 'the GPU at hand only, and there is none'}; {other} may build for it "
            "(docs/targets/tensorrt.md)"
        )
    return tuple(sorted({*asked, *own}, key=_number))


def _able(capabilities: Sequence[str], precision: Precision) -> tuple[str, ...]:
    """Choose those that have instructions for the precision."""
    return tuple(capability for capability in capabilities if _number(capability) >= _number(SINCE[precision]))


def _number(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))


def _typed(model: Path, precision: Precision) -> bytes:
    """Settle every type of an ONNX file, for TensorRT keeps to them; what was settled before stays as it is."""
    content, mark = model.read_bytes(), f"bitferry tensorrt {precision}"
    if mark.encode() in content[:100]:  # so a device builds it again without onnx
        return content
    import onnx  # noqa: PLC0415 - only the engineer's machine has it

    from bitferry.device.retype import retype  # noqa: PLC0415 - likewise

    kind = onnx.TensorProto.DataType.Value(REST.get(precision, "FLOAT"))
    return retype(content, kind, float8=precision == "float8", producer=mark)


def _build(content: bytes, capabilities: Sequence[str], options: Options) -> tuple[bytes, dict[str, str]]:
    """Build the engine; give it with the kinds of the network's convolutions and matrix products, by name."""
    log = engine.Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(content, network, log)
    config = _config(builder, options)
    _set_batch(builder, network, config, options)
    timings = engine.cached(options.cache, f"{sms(capabilities)}-{trt.__version__}.timings")
    if RTX:
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, sm(capability)), index)
    elif timings:
        known = timings.read_bytes() if timings.is_file() else b""
        config.set_timing_cache(config.create_timing_cache(known), False)
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise RuntimeError(f"{NAME} built no engine for {sms(capabilities)}: {log.last}")
    if not RTX and timings:
        engine.keep(timings, bytes(config.get_timing_cache().serialize()))
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    return bytes(built), {layer.name: KINDS[layer.type.name] for layer in layers if layer.type.name in KINDS}


def _config(builder: Any, options: Options) -> Any:
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default, it rounds float32 layers to 10 bits
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # which `executed` reads
    if options.workspace_mb:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mb << 20)
    return config


def _parse(content: bytes, network: Any, log: engine.Log) -> None:
    parser = trt.OnnxParser(network, log)
    if not parser.parse(content):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        found = dict.fromkeys(f"{e.node_operator()} at '{e.node_name()}'{_why(e)}" for e in errors)
        raise RuntimeError(f"{NAME} does not take {'; '.join(found)}")


def _why(error: Any) -> str:
    lines = error.desc().strip().splitlines()
    return f" ({lines[0]})" if lines and lines[0] != "false" else ""


def _set_batch(builder: Any, network: Any, config: Any, options: Options) -> None:
    images = network.get_input(0)
    shape = tuple(images.shape)[1:]
    if options.batch != "dynamic":
        images.shape = (options.batch, *shape)
        return
    profile = builder.create_optimization_profile()
    most = (options.max_batch, *shape)
    profile.set_shape(images.name, (1, *shape), most, most)
    config.add_optimization_profile(profile)
