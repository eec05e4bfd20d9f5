"""A matrix while it runs: on a terminal a table of what is done and what runs where, else a line per finished cell."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bitferry.pipeline import progress
from bitferry.pipeline.nightly.graph import Done, Task
from bitferry.pipeline.nightly.placement import Node

LINES = 20
"""Of running tasks; a terminal shows no more anyway."""


@dataclass(frozen=True)
class Begun:
    """A task that runs."""

    task: Task
    node: Node
    at: float
    """By the monotonic clock, in seconds."""


class Show:
    """What a person sees of a graph on its way; told of each attempt that begins and each task that ends."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.left = Counter(cell for task in tasks for cell in task.cells)
        self.waiting = Counter(task.whole for task in tasks)
        self.cells, self.start = len(self.left), time.monotonic()
        self.running, self.touched, self.failed, self.finished = dict[str, Begun](), set[str](), set[str](), set[str]()
        # whether a task measures → how many ended, and their seconds
        self.ended, self.seconds = {False: 0, True: 0}, {False: 0.0, True: 0.0}

    def begun(self, task: Task, node: Node) -> None:
        """Take in that a task begins."""
        self.running[task.key] = Begun(task, node, time.monotonic())
        self.touched.update(task.cells)

    def __call__(self, done: Done) -> None:
        """Take in what came of a task."""
        task = done.task
        self.running.pop(task.key, None)
        self.waiting[task.whole] -= 1
        if done.error_kind != "needed":
            self.ended[task.whole] += 1
            self.seconds[task.whole] += done.seconds
        for cell in task.cells:
            self.left[cell] -= 1
            if done.error is not None and cell not in self.finished:
                self.failed.add(cell)
                self._finish(cell, f"failed: {done.error}")
            elif self.left[cell] == 0 and cell not in self.finished:
                self._finish(cell, f"done on {done.node}")

    def remaining(self) -> float | None:
        """Estimate the seconds that are left, from those that tasks took and how many ran at once; None at first."""
        spent = sum(self.seconds.values())
        if any(self.waiting[whole] and not self.ended[whole] for whole in (False, True)) or not spent:
            return None
        left = sum(
            self.waiting[whole] * self.seconds[whole] / self.ended[whole] for whole in self.ended if self.ended[whole]
        )
        return left * (time.monotonic() - self.start) / spent

    def __rich__(self) -> Group:
        """Draw it."""
        running = len(self.touched - self.finished)
        waiting = self.cells - len(self.finished) - running
        left = self.remaining()
        told = f"{len(self.finished) - len(self.failed)} of {self.cells} cells done, {len(self.failed)} failed, "
        told += f"{running} begun, {waiting} waiting"
        if left is not None:
            told += f"; about {timedelta(seconds=round(left))} left"
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        now = time.monotonic()
        for one in sorted(self.running.values(), key=lambda one: (one.node.hostname, one.at))[:LINES]:
            table.add_row(one.node.hostname, Text(one.task.name), f"{now - one.at:.0f} s")
        return Group(Text(told), table)

    def _finish(self, cell: str, how: str) -> None:
        self.finished.add(cell)
        if not progress.console.is_terminal or cell in self.failed:
            progress.stage("cell", f"{cell} {how} ({len(self.finished)} of {self.cells})")


@contextmanager
def shown(tasks: Sequence[Task]) -> Iterator[Show]:
    """Show the tasks on stderr; give what is to be told of them. A refresh per second is all it costs."""
    show, console = Show(tasks), progress.console
    if console.quiet or not console.is_terminal:
        yield show
        return
    with Live(show, console=console, refresh_per_second=1, transient=True):
        yield show
