"""Ray itself: started or joined quietly, its nodes listed, functions sent to a node, its errors sorted."""

# Ray takes seconds to import and is an extra.
# ruff: noqa: PLC0415

import logging
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bitferry.device.errors import InputError, StageFailed, TargetUnavailable, first_line
from bitferry.device.machine import usable_cpus

if TYPE_CHECKING:
    from threading import Event

    from ray import ObjectRef
    from ray._private.worker import Worker
    from ray.remote_function import RemoteFunction

MEASURES = "bitferry_measure"
"""The resource that keeps measurements to the nodes that advertise it."""
KIND = "bitferry-kind"
"""The label that names a node's kind where its processor and GPU do not tell it apart, as a board's."""
CONNECT_SECONDS = 10.0
OBJECT_STORE = 256 << 20
"""Bytes; only verdicts and timings go through it, never artifacts."""
CALLS = 25
"""Tasks after which a process is replaced, for what compilers leak."""
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # else everything else on the machine goes before a measurement
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else a task sees no GPU unless Ray hands it out
}
INSTALL = "pip install 'bitferry[nightly]'"
SOURCES = Path(__file__).parents[3]

Fault = Literal["ours", "node", "process", "memory"]


@dataclass(frozen=True)
class Listed:
    """A node as Ray lists it."""

    id: str
    cpus: float
    memory_bytes: int
    measures: bool
    kind: str | None
    """The label, where it has one."""


def connect(address: str | None) -> None:
    """Start Ray on this machine, or join the cluster at HOST:PORT, or with `auto` the one that runs on this machine.

    Raises TargetUnavailable without Ray, InputError where no cluster answers, StageFailed where Ray does not start.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        from ray._private import worker
    except ModuleNotFoundError as error:
        raise TargetUnavailable(f"the matrix needs the Python package 'ray'; install it (`{INSTALL}`)") from error
    worker.listen_error_messages = _unheard
    if address is None:
        with _importable():
            _start()
        return
    try:
        if address != "auto":
            host, _, port = address.rpartition(":")
            # Ray itself would wait for minutes
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        ray.init(address, runtime_env={"env_vars": SETTINGS}, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"no Ray cluster answers at {address} ({first_line(error)}); "
            "give the HOST:PORT that `ray start --head` printed, with the same versions of Ray and Python"
        ) from error


def _start() -> None:
    """Start Ray here, twice where it is too slow: it gives up after 30 s, and files that were read once are quick."""
    import ray

    home = Path.home()
    if not (home.is_dir() and os.access(home, os.W_OK)):  # else Ray keeps the token of this cluster there
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))
    for last in (False, True):
        try:
            ray.init(
                "local",
                num_cpus=usable_cpus(),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except Exception as error:
            ray.shutdown()
            if last:
                raise StageFailed(f"Ray did not start on this machine: {first_line(error)}") from error
        else:
            return


def disconnect() -> None:
    """Leave the cluster, and end it where it was started here."""
    import ray

    ray.shutdown()


def listed() -> list[Listed]:
    """List the nodes that are alive and have CPUs."""
    import ray

    nodes: Callable[[], list[dict[str, Any]]] = ray.nodes
    alive = [(node, node["Resources"]) for node in nodes() if node["Alive"]]
    return [
        Listed(node["NodeID"], has["CPU"], int(has["memory"]), has.get(MEASURES, 0) >= 1, node["Labels"].get(KIND))
        for node, has in alive
        if has.get("CPU")
    ]


def send(
    function: Callable[..., object],
    arguments: tuple[object, ...],
    ended: Callable[[object], None],
    *,
    node: str,
    cpus: float = 0,
    memory_bytes: int = 0,
    alone: bool = False,
) -> "ObjectRef[object]":
    """Run a function on a node, once; another thread calls `ended` with its result or with Ray's error."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    chosen = _remote(function, CALLS).options(
        num_cpus=cpus,
        memory=memory_bytes or None,
        resources={MEASURES: 1} if alone else None,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    )
    reference: ObjectRef[object] = chosen.remote(*arguments)
    reference.future().add_done_callback(lambda future: ended(future.exception() or future.result()))
    return reference


@lru_cache
def _remote(function: Callable[..., object], calls: int) -> "RemoteFunction":
    """Make a function Ray's, once: each time would send it to the nodes again."""
    import ray

    made: RemoteFunction = ray.remote(max_retries=0, max_calls=calls)(function)
    return made


def cancel(reference: "ObjectRef[object]") -> None:
    """Kill the process that works on what was sent."""
    import ray

    ray.cancel(reference, force=True)


def fault(error: BaseException) -> Fault:
    """Say what ended an attempt: the task's own error, or the death of its node or process, or too little memory."""
    from ray import exceptions

    if isinstance(error, exceptions.OutOfMemoryError):
        return "memory"
    if isinstance(error, exceptions.NodeDiedError | exceptions.TaskUnschedulableError):
        return "node"
    lost = isinstance(error, exceptions.RayError) and not isinstance(error, exceptions.RayTaskError)
    return "process" if lost else "ours"


def packed(value: object) -> bytes:
    """Pickle a function with its arguments, by reference where it can be imported."""
    from ray import cloudpickle

    pickle: Callable[[object], bytes] = cloudpickle.dumps
    return pickle(value)


def unpacked(content: bytes) -> tuple[Callable[..., object], tuple[object, ...]]:
    """Give back the function and the arguments."""
    from ray import cloudpickle

    function, arguments = cloudpickle.loads(content)
    return function, arguments


def _unheard(worker: "Worker", threads_stopped: "Event") -> None:
    """Listen to nothing: Ray prints what its daemons say on stdout otherwise, and the same is in its logs."""


@contextmanager
def _importable() -> Iterator[None]:
    """Let Ray's processes find this very bitferry, which a checkout need not have installed."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(SOURCES), *([before] if before else [])])
    try:
        yield
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before
