"""Another machine to try bundles on: an sshd of this user's own on loopback, and a Python without torch."""

import os
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bitferry.device.errors import BitferryError

if TYPE_CHECKING:
    from bitferry.pipeline.recheck import Recheck

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin:/sbin")
DAEMON = """
Port {port}
ListenAddress 127.0.0.1
HostKey "{folder}/host"
AuthorizedKeysFile "{folder}/authorized_keys"
PidFile none
UsePAM no
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
MaxStartups 100
SetEnv "TMPDIR={temporary}"
"""
CLIENT = """
Host board
  HostName 127.0.0.1
  Port {port}
  User {user}
  IdentityFile "{folder}/key"
  IdentitiesOnly yes
  UserKnownHostsFile "{folder}/known"
  GlobalKnownHostsFile /dev/null
Host nowhere
  HostName 127.0.0.1
  Port 1
"""


@dataclass(frozen=True)
class Board:
    """The other machine: how it is reached, its Python, and where its temporary files lie."""

    ssh: tuple[str, ...]
    folder: Path
    temporary: Path
    python: str

    def verify(self, bundle: Path, data: Path | None = None, python: str | None = None) -> "Recheck":
        """Verify a bundle there; nothing may be left behind, whatever comes of it."""
        from bitferry.pipeline.shipping import remote  # noqa: PLC0415 - imports torch

        try:
            return remote.verify(bundle, "board", data, python=python or self.python, effort="quick", ssh=self.ssh)
        finally:
            assert not list(self.temporary.iterdir())

    def refused(self, kind: type[BitferryError], bundle: Path, python: str | None = None) -> str:
        """Verify what must be refused; give the message."""
        with pytest.raises(kind) as refusal:
            self.verify(bundle, python=python)
        assert "\n" not in str(refusal.value)
        return str(refusal.value)

    def program(self, name: str, script: str) -> str:
        """Write a shell script that stands where Python is looked for."""
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return str(path)


def keygen(path: Path) -> str:
    """Make a key pair; give the public one."""
    path.unlink(missing_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True, stdin=subprocess.DEVNULL)
    return path.with_suffix(".pub").read_text()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    """An sshd of this user's own."""
    if SSHD is None:
        assert os.environ.get("REQUIRE_SSHD") != "1", "REQUIRE_SSHD=1, but there is no sshd"
        pytest.skip("no sshd (the package openssh-server)")
    folder = tmp_path_factory.mktemp("sshd")
    temporary = folder / "a device's temporary files"
    temporary.mkdir()
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where it locks itself in before somebody has logged in
    port, host_key = free_port(), keygen(folder / "host")
    (folder / "authorized_keys").write_text(keygen(folder / "key"))
    (folder / "known").write_text(f"[127.0.0.1]:{port} {host_key}")
    (folder / "daemon").write_text(DAEMON.format(port=port, folder=folder, temporary=temporary))
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    (folder / "client").write_text(CLIENT.format(port=port, folder=folder, user=user))
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "daemon"], stderr=log)
        try:
            await_listening(port, server, folder / "log")
            yield Board(("ssh", "-F", str(folder / "client")), folder, temporary, "")
        finally:
            server.terminate()
            server.wait()


def await_listening(port: int, server: "subprocess.Popen[bytes]", log: Path) -> None:
    for _ in range(200):
        assert server.poll() is None, log.read_text()
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(log.read_text())


@pytest.fixture
def board(sshd: Board, bare: Path) -> Board:
    """The other machine; its Python has the runtimes and lies where names have spaces and quotes."""
    (sshd.folder / "it's a venv").mkdir(exist_ok=True)
    python = sshd.program("it's a venv/python", f'exec {shlex.quote(str(bare))} "$@"')
    return Board(sshd.ssh, sshd.folder, sshd.temporary, python)
