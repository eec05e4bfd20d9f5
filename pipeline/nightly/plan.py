"""Recipes × targets × precisions → cells, and for those that changed the graph of tasks that makes them."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bitferry import targets
from bitferry.device.errors import InputError
from bitferry.pipeline import progress
from bitferry.pipeline.asked import choose_targets
from bitferry.pipeline.nightly import work
from bitferry.pipeline.nightly.graph import Task
from bitferry.pipeline.nightly.night import Cell, Inputs
from bitferry.pipeline.nightly.work import Order
from bitferry.pipeline.recipe import Recipe, read
from bitferry.targets import PRECISIONS, Precision

GIB = 1 << 30
SHORT = ("float8", "float16", "bfloat16")
"""Precisions that are measured only where the hardware has instructions for them."""


@dataclass(frozen=True)
class Planned:
    """A cell that is to be measured or reused."""

    cell: Cell
    recipe: Recipe
    order: Order
    inputs: Inputs
    kind: str
    key: str


def cells(paths: Sequence[Path], names: str | None, precisions: Sequence[str]) -> Iterator[tuple[Path, Recipe, Cell]]:
    """Give each recipe's cells on the targets asked for, in those of the precisions that a target runs.

    Raises InputError for recipes of one name, unknown precisions and faults in a recipe.
    """
    known = (*PRECISIONS, "auto")
    wrong = [one for one in precisions if one not in known]
    if wrong:
        raise InputError(f"'{wrong[0]}' is no precision; the precisions are {', '.join(known)}")
    seen: dict[str, Path] = {}
    left_out: dict[str, None] = {}
    for path in paths:
        recipe = read(path, precision="auto")
        if recipe.name in seen:
            raise InputError(f"{path} and {seen[recipe.name]} are both called '{recipe.name}'; a name is one recipe's")
        seen[recipe.name] = path
        for name in choose_targets(names, recipe):
            able, slow = _runs(recipe, name, precisions)
            left_out |= dict.fromkeys([slow] if slow else [])
            for precision in able:
                yield path.resolve(), recipe, Cell(recipe.name, name, precision)
    for told in left_out:
        progress.stage("skip", told)


def _runs(recipe: Recipe, name: str, precisions: Sequence[str]) -> tuple[list[str], str]:
    """Choose the precisions that a target runs, and this machine with speed; say which are left out for that."""
    found = targets.get(name).environment(options=recipe.options(name))
    schemes = targets.get(name).SCHEMES
    able = [one for one in precisions if one == "auto" or one in schemes]
    slow = [one for one in able if one in SHORT and one not in found.fast and not found.unmeasured]
    told = f"{', '.join(slow)} on {name}: {found.device} has no instructions for it" if slow else ""
    return [one for one in able if one not in slow], told


def kind_for(recipe: Recipe, target: str, kinds: Sequence[str], last: str | None) -> str:
    """Choose the kind of node that measures a cell: as the recipe asks, else as the last time, else the first.

    Raises InputError when no node is as the recipe asks.
    """
    asked = recipe.nightly.nodes.get(target, recipe.nightly.nodes.get("*", ""))
    fitting = [kind for kind in kinds if all(word.lower() in kind.lower() for word in asked.split())]
    if not fitting:
        told = f"recipe '{recipe.name}' wants '{asked}' for {target} (nightly.nodes)"
        raise InputError(f"{told}; the nodes here are: {', '.join(kinds)}")
    return last if last in fitting else fitting[0]


def graph(planned: Sequence[Planned]) -> list[Task]:
    """Give every task once, with the cells that wait for it."""
    found: dict[str, Task] = {}
    for one in planned:
        for task in _tasks(one):
            cells = (*found[task.key].cells, one.cell.name) if task.key in found else (one.cell.name,)
            found[task.key] = replace(found.get(task.key, task), cells=cells)
    return [*found.values()]


def _tasks(planned: Planned) -> list[Task]:
    """Give the tasks that make and measure a cell, first to last; those that cells share have the same keys."""
    order, cell = planned.order, planned.cell
    schemes = targets.get(cell.target).SCHEMES
    wanted = [cell.precision] if cell.precision != "auto" else _searched(planned)
    prepared = _task(planned, "prepare", None, (), work.prepare, cpus=4, memory=3)
    made, compiled = [prepared], []
    for precision in dict.fromkeys([*wanted, *(["float32"] if "float32" in schemes else [])]):
        one = replace(planned, order=replace(order, precision=precision), cell=replace(cell, precision=precision))
        made += _built(one, prepared.key)
        compiled.append(made[-1].key)
    last = tuple(compiled)
    if cell.precision != "auto":
        made.append(_task(planned, "evaluate", cell, last, work.evaluate, cpus=2, memory=3, kind=planned.kind))
        last = (made[-1].key,)
    measured = _task(planned, "measure", cell, last, work.measure, memory=3, kind=planned.kind, whole=True)
    return [*made, replace(measured, key=planned.key)]


def _searched(planned: Planned) -> list[str]:
    """Give the precisions that a search builds, for them to be built beforehand."""
    found = targets.get(planned.cell.target).environment(options=planned.recipe.options(planned.cell.target))
    schemes = targets.get(planned.cell.target).SCHEMES
    fast: list[str] = [one for one in schemes if one in found.fast or one not in SHORT]
    return [next(iter(schemes))] if found.unmeasured else fast


def _built(planned: Planned, prepared: str) -> list[Task]:
    """Give the tasks from the float model to one compiled file."""
    target = targets.get(planned.cell.target)
    options = planned.recipe.options(planned.cell.target)
    scheme, form = targets.scheme(target, _precision(planned.cell.precision), options), target.CONSUMES
    made, last = [], prepared
    if scheme is not None:
        made.append(_task(planned, "quantize", asdict(scheme), (last,), work.quantize, cpus=2, memory=3))
        last = made[-1].key
    made.append(_task(planned, "convert", form, (last,), work.convert, memory=3))
    made.append(_task(planned, "compile", planned.cell, (made[-1].key,), work.compile, memory=3))
    return made


def _precision(name: str) -> Precision:
    return next(one for one in PRECISIONS if one == name)


def _task(  # noqa: PLR0913 - a task is all of this
    planned: Planned, stage: str, own: object, needs: tuple[str, ...], run: Callable[[Order], object], *,
    cpus: float = 1, memory: float, kind: str | None = None, whole: bool = False,
) -> Task:  # fmt: skip
    """Name a stage by what it is made from, so that equal ones are one task."""
    found = planned.inputs
    common = {name: value for name, value in found.recipe.items() if not name.startswith(("targets.", "budget."))}
    told = [stage, own, needs, planned.recipe.name, common, dict(found.data), found.weights, found.code, kind]
    key = hashlib.sha256(json.dumps(told, sort_keys=True, default=asdict).encode()).hexdigest()
    cell = planned.cell
    what = {"prepare": cell.recipe, "quantize": f"{cell.recipe} for {cell.target}"}.get(stage, cell.name)
    return Task(
        key=key,
        name=f"{what}: {stage}",
        run=run,
        arguments=(planned.order,),
        needs=needs,
        cpus=cpus,
        memory_bytes=int(memory * GIB),
        whole=whole,
        kind=kind,
    )
