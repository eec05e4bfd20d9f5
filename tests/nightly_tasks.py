"""What the engine's tests send to the nodes: each leaves a line in a file, so that what ran, where and when is seen."""

import errno
import os
import signal
import time
from pathlib import Path

import ray

from bitferry.pipeline.nightly import perform


def stamp(folder: Path, name: str, seconds: float = 0.0) -> str:
    """Leave when it began and ended, and on which node; give its name."""
    start = time.time()
    time.sleep(seconds)
    with (folder / name).open("a") as lines:
        lines.write(f"{start} {time.time()} {ray.get_runtime_context().get_node_id()}\n")
    return name


def fail(text: str) -> None:
    """Raise an error, after a word on stderr as a library in C writes it."""
    os.write(2, b"a compiler's last words\n")
    raise ValueError(text)


def full_disk() -> None:
    """Raise what a full disk raises, as a stage's error."""
    raise RuntimeError("the stage failed") from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def die_once(folder: Path, name: str) -> str:
    """Kill the process the first time, and answer the second."""
    marker = folder / f"{name}.died"
    if marker.exists():
        return stamp(folder, name)
    marker.touch()
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError("a dead process goes on")


def die(folder: Path, name: str) -> None:
    """Kill the process every time, in a line each."""
    stamp(folder, name)
    os._exit(3)


def fill_memory(size: int) -> int:
    """Hold so many bytes, for the peak of memory to be seen."""
    return len(bytes(bytearray(size)))


def generate() -> object:
    """Give what no process can send to another."""
    return (number for number in range(3))


def other_bitferry() -> perform.Probed:
    """Answer as a node with another bitferry does."""
    return perform.Probed("elsewhere", "x86-64", "0" * 64)
