"""One graph on its way: what is ready goes out, what ends frees its node and what waits for it, what broke goes again.

Ray itself retries nothing, and each task has one attempt at a time, so a result counts once.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from queue import Empty
from typing import TYPE_CHECKING

from bitferry.device.errors import first_line
from bitferry.pipeline.nightly import ray_session
from bitferry.pipeline.nightly.graph import Done, Task, after, dependents, ordered
from bitferry.pipeline.nightly.nodes import Answer, Nodes
from bitferry.pipeline.nightly.perform import Outcome, log_file, perform
from bitferry.pipeline.nightly.placement import Node, Placed, Placement

if TYPE_CHECKING:
    from ray import ObjectRef

LOOK_SECONDS = 1.0
LOST_SECONDS = 60.0
"""How long Ray may take to give up what ran on a node that left, before we do."""
DEATHS = 3
"""How many deaths of its nodes a task may outlive; such a task may be what kills them."""
CANCEL_SECONDS = 5.0


@dataclass(frozen=True)
class Ended:
    """An attempt that ended: its number, and its Outcome or Ray's error."""

    attempt: int
    result: object


@dataclass
class Tries:
    """What became of a task so far."""

    attempts: int = 0
    faults: int = 0
    """Of the machine, its node alive."""
    deaths: int = 0
    """Of its node."""


@dataclass
class Attempt:
    """A task that runs on a node."""

    placed: Placed
    reference: "ObjectRef[object]"


class Execution:
    """What waits, what runs and what ended of one graph; raises ValueError for a cycle or an unknown need."""

    def __init__(
        self, tasks: Mapping[str, Task], nodes: Nodes, grace: float, begun: Callable[[Task, Node], None]
    ) -> None:
        self.tasks, self.nodes, self.grace, self.begun = tasks, nodes, grace, begun
        self.sorter, self.direct = ordered(tasks), dependents(tasks)
        self.order = {key: number for number, key in enumerate(tasks)}
        self.unfinished, self.tries = set(tasks), {key: Tries() for key in tasks}
        self.placement, self.homes = Placement(), dict[str, str]()
        self.running = dict[int, Attempt]()
        self.doubted = dict[str, list[tuple[Placed, str]]]()
        self.missing_since = dict[str | None, float]()
        self.looked, self.sent = 0.0, 0
        for node in nodes.used.values():
            self.placement.add(node)
        self._push_ready()

    def look(self) -> Iterator[Done]:
        """Once a second: take in nodes that joined, drop those that left, fail what no node can run."""
        now = time.monotonic()
        if now - self.looked < LOOK_SECONDS:
            return
        self.looked = now
        for node in self.nodes.look():
            self.placement.remove(node)
            yield from self._resolve(node, died=True)
        yield from self._lost(now)
        yield from self._refuse_missing(now)

    def place(self) -> None:
        """Send out what can begin."""
        for placed in self.placement.next(self.homes):
            self.sent += 1
            self.tries[placed.task.key].attempts += 1
            reference = ray_session.send(
                perform,
                (ray_session.packed((placed.task.run, placed.task.arguments)), placed.task.key),
                partial(self._tell, self.sent),
                node=placed.node.id,
                cpus=placed.cpus,
                memory_bytes=placed.memory_bytes,
                alone=placed.task.whole and placed.node.measures,
            )
            self.running[self.sent] = Attempt(placed, reference)
            self.begun(placed.task, placed.node)

    def ends(self, seconds: float) -> Iterator[Done]:
        """Wait for something to end, and give all that did."""
        try:
            event = self.nodes.events.get(timeout=seconds)
            while True:
                if isinstance(event, Answer):
                    yield from self._answered(event)
                elif isinstance(event, Ended):
                    yield from self._ended(event)
                event = self.nodes.events.get_nowait()
        except Empty:
            pass

    def cancel(self) -> None:
        """Kill what runs."""
        for attempt in self.running.values():
            ray_session.cancel(attempt.reference)

    def last(self) -> Iterator[Done]:
        """Give what ended well although it was to be killed; the rest stays unfinished."""
        deadline = time.monotonic() + CANCEL_SECONDS
        while self.running and time.monotonic() < deadline:
            try:
                event = self.nodes.events.get(timeout=0.2)
            except Empty:
                continue
            if isinstance(event, Ended) and event.attempt in self.running:
                attempt = self.running.pop(event.attempt)
                if isinstance(event.result, Outcome) and event.result.error is None:
                    yield from self._done(attempt.placed, event.result)

    def _tell(self, number: int, result: object) -> None:
        self.nodes.events.put(Ended(number, result))

    def _push_ready(self) -> None:
        for key in self.sorter.get_ready():
            self.placement.push(self.order[key], self.tasks[key])

    def _answered(self, answer: Answer) -> Iterator[Done]:
        """Open a node that answers, and close the case of what died on it."""
        node = self.nodes.answer(answer)
        if node:
            self.placement.add(node)
        yield from self._resolve(answer.node, died=node is None)

    def _ended(self, event: Ended) -> Iterator[Done]:
        attempt = self.running.pop(event.attempt, None)
        if attempt is None:  # of a node that was given up
            return
        placed = attempt.placed
        self.placement.release(placed)
        if isinstance(event.result, Outcome) and event.result.error_kind != "machine":
            yield from self._done(placed, event.result)
        elif isinstance(event.result, Outcome):
            yield from self._fault(placed, event.result.error or "", event.result)
        elif isinstance(event.result, BaseException):
            yield from self._broken(placed, event.result)
        else:
            raise TypeError(f"{placed.task.name} gave {event.result!r}")

    def _broken(self, placed: Placed, error: BaseException) -> Iterator[Done]:
        """Sort an end that the task itself did not tell of."""
        kind, told = ray_session.fault(error), f"{type(error).__name__}: {first_line(error)}"
        if kind == "ours":
            yield from self._done(placed, Outcome(None, told, "ours", str(error), 0.0, 0))
        elif kind == "memory":
            task = replace(placed.task, memory_bytes=2 * placed.task.memory_bytes)
            yield from self._fault(replace(placed, task=task), told)
        else:
            room = self.placement.rooms.get(placed.node.id)
            if room:
                room.closed = True
                self.nodes.again(placed.node)
            if kind == "node" or room is None:
                yield from self._death(placed, told)
            else:
                self.doubted.setdefault(placed.node.id, []).append((placed, told))

    def _resolve(self, node: str, *, died: bool) -> Iterator[Done]:
        for placed, told in self.doubted.pop(node, ()):
            yield from self._death(placed, told) if died else self._fault(placed, told)

    def _fault(self, placed: Placed, error: str, outcome: Outcome | None = None) -> Iterator[Done]:
        """Try once more what the machine broke."""
        tries = self.tries[placed.task.key]
        tries.faults += 1
        if tries.faults == 1:
            self.placement.push(self.order[placed.task.key], placed.task)
        else:
            told = f"{error}; what it wrote may be in {log_file(placed.task.key)} on {placed.node.hostname}"
            failed = outcome or Outcome(None, told, "machine", None, 0.0, 0)
            yield from self._done(placed, failed)

    def _death(self, placed: Placed, error: str) -> Iterator[Done]:
        """Begin anew elsewhere what a node took with it."""
        tries = self.tries[placed.task.key]
        tries.deaths += 1
        if tries.deaths <= DEATHS:
            self.placement.push(self.order[placed.task.key], placed.task)
        else:
            told = f"{tries.deaths} nodes died while they ran it, the last with: {error}"
            yield from self._done(placed, Outcome(None, told, "machine", None, 0.0, 0))

    def _lost(self, now: float) -> Iterator[Done]:
        """Give up what ran on nodes that left long ago, should Ray not have said so."""
        for number, attempt in list(self.running.items()):
            left = self.nodes.left.get(attempt.placed.node.id)
            if left is not None and now - left > LOST_SECONDS:
                del self.running[number]
                yield from self._death(attempt.placed, "the node left")

    def _refuse_missing(self, now: float) -> Iterator[Done]:
        """Fail what has waited long for a kind of node that is not there."""
        missing = {} if self.nodes.asked else self.placement.missing()
        self.missing_since = {kind: self.missing_since.get(kind, now) for kind in missing}
        for kind, tasks in missing.items():
            if now - self.missing_since[kind] >= self.grace:
                self.placement.drop(kind)
                there = ", ".join(sorted({node.kind for node in self.nodes.used.values()})) or "none at all"
                told = f"no node of the kind '{kind}' is there" if kind else "no node is there"
                for task in tasks:
                    yield from self._failed(Done(task, None, f"{told}; the nodes are: {there}", "machine"))

    def _done(self, placed: Placed, outcome: Outcome) -> Iterator[Done]:
        key = placed.task.key
        done = Done(
            self.tasks[key],
            outcome.value,
            outcome.error,
            outcome.error_kind,
            outcome.trace,
            self.tries[key].attempts,
            outcome.seconds,
            placed.node.hostname,
            placed.node.kind,
            peak_memory_bytes=outcome.peak_memory_bytes or None,
        )
        if done.error is not None:
            yield from self._failed(done)
            return
        self.unfinished.discard(key)
        self.homes[key] = placed.node.id
        self.sorter.done(key)
        self._push_ready()
        yield done

    def _failed(self, done: Done) -> Iterator[Done]:
        """Give a failure, and those of the tasks that needed it."""
        self.unfinished.discard(done.task.key)
        done = replace(done, cause="machine" if done.error_kind == "machine" else "ours")
        yield done
        for key in after(done.task.key, self.direct):
            if key in self.unfinished:
                self.unfinished.discard(key)
                yield replace(done, task=self.tasks[key], error_kind="needed", seconds=0.0)
