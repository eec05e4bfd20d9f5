"""The contract every target keeps, and the folder as its registry: a file here is a target of that name."""

import importlib
import os
import pkgutil
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, Protocol, cast, get_args

from device.arrays import Predict
from device.errors import InputError, TargetUnavailable

Form = Literal["onnx", "torchscript"]
Precision = Literal["int8", "float32", "bfloat16", "float16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a target wants its int8 graph; two targets with equal schemes share one quantized model."""

    activation: Literal["uint8", "int8"] = "uint8"
    activation_symmetric: bool = False
    """Zero point fixed at the middle of the range (TensorRT); False lets it move (affine)."""
    weight_bits: int = 8
    """Weights are int8, symmetric and per output channel; fewer bits leave head room in 16-bit accumulators."""
    quantize_add: bool = True
    """Quantize both inputs of a residual addition, so that it runs on int8 as well."""


@dataclass(frozen=True)
class Environment:
    """What a compiled artifact and its measurements are tied to."""

    runtime: str
    version: str
    device: str
    isa: tuple[str, ...]
    system: str


@dataclass(frozen=True)
class Layer:
    """One convolution or matrix product as the runtime ran it."""

    name: str
    kind: Literal["convolution", "matrix product"]
    precision: str
    """Of its inputs: int8, float32, bfloat16, float16."""


class Target(Protocol):
    """What a module in this folder provides. Its file name is its name everywhere."""

    CONSUMES: Form
    SUFFIX: str
    """Of the compiled file, dot included; files beside it belong to it."""
    SCHEMES: Mapping[Precision, Scheme | None]
    """The precisions it can run; the scheme is None where no quantization is needed."""

    def environment(self) -> Environment:
        """Say which runtime and hardware would run the artifact here."""

    def compile(self, model: Path, out: Path, *, precision: Precision) -> None:
        """Compile `model` (of form CONSUMES) to `out`; several precisions may give the same file."""

    def load(self, path: Path, *, precision: Precision, threads: int | None = None) -> Predict:
        """Load a compiled file on this machine; `threads` is None for the runtime's own choice."""

    def executed(self, path: Path, *, precision: Precision) -> Sequence[Layer]:
        """List the convolutions and matrix products with the precision the runtime really runs them in."""


def names() -> list[str]:
    """List every target in this folder, ready on this machine or not."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def check_name(name: str) -> None:
    """Raise InputError, with the nearest known name, when no target is called `name`."""
    if name not in names():
        close = get_close_matches(name, names(), n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise InputError(f"unknown target '{name}'; {hint}the targets are {', '.join(names())}")


def get(name: str) -> Target:
    """Import the target called `name`.

    Raises InputError for a name that is no file here, TargetUnavailable when its runtime is not installed.
    """
    check_name(name)
    try:
        module = importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("targets", "device", "pipeline", ""):
            raise  # our own mistake, not the user's machine
        raise TargetUnavailable(
            f"target '{name}' needs the Python package '{missing}', which is not installed; "
            f"install it (`pip install {missing}`) or leave this target out"
        ) from error
    return cast(Target, module)


def source(name: str) -> Path:
    """Give the file of the target called `name`: what compiles, verifies and ships it."""
    return Path(__path__[0]) / f"{name}.py"


def cpu_isa() -> tuple[str, ...]:
    """List the instruction sets that decide int8 and 16-bit speed on this CPU (Linux; empty where unknown)."""
    wanted = (
        "avx2",
        "avx512f",
        "avx512_vnni",
        "avx_vnni",
        "avx512_bf16",
        "amx_int8",
        "amx_bf16",
        "asimddp",
        "i8mm",
    )
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return ()
    return tuple(name for name in wanted if name in flags)


def has_bfloat16() -> bool:
    """Say whether this CPU computes in bfloat16, so that float32 layers may silently run in it."""
    return bool({"amx_bf16", "avx512_bf16"} & set(cpu_isa()))


def usable_cpus() -> int:
    """Count the CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def system() -> str:
    """Name the operating system and processor family, as in 'Linux x86_64'."""
    return f"{platform.system()} {platform.machine()}"
