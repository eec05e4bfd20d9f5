"""A TensorRT engine on the GPU of this machine: whether it fits, what it answers, what it really ran."""

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from bitferry.device import gpu
from bitferry.device.arrays import Images, Outputs
from bitferry.device.errors import InputError, StageFailed, TargetUnavailable

try:
    trt: Any = import_module("tensorrt")
except ModuleNotFoundError:
    trt = import_module("tensorrt_rtx")
RTX = trt.__name__ == "tensorrt_rtx"
NAME = f"TensorRT {'for RTX ' if RTX else ''}{trt.__version__}"
PRECISIONS = {
    "int8": "int8",
    "fp8": "float8",
    "float8": "float8",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "half": "float16",
    "fp16": "float16",
    "float16": "float16",
    "float": "float32",
    "fp32": "float32",
}
"""Words in the inspector's names of types and formats; the first one that is found counts."""


class Log(trt.ILogger):  # type: ignore[misc]
    """Keeps the errors that TensorRT tells nobody but its log."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
            self.errors.append(message.strip())

    @property
    def last(self) -> str:
        return self.errors[-1] if self.errors else "it does not say why"


class Session:
    """An engine on the GPU, with memory for its largest batch."""

    def __init__(self, path: Path, *, device: int, max_batch: int, cache: str) -> None:
        here = gpu.find(device)
        reason = unfit(here)
        if reason or isinstance(here, str):
            raise TargetUnavailable(f"{path} cannot run here: {reason}")
        self.stream = gpu.Stream(device)
        self.log = Log()
        self.runtime = trt.Runtime(self.log)
        self.engine = _fitting(path, self.runtime, here, self.log)
        tensors = {self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)}
        (self.images,) = (t for t in tensors if self.engine.get_tensor_mode(t) == trt.TensorIOMode.INPUT)
        (self.scores,) = tensors - {self.images}
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        self.context, keep = self._context(cached(cache, f"{sm(here.capability)}-{digest}.kernels"))
        count, *shape = tuple(self.engine.get_tensor_shape(self.images))
        self._allocate((max_batch if count < 0 else count, *shape))
        self(np.zeros((max(1, count), *shape), np.uint8))
        keep()

    def __call__(self, images: Images) -> Outputs:
        pixels = np.ascontiguousarray(images)
        self.context.set_input_shape(self.images, pixels.shape)
        self.stream.send(pixels, self.addresses[0])
        if not self.context.execute_async_v3(self.stream.handle):
            raise StageFailed(f"{NAME} did not run the engine: {self.log.last}")
        return self.stream.receive(self.addresses[1], tuple(self.context.get_tensor_shape(self.scores)))

    def inspect(self) -> list[dict[str, Any]]:
        """Give what the engine's inspector tells of each of its layers."""
        inspector = self.engine.create_engine_inspector()
        inspector.execution_context = self.context
        told = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
        return list(told["Layers"])

    def _context(self, kernels: Path | None) -> tuple[Any, Callable[[], None]]:
        """Make the context, with the kernels that an earlier load made; give what keeps them once it has run."""
        if not RTX or kernels is None:
            return self.engine.create_execution_context(), lambda: None
        config = self.engine.create_runtime_config()
        made = config.create_runtime_cache()
        known = kernels.is_file() and made.deserialize(kernels.read_bytes())
        config.set_runtime_cache(made)
        context = self.engine.create_execution_context(config)
        return context, lambda: None if known else keep(kernels, bytes(made.serialize()))

    def _allocate(self, largest: tuple[int, ...]) -> None:
        self.context.set_input_shape(self.images, largest)
        scores = tuple(self.context.get_tensor_shape(self.scores))
        self.addresses = [self.stream.allocate(size) for size in (math.prod(largest), 4 * math.prod(scores))]
        for tensor, address in zip((self.images, self.scores), self.addresses, strict=True):
            self.context.set_tensor_address(tensor, address)


def tied_to(path: Path) -> dict[str, Any]:
    """Read what is written beside an engine: `runtime`, `version`, `capabilities`, and `layers` by name."""
    note = path.with_suffix(".json")
    try:
        tied: dict[str, Any] = json.loads(note.read_bytes())
        return {name: tied[name] for name in ("runtime", "version", "capabilities", "layers")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{note} does not say what the engine is tied to ({error!r}); compile it again") from error


def unfit(here: gpu.Gpu | str) -> str | None:
    """Say why nothing that is compiled here runs here; None where it does."""
    if isinstance(here, gpu.Gpu) and RTX and here.capability not in listed():
        return (
            f"{NAME} has kernels for {sms(listed())}, not for {here.name} ({sm(here.capability)}); "
            "TensorRT itself, the Python package 'tensorrt', may have"
        )
    return here if isinstance(here, str) else None


def listed() -> tuple[str, ...]:
    """List the compute capabilities that TensorRT for RTX builds for."""
    numbers = [name.removeprefix("SM") for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    return tuple(f"{number[:-1]}.{number[-1]}" for number in numbers)


def sm(capability: str) -> str:
    """Name a compute capability as NVIDIA names its architectures: 8.6 is SM86."""
    return "SM" + capability.replace(".", "")


def sms(capabilities: Sequence[str]) -> str:
    """Name several."""
    return ", ".join(map(sm, capabilities))


def ran(engine: Sequence[dict[str, Any]], layers: Sequence[str]) -> list[str]:
    """Find each layer of the network in what the inspector tells; give the precision of its first input.

    TensorRT 10 tells `Format/Datatype`, 11 `DataType` apart from the format. A layer that it does not tell of, as
    within a fused block, is "unknown".
    """
    found = []
    for layer in layers:
        whole = re.compile(rf"(?<![\w./]){re.escape(layer)}(?![\w./])")
        texts = [
            " ".join(str(value) for key, value in part["Inputs"][0].items() if "datatype" in key.lower()).lower()
            for part in engine
            if part.get("Inputs")
            and part.get("LayerType") not in ("Reformat", "Constant")
            and whole.search(f"{part['Name']} {part.get('Metadata', '')}")
        ]
        text = texts[0] if texts else ""
        found.append(next((precision for word, precision in PRECISIONS.items() if word in text), "unknown"))
    return found


def cached(folder: str, name: str) -> Path | None:
    """Give the place of a cache's file; None where no cache is wanted."""
    return Path(folder).expanduser() / name if folder else None


def keep(path: Path, content: bytes) -> None:
    """Write a cache's file whole; where that cannot be, it is made again each time."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(path)


def _fitting(path: Path, runtime: Any, here: gpu.Gpu, log: Log) -> Any:
    """Read the engine; raise InputError, saying what it is tied to, when this machine is another."""
    tied, content = tied_to(path), path.read_bytes()
    reason = _misfit(tied, content, runtime, here)
    engine = None if reason else runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise InputError(
            f"{path} was built by {tied['runtime']} {tied['version']} for {sms(tied['capabilities'])} and does not fit "
            f"{trt.__name__} {trt.__version__} on {here.name} ({sm(here.capability)}): {reason or log.last}; in a "
            "bundle, `python run.pyz rebuild` builds it for this machine; elsewhere, compile it here"
        )
    return engine


def _misfit(tied: dict[str, Any], content: bytes, runtime: Any, here: gpu.Gpu) -> str | None:
    if tied["runtime"] != trt.__name__:
        return "an engine of one does not run on the other"
    if not RTX:
        same = (tied["version"], tied["capabilities"]) == (trt.__version__, [here.capability])
        return None if same else "an engine runs on the version and the kind of GPU that built it"
    validity, faults = runtime.get_engine_validity(content)
    known = trt.EngineInvalidityDiagnostics.__members__.items()
    told = [name.lower().replace("_", " ") for name, bit in known if faults & int(bit)]
    return ", ".join(told) or "it is damaged" if validity == trt.EngineValidity.INVALID else None
