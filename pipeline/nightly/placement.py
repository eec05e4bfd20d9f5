"""Which task goes to which node, and when: builds share nodes by CPUs and memory, a measurement has one alone.

Ray places tasks by itself, but it cannot keep a node free for a task that needs all of it: small tasks would fill
every gap, and the measurement would wait to the end. So the driver decides, and tells Ray the node.
"""

import heapq
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from bitferry.pipeline.nightly.graph import Task

GIB = 1 << 30
Shape = tuple[str | None, float, int]
"""Kind, CPUs and memory in GiB: tasks of one shape fit on the same nodes, so only the first of each is looked at."""


@dataclass(frozen=True)
class Node:
    """A machine of the cluster as Ray and the probe describe it."""

    id: str
    hostname: str
    kind: str
    """As `x86-64 avx512_vnni`."""
    cpus: float
    memory_bytes: int
    measures: bool
    """It advertises the resource that keeps measurements to some nodes."""


@dataclass
class Room:
    """A node with what is free on it."""

    node: Node
    cpus: float
    memory_bytes: int
    running: int = 0
    held: bool = False
    """A measurement has it."""
    closed: bool = False
    """Something died on it, and whether it still answers is not known yet."""

    @property
    def open(self) -> bool:
        return not self.held and not self.closed

    @property
    def idle(self) -> bool:
        return self.open and not self.running


@dataclass(frozen=True)
class Placed:
    """A task on a node, with what it takes there."""

    task: Task
    node: Node
    cpus: float
    memory_bytes: int


@dataclass
class Placement:
    """The ready tasks and the nodes; tasks that were given first go first."""

    rooms: dict[str, Room] = field(default_factory=dict)
    builds: dict[Shape, list[tuple[int, Task]]] = field(default_factory=dict)
    measurements: dict[str | None, list[tuple[int, Task]]] = field(default_factory=dict)

    def add(self, node: Node) -> None:
        """Take a node in; one that is there already is open again."""
        room = self.rooms.setdefault(node.id, Room(node, node.cpus, node.memory_bytes))
        room.closed = False

    def remove(self, node: str) -> None:
        """Forget a node that left."""
        self.rooms.pop(node, None)

    def push(self, order: int, task: Task) -> None:
        """Take in a task that is ready; of those that fit, the lowest `order` begins first."""
        if task.whole:
            heapq.heappush(self.measurements.setdefault(task.kind, []), (order, task))
        else:
            shape = (task.kind, task.cpus, -(-task.memory_bytes // GIB))
            heapq.heappush(self.builds.setdefault(shape, []), (order, task))

    def release(self, placed: Placed) -> None:
        """Give back what a task took, where its node is still there."""
        room = self.rooms.get(placed.node.id)
        if room:
            room.cpus += placed.cpus
            room.memory_bytes += placed.memory_bytes
            room.running -= 1
            room.held = False

    def next(self, homes: Mapping[str, str]) -> Iterator[Placed]:
        """Place what can begin now; `homes` says on which node each finished task's output lies.

        One node of each kind takes no further build while a measurement waits for that kind; the others measure when
        there is no build for them.
        """
        drained = {room.node.id for kind in self.measurements for room in self._drained(kind)}
        yield from self._measure(drained)
        yield from self._build(drained, homes)
        yield from self._measure(self.rooms)

    def missing(self) -> dict[str | None, list[Task]]:
        """Give the ready tasks whose kind no node has, by kind."""
        found: dict[str | None, list[Task]] = {}
        for kind, queue in self._queues():
            if queue and not self._of_kind(kind):
                found.setdefault(kind, []).extend(task for _, task in queue)
        return found

    def drop(self, kind: str | None) -> None:
        """Forget the ready tasks of a kind."""
        for of, queue in self._queues():
            if of == kind:
                queue.clear()

    def _queues(self) -> Iterator[tuple[str | None, list[tuple[int, Task]]]]:
        yield from self.measurements.items()
        yield from ((shape[0], queue) for shape, queue in self.builds.items())

    def _drained(self, kind: str | None) -> list[Room]:
        """Choose the node of a kind that is emptied for what waits to be measured: the one with the least on it."""
        rooms = self._measuring(kind)
        if not self.measurements[kind] or any(room.held for room in rooms):
            return []
        return sorted((room for room in rooms if room.open), key=lambda room: room.running)[:1]

    def _measuring(self, kind: str | None) -> list[Room]:
        """List the nodes that may measure a kind: those that advertise it, else all."""
        rooms = self._of_kind(kind)
        return [room for room in rooms if room.node.measures] or rooms

    def _measure(self, among: Collection[str]) -> Iterator[Placed]:
        for kind, queue in self.measurements.items():
            for room in self._measuring(kind) if queue else ():
                if queue and room.idle and room.node.id in among:
                    room.held = True
                    task = heapq.heappop(queue)[1]
                    yield self._placed(task, room, room.cpus, min(task.memory_bytes, room.memory_bytes))

    def _build(self, drained: Collection[str], homes: Mapping[str, str]) -> Iterator[Placed]:
        """Place builds first to last; one node is kept for the first that fits nowhere, lest small ones starve it."""
        kept, waiting = set(drained), False
        queues = {shape: queue for shape, queue in self.builds.items() if queue}
        while queues:
            shape = min(queues, key=lambda shape: queues[shape][0])
            task = queues[shape][0][1]
            cpus, memory = self._need(task)
            open_rooms = [room for room in self._of_kind(task.kind) if room.open and room.node.id not in kept]
            rooms = [room for room in open_rooms if room.cpus >= cpus and room.memory_bytes >= memory]
            if rooms:
                made = {homes.get(need) for need in task.needs}
                heapq.heappop(queues[shape])
                room = max(rooms, key=lambda room: (room.node.id in made, room.cpus))
                yield self._placed(task, room, cpus, memory)
            if not rooms and open_rooms and not waiting:
                kept.add(max(open_rooms, key=lambda room: room.cpus).node.id)
                waiting = True
            if not rooms or not queues[shape]:
                del queues[shape]

    def _need(self, task: Task) -> tuple[float, int]:
        """Give the CPUs and memory that a task takes: what it asks for, or what the largest node has of it."""
        nodes = [room.node for room in self._of_kind(task.kind)]
        enough = (node for node in nodes if node.cpus >= task.cpus and node.memory_bytes >= task.memory_bytes)
        if not nodes or next(enough, None):
            return task.cpus, task.memory_bytes
        largest = max(nodes, key=lambda node: (min(node.memory_bytes, task.memory_bytes), node.cpus))
        return min(task.cpus, largest.cpus), min(task.memory_bytes, largest.memory_bytes)

    def _of_kind(self, kind: str | None) -> list[Room]:
        return [room for room in self.rooms.values() if kind in (None, room.node.kind)]

    def _placed(self, task: Task, room: Room, cpus: float, memory: int) -> Placed:
        room.cpus -= cpus
        room.memory_bytes -= memory
        room.running += 1
        return Placed(task, room.node, cpus, memory)
