"""The machine that measures: what it is, how many CPUs may be used, and what may have disturbed a timing on it."""

import os
import platform
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CPUS = Path("/sys/devices/system/cpu")
BOARD = Path("/proc/device-tree/model")


@dataclass(frozen=True)
class Machine:
    """Where something was measured."""

    hostname: str
    cpu: str
    """As in `Raspberry Pi 5 Model B Rev 1.0`: the processor's own name, or that of the board where it has none."""
    cpus: int
    """Usable ones."""
    system: str
    python: str
    numpy: str


@dataclass(frozen=True)
class Conditions:
    """What a timing on a machine depends on, besides the machine."""

    others: float | None
    """The share of all CPUs that others used while timing; None where the system does not tell."""
    cpus: int
    """Usable ones."""
    quota: float | None
    """The CPUs that a container may use; None where that is not limited."""
    governors: tuple[str, ...]
    """Of the CPUs' clocks."""
    clock: float | None
    """Right after timing, as a share of the highest; None where the system does not tell (virtual machines rarely)."""


def here() -> Machine:
    """Describe this machine."""
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    return Machine(socket.gethostname(), _cpu(), usable_cpus(), system, platform.python_version(), np.__version__)


def conditions(others: float | None) -> Conditions:
    """Look at the CPUs' clocks and at how many of them may be used; `others` is what `other_load` found."""
    governors = {_text(path) for path in CPUS.glob("cpu[0-9]*/cpufreq/scaling_governor")} - {None}
    shares = [
        now / most
        for cpu in CPUS.glob("cpu[0-9]*/cpufreq")
        if (now := _clock_of(cpu, "scaling_cur")) and (most := _clock_of(cpu, "cpuinfo_max"))
    ]
    clock = float(np.median(shares)) if shares else None
    return Conditions(others, usable_cpus(), _quota(), tuple(sorted(map(str, governors))), clock)


@contextmanager
def other_load() -> Iterator[Callable[[], float | None]]:
    """Give a function that says, once the block is over, which share of all CPUs others used (Linux; else None).

    Others are the other processes, and the host where this is a virtual machine.
    """
    before = _cpu_seconds()
    shares: list[float | None] = []
    yield lambda: shares[0]
    after = _cpu_seconds()
    if before is None or after is None or after[1] <= before[1]:
        shares.append(None)
    else:
        shares.append(max(0.0, (after[0] - before[0]) / (after[1] - before[1])))


def usable_cpus() -> int:
    """Count the CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> str:
    lines = (_text(Path("/proc/cpuinfo")) or "").splitlines()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    board = (_text(BOARD) or "").strip("\0")
    return next(named, "") or board or platform.processor() or platform.machine()


def _clock_of(cpu: Path, which: str) -> float:
    """Give a frequency in kHz; 0 where this machine does not tell."""
    text = _text(cpu / f"{which}_freq")
    return float(text) if text and text.isdecimal() else 0.0


def _cpu_seconds() -> tuple[float, float] | None:
    """Give the CPU seconds that others have used, and all that there were, since the machine started."""
    try:
        counts = [int(count) for count in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except OSError:
        return None
    ticks = os.sysconf("SC_CLK_TCK")
    idle = counts[3] + counts[4]
    times = os.times()
    return (sum(counts) - idle) / ticks - times.user - times.system, sum(counts) / ticks


def _quota() -> float | None:
    """Give the CPUs that this container may use (Linux control groups, version 2); None when not limited."""
    quota, _, period = (_text(Path("/sys/fs/cgroup/cpu.max")) or "max").partition(" ")
    return float(quota) / float(period) if quota != "max" and platform.system() == "Linux" else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
