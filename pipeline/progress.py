"""Talk on stderr: a line per stage, and a progress bar on anything long when a person is watching."""

import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
BEST = "ends with the best as soon as there is one"


class Stopped(BaseException):
    """What `track` raises between two items where a longer work is to end early; no error, so no handler takes it."""


_over: list[Callable[[], bool]] = []
console = Console(stderr=True, highlight=False, force_jupyter=False)  # a notebook shows stderr, line after line


def stage(name: str, text: str) -> None:
    """Say in one line what a stage did."""
    console.print(f"[bold]{name:<10}[/bold] {escape(text)}", soft_wrap=True)


@contextmanager
def timed(name: str, of: str = "") -> Iterator[None]:
    """Say when a stage begins, and how long it took."""
    stage(name, f"{of} …".strip())
    start = time.perf_counter()
    yield
    stage(name, f"{of} done in {time.perf_counter() - start:.1f} s".strip())


def track(items: Iterable[T], text: str, *, total: int, told: Callable[[], str] | None = None) -> Iterator[T]:
    """Yield the items with a bar that counts them; silent when stderr is no terminal or --quiet was given.

    `told` gives what stands beside the bar as the work goes on, in place of the text.
    """
    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=console.quiet or not console.is_terminal) as bar:
        task = bar.add_task(text, total=total)
        for item in items:
            if any(over() for over in _over):
                raise Stopped
            yield item
            bar.update(task, advance=1, description=told() if told else text)


def counted(text: str) -> Callable[[Sequence[T]], Iterator[T]]:
    """Give what tracks a sequence."""
    return lambda items: track(items, text, total=len(items))


@contextmanager
def stopping(over: Callable[[], bool]) -> Iterator[None]:
    """Make whatever is tracked in here raise Stopped as soon as `over` says so."""
    _over.append(over)
    try:
        yield
    finally:
        _over.remove(over)


@contextmanager
def until_stopped(what: str, told: str = BEST) -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C end a long stage early and not the program, saying what is `told`; the second one does."""
    before, pressed = signal.getsignal(signal.SIGINT), list[int]()

    def stop(number: int, frame: FrameType | None) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, before)
        stage(what, f"{told}; Ctrl-C again stops at once")

    signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
