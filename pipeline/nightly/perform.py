"""What runs on a node: one task with its output caught, its errors sorted, its time and memory taken."""

import errno
import getpass
import hashlib
import json
import os
import platform
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bitferry import targets
from bitferry.device import gpu
from bitferry.device.errors import first_line
from bitferry.device.footprint import peak_memory
from bitferry.pipeline.nightly import inputs
from bitferry.pipeline.nightly.ray_session import unpacked
from bitferry.pipeline.own_source import source_hash

MACHINE = (errno.ENOSPC, errno.EIO, errno.EDQUOT)
"""A full or broken disk is not the task's fault."""
LOG_BYTES = 20_000
"""Of a log's end, kept with an error."""
ISA_NAMES = {"x86_64": "x86-64", "AMD64": "x86-64", "arm64": "aarch64"}


@dataclass(frozen=True)
class Probed:
    """What a node says of itself."""

    hostname: str
    kind: str
    source: str
    """Hash of the bitferry that is installed there, and of the versions of what it needs."""


@dataclass(frozen=True)
class Outcome:
    """What came of one attempt."""

    value: object | None
    error: str | None
    error_kind: Literal["ours", "machine"] | None
    trace: str | None
    seconds: float
    peak_memory_bytes: int


def probe() -> Probed:
    """Describe this node; a kind is the processor's family, its newest instruction set and its GPU."""
    processor = ISA_NAMES.get(platform.machine(), platform.machine())
    found = gpu.find(0)
    name = found.name if isinstance(found, gpu.Gpu) else ""
    kind = " ".join(part for part in (processor, *targets.cpu_isa()[-1:], name) if part)
    return Probed(socket.gethostname(), kind, whole())


def whole() -> str:
    """Hash this bitferry's source with the versions of the packages that it needs, directly or not."""
    told = [source_hash(), sorted(inputs.needed().items())]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def perform(content: bytes, key: str) -> Outcome:
    """Run a packed function and give what came of it, its error too.

    What it writes goes to a file that stays only where the process dies.
    """
    path = log_file(key)
    _forget_peak()
    start = time.perf_counter()
    value, error, trace = None, None, None
    with _written_to(path):
        try:
            function, arguments = unpacked(content)
            value = function(*arguments)
        except BaseException as caught:  # noqa: BLE001 - whatever a task raises is its result
            error, trace = caught, traceback.format_exc()
    seconds = time.perf_counter() - start
    told = _end_of(path)
    path.unlink(missing_ok=True)
    if error is None:
        return Outcome(value, None, None, None, seconds, peak_memory())
    kind: Literal["ours", "machine"] = "machine" if _machine_at_fault(error) else "ours"
    trace = f"{trace}\nIt wrote:\n{told}" if told else trace
    text = _legible(f"{type(error).__name__}: {first_line(error)}")
    return Outcome(None, text, kind, _legible(trace), seconds, peak_memory())


def _legible(text: str | None) -> str:
    """Replace what no file of text can hold, as a file's name that is no UTF-8."""
    return (text or "").encode("utf-8", "replace").decode()


def log_file(key: str) -> Path:
    """Give where a task's output is written on its node while it runs; a process that dies leaves it there."""
    folder = Path(tempfile.gettempdir()) / f"bitferry-logs-{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.log"


def _machine_at_fault(error: BaseException) -> bool:
    """Look for memory or disk in an error and what caused it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError) or (isinstance(seen, OSError) and seen.errno in MACHINE):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


@contextmanager
def _written_to(path: Path) -> Iterator[None]:
    """Send what this process and its libraries write to a file; by number, as compilers in C++ know no sys.stdout."""
    kept = {number: os.dup(number) for number in (1, 2)}
    with path.open("ab") as stream:
        for number in kept:
            os.dup2(stream.fileno(), number)
    try:
        yield
    finally:
        for stream_of in (sys.stdout, sys.stderr):
            stream_of.flush()
        for number, before in kept.items():
            os.dup2(before, number)
            os.close(before)


def _end_of(path: Path) -> str:
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - LOG_BYTES))
        return stream.read().decode(errors="replace")


def _forget_peak() -> None:
    """Make the peak of memory begin anew, on Linux; elsewhere it is that of the process so far."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
