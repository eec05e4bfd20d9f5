"""Does a bundle fit this machine? Told by its manifest's `tied`, before anything is unpacked."""

import platform
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from device.errors import InputError, TargetUnavailable

CPUINFO = Path("/proc/cpuinfo")
CLAUSE = re.compile(r"(>=|<=|==|<|>)\s*([0-9][0-9.]*)")


def check(tied: Mapping[str, Any], where: str) -> None:
    """Raise TargetUnavailable, naming everything that this machine lacks."""
    try:
        lacking = list(_lacking(tied))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{where} does not say what it is tied to ({error!r:.120}); bundle it again") from error
    if lacking:
        raise TargetUnavailable(f"{where} does not fit this machine: {'; '.join(lacking)}")


def order(text: str) -> tuple[tuple[int, ...], bool, tuple[tuple[int, str], ...]]:
    """Give a version's place among others, by semver.org's rules: 1.10.0 after 1.9.0, and 1.0.0-rc1 before 1.0.0."""
    numbers, _, rest = text.partition("+")[0].partition("-")
    parts = [int(part) if part.isdigit() else -1 for part in numbers.split(".")]
    while parts and parts[-1] == 0:
        parts.pop()
    later = tuple((int(part), "") if part.isdigit() else (1 << 62, part) for part in rest.split(".")) if rest else ()
    return tuple(parts), not rest, later


def within(found: str, ranges: str) -> bool:
    """Say whether a version is inside comma-separated bounds, as ">=2026.4,<2027"."""
    here = _numbers(found)
    for clause in ranges.split(","):
        match = CLAUSE.fullmatch(clause.strip())
        if not match:
            raise ValueError(f"{clause!r} is no bound of a version")
        sign, wanted = match[1], _numbers(match[2])
        length = max(len(here), len(wanted))
        a, b = (one + (0,) * (length - len(one)) for one in (here, wanted))
        if not {">=": a >= b, "<=": a <= b, "==": a == b, "<": a < b, ">": a > b}[sign]:
            return False
    return True


def _lacking(tied: Mapping[str, Any]) -> Iterator[str]:
    here = {"os": platform.system(), "machine": platform.machine()}
    for name, found in here.items():
        if tied[name] is not None and tied[name] != found:
            yield f"it was built for {tied[name]}, this is {found}"
    flags = _flags()
    if missing := [one for one in tied["isa"] if flags is not None and one not in flags]:
        yield f"the CPU lacks {', '.join(missing)}"
    if not within(platform.python_version(), tied["python"]):
        yield f"it needs Python {tied['python']}, this is {platform.python_version()}"
    for package, ranges in tied["packages"].items():
        yield from _package(package, ranges)
    if tied["gpu"]:
        from device import gpu  # noqa: PLC0415 - it imports NumPy, which installing needs not

        card = gpu.find(0)
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
    if not within(found, ranges):
        yield f"it needs {name} {ranges}, and {found} is installed"


def _numbers(text: str) -> tuple[int, ...]:
    """Give the release of a version: 2.14.0 of 2.14.0+cpu or 2.14.0rc1."""
    match = re.match(r"[0-9]+(\.[0-9]+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _flags() -> set[str] | None:
    """List what the CPU can do, by Linux's names; None where it does not tell."""
    try:
        return set(CPUINFO.read_text().split())
    except OSError:
        return None
