"""The engine on a real cluster of Ray nodes: what dies is done again elsewhere, what fails fails alone, and once."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import pytest
from ray.cluster_utils import Cluster as RayCluster

from bitferry.device.errors import InputError
from bitferry.pipeline.nightly import engine, graph, live, ray_session
from bitferry.pipeline.nightly.engine import Cluster
from bitferry.pipeline.nightly.graph import Done, Task
from bitferry.pipeline.nightly.nodes import Answer, Nodes
from bitferry.pipeline.nightly.placement import Node
from bitferry.pipeline.nightly.ray_session import Listed, _importable
from tests import nightly_tasks

SERVER, BOARD, LATE = "server", "board", "late"
NODE = {"num_cpus": 2, "memory": 4 << 30, "object_store_memory": 80 << 20}


def task(name: str, run: Callable[..., object], *arguments: object, **more: object) -> Task:
    return replace(Task(name, name, run, arguments, memory_bytes=1 << 28), **more)  # type: ignore[arg-type]


def join(nodes: RayCluster, kind: str) -> None:
    """Start a node; Ray gives it 15 s for that, which a busy machine may need three times."""
    for last in (False, False, True):
        try:
            nodes.add_node(wait=False, labels={"bitferry-kind": kind}, **NODE)
        except Exception as error:
            if last or "timed out during startup" not in str(error):
                raise
        else:
            return


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayCluster]:
    """A cluster whose head has no CPUs, with two nodes of one kind and one of another."""
    with _importable():
        made = RayCluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0, "include_dashboard": False})
        for kind in (SERVER, SERVER, BOARD):
            join(made, kind)
        made.wait_for_nodes()
        yield made
        made.shutdown()


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def cluster(nodes: RayCluster, said: list[str]) -> Iterator[Cluster]:
    with engine.started(nodes.address, say=said.append, grace=2.0) as made:
        yield made


def ends(cluster: Cluster, tasks: list[Task]) -> dict[str, Done]:
    found = [*cluster.execute(tasks)]
    assert sorted(one.task.key for one in found) == sorted(one.key for one in tasks)  # each once
    return {one.task.key: one for one in found}


def stamps(folder: Path) -> list[tuple[str, float, float, str]]:
    """Give what ran: name, start, end, node."""
    return [
        (path.name, float(start), float(end), node)
        for path in folder.iterdir()
        for start, end, node in (line.split() for line in path.read_text().splitlines())
    ]


def test_nodes_say_what_they_are(cluster: Cluster, said: list[str]) -> None:
    assert cluster.kinds == [SERVER, BOARD]
    assert len([line for line in said if "joined: server, 2 CPUs, 4.0 GiB" in line]) == 2


def test_failures_stay_alone_and_what_a_machine_broke_is_tried_once_more(cluster: Cluster, tmp_path: Path) -> None:
    done = ends(
        cluster,
        [
            task("good", nightly_tasks.stamp, tmp_path, "good"),
            task("bad", nightly_tasks.fail, "boom"),
            task("after bad", nightly_tasks.stamp, tmp_path, "after bad", needs=("bad",)),
            task("after that", nightly_tasks.stamp, tmp_path, "after that", needs=("good", "after bad")),
            task("crash once", nightly_tasks.die_once, tmp_path, "crash once"),
            task("after crash", nightly_tasks.stamp, tmp_path, "after crash", needs=("crash once",)),
            task("crash", nightly_tasks.die, tmp_path, "crash"),
            task("disk", nightly_tasks.full_disk),
            task("unpicklable", nightly_tasks.generate),
            task("exit", sys.exit, 3),
            task("vax", nightly_tasks.stamp, tmp_path, "vax", kind="vax"),
            task("vax, whole", nightly_tasks.stamp, tmp_path, "vax, whole", kind="vax", whole=True),
        ],
    )
    kinds = {name: (one.error_kind, one.attempts) for name, one in done.items()}
    assert kinds == {
        "good": (None, 1), "bad": ("ours", 1), "after bad": ("needed", 1), "after that": ("needed", 1),
        "crash once": (None, 2), "after crash": (None, 1), "crash": ("machine", 2), "disk": ("machine", 2),
        "unpicklable": ("ours", 1), "exit": ("ours", 1), "vax": ("machine", 0), "vax, whole": ("machine", 0),
    }  # fmt: skip
    assert done["good"].value == "good"
    assert done["bad"].error == done["after that"].error == "ValueError: boom"
    assert "in fail" in (done["bad"].trace or "")
    assert (done["bad"].trace or "").endswith("a compiler's last words\n")
    assert done["vax"].error == "no node of the kind 'vax' is there; the nodes are: board, server"
    assert [name for name, *_ in stamps(tmp_path)].count("crash") == 2
    assert not {"after bad", "after that", "vax"} & {path.name for path in tmp_path.iterdir()}


def test_memory_is_each_tasks_own(cluster: Cluster) -> None:
    much, little = task("much", nightly_tasks.fill_memory, 200 << 20), task("little", nightly_tasks.fill_memory, 1)
    done = ends(cluster, [replace(much, kind=BOARD), replace(little, kind=BOARD, needs=("much",))])
    peaks = [done[name].peak_memory_bytes or 0 for name in ("much", "little")]
    assert peaks[0] - peaks[1] > 150 << 20


def test_stopped_it_kills_what_runs_and_begins_nothing(cluster: Cluster, tmp_path: Path) -> None:
    slow = [task(f"slow {i}", nightly_tasks.stamp, tmp_path, f"slow {i}", 60.0, needs=("quick",)) for i in range(12)]
    begun: list[str] = []
    done = cluster.execute(
        [task("quick", nightly_tasks.stamp, tmp_path, "quick"), *slow],
        stopped=lambda: len(begun) == 7,
        begun=lambda task, node: begun.append(task.name),
    )
    start = time.monotonic()
    assert [one.task.name for one in done] == ["quick"]
    assert time.monotonic() - start < 40
    assert [name for name, *_ in stamps(tmp_path)] == ["quick"]
    again = ends(cluster, [task("next", nightly_tasks.stamp, tmp_path, "next")])  # its nodes are free again
    assert again["next"].error is None


def test_a_node_killed_in_the_middle_and_one_that_joins(
    nodes: RayCluster, cluster: Cluster, said: list[str], tmp_path: Path
) -> None:
    """Builds on every node, measurements of both kinds; one server dies at work, a node of a third kind comes late."""
    builds = [task(f"build {i}", nightly_tasks.stamp, tmp_path, f"build {i}", 0.1) for i in range(16)]
    builds.append(task("build long", nightly_tasks.stamp, tmp_path, "build long", 5.0, kind=SERVER))
    measured = [
        task(f"measure {i}", nightly_tasks.stamp, tmp_path, f"measure {i}", 0.1, whole=True, kind=kind,
             needs=(f"build {i}",))
        for i, kind in enumerate((SERVER, BOARD) * 5)
    ]  # fmt: skip
    late = task("late", nightly_tasks.stamp, tmp_path, "late", whole=True, kind=LATE, needs=("build long",))
    where: dict[str, list[str]] = {}
    killed = None
    done: list[Done] = []
    for one in cluster.execute(
        [*builds, *measured, late], begun=lambda task, node: where.setdefault(task.name, []).append(node.id)
    ):
        done.append(one)
        if killed is None and "build long" in where:
            killed = where["build long"][0]
            victim = next(node for node in nodes.worker_nodes if node.node_id == killed)
            nodes.remove_node(victim, allow_graceful=False)
            join(nodes, LATE)
    assert killed
    assert sorted(one.task.name for one in done) == sorted(one.name for one in [*builds, *measured, late])
    assert [one.error for one in done] == [None] * len(done)
    attempts = {one.task.name: one.attempts for one in done}
    assert attempts["build long"] == 2
    assert {name for name, nodes in where.items() if len(nodes) > 1} == {
        n for n, count in attempts.items() if count > 1
    }
    ran = stamps(tmp_path)
    assert {name for name, *_ in ran} == {one.task.name for one in done}
    assert next(node for name, _, _, node in ran if name == "build long") != killed
    deadline = time.monotonic() + 60
    while not any(line.endswith("left") for line in said) and time.monotonic() < deadline:
        cluster.nodes.look()  # Ray tells of a death late
        time.sleep(0.2)
    assert killed not in cluster.nodes.used
    assert LATE in cluster.kinds
    for name, start, end, node in ran:
        if name.startswith("measure") or name == "late":
            beside = [
                other for other in ran if other[3] == node and other[0] != name and other[1] < end > start < other[2]
            ]
            assert not beside


SCRIPT = """
import sys
from pathlib import Path
from functools import partial
from bitferry.pipeline import interrupt, progress
from bitferry.pipeline.nightly import engine, live
from bitferry.pipeline.nightly.graph import Task
from tests import nightly_tasks

folder = Path(sys.argv[1])
tasks = [Task("c", "c", nightly_tasks.fail, ("boom",), cells=("two",)),
         Task("a", "a", nightly_tasks.stamp, (folder, "a"), cells=("one",)),
         Task("b", "b", nightly_tasks.stamp, (folder, "b"), needs=("a",), whole=True, cells=("one",)),
         Task("d", "d", nightly_tasks.stamp, (folder, "d", 60.0), needs=("b", "a"), whole=True, cells=("three",))]
with interrupt.until_stopped(partial(progress.stage, "matrix")) as stopped, engine.started() as cluster, live.shown(tasks) as show:
    def begun(task, node):
        show.begun(task, node)
        print("begun", task.name, flush=True)
    for done in cluster.execute(tasks, stopped=stopped, begun=begun):
        show(done)
print("over", flush=True)
"""


def test_on_one_machine_it_is_quiet_and_ctrl_c_ends_it(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    ) as running:
        assert running.stdout
        assert running.stderr
        begun = []
        for line in running.stdout:
            begun.append(line)
            if line == "begun d\n" or not running.stdout.readable():
                break
        os.killpg(running.pid, signal.SIGINT)  # as a terminal sends it: to everything that was started
        begun += running.stdout.readlines()
        told = running.stderr.read()
    assert running.returncode == 0, told
    assert begun == ["begun c\n", "begun a\n", "begun b\n", "begun d\n", "over\n"]
    lines = told.splitlines()
    assert [line.split()[0] for line in lines] == ["node", "cell", "cell", "matrix"], told
    assert "two failed: ValueError: boom (1 of 3)" in lines[1]
    assert "one done on" in lines[2]
    assert not (tmp_path / "d").exists()


def test_a_node_with_another_bitferry_is_refused() -> None:
    said: list[str] = []
    made = Nodes(SimpleQueue(), said.append)
    made.asked["n1"] = Listed("n1", 4, 1 << 30, measures=False, kind=None)
    assert made.answer(Answer("n1", nightly_tasks.other_bitferry())) is None
    made.asked["n2"] = Listed("n2", 4, 1 << 30, measures=False, kind=None)
    assert made.answer(Answer("n2", ModuleNotFoundError("No module named 'pipeline'"))) is None
    assert said[0].startswith("elsewhere has another bitferry than this machine, or other versions of what it needs")
    assert "cannot run bitferry and is not used; install it there" in said[1]
    assert set(made.refused) == {"n1", "n2"}


def test_an_address_where_nothing_answers_is_said_in_one_line() -> None:
    for address in ("127.0.0.1:9", "nowhere"):
        with pytest.raises(InputError, match=f"no Ray cluster answers at {address} .*; give the HOST:PORT"):
            ray_session.connect(address)


def test_a_graph_that_cannot_end_is_refused() -> None:
    a = Task("a", "first", nightly_tasks.fail, needs=("b",))
    b = Task("b", "second", nightly_tasks.fail, needs=("a",))
    with pytest.raises(ValueError, match="these tasks need each other: .*first → second|second → first"):
        graph.ordered(graph.unique([a, b]))
    with pytest.raises(ValueError, match="'first' needs the task b, which is not there"):
        graph.ordered(graph.unique([a]))


def test_equal_tasks_are_one_with_the_cells_of_both() -> None:
    one = Task("a", "first", nightly_tasks.fail, cells=("x",))
    (found,) = graph.unique([one, replace(one, cells=("y", "x"))]).values()
    assert found.cells == ("x", "y")


def test_progress_counts_cells_and_estimates_the_rest() -> None:
    build = Task("b", "build", nightly_tasks.fail, cells=("one", "two"))
    tasks = [
        build,
        *(Task(f"m{n}", f"measure {n}", nightly_tasks.fail, cells=(n,), whole=True) for n in ("one", "two")),
    ]
    show = live.Show(tasks)
    show.begun(build, Node("n", "host", SERVER, 2, 1 << 30, measures=False))
    show(Done(build, seconds=2.0))
    assert show.remaining() is None
    show(Done(tasks[1], seconds=8.0))
    assert (show.finished, show.failed) == ({"one"}, set())
    assert show.remaining() is not None
    show(Done(tasks[2], error="ValueError: boom", error_kind="ours"))
    assert (show.finished, show.failed) == ({"one", "two"}, {"two"})
