"""Work on a stranger's file in a child process that can take little: memory, time, disk, files, and no network."""

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from bitferry.device.errors import BitferryError, InputError, first_line

Work = Callable[[], list[str]]
MOST_TOLD = 64_000_000
"""Bytes that the child may tell its parent."""
GRACE = 2.0
"""Seconds of the clock for each of the processor's: a busy machine, a slow disk."""
NEW_USER, NEW_NETWORK = 0x10000000, 0x40000000
DIE_WITH_PARENT = 1


@dataclass(frozen=True)
class Limits:
    """What the child may use, beside the memory that its parent has already."""

    memory: int
    output: int
    """Bytes of any one file that it writes."""
    seconds: int
    """Of the processor; and `GRACE` times as many of the clock."""


@contextlib.contextmanager
def room() -> Iterator[Path]:
    """Give an empty folder for what the child writes, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="bitferry-") as folder:
        yield Path(folder)


def run(work: Work, what: str, limits: Limits) -> list[str]:
    """Do `work` in a child process within `limits` and give what it returns; raise InputError for all that fails in it.

    The child is a fork, so that nothing is imported again. It has no network where the kernel lets a process give it
    up. Only Linux has all of this: elsewhere the work is done in this process.
    """
    if sys.platform != "linux":
        return work()
    end, start = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12's, of forking beside threads: see _child
        child = os.fork()
    if child == 0:
        os.close(end)
        _child(work, start, limits)
    os.close(start)
    try:
        told = _listen(end, time.monotonic() + limits.seconds * GRACE)
    finally:
        os.close(end)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)  # it has said all it had to say, or its time is over
        _, status = os.waitpid(child, 0)
    return _answer(told, status, what, limits)


def _child(work: Work, start: int, limits: Limits) -> NoReturn:
    """Answer through the pipe and end at once: what the parent has open or half printed is not the child's.

    A lock that another of the parent's threads held is held for ever here; the parent's clock ends that.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        _confine(limits)
        told = {"done": work()}
    except BitferryError as error:
        told = {"refused": [str(error)]}
    except BaseException as error:  # noqa: BLE001 - whatever it is, the parent has to be told
        told = {"failed": [f"{type(error).__name__}: {first_line(error)}"]}
    with contextlib.suppress(BaseException):
        content = json.dumps(told).encode()
        while content:
            content = content[os.write(start, content) :]
    os._exit(0)


def _confine(limits: Limits) -> None:
    import resource  # noqa: PLC0415 - there is none on Windows

    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(DIE_WITH_PARENT, signal.SIGKILL)
    if libc.unshare(NEW_USER | NEW_NETWORK):  # refused inside most containers; the other limits hold all the same
        libc.unshare(NEW_NETWORK)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    highest = max(map(int, os.listdir("/proc/self/fd")))  # noqa: PTH208 - names alone
    for kind, most in (
        (resource.RLIMIT_AS, pages * resource.getpagesize() + limits.memory),
        (resource.RLIMIT_FSIZE, limits.output),
        (resource.RLIMIT_CPU, limits.seconds),
        (resource.RLIMIT_NOFILE, highest + 8),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (soft, soft))


def _listen(end: int, until: float) -> bytes:
    """Read what the child tells until it ends or its time is over."""
    told = bytearray()
    while len(told) <= MOST_TOLD and select.select([end], [], [], max(0.0, until - time.monotonic()))[0]:
        part = os.read(end, 1 << 16)
        if not part:
            break
        told += part
    return bytes(told)


def _answer(told: bytes, status: int, what: str, limits: Limits) -> list[str]:
    try:
        answer = json.loads(told)
    except ValueError:
        over = os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL) if os.WIFSIGNALED(status) else False
        why = f"took more than the {limits.seconds} seconds allowed" if over else "broke down in the reader"
        raise InputError(f"{what} {why}, so it was stopped; get the file again from where it was made") from None
    if "refused" in answer:
        raise InputError(answer["refused"][0])
    if "failed" in answer:
        raise InputError(f"{what} failed ({answer['failed'][0]}); get the file again from where it was made")
    found: list[str] = answer["done"]
    return found
