"""Where tasks go, without Ray: a node is never overfull, a measurement is alone, nothing is left over."""

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from bitferry.pipeline.nightly.graph import Task
from bitferry.pipeline.nightly.placement import GIB, Node, Placed, Placement

KINDS = ("x86-64 avx512_vnni", "x86-64 avx2", "aarch64 asimddp")


def run() -> None:
    raise AssertionError("placing runs nothing")


def task(name: str, *, cpus: float = 1, gib: float = 1, whole: bool = False, kind: str | None = None) -> Task:
    return Task(name, name, run, cpus=cpus, memory_bytes=int(gib * GIB), whole=whole, kind=kind)


def node(name: str, *, cpus: float = 4, gib: int = 16, kind: str = KINDS[0], measures: bool = False) -> Node:
    return Node(name, name, kind, cpus, gib * GIB, measures)


def placement(nodes: list[Node], tasks: list[Task]) -> Placement:
    made = Placement()
    for one in nodes:
        made.add(one)
    for order, ready in enumerate(tasks):
        made.push(order, ready)
    return made


def names(placed: list[Placed]) -> list[tuple[str, str]]:
    return [(one.task.key, one.node.id) for one in placed]


def test_builds_fill_nodes_by_cpus_and_memory() -> None:
    tasks = [task("a", cpus=3), task("b", cpus=2), task("c", gib=14), task("d", cpus=0.5)]
    made = placement([node("n1"), node("n2")], tasks)
    assert names([*made.next({})]) == [("a", "n1"), ("b", "n2"), ("c", "n2"), ("d", "n1")]


def test_a_build_goes_where_its_input_was_made() -> None:
    made = placement([node("n1"), node("n2", cpus=2)], [Task("b", "b", run, needs=("a",))])
    assert names([*made.next({"a": "n2"})]) == [("b", "n2")]


def test_a_measurement_waits_for_an_empty_node_which_takes_nothing_else() -> None:
    made = placement([node("n1", cpus=2)], [task("a"), task("b")])
    first, second = made.next({})
    made.push(2, task("m", whole=True))
    made.push(3, task("c"))
    made.release(first)
    assert not [*made.next({})]  # c would fit, and m would wait the longer
    made.release(second)
    measured = next(made.next({}))
    assert (measured.task.key, measured.cpus) == ("m", 2)
    assert not [*made.next({})]
    made.release(measured)
    assert names([*made.next({})]) == [("c", "n1")]


def test_one_node_of_a_kind_measures_and_the_others_build_as_long_as_there_is_something() -> None:
    nodes = [node("n1", cpus=1), node("n2", cpus=1), node("n3", cpus=1)]
    made = placement(nodes, [task("m1", whole=True), task("m2", whole=True), task("b1"), task("b2"), task("b3")])
    first = {one.task.key: one for one in made.next({})}
    assert set(first) == {"m1", "b1", "b2"}
    for one in first.values():
        made.release(one)
    assert {one.task.key for one in made.next({})} == {"m2", "b3"}


def test_a_large_build_is_not_starved_by_small_ones() -> None:
    made = placement([node("n1", cpus=2)], [task("small")])
    running = [*made.next({})]
    made.push(1, task("large", cpus=2))
    for order in range(2, 9):
        made.push(order, task(f"small {order}"))
    assert not [*made.next({})]
    made.release(running[0])
    assert names([*made.next({})]) == [("large", "n1")]


def test_what_is_larger_than_every_node_gets_all_of_the_largest() -> None:
    made = placement([node("n1", cpus=2, gib=4), node("n2", cpus=4, gib=8)], [task("a", cpus=64, gib=512)])
    (placed,) = made.next({})
    assert (placed.node.id, placed.cpus, placed.memory_bytes) == ("n2", 4, 8 * GIB)


def test_only_nodes_that_say_so_measure_where_one_does() -> None:
    nodes = [node("n1"), node("n2", measures=True), node("n3", kind=KINDS[1])]
    made = placement(nodes, [task(f"m{i}", whole=True) for i in range(3)])
    assert names([*made.next({})]) == [("m0", "n2")]
    made.push(9, task("other", whole=True, kind=KINDS[1]))
    assert names([*made.next({})]) == [("other", "n3")]


def test_a_closed_node_takes_nothing_and_a_kind_that_is_not_there_is_told() -> None:
    made = placement([node("n1")], [task("a"), task("b", kind=KINDS[2]), task("m", whole=True, kind=KINDS[2])])
    made.rooms["n1"].closed = True
    assert not [*made.next({})]
    assert {kind: {one.key for one in tasks} for kind, tasks in made.missing().items()} == {KINDS[2]: {"b", "m"}}
    made.drop(KINDS[2])
    assert not made.missing()
    made.add(node("n1"))
    assert names([*made.next({})]) == [("a", "n1")]


nodes_of = st.lists(
    st.tuples(
        st.sampled_from([1, 2, 4, 16]), st.sampled_from([2, 8, 64]), st.sampled_from(KINDS), st.booleans(),
    ), min_size=1, max_size=6,
)  # fmt: skip
tasks_of = st.lists(
    st.tuples(
        st.sampled_from([0.5, 1, 2, 4, 32]), st.sampled_from([0.5, 2, 7, 100]), st.booleans(),
        st.sampled_from([None, *KINDS]),
    ), max_size=40,
)  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(nodes_of, tasks_of, st.integers(0, 2**32))
def test_whatever_ends_when_nodes_are_never_overfull_and_nothing_is_left_over(
    nodes: list[tuple[float, int, str, bool]],
    tasks: list[tuple[float, float, bool, str | None]],
    seed: int,
) -> None:
    there = [node(f"n{i}", cpus=c, gib=g, kind=k, measures=m) for i, (c, g, k, m) in enumerate(nodes)]
    kinds = {one.kind for one in there} | {None}
    given_tasks = [task(str(i), cpus=c, gib=g, whole=w, kind=k) for i, (c, g, w, k) in enumerate(tasks) if k in kinds]
    made, chance = placement(there, given_tasks), random.Random(seed)  # noqa: S311 - reproducible
    running: list[Placed] = []
    begun: Counter[str] = Counter()
    while True:
        placed = [*made.next({})]
        begun.update(one.task.key for one in placed)
        running += placed
        for one in there:
            here = [other for other in running if other.node == one]
            assert sum(other.cpus for other in here) <= one.cpus
            assert sum(other.memory_bytes for other in here) <= one.memory_bytes
            assert len(here) <= 1 or not any(other.task.whole for other in here)
            assert all(other.task.kind in (None, one.kind) for other in here)
        if not running:
            break
        made.release(running.pop(chance.randrange(len(running))))
    assert begun == Counter(one.key for one in given_tasks)
