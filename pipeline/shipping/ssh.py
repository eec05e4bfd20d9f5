"""Commands and files on another machine, over this system's OpenSSH: no password asked, no endless wait."""

import re
import shlex
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from bitferry.device.errors import InputError, StageFailed, TargetUnavailable, first_line
from bitferry.pipeline import interrupt, progress

CONNECT_SECONDS = 15
OPTIONS = (
    "-T", "-x", "-a", "-oBatchMode=yes", f"-oConnectTimeout={CONNECT_SECONDS}", "-oServerAliveInterval=5",
    "-oServerAliveCountMax=6", "-oClearAllForwardings=yes", "-oRemoteCommand=none",
)  # fmt: skip
"""After the user's own, which win: ssh takes the first value it is given."""
STEP_SECONDS = 120
"""For a small step, connecting included."""
SLOWEST_BYTES = 50_000
"""Per second; a slower copy is given up."""
NOWHERE = (
    "could not resolve hostname", "connection refused", "timed out", "no route to host", "network is unreachable",
    "connection closed", "connection reset", "broken pipe", "not responding",
)  # fmt: skip
FULL = "No space left on device"
UNPACK = """
import sys, tarfile
safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
try:
    with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as files:
        files.extractall(sys.argv[1], **safe)
except OSError as error:
    sys.exit("error: " + (error.strerror or str(error)))
"""


@dataclass(frozen=True)
class Done:
    """How a command on the other machine ended."""

    code: int
    out: bytes
    told: str
    """What it, or ssh, wrote to stderr."""

    @property
    def last_line(self) -> str:
        """Give the last line it printed; a login shell may have printed others before."""
        lines = self.out.decode(errors="replace").strip().splitlines()
        return _printable(lines[-1]) if lines else ""

    @property
    def error(self) -> str | None:
        """Give what a bundle's program says is wrong; a runtime may print more as it ends."""
        found = (line.removeprefix("error: ") for line in self.told.splitlines() if line.startswith("error: "))
        return next(map(_printable, found), None)

    @property
    def why(self) -> str:
        """Give the last line of stderr, which is where Python and ssh say what is wrong."""
        lines = [line.strip() for line in self.told.splitlines() if line.strip()]
        return _printable(lines[-1]) if lines else f"exit code {self.code}"


@dataclass(frozen=True)
class Login:
    """How another machine is reached, as `ssh` takes it."""

    host: str
    ssh: Sequence[str] = ("ssh",)

    def __post_init__(self) -> None:
        """Raise InputError for what ssh would take for an option, or for two words."""
        if not re.fullmatch(r"(?:[^\s@-][^\s@]*@)?[^\s@-][^\s@]*", self.host):
            raise InputError(f"--host {self.host!r} is no machine; write it as ssh takes it, as in pi@192.168.1.20")
        if not self.ssh:
            raise InputError("the ssh command is empty; write it as in --ssh 'ssh -p 2222'")

    def run(
        self,
        script: str,
        *,
        seconds: float = STEP_SECONDS,
        given: IO[bytes] | None = None,
        into: IO[bytes] | None = None,
    ) -> Done:
        """Run a shell script there; raise TargetUnavailable where the machine cannot be reached or lets nobody in."""
        words = [*self.ssh, *OPTIONS, "--", self.host, f"exec sh -c {shlex.quote(script)}"]
        try:
            with interrupt.waiting(self.host):
                done = subprocess.run(
                    words,
                    stdin=given or subprocess.DEVNULL,
                    stdout=into or subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    timeout=seconds,
                    check=False,
                )
        except subprocess.TimeoutExpired:
            raise StageFailed(
                f"{self.host} was not done within {seconds:.0f} s; it or the way to it is stuck"
            ) from None
        except OSError as error:
            raise TargetUnavailable(
                f"{self.ssh[0]} cannot be run ({error.strerror}); install OpenSSH's client, or name yours by --ssh"
            ) from error
        told = done.stderr.decode(errors="replace")
        if done.returncode == 255:  # ssh's own
            raise TargetUnavailable(self._unreached(told))
        return Done(done.returncode, done.stdout or b"", told)

    def _unreached(self, told: str) -> str:
        lower, host = told.lower(), self.host
        said = Done(255, b"", told).why
        if "remote host identification has changed" in lower:
            return (
                f"{host} shows another host key than the one known for it: it was set up anew, or it is another "
                f"machine; if you know why, forget the old key with `ssh-keygen -R {host.rpartition('@')[2]}`"
            )
        if "host key verification failed" in lower:
            return f"the host key of {host} is not known here; run `ssh {host}` once, compare the key, and accept it"
        if "permission denied" in lower or "too many authentication failures" in lower:
            return (
                f"{host} lets nobody in with the keys at hand ({said}); put your key there with `ssh-copy-id {host}`, "
                "or name one by --ssh 'ssh -i KEY' (a password is never asked for)"
            )
        if any(words in lower for words in NOWHERE):
            return f"{host} cannot be reached ({said}); is it on, is the name right, does `ssh {host}` work?"
        return f"ssh to {host} failed: {said}"


@dataclass(frozen=True)
class Device:
    """A machine with Python, and what is done on it."""

    login: Login
    python: str = "python3"

    def __post_init__(self) -> None:
        """Raise InputError for what is no program."""
        if not self.python or self.python.startswith("-") or not self.python.isprintable():
            raise InputError(f"--python {self.python!r} is no program; name one as in /home/pi/venv/bin/python")

    @property
    def interpreter(self) -> str:
        """Give Python as the shell there takes it; `~/` stays the home folder."""
        if self.python.startswith("~/"):
            return f'"$HOME"/{shlex.quote(self.python[2:])}'
        return shlex.quote(self.python)

    @contextmanager
    def folder(self) -> Iterator[PurePosixPath]:
        """Make a folder there that is gone afterwards, with whatever still runs in it."""
        done = self.login.run('LC_ALL=C exec mktemp -d "${TMPDIR:-/tmp}/bitferry.XXXXXX"')
        if done.code or not done.last_line.startswith("/"):
            self.refuse_full(done, "its folder for temporary files")
            raise StageFailed(f"no temporary folder can be made on {self.login.host}: {done.why}")
        made = PurePosixPath(done.last_line)
        try:
            yield made
        finally:
            self._remove(made)

    def send(self, files: Mapping[str, Path], folder: PurePosixPath) -> None:
        """Copy files into a folder there, by the names given to them."""
        with tempfile.TemporaryFile() as packed:
            with tarfile.open(fileobj=packed, mode="w") as archive:
                for name, path in files.items():
                    with path.open("rb") as content:
                        entry = tarfile.TarInfo(name)
                        entry.size = path.stat().st_size
                        archive.addfile(entry, content)
            size = packed.tell()
            packed.seek(0)
            script = f"exec {self.interpreter} -I -c {shlex.quote(UNPACK)} {shlex.quote(str(folder))}"
            done = self.login.run(script, seconds=STEP_SECONDS + size / SLOWEST_BYTES, given=packed)
        if done.code:
            self.refuse_full(done, str(folder), size)
            raise StageFailed(f"the files could not be copied to {self.login.host}: {done.why}")

    def fetch(self, path: PurePosixPath, to: Path, *, size: int) -> None:
        """Copy a file from there, which is about `size` bytes large."""
        with to.open("wb") as file:
            seconds = STEP_SECONDS + size / SLOWEST_BYTES
            done = self.login.run(f"exec cat {shlex.quote(str(path))}", seconds=seconds, into=file)
        if done.code:
            raise StageFailed(f"{path.name} could not be copied from {self.login.host}: {done.why}")

    def call(self, folder: PurePosixPath, arguments: Sequence[str], *, seconds: float) -> Done:
        """Run Python in a folder there; its process is written down for `folder` to end should we be stopped.

        What a runtime writes into the folder of temporary files (ONNX Runtime does) goes away with this one.
        """
        words = shlex.join(arguments)
        return self.login.run(
            f'cd {shlex.quote(str(folder))} || exit 1\nexport TMPDIR="$PWD"\n'
            f"{self.interpreter} {words} & echo $! > pid; wait $!; code=$?; rm -f pid; exit $code",
            seconds=seconds,
        )

    def refuse_full(self, done: Done, place: str, size: int | None = None) -> None:
        """Raise TargetUnavailable where the other machine's disk is full."""
        if FULL in done.told or "Disk quota exceeded" in done.told:
            wanted = f" for {size / 1e6:.1f} MB" if size else ""
            raise TargetUnavailable(
                f"no space left on {self.login.host}{wanted} in {place}; free some, or set TMPDIR for its logins to a "
                "folder that has more"
            )

    def _remove(self, folder: PurePosixPath) -> None:
        place = shlex.quote(str(folder))
        script = f"pid=$(cat {place}/pid 2>/dev/null) && kill $pid 2>/dev/null; exec rm -rf {place}"
        try:
            done = self.login.run(script)
            fault = done.why if done.code else None
        except (StageFailed, TargetUnavailable) as error:
            fault = first_line(error)
        if fault:
            progress.stage("verify", f"{folder} stays on {self.login.host}: {fault}")


def command(text: str) -> tuple[str, ...]:
    """Split an ssh command as a shell would, as in `ssh -p 2222 -i key`."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise InputError(f"--ssh {text!r} is no command: {first_line(error).lower()}") from error


def _printable(line: str) -> str:
    """Take out what would steer the terminal that it is shown on."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line)
