"""The tasks of a night and what each needs before it: a graph in which a content hash names a task."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from typing import Literal

MEMORY = 2 << 30


@dataclass(frozen=True)
class Task:
    """One piece of work for a node."""

    key: str
    """A hash of what its result depends on; two tasks of one key are one task."""
    name: str
    """What a person reads, as `fashion-resnet18 for openvino: quantize`."""
    run: Callable[..., object]
    """A function of a module, importable on the nodes."""
    arguments: tuple[object, ...] = ()
    needs: tuple[str, ...] = ()
    """The keys of the tasks that must have succeeded before."""
    cpus: float = 1.0
    memory_bytes: int = MEMORY
    whole: bool = False
    """It measures: no other task may run on its node meanwhile."""
    kind: str | None = None
    """The kind of node that it must run on; None: any."""
    cells: tuple[str, ...] = ()
    """The names of the cells that need it."""


@dataclass(frozen=True)
class Done:
    """What came of a task."""

    task: Task
    value: object | None = None
    error: str | None = None
    error_kind: Literal["ours", "machine", "needed"] | None = None
    """ours: it raised an error; machine: its node or process died, or ran out of memory or disk; needed: a task
    before it failed, and `error` is that one's."""
    trace: str | None = None
    """The traceback, and the end of what the task wrote to stdout and stderr."""
    attempts: int = 0
    seconds: float = 0.0
    """Of the last attempt, on the node."""
    node: str = ""
    """The hostname of the node, the last one where there were several."""
    kind: str = ""
    """Of that node."""
    cause: Literal["ours", "machine"] = "ours"
    """Of the error, were it that of a task before."""
    peak_memory_bytes: int | None = None
    """Of the process that ran it, the interpreter and imports included; None where the system does not tell."""


def unique(tasks: Sequence[Task]) -> dict[str, Task]:
    """Give each task once, by key, in the order given, with the cells of all that are the same."""
    found: dict[str, Task] = {}
    for task in tasks:
        cells = found[task.key].cells if task.key in found else ()
        found[task.key] = replace(task, cells=tuple(dict.fromkeys((*cells, *task.cells))))
    return found


def ordered(tasks: Mapping[str, Task]) -> "TopologicalSorter[str]":
    """Give what says which tasks are ready; raise ValueError for a need that no task has, and for a cycle."""
    for task in tasks.values():
        unknown = [need for need in task.needs if need not in tasks]
        if unknown:
            raise ValueError(f"'{task.name}' needs the task {unknown[0]}, which is not there")
    sorter = TopologicalSorter({task.key: task.needs for task in tasks.values()})
    try:
        sorter.prepare()
    except CycleError as error:
        names = " → ".join(tasks[key].name for key in error.args[1])
        raise ValueError(f"these tasks need each other: {names}") from error
    return sorter


def dependents(tasks: Mapping[str, Task]) -> dict[str, list[str]]:
    """Give the keys of the tasks that need each task directly."""
    found: dict[str, list[str]] = {key: [] for key in tasks}
    for task in tasks.values():
        for need in dict.fromkeys(task.needs):
            found[need].append(task.key)
    return found


def after(key: str, direct: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Give the keys of all tasks that need a task, directly or not, each once."""
    seen, todo = {key}, [key]
    while todo:
        for later in direct[todo.pop()]:
            if later not in seen:
                seen.add(later)
                todo.append(later)
                yield later
