"""What the nightly matrix costs beside the work itself, and how long one would take on many nodes.

    python benchmarks/nightly_cost.py [--cells 100 1000 10000] [--replaced 100 1000] [--nodes 1 10 50]

First cells whose tasks do nothing, on Ray on this machine: all that is left is the engine's own time. Each ten cells
are a model on ten targets: one task prepares the model, and each cell quantizes, converts, compiles and measures.
`--cells` keeps the processes that run tasks; `--replaced` replaces each after so many tasks as the matrix does.
Then the same tasks with their seconds, on nodes that are imagined: the engine's own placement with a clock that jumps
to the next end. Prints both tables and keeps them in benchmarks/results/.
"""

import argparse
import heapq
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from bitferry.device.footprint import peak_memory
from bitferry.pipeline.nightly import engine, ray_session
from bitferry.pipeline.nightly.graph import Task, ordered
from bitferry.pipeline.nightly.placement import GIB, Node, Placed, Placement

TARGETS = 10
SECONDS = {"prepare": 60.0, "quantize": 20.0, "convert": 10.0, "compile": 15.0, "measure": 30.0}
"""Of an imagined cell's stages; `--seconds` gives others."""
CELL_SECONDS = 30.0
STAGES = ("quantize", "convert", "compile", "measure")


@dataclass(frozen=True)
class Cost:
    """What the engine took for cells whose tasks do nothing."""

    calls: int
    """Tasks after which a process is replaced; 0: never."""
    cells: int
    tasks: int
    seconds: float
    memory_bytes: int
    """What the driver's peak grew by."""


@dataclass(frozen=True)
class Imagined:
    """A night on imagined nodes."""

    nodes: int
    cells: int
    hours: float
    busy: float
    """The share of the nodes' time in which they did what fills them: measuring alone, or builds on all CPUs."""
    placing_ms: float
    """The driver's own time per task."""


def tasks(cells: int) -> Iterator[Task]:
    """Give the tasks of so many cells, ten to a model."""
    for number in range(cells):
        model, target = divmod(number, TARGETS)
        cell, last = f"model-{model}/target-{target}/int8", f"{model} prepare"
        if target == 0:
            yield Task(last, f"model-{model}: prepare", time.sleep, (0,), cells=(cell,))
        for stage in STAGES:
            key = f"{cell} {stage}"
            whole = stage == "measure"
            yield Task(key, f"{cell}: {stage}", time.sleep, (0,), needs=(last,), whole=whole, cells=(cell,))
            last = key


def real(cluster: engine.Cluster, cells: int, calls: int) -> Cost:
    """Run tasks that do nothing, each process replaced after so many calls."""
    ray_session.CALLS = calls
    given, before, start = list(tasks(cells)), peak_memory(), time.perf_counter()
    ended = [done.error for done in cluster.execute(given)]
    if ended != [None] * len(given):
        raise SystemExit(f"{len(given)} tasks, and {ended.count(None)} ended well")
    return Cost(calls, cells, len(given), time.perf_counter() - start, peak_memory() - before)


def imagined(cells: int, nodes: int, cpus: int, seconds: Mapping[str, float]) -> Imagined:
    """Place the tasks on nodes that are not there, each taking the seconds of its stage."""
    given = {task.key: task for task in tasks(cells)}
    order = {key: number for number, key in enumerate(given)}
    sorter, placement = ordered(given), Placement()
    for number in range(nodes):
        placement.add(Node(f"n{number}", f"n{number}", "x86-64", cpus, 4 * cpus * GIB, measures=False))
    running: list[tuple[float, int, Placed]] = []
    homes: dict[str, str] = {}
    now, busy, start = 0.0, 0.0, time.perf_counter()
    while sorter.is_active():
        for key in sorter.get_ready():
            placement.push(order[key], given[key])
        for placed in placement.next(homes):
            took = seconds[placed.task.name.rpartition(" ")[2]]
            busy += took * placed.cpus
            heapq.heappush(running, (now + took, order[placed.task.key], placed))
        now, _, placed = heapq.heappop(running)
        placement.release(placed)
        homes[placed.task.key] = placed.node.id
        sorter.done(placed.task.key)
    spent = time.perf_counter() - start
    return Imagined(nodes, cells, now / 3600, busy / (now * nodes * cpus), 1e3 * spent / len(given))


def show(costs: list[Cost], nights: list[Imagined]) -> None:
    """Print both tables as the documentation has them."""
    print("\n| processes replaced | cells | tasks | seconds | ms per cell | of a 30 s cell | driver, MiB |")
    print("|---|---|---|---|---|---|---|")
    for one in costs:
        each = one.seconds / one.cells
        share, memory = each / CELL_SECONDS, one.memory_bytes / 2**20
        counts = f"{f'after {one.calls} tasks' if one.calls else 'never'} | {one.cells:,} | {one.tasks:,}"
        print(f"| {counts} | {one.seconds:.1f} | {1e3 * each:.0f} | {share:.1%} | {memory:.0f} |")
    print("\n| nodes | cells | hours | nodes' CPUs in use | placing a task, ms |\n|---|---|---|---|---|")
    for night in nights:
        print(f"| {night.nodes} | {night.cells:,} | {night.hours:.2f} | {night.busy:.0%} | {night.placing_ms:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cells", type=int, nargs="*", default=[100, 1000, 10000], help="that do nothing, on Ray")
    parser.add_argument("--replaced", type=int, nargs="*", default=[100, 1000], help="the same, in fresh processes")
    parser.add_argument("--models", type=int, default=1000, help="of the imagined night, on ten targets each")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 10, 50], help="of the imagined nights")
    parser.add_argument("--cpus", type=int, default=16, help="of each imagined node")
    parser.add_argument("--seconds", nargs="*", default=[], metavar="STAGE=S", help="of the imagined stages")
    asked = parser.parse_args()
    seconds = SECONDS | {name: float(value) for name, _, value in (one.partition("=") for one in asked.seconds)}
    costs: list[Cost] = []
    begin = time.perf_counter()
    if asked.cells or asked.replaced:
        with engine.started() as cluster:
            started = time.perf_counter() - begin
            print(f"Ray started in {started:.1f} s; {next(iter(cluster.nodes.used.values())).cpus:g} CPUs", flush=True)
            replaced = ray_session.CALLS
            for calls, sizes in ((0, asked.cells), (replaced, asked.replaced)):
                for cells in sizes:
                    costs.append(real(cluster, cells, calls))
                    print(costs[-1], flush=True)
    nights = [imagined(TARGETS * asked.models, nodes, asked.cpus, seconds) for nodes in asked.nodes]
    show(costs, nights)
    keep({"ray": [vars(one) for one in costs], "imagined": [vars(one) for one in nights], "seconds": seconds})


def keep(found: Mapping[str, object]) -> None:
    """Write the figures beside those of other benchmarks."""
    from common import result_path  # noqa: PLC0415 - it imports what would count as the driver's memory

    result_path("nightly-cost").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
