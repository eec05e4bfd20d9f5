"""Microsoft ONNX Runtime: ONNX → ONNX rearranged so that its int8 kernels take whole layers; on a CPU, or CUDA."""

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import onnxruntime as ort

from bitferry import targets
from bitferry.device import onnx_file, rearrange
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

CONSUMES: Form = "onnx"
SUFFIX = ".onnx"
SCHEMES: Mapping[Precision, Scheme | None] = {"int8": Scheme(bias="int32", outputs="int8"), "float32": None}
PACKAGES = {"CPU": "onnxruntime", "CUDA": "onnxruntime-gpu", "OpenVINO": "onnxruntime-openvino"}
DATATYPES = {"uint8": "int8", "int8": "int8", "float": "float32", "float16": "float16", "bfloat16": "bfloat16"}
LAYERS = ("Conv", "MatMul", "Gemm", "Attention")


@dataclass(frozen=True, kw_only=True)
class Options(targets.Options):
    provider: Literal["CPU", "CUDA", "OpenVINO"] = "CPU"
    """What runs the graph; all but CPU need another build of ONNX Runtime."""
    spinning: bool = True
    """Threads wait busily for their next piece of work: faster, but they hold their CPUs for the whole of a call."""

    @property
    def needs_vnni(self) -> bool:
        return self.provider != "CUDA"


def environment(*, options: Options) -> Environment:
    missing = _missing(options)
    fast = fast_on_cpu(SCHEMES) if options.provider == "CPU" else () if missing else tuple(SCHEMES)
    return Environment("onnxruntime", ort.__version__, options.provider, cpu_isa(), system(), _found(), fast, missing)


def needs(path: Path, *, options: Options) -> Needs:
    return Needs({PACKAGES[options.provider]: since(ort.__version__)})


def compile(model: Path, out: Path, *, precision: Precision, options: Options) -> None:
    import onnx  # noqa: PLC0415 - only the engineer's machine has it

    made = onnx.load(model)
    if options.batch != "dynamic":
        for value in (made.graph.input[0], made.graph.output[0]):
            value.type.tensor_type.shape.dim[0].dim_value = options.batch
        del made.graph.value_info[:]  # which name the dynamic batch still
    made = onnx.shape_inference.infer_shapes(made)
    rearrange.rearrange(made.graph, int8=precision == "int8")
    del made.graph.value_info[:]
    onnx.checker.check_model(made, full_check=True)
    onnx.save(made, out)


def load(path: Path, *, precision: Precision, options: Options) -> Predict:
    session = _session(path, options)
    name = session.get_inputs()[0].name

    def predict(images: Images) -> Outputs:
        return cast(Outputs, session.run(None, {name: images})[0])

    return predict if options.batch == "dynamic" else in_batches(predict, options.batch)


def executed(path: Path, *, precision: Precision, options: Options) -> Sequence[Layer]:
    with tempfile.TemporaryDirectory() as folder:
        session = _session(path, options, profile=f"{folder}/profile")
        (images,) = session.get_inputs()
        blank = np.zeros([size if isinstance(size, int) else 1 for size in images.shape], np.uint8)
        for _ in range(targets.TIMED_CALLS):
            session.run(None, {images.name: blank})
        events = json.loads(Path(session.end_profiling()).read_text())
    timed = [(layer, event["dur"]) for event in events if (layer := _layer(event))]
    taken = {layer: [microseconds for other, microseconds in timed if other == layer] for layer, _ in timed}
    return [replace(layer, microseconds=float(np.median(each[1:]))) for layer, each in taken.items()]


def _layer(event: dict[str, Any]) -> Layer | None:
    """Read one event of ONNX Runtime's profile: which kernel ran for a node, on inputs of which types."""
    kernel, inputs = event["args"].get("op_name", ""), event["args"].get("input_type_shape")
    if not inputs or not any(word in kernel for word in LAYERS):
        return None
    kind: Kind = "convolution" if "Conv" in kernel else "matrix product"
    name = re.sub(r"(_token_\d+)?_kernel_time$", "", event["name"])  # fusing appends the token
    return Layer(name, kind, DATATYPES.get(datatype := next(iter(inputs[0])), datatype))


def _session(path: Path, options: Options, *, profile: str | None = None) -> ort.InferenceSession:
    if missing := _missing(options):
        raise TargetUnavailable(missing)
    onnx_file.check(path)
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    settings.intra_op_num_threads = options.threads or targets.usable_cpus()
    settings.add_session_config_entry("session.intra_op.allow_spinning", str(int(options.spinning)))
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    if profile:
        settings.enable_profiling, settings.profile_file_prefix = True, profile
        # The one step left out, the NCHWc layout of float convolutions, renames them and changes no precision.
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    wanted = f"{options.provider}ExecutionProvider"
    session = ort.InferenceSession(path, settings, providers=_providers(wanted))
    if session.get_providers()[0] != wanted:  # it falls back without a word
        raise TargetUnavailable(
            f"ONNX Runtime has the provider {options.provider} but cannot start it: a driver or a library is missing"
        )
    return session


def _providers(wanted: str) -> list[tuple[str, dict[str, str]]]:
    """List a provider and the CPU, with their settings: CUDA's would round float32 layers to TF32, of 10 bits."""
    settings = {"CUDAExecutionProvider": {"use_tf32": "0"}}
    return [(name, settings.get(name, {})) for name in dict.fromkeys((wanted, "CPUExecutionProvider"))]


def _found() -> tuple[str, ...]:
    return tuple(name.removesuffix("ExecutionProvider") for name in ort.get_available_providers())


def _missing(options: Options) -> str | None:
    """Say why the provider cannot be used here; None where it can."""
    if options.provider in _found():
        return None
    way = f"install the package {PACKAGES[options.provider]} in place of onnxruntime, or choose another provider"
    return f"the ONNX Runtime installed here has no {options.provider} provider (it has {', '.join(_found())}); {way}"
