"""Work in a child process with limits: what it may not use stops it, and its parent goes on."""

import os
import socket
import sys
import time
from pathlib import Path

import pytest

from bitferry.device.errors import InputError
from bitferry.pipeline import confined

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has these limits")
NETWORK = Path("/proc/self/ns/net")
LIMITS = confined.Limits(memory=1 << 28, output=1 << 20, seconds=1)


def endless() -> list[str]:
    while True:
        pass


def greedy() -> list[str]:
    return [str(len(bytearray(1 << 30)))]


def crash() -> list[str]:
    os.abort()


def sleeping() -> list[str]:
    time.sleep(600)
    return []


@pytest.mark.parametrize(
    ("work", "told"),
    [
        (endless, "trying took more than the 1 seconds allowed, so it was stopped"),
        (sleeping, "trying took more than the 1 seconds allowed, so it was stopped"),
        (greedy, r"trying failed \(MemoryError"),
        (crash, "trying broke down in the reader, so it was stopped"),
    ],
)
def test_what_takes_too_much_is_stopped(work: confined.Work, told: str) -> None:
    with pytest.raises(InputError, match=told):
        confined.run(work, "trying", LIMITS)
    assert confined.run(lambda: ["still", "here"], "trying", LIMITS) == ["still", "here"]


def test_a_file_cannot_grow_without_end(tmp_path: Path) -> None:
    def write() -> list[str]:
        (tmp_path / "large").write_bytes(bytes(1 << 22))
        return []

    with pytest.raises(InputError, match="File too large"):
        confined.run(write, "trying", LIMITS)
    assert (tmp_path / "large").stat().st_size <= 1 << 20


def test_there_is_no_network_where_the_kernel_lets_go_of_it() -> None:
    before = NETWORK.readlink()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def call() -> list[str]:
            if NETWORK.readlink() == before:
                return ["kept"]
            socket.create_connection(server.getsockname(), timeout=5)
            return ["reached"]

        try:
            found = confined.run(call, "trying", LIMITS)
        except InputError as error:
            assert "unreachable" in str(error)  # noqa: PT017 - one of two ways
        else:
            assert found == ["kept"]
