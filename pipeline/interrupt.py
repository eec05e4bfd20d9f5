"""Ctrl-C: noted where it falls, and raised at the next safe point, where a stage begins or between two tracked items.

An exception from a signal handler would unwind through whatever native code calls Python back, and an interpreter that
is taken down while a runtime's threads are at work can crash. So the handler raises nothing, and a program that ends by
Ctrl-C runs no destructor. What is kept on disk is whole or not there at all, whenever that is.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

STOPPED = 130
"""Exit code of a program that Ctrl-C ended."""
LONGEST = 5.0
"""Seconds until a safe point; a program that reaches none ends where it is, which loses only the stage under way."""
BEST = "ends with the best as soon as there is one"
SHOW_CURSOR = "\x1b[?25h"


class Stopped(BaseException):
    """What a safe point raises where a longer work is to end early; no error, so no handler of errors takes it."""


class Ended(Stopped):
    """What a safe point raises where Ctrl-C ends the whole program."""


_over: list[Callable[[], bool]] = []
_waits: list[str] = []
_ending = threading.Event()
_watched = threading.Event()


def check() -> None:
    """Be a safe point: raise Ended where Ctrl-C ends the program, Stopped where a longer work is to end early."""
    if _ending.is_set():
        raise Ended
    if any(over() for over in _over):
        raise Stopped


@contextmanager
def stopping(over: Callable[[], bool]) -> Iterator[None]:
    """Make every safe point in here raise Stopped as soon as `over` says so."""
    _over.append(over)
    try:
        yield
    finally:
        _over.remove(over)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Let Ctrl-C raise Ended at once in here, where this program computes nothing and waits for another.

    It is no safe point itself: what is cleaned up after Ctrl-C may have to wait, too.
    """
    _waits.append(what)
    try:
        yield
    finally:
        _waits.remove(what)


@contextmanager
def until_stopped(tell: Callable[[str], None], told: str = BEST) -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C end a long stage early and not the program, saying what is `told`; the second one does.

    Gives what says whether it was pressed, itself a safe point. Outside the main thread, where no signal is handled,
    it never was.
    """
    pressed = list[int]()

    def stopped() -> bool:
        if _ending.is_set():
            raise Ended
        return bool(pressed)

    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = signal.getsignal(signal.SIGINT) or signal.default_int_handler

    def stop(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, before)
        with suppress(RuntimeError):  # it fell into the writing of another line
            tell(f"{told}; Ctrl-C again ends the program")

    signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def end_on_interrupt() -> None:
    """Let Ctrl-C end this program at the next safe point, or after LONGEST seconds; pressed again, at once.

    Does nothing outside the main thread, where no handler can be set.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    signal.signal(signal.SIGINT, _end)
    if not _watched.is_set():
        _watched.set()
        threading.Thread(target=_force, daemon=True).start()


def ending() -> bool:
    """Say whether Ctrl-C ends the program: what fails from then on failed by it."""
    return _ending.is_set()


def leave() -> NoReturn:
    """End the program with STOPPED, without the destructors of runtimes whose threads may be at work."""
    _tell("stopped; what was finished is kept, run the same command to go on")
    os._exit(STOPPED)


def _end(number: int, frame: FrameType | None) -> None:
    if _ending.is_set():
        leave()
    _ending.set()
    if _waits:
        raise Ended
    _tell(f"stops within {LONGEST:g} s; Ctrl-C again stops at once")


def _force() -> None:
    """Wait for Ctrl-C, and end a program that reaches no safe point."""
    _ending.wait()
    time.sleep(LONGEST)
    leave()


def _tell(text: str) -> None:
    """Write a line to stderr unbuffered, as a signal handler may; also where a stage turned `sys.stderr` away."""
    with suppress(OSError, ValueError, AttributeError):  # there may be none
        number = sys.__stderr__.fileno()  # type: ignore[union-attr]
        shown = SHOW_CURSOR if os.isatty(number) else ""  # a progress bar hides it
        os.write(number, f"{shown}{text}\n".encode())
