"""The contract every target keeps, and the folder as its registry: a file here is a target of that name."""

import importlib
import os
import pkgutil
import platform
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeVar, cast, get_args

from bitferry.device.arrays import Predict
from bitferry.device.errors import InputError, TargetUnavailable, first_line
from bitferry.device.machine import usable_cpus as usable_cpus

Kind = Literal["convolution", "matrix product"]
"""Of the layers whose precision a target tells."""
Form = Literal["onnx", "torchscript", "exported"]
"""What a target compiles from: simplified ONNX, a TorchScript file, or a torch.export program (`.pt2`)."""
Precision = Literal["int8", "float32", "bfloat16", "float16", "float8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
Batch = int | Literal["dynamic"]
MOST_THREADS, MOST_BATCH = 1024, 4096
TIMED_CALLS = 11
"""Of an artifact whose layers are timed; the first of them only warms up."""

FOLDERS = "BITFERRY_TARGETS"
"""Environment variable: more folders to look for targets in, separated as in PATH."""
__path__ += [folder for folder in os.environ.get(FOLDERS, "").split(os.pathsep) if folder]


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a target wants its int8 graph; targets with equal schemes share one quantized model."""

    activation: Literal["uint8", "int8"] = "uint8"
    activation_symmetric: bool = False
    """Zero point fixed at the middle of the range (TensorRT); False lets it move (affine)."""
    weight_bits: int = 8
    """Weights are int8, symmetric and per output channel; fewer bits leave head room in 16-bit accumulators."""
    bias: Literal["float32", "int32"] = "float32"
    """int32 has the scale of input times weight, and zero point 0."""
    additions: Literal["both", "skip", "none"] = "both"
    """Which inputs of a residual addition of maps (N×C×H×W) are quantized: both, so that it runs on int8 as well, or
    the one that no layer gives directly, so that the other fuses with its layer. Additions of tokens stay float."""
    outputs: Literal["float32", "int8"] = "float32"
    """What a layer gives that no quantized layer takes, the classifier's scores above all."""
    concatenations: Literal["own", "shared"] = "own"
    """The scales of a concatenation on int8: for each input its own, or one for all of them and the output."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a recipe may set under `[targets.NAME]`; a target adds its own in a subclass of this name."""

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # noqa: RUF012 - read by pydantic, where there is one

    threads: int | None = None
    """CPU threads; None for every CPU this process may use."""
    color: Literal["RGB", "BGR"] = "RGB"
    """The order of an image's channels that the model wants; not set here but taken from the recipe's preprocessing."""
    batch: Batch = 1
    """Images of one call of the compiled model: fixed, which most runtimes turn into speed, or "dynamic"."""

    @property
    def needs_vnni(self) -> bool:
        """Say whether int8 runs on kernels that saturate with 8-bit weights on an x86 processor without VNNI."""
        return False

    def __post_init__(self) -> None:
        """Raise ValueError for what no runtime takes; a subclass calls this before its own checks."""
        if self.threads is not None and not 1 <= self.threads <= MOST_THREADS:
            raise ValueError(f"threads must be 1 to {MOST_THREADS}, not {self.threads}")
        if self.batch != "dynamic" and not 1 <= self.batch <= MOST_BATCH:
            raise ValueError(f'batch must be 1 to {MOST_BATCH}, or "dynamic", not {self.batch}')

    def alternatives(self, precision: Precision, fast: Sequence[Precision]) -> Iterator[Self]:
        """Give other settings that may be faster at a precision, of those left open here, for a search to time.

        `fast` lists what the device has instructions for. A subclass adds its own to these: fewer threads.
        """
        count = usable_cpus() // 2 if self.threads is None else 0
        while count >= 1:
            yield replace(self, threads=count)
            count //= 2


@dataclass(frozen=True)
class Environment:
    """What a compiled artifact and its measurements are tied to."""

    runtime: str
    version: str
    device: str
    """What runs the artifact."""
    isa: tuple[str, ...]
    system: str
    devices: tuple[str, ...] = ()
    """Everything this runtime found that it could run on."""
    fast: tuple[Precision, ...] = ("float32",)
    """The precisions that the device has instructions for."""
    unmeasured: str | None = None
    """Why an artifact that compiles here cannot run here; None where it can."""


@dataclass(frozen=True)
class Needs:
    """What a device must have to run an artifact."""

    packages: Mapping[str, str]
    """Each Python package, as pip knows it, with its range of versions, as in ">=2026.4,<2027"."""
    gpus: tuple[str, ...] = ()
    """Compute capabilities that it was built for, as "8.6"; empty where it needs no GPU of NVIDIA's."""
    system: str | None = None
    """The operating system, as Python names it, where that is not the one of the machine that built it."""
    varies: Mapping[str, str] = field(default_factory=dict)
    """Files that another compilation from the same input may give other bytes, each with the reason."""


@dataclass(frozen=True)
class Layer:
    """One convolution or matrix product as the runtime ran it."""

    name: str
    kind: Kind
    precision: str
    """Of its inputs: int8, float32, bfloat16, float16."""
    microseconds: float | None = None
    """What it took in one call of the artifact, the median of a few; None where the runtime does not tell."""
    reason: str | None = None
    """Why it is not int8 where that was asked for; None where it is, was not, or the quantized program tells."""


AnyOptions = TypeVar("AnyOptions", bound=Options)


class Target(Protocol[AnyOptions]):
    """What a module in this folder provides. Its file name is its name everywhere.

    It may provide `needs(path, *, options) -> Needs` besides: what a device must have to run the compiled file `path`;
    and `exact(*, precision, options) -> bool`: whether it rounds nothing on purpose, by default True of float32 alone.
    """

    CONSUMES: Form
    SUFFIX: str
    """Of the compiled file, dot included; files beside it belong to it."""
    SCHEMES: Mapping[Precision, Scheme | None]
    """The precisions it can run; the scheme is None where no quantization is needed. It is taken by `scheme`."""
    Options: type[AnyOptions]

    def environment(self, *, options: AnyOptions) -> Environment:
        """Say which runtime and hardware would run the artifact here."""

    def compile(self, model: Path, out: Path, *, precision: Precision, options: AnyOptions) -> None:
        """Compile `model` (of form CONSUMES, its batch dynamic) to `out`; several precisions may give the same file."""

    def load(self, path: Path, *, precision: Precision, options: AnyOptions) -> Predict:
        """Load a compiled file on this machine; the Predict takes any number of images, whatever the batch."""

    def executed(self, path: Path, *, precision: Precision, options: AnyOptions) -> Sequence[Layer]:
        """List the convolutions and matrix products with the precision the runtime really runs them in."""


def scheme(target: Target[Any], precision: Precision, options: Options) -> Scheme | None:
    """Give the scheme of a precision, with no more bits of a weight than the kernels chosen by the options multiply."""
    stated = target.SCHEMES[precision]
    if stated is None or not options.needs_vnni:
        return stated
    return replace(stated, weight_bits=min(stated.weight_bits, int8_weight_bits()))


def names() -> list[str]:
    """List every target in this folder, ready on this machine or not."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def check_name(name: str) -> None:
    """Raise InputError, with the nearest known name, when no target is called `name`."""
    if name not in names():
        close = get_close_matches(name, names(), n=1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise InputError(f"unknown target '{name}'; {hint}the targets are {', '.join(names())}")


def get(name: str) -> Target[Any]:
    """Import the target called `name`.

    Raises InputError for a name that is no file here, TargetUnavailable when its runtime is not installed.
    """
    check_name(name)
    try:
        module = importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "bitferry"):
            raise  # our own mistake, not the user's machine
        raise TargetUnavailable(
            f"target '{name}' needs the Python package '{missing}', which is not installed; "
            f"install it (`{install_command(name, missing)}`) or leave this target out"
        ) from error
    except (ImportError, OSError) as error:  # a shared library that is missing or does not fit
        if "cannot import name" in str(error) and "'bitferry" in str(error):
            raise  # our own mistake
        raise TargetUnavailable(
            f"target '{name}' cannot be loaded: {type(error).__name__}: {first_line(error)}; repair its packages "
            f"(`{install_command(name, name)}`) or leave this target out"
        ) from error
    return cast(Target[Any], module)


def install_command(name: str, package: str) -> str:
    """Give the command that would install what the target called `name` lacks, at the versions tried with bitferry."""
    return f"pip install {shlex.join(pins(name, package))}"


def pins(name: str, package: str) -> list[str]:
    """List what installs a package of the target called `name`, at the versions tried with bitferry."""
    try:
        wanted = [line.partition(";") for line in metadata.requires("bitferry") or ()]
    except metadata.PackageNotFoundError:  # on a device
        wanted = []
    extra = [pin.strip() for pin, _, marker in wanted if f"extra == '{name}'" in marker.replace('"', "'")]
    plain = [pin.strip() for pin, _, marker in wanted if not marker and re.split(r"[<=>!~]", pin)[0] == package]
    return extra or plain or [package]


def needs(name: str, path: Path, *, options: Options) -> Needs:
    """Say what a device must have to run an artifact: what its target states, else the very version found here."""
    target = get(name)
    stated: Callable[..., Needs] | None = getattr(target, "needs", None)
    if stated:
        return stated(path, options=options)
    found = target.environment(options=options)
    return Needs({found.runtime: f"=={found.version}"})


def is_exact(name: str, precision: Precision, options: Options) -> bool:
    """Return whether a target rounds nothing on purpose: what it states, else whether the precision is float32."""
    stated: Callable[..., bool] | None = getattr(get(name), "exact", None)
    return stated(precision=precision, options=options) if stated else precision == "float32"


def since(version: str) -> str:
    """Give the range of versions from a minor release until the next major one: ">=2026.4,<2027" of 2026.4.1."""
    major, minor = (*version.split("."), "0")[:2]
    return f">={major}.{minor},<{int(major) + 1}"


def source(name: str) -> Path:
    """Give the file of the target called `name`: what compiles, verifies and ships it."""
    found = find_spec(f"{__name__}.{name}")
    return Path(str(found.origin if found else None))


def cpu_isa() -> tuple[str, ...]:
    """List the instruction sets that decide int8 and 16-bit speed on this CPU (Linux; empty where unknown)."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return ()
    return tuple(name for name in ISA if name in flags)


X86 = ("x86_64", "amd64")
ISA: Mapping[str, tuple[Precision, ...]] = {
    "avx2": ("float32",), "avx512f": ("float32",), "avx512_vnni": ("int8",), "avx_vnni": ("int8",),
    "avx512_bf16": ("bfloat16",), "avx512_fp16": ("float16",), "amx_int8": ("int8",), "amx_bf16": ("bfloat16",),
    "amx_fp16": ("float16",), "asimd": ("float32",), "asimddp": ("int8",), "i8mm": ("int8",), "asimdhp": ("float16",),
    "bf16": ("bfloat16",),
}  # fmt: skip
"""Instruction sets as Linux names them, with the precisions they make fast."""


def int8_weight_bits() -> int:
    """Return how many bits of an int8 weight this CPU's kernels multiply without saturating: 7 or 8.

    x86 without VNNI adds two products of uint8 and int8 in 16 bits (vpmaddubsw): 2·255·127 = 64,770 is more than
    32,767, and 2·255·63 = 32,130 is not. oneDNN's limit of instruction sets, ONEDNN_MAX_CPU_ISA, counts.
    """
    if platform.machine().lower() not in X86:
        return 8
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    limited = not any(name in limit for name in ("VNNI", "AMX", "BF16", "FP16", "AVX10", "ALL", "DEFAULT"))
    return 8 if "int8" in fast_on_cpu(("int8",)) and not limited else 7


def fast_on_cpu(precisions: Iterable[Precision]) -> tuple[Precision, ...]:
    """Choose from a target's precisions those that this CPU has instructions for; float32 it always has."""
    native = {"float32"} | {precision for name in cpu_isa() for precision in ISA[name]}
    return tuple(precision for precision in precisions if precision in native)


def has_bfloat16() -> bool:
    """Say whether this CPU computes in bfloat16, so that float32 layers may silently run in it."""
    return "bfloat16" in fast_on_cpu(("bfloat16",))


def system() -> str:
    """Name the operating system and processor family, as in 'Linux x86_64'."""
    return f"{platform.system()} {platform.machine()}"
