"""A graph of tasks on Ray: each done once, failures kept apart, what a machine broke tried again."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from bitferry.device.errors import InputError
from bitferry.pipeline import progress
from bitferry.pipeline.nightly import ray_session
from bitferry.pipeline.nightly.execution import Execution
from bitferry.pipeline.nightly.graph import Done, Task, unique
from bitferry.pipeline.nightly.nodes import Answer, Nodes, Say
from bitferry.pipeline.nightly.placement import Node

JOIN_SECONDS = 180.0
"""How long a cluster's nodes may take to answer at the start."""
GRACE_SECONDS = 60.0
"""How long a cluster may lack a kind of node before the tasks for it fail."""


def never() -> bool:
    """Say that nothing is to be stopped."""
    return False


def silent(task: Task, node: Node) -> None:
    """Tell nobody."""


def told(text: str) -> None:
    """Say on stderr what became of a node."""
    progress.stage("node", text)


@dataclass
class Cluster:
    """Ray, on this machine or many."""

    nodes: Nodes
    grace: float

    @property
    def kinds(self) -> list[str]:
        """List the kinds of node that there are and that may measure, the most frequent first."""
        used = list(self.nodes.used.values())
        kinds = [node.kind for node in used if node.measures] or [node.kind for node in used]
        return sorted(set(kinds), key=lambda kind: (-kinds.count(kind), kind))

    def execute(
        self,
        tasks: Sequence[Task],
        *,
        stopped: Callable[[], bool] = never,
        begun: Callable[[Task, Node], None] = silent,
    ) -> Iterator[Done]:
        """Run the tasks, each after those it needs, and give each as it ends; once `stopped`, kill what runs.

        `begun` is told of each attempt. Raises ValueError for a graph with a cycle or an unknown need.
        """
        running = Execution(unique(tasks), self.nodes, self.grace, begun)
        try:
            while running.unfinished and not stopped():
                yield from running.look()
                running.place()
                yield from running.ends(0.2)
            running.cancel()
            yield from running.last()
        finally:
            running.cancel()


@contextmanager
def started(address: str | None = None, *, say: Say = told, grace: float = GRACE_SECONDS) -> Iterator[Cluster]:
    """Start Ray here, or join the cluster at an address; every node that is there has been asked what it is.

    Raises TargetUnavailable without Ray, InputError where no cluster answers or none of its nodes can be used.
    """
    ray_session.connect(address)
    try:
        nodes = Nodes(SimpleQueue(), say)
        nodes.look()
        deadline = time.monotonic() + JOIN_SECONDS
        while nodes.asked and time.monotonic() < deadline:
            try:
                event = nodes.events.get(timeout=0.2)
            except Empty:
                continue
            if isinstance(event, Answer):
                nodes.answer(event)
        if not nodes.used:
            why = "; ".join(nodes.refused.values()) or "no node with CPUs answers"
            raise InputError(f"no node of the Ray cluster can be used: {why}")
        yield Cluster(nodes, grace if address else 0.0)
    finally:
        ray_session.disconnect()
