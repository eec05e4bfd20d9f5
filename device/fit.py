"""Does a bundle fit this machine? Told by its manifest's `tied`, before anything is unpacked."""

import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bitferry.device import versions
from bitferry.device.errors import InputError, TargetUnavailable

VNNI = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
"""Instruction sets of x86 processors that add products of 8 bits without saturating."""
CPUINFO = Path("/proc/cpuinfo")


def check(manifest: Mapping[str, Any], where: str) -> None:
    """Raise TargetUnavailable, naming everything that this machine lacks of what a bundle's manifest says it needs."""
    try:
        lacking = list(_lacking(manifest["tied"], _gpu(manifest)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{where} does not say what it is tied to ({error!r:.120}); bundle it again") from error
    if lacking:
        raise TargetUnavailable(f"{where} does not fit this machine: {'; '.join(lacking)}")


def _gpu(manifest: Mapping[str, Any]) -> int:
    """Give the index of the GPU that the model's options name; the first where they name none."""
    named = (manifest.get("model") or {}).get("options", {}).get("device", 0)
    return named if type(named) is int else 0


def _lacking(tied: Mapping[str, Any], gpu_index: int) -> Iterator[str]:
    here = {"os": platform.system(), "machine": platform.machine()}
    for name, found in here.items():
        if tied[name] is not None and tied[name] != found:
            yield f"it was built for {tied[name]}, this is {found}"
    flags = _flags()
    if missing := [one for one in tied["isa"] if flags is not None and one not in flags]:
        yield f"the CPU lacks {', '.join(missing)}"
    if tied.get("vnni") and flags is not None and not flags & VNNI:  # older bundles do not say
        yield (
            "the int8 kernels of this processor saturate with the bundle's 8-bit weights, as it has none of "
            f"{', '.join(sorted(VNNI))}: deploy again on a processor like this one, for weights of 7 bits"
        )
    if not versions.within(platform.python_version(), tied["python"]):
        yield f"it needs Python {tied['python']}, this is {platform.python_version()}"
    for package, ranges in tied["packages"].items():
        yield from _package(package, ranges)
    if tied["gpu"]:
        from bitferry.device import gpu  # noqa: PLC0415 - it imports NumPy, which installing needs not

        card = gpu.find(gpu_index)
        if isinstance(card, str):
            yield card
        elif card.capability not in tied["gpu"]:
            yield f"it is built for compute capability {', '.join(tied['gpu'])}; {card.name} has {card.capability}"


def _package(name: str, ranges: str) -> Iterator[str]:
    try:
        found = version(name)
    except PackageNotFoundError:
        yield f"it needs the Python package '{name}' ({ranges}), which is not installed"
        return
    if not versions.within(found, ranges):
        yield f"it needs {name} {ranges}, and {found} is installed"


def _flags() -> set[str] | None:
    """List what the CPU can do, by Linux's names; None where it does not tell."""
    try:
        return set(CPUINFO.read_text().split())
    except OSError:
        return None
