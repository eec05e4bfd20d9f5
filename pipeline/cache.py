"""Keep each stage's output under build/<recipe>/<stage>-<key>/: whole or not at all, never a failure."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from bitferry.device import atomic
from bitferry.device.errors import InputError
from bitferry.pipeline import failing, interrupt, progress

if TYPE_CHECKING:
    from bitferry.pipeline.nightly.store import Store

MARK = ".bitferry"
MARK_TEXT = "This folder belongs to bitferry; it may replace what is in it.\n"


def key(stage: str, *, code: str | Path, packages: tuple[str, ...] = (), **inputs: object) -> str:
    """Hash what a stage's output depends on: its inputs, the versions of its tools and its own source file."""
    parts = {
        "stage": stage,
        "code": file_hash(Path(code)),
        "packages": {name: version(name) for name in packages},
        "inputs": inputs,
    }
    text = json.dumps(parts, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """Hash a file's bytes with sha256."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a cache key cannot hold {value!r}")


def own(folder: Path) -> None:
    """Make `folder`, or make sure that it is bitferry's; raise InputError when it holds anything else."""
    try:
        # The mark is looked for last: another run that begins here just now writes it before anything else.
        if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).exists():
            raise InputError(
                f"{folder} is not empty and bitferry did not make it; "
                "name a new or empty folder, or one that an earlier run made"
            )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARK).write_text(MARK_TEXT)
    except OSError as error:
        raise InputError(f"{folder} cannot be written to ({error.strerror}); name another folder") from error


def publish(temporary: Path, final: Path) -> None:
    """Rename a finished folder into place, its bytes on disk first, replacing an older one."""
    for path in sorted(temporary.rglob("*")):
        if path.is_file():
            with path.open("rb+") as stream:
                os.fsync(stream.fileno())
    atomic.publish(temporary, final, _aside(final))


def recover(final: Path) -> None:
    """Bring back a folder that `publish` had put aside when it was killed, where the system cannot exchange two."""
    atomic.recover(final, _aside(final))


def _aside(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


@contextmanager
def locked(path: Path, stage: str) -> Iterator[None]:
    """Hold a lock file, saying so when another run holds it."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=1)
    except Timeout:
        progress.stage(stage, "waits for another run")
        interrupt.check()
        with interrupt.waiting(stage):
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@dataclass(frozen=True)
class Cache:
    """The build folder of one recipe."""

    root: Path
    store: "Store | None" = None
    """Where what this machine does not have may be, and goes."""

    def folder(self, stage: str, key: str, make: Callable[[Path], None], *, of: str = "") -> Path:
        """Return the stage's folder, calling `make` with an empty one to fill if this key was never made.

        `of` says of what, for the line on stderr.

        A killed run leaves only a hidden folder and a lock, which the next one throws away. Two runs at once wait
        for each other here.
        """
        final = self.root / f"{stage}-{key}"
        lock = self.root / f".{final.name}.lock"
        own(self.root)
        with locked(lock, stage):
            if final.is_dir():
                progress.stage(stage, f"{of} reused from {final}".strip())
            else:
                self._fill(final, make, stage, of)
            # Who waits for the removed file finds the folder made; a failure, after which it is not, keeps the file.
            with suppress(OSError):
                lock.unlink()
        return final

    def _fill(self, final: Path, make: Callable[[Path], None], stage: str, of: str) -> None:
        """Fetch the folder from the store, or make it and put it there."""
        temporary = final.with_name(f".{final.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        with _removed_on_failure(temporary):
            fetched = self.store is not None and self.store.get_folder(final.name, temporary)
            if self.store and fetched:
                progress.stage(stage, f"{of} fetched from {self.store.url}".strip())
            else:
                with progress.timed(stage, of), failing.stage(stage, of):
                    make(temporary)
        publish(temporary, final)
        if self.store and not fetched:
            self.store.put_folder(final.name, final)
