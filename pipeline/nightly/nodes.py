"""The nodes that are there: each is asked once what it is, and again when something died on it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue

from bitferry.device.errors import first_line
from bitferry.pipeline.nightly import ray_session
from bitferry.pipeline.nightly.perform import Probed, probe, whole
from bitferry.pipeline.nightly.placement import Node
from bitferry.pipeline.nightly.ray_session import Listed

Say = Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    """What a node said when it was asked: what it is, or the error instead."""

    node: str
    result: object


@dataclass
class Nodes:
    """The nodes of a cluster; they may join and leave at any time."""

    events: "SimpleQueue[object]"
    """Where an Answer arrives."""
    say: Say
    """Told in one line of each node that joins, leaves or is refused."""
    source: str = field(default_factory=whole)
    used: dict[str, Node] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    """Node → why it is not used."""
    silent: set[str] = field(default_factory=set)
    """Those that did not answer when they were asked last; they are asked again as long as Ray lists them."""
    asked: dict[str, Listed] = field(default_factory=dict)
    left: dict[str, float] = field(default_factory=dict)
    """Node → when it left, by the monotonic clock."""

    def look(self) -> list[str]:
        """Ask the nodes that joined what they are; give those that left."""
        there = {one.id: one for one in ray_session.listed()}
        for one in there.values():
            if one.id in self.silent or one.id not in (*self.used, *self.refused):
                self.ask(one)
        gone = [node for node in self.used if node not in there]
        for node in gone:
            self.left[node] = time.monotonic()
            self.silent.discard(node)
            self.say(f"{self.used.pop(node).hostname} left")
        return gone

    def ask(self, listed: Listed) -> None:
        """Ask a node what it is, unless it is being asked."""
        if listed.id not in self.asked:
            self.asked[listed.id] = listed
            ray_session.send(probe, (), lambda result: self.events.put(Answer(listed.id, result)), node=listed.id)

    def again(self, node: Node) -> None:
        """Ask a node whether it is still there."""
        self.ask(Listed(node.id, node.cpus, node.memory_bytes, node.measures, node.kind))

    def answer(self, answer: Answer) -> Node | None:
        """Take in what a node said; None where it did not answer or cannot be used."""
        listed, said = self.asked.pop(answer.node), answer.result
        self.silent.discard(listed.id)
        if isinstance(said, Probed) and said.source == self.source:
            if listed.id not in self.used:
                kind = listed.kind or said.kind
                node = Node(listed.id, said.hostname, kind, listed.cpus, listed.memory_bytes, listed.measures)
                self.used[listed.id] = node
                size = f"{node.cpus:g} CPUs, {node.memory_bytes / 2**30:.1f} GiB"
                self.say(f"{node.hostname} joined: {node.kind}, {size}")
            return self.used[listed.id]
        if isinstance(said, BaseException) and ray_session.fault(said) != "ours":
            self.silent.add(listed.id)
            return None
        why = _reason(listed, said)
        self.refused[listed.id] = why
        self.say(why)
        return None


def _reason(listed: Listed, said: object) -> str:
    if isinstance(said, Probed):
        return (
            f"{said.hostname} has another bitferry than this machine, or other versions of what it needs, and is not "
            "used; install the same there and start Ray there anew"
        )
    text = first_line(said) if isinstance(said, BaseException) else repr(said)
    return f"node {listed.id[:8]} cannot run bitferry and is not used; install it there with its extras ({text})"
