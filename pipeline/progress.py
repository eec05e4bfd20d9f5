"""Talk on stderr: a line per stage, and a progress bar on anything long when a person is watching."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bitferry.pipeline import interrupt

T = TypeVar("T")
console = Console(stderr=True, highlight=False, force_jupyter=False)  # a notebook shows stderr, line after line


def stage(name: str, text: str) -> None:
    """Say in one line what a stage did."""
    console.print(f"[bold]{name:<10}[/bold] {escape(text)}", soft_wrap=True)


@contextmanager
def timed(name: str, of: str = "") -> Iterator[None]:
    """Say when a stage begins, which is a safe point for Ctrl-C, and how long it took."""
    interrupt.check()
    stage(name, f"{of} …".strip())
    start = time.perf_counter()
    yield
    stage(name, f"{of} done in {time.perf_counter() - start:.1f} s".strip())


def track(items: Iterable[T], text: str, *, total: int, told: Callable[[], str] | None = None) -> Iterator[T]:
    """Yield the items with a bar that counts them; silent when stderr is no terminal or --quiet was given.

    Between two items is a safe point for Ctrl-C.

    `told` gives what stands beside the bar as the work goes on, in place of the text.
    """
    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=console.quiet or not console.is_terminal) as bar:
        task = bar.add_task(text, total=total)
        for item in items:
            interrupt.check()
            yield item
            bar.update(task, advance=1, description=told() if told else text)


def counted(text: str) -> Callable[[Sequence[T]], Iterator[T]]:
    """Give what tracks a sequence."""
    return lambda items: track(items, text, total=len(items))
