"""This machine, examined: what would stop or disturb a deployment, and which targets are ready. Installs nothing."""

import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from bitferry.pipeline import progress

Grade = Literal["ok", "note", "problem"]

LEAST_MEMORY = 4e9
"""Bytes. Quantizing and exporting models of ImageNet's size was seen to take up to 2.6 GB."""
LEAST_DISK = 2e9
"""Bytes. A model of 45 MB leaves about ten copies of it in the build folder, each time something changes."""
PATIENCE = 120.0
"""Seconds a runtime gets to be imported."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "KMP_AFFINITY", "GOMP_CPU_AFFINITY")
PRECISION = ("ONEDNN_DEFAULT_FPMATH_MODE", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
TORCH = """
import json, torch, torchvision
torchvision.ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
print(json.dumps({"torch": torch.__version__, "torchvision": torchvision.__version__}))
"""
TARGET = "import sys; from bitferry.pipeline.doctor import describe; describe(sys.argv[1])"


@dataclass(frozen=True)
class Check:
    """One thing about this machine; a problem stops bitferry, a note is worth knowing."""

    name: str
    grade: Grade
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class State:
    """One target on this machine."""

    name: str
    ready: Literal["yes", "builds", "no"]
    """`builds`: it compiles here, and cannot run what it compiled."""
    runtime: str = ""
    device: str = ""
    found: tuple[str, ...] = ()
    """Everything the runtime could run on, as it names it."""
    precisions: tuple[str, ...] = ()
    fast: tuple[str, ...] = ()
    """Of these, the ones that the device has instructions for."""
    reason: str = ""
    """Why it is not ready."""
    install: str = ""
    """The command that would install what is missing."""


@dataclass(frozen=True)
class Report:
    """All that was found."""

    checks: tuple[Check, ...]
    targets: tuple[State, ...]

    @property
    def able(self) -> bool:
        """Say whether a model can be deployed here, to one target at least."""
        return all(check.grade != "problem" for check in self.checks)


def examine(build: Path) -> Report:
    """Look at everything; PyTorch and each target in a process of its own, so that none can take this one down."""
    python = Check("Python", "ok", f"{platform.python_version()}, {sys.executable}")
    try:
        names = _names()
    except ImportError as error:
        own = Check("bitferry", "problem", f"cannot be loaded: {error}", _reinstall(r"numpy\b"))
        return Report((python, *_packages(), own), ())
    with ThreadPoolExecutor(os.cpu_count()) as pool, progress.console.status("looking at every target"):
        torch = pool.submit(_answer, TORCH)
        found = tuple(pool.map(_state, names))
    machine = (*_cpu(), _memory(), _disk(build), _gpu(), *_variables(), *_quiet())
    return Report((python, _torch(torch.result()), *_packages(), *machine, _ready(found)), found)


def states() -> tuple[State, ...]:
    """Look at the targets alone."""
    with ThreadPoolExecutor(os.cpu_count()) as pool, progress.console.status("looking at every target"):
        return tuple(pool.map(_state, _names()))


def describe(name: str) -> None:
    """Print the state of a target as JSON; run in a process that its runtime may end."""
    from bitferry import targets  # noqa: PLC0415 - imports NumPy, whose absence the doctor should survive
    from bitferry.device.errors import TargetUnavailable  # noqa: PLC0415

    try:
        target = targets.get(name)
        found = target.environment(options=target.Options())
    except TargetUnavailable as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError):
            missing = (cause.name or "").partition(".")[0]
            install = targets.install_command(name, missing)
            state = State(name, "no", reason=f"the Python package '{missing}' is not installed", install=install)
        else:
            state = State(name, "no", reason=str(error))
    else:
        state = State(
            name,
            "builds" if found.unmeasured else "yes",
            runtime=f"{found.runtime} {found.version}",
            device=found.device,
            found=found.devices,
            precisions=tuple(target.SCHEMES),
            fast=found.fast,
            reason=found.unmeasured or "",
        )
    print(json.dumps(asdict(state)))


def _names() -> list[str]:
    from bitferry import targets  # noqa: PLC0415

    return targets.names()


def _state(name: str) -> State:
    said = _answer(TARGET, name)
    if isinstance(said, str):
        return State(name, "no", reason=f"it cannot be loaded: {said}")
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in said.items()}
    return State(**fields)


def _answer(code: str, *arguments: str) -> dict[str, Any] | str:
    """Run Python code that prints a JSON object last; give the object, or in a few words why there is none."""
    command = [sys.executable, "-P", "-c", code, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return f"no answer within {PATIENCE:g} seconds"
    if done.returncode < 0:
        return f"the process was ended by {signal.Signals(-done.returncode).name}"
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith(" ")]
        return said[-1] if said else f"the process ended with {done.returncode} and said nothing"
    return found


def _torch(found: dict[str, Any] | str) -> Check:
    if isinstance(found, str):
        told = f"PyTorch and torchvision do not load together: {found}"
        return Check("PyTorch", "problem", told, _reinstall(r"torch(vision)?\b"))
    return Check("PyTorch", "ok", f"{found['torch']}, torchvision {found['torchvision']}, which fit each other")


def _pins() -> list[str]:
    """List what bitferry needs, without the extras, as in `torch==2.14.*`."""
    try:
        return [line for line in metadata.requires("bitferry") or () if ";" not in line]
    except metadata.PackageNotFoundError:
        return []


def _reinstall(names: str) -> str:
    pins = [pin for pin in _pins() if re.match(names, pin)]
    return f"pip install --force-reinstall {shlex.join(pins)}" if pins else ""


def _packages() -> Iterator[Check]:
    missing, other = {}, {}
    for pin in _pins():
        name, _, wanted = pin.partition("==")
        name = re.split(r"[<>=!~ ]", name)[0]
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing[pin] = name
        else:
            if not f"{version}.".startswith(wanted.removesuffix("*")):
                other[pin] = f"{name} {version} (tried: {wanted})"
    if missing:
        told = f"missing: {', '.join(missing.values())}"
        yield Check("packages", "problem", told, f"pip install {shlex.join(missing)}")
    if other:
        told = f"other versions than bitferry was tried with: {', '.join(other.values())}"
        yield Check("packages", "note", told, f"pip install {shlex.join(other)}")
    if not missing and not other:
        yield Check("packages", "ok", f"all {len(_pins())} that bitferry needs, at the versions it was tried with")


def _cpu() -> Iterator[Check]:
    from bitferry.targets import ISA, cpu_isa, usable_cpus  # noqa: PLC0415

    model = re.search(r"^model name\s*:\s*(.+)$", _text(Path("/proc/cpuinfo")), re.MULTILINE)
    able = cpu_isa()
    name = model[1] if model else platform.processor() or platform.machine()
    told = f"{name}; {' '.join(able) or 'which instructions it has is not known'}"
    if not able or any("int8" in ISA[name] for name in able):
        yield Check("CPU", "ok", told)
    else:
        yield Check("CPU", "note", f"{told}; none that multiply int8", "expect little speed from int8 on this CPU")
    usable, present = usable_cpus(), os.cpu_count()
    remedy = "" if usable == present else "taskset or the container's settings keep the others from this process"
    yield Check("cores", "note" if remedy else "ok", f"{usable} of {present} may be used", remedy)


def _memory() -> Check:
    told = re.search(r"^MemAvailable:\s*(\d+) kB", _text(Path("/proc/meminfo")), re.MULTILINE)
    limit = _text(Path("/sys/fs/cgroup/memory.max")).strip()
    sizes = [int(told[1]) * 1024] if told else []
    sizes += [int(limit)] if limit.isdecimal() else []
    if not sizes:
        return Check("memory", "ok", "not known on this system")
    found = f"{min(sizes) / 1e9:.1f} GB available"
    if min(sizes) < LEAST_MEMORY:
        return Check("memory", "note", found, f"large models need up to {LEAST_MEMORY / 1e9:g} GB; close something")
    return Check("memory", "ok", found)


def _disk(build: Path) -> Check:
    existing = next(folder for folder in (build.absolute(), *build.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        told = f"{existing} is no folder that can be written to"
        return Check("disk", "problem", told, "choose another: --build FOLDER")
    free = shutil.disk_usage(existing).free
    found = f"{free / 1e9:.1f} GB free for {build}"
    if free < LEAST_DISK:
        return Check("disk", "note", found, "make room (make clean removes build/), or choose another: --build FOLDER")
    return Check("disk", "ok", found)


def _gpu() -> Check:
    if shutil.which("nvidia-smi") is None:
        return Check("GPU", "ok", "no NVIDIA driver; what is built for a GPU is not measured here")
    command = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = " | ".join(f"{done.stdout}{done.stderr}".strip().splitlines())
    if done.returncode != 0:
        return Check("GPU", "note", f"nvidia-smi fails: {said}", "repair the NVIDIA driver, or leave GPUs out")
    return Check("GPU", "ok", f"{said} (name, compute capability, driver)")


def _variables() -> Iterator[Check]:
    for name, variables, effect in (
        ("threads", THREADS, "rules how PyTorch trains and calibrates here"),
        ("precision", PRECISION, "changes what oneDNN makes of float32, in the baseline too"),
    ):
        for variable in variables:
            if variable in os.environ:
                yield Check(name, "note", f"{variable}={os.environ[variable]} {effect}", f"unset {variable}")
    for folder in os.environ.get("BITFERRY_TARGETS", "").split(os.pathsep):
        if folder and not Path(folder).is_dir():
            yield Check("targets", "note", f"BITFERRY_TARGETS names {folder}, which is no folder", "correct it")


def _quiet() -> Iterator[Check]:
    """Repeat what verification would suspect a timing of, measured now."""
    from bitferry.device import machine  # noqa: PLC0415
    from bitferry.pipeline.measure.suspicion import suspicions  # noqa: PLC0415
    from bitferry.targets import usable_cpus  # noqa: PLC0415

    with machine.other_load() as others:
        time.sleep(0.3)
    told = suspicions({}, threads=usable_cpus(), conditions=machine.conditions(others()))
    for one in told:
        yield Check(one.kind, "note", f"a timing now would be disturbed: {one.finding}", one.remedy)
    if not told:
        yield Check("quiet", "ok", "nothing that would disturb a timing")


def _ready(found: Sequence[State]) -> Check:
    able = [state.name for state in found if state.ready != "no"]
    if not able:
        return Check("targets", "problem", f"none of {len(found)} is ready", "install one of the runtimes below")
    return Check("targets", "ok", f"{len(able)} of {len(found)} ready")


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
