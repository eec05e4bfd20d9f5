"""Artifacts by the hash of their content in a shared folder or an object store, for nodes that share no disk."""

# fsspec's file systems take long to import, and only a matrix on several nodes needs them.
# ruff: noqa: PLC0415

import hashlib
import json
import shutil
import tarfile
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING

from bitferry.device.errors import BitferryError, InputError, TargetUnavailable, first_line
from bitferry.pipeline import progress

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

RENAMING = {"file", "local", "sftp", "ssh", "smb", "hdfs", "memory"}
"""Where a file can be seen half written, and so is renamed into place; object stores show it whole or not at all."""
PART = 1 << 20
REFRESH = timedelta(days=1)
"""What was last used longer ago than this is marked as used again, for `prune` to leave it."""


@dataclass(frozen=True)
class Pointer:
    """Which object a name stands for."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Store:
    """A place that fsspec knows by its URL, as `file:///mnt/bitferry` or `s3://bucket/bitferry`, or a plain path.

    `objects/<sha256>` holds content, `stages/<name>` says which. What cannot be reached raises InputError, a kind of
    place whose Python package is missing TargetUnavailable.
    """

    url: str

    @cached_property
    def _place(self) -> tuple["AbstractFileSystem", str]:
        from fsspec.core import url_to_fs

        try:
            files, root = url_to_fs(self.url)
        except ImportError as error:
            raise TargetUnavailable(f"the store {self.url} needs a Python package: {first_line(error)}") from error
        except ValueError as error:
            raise InputError(f"'{self.url}' is no folder and no URL that fsspec knows: {first_line(error)}") from error
        with self._reached():
            for folder in ("objects", "stages"):
                files.makedirs(f"{root}/{folder}", exist_ok=True)
        return files, str(root)

    def has(self, name: str) -> bool:
        """Say whether something goes by this name."""
        files, root = self._place
        with self._reached():
            pointer = self._pointer(name)
            return pointer is not None and bool(files.exists(f"{root}/objects/{pointer.sha256}"))

    def put_folder(self, name: str, folder: Path) -> str:
        """Keep the files of a folder under a name; give their hash. Equal folders are kept once."""
        with tempfile.TemporaryFile() as stream:
            _pack(folder, stream)
            return self._put(name, stream)

    def get_folder(self, name: str, into: Path) -> bool:
        """Fill an empty folder with what goes by a name; False where nothing does, or its content was damaged."""
        with self._got(name) as stream:
            if stream is None:
                return False
            _unpack(stream, into, f"'{name}' in the store {self.url}")
        return True

    def put_bytes(self, name: str, content: bytes) -> str:
        """Keep a few bytes under a name; give their hash."""
        with tempfile.TemporaryFile() as stream:
            stream.write(content)
            return self._put(name, stream)

    def get_bytes(self, name: str) -> bytes | None:
        """Give what `put_bytes` kept; None where nothing goes by this name."""
        with self._got(name) as stream:
            return None if stream is None else stream.read()

    def prune(self, keep_days: float) -> int:
        """Remove what was neither put nor used for so many days; give the bytes that this freed."""
        files, root = self._place
        before, freed = datetime.now(UTC) - timedelta(days=keep_days), 0
        with self._reached():
            for path in files.ls(f"{root}/stages", detail=False):
                if self._modified(path) < before:
                    files.rm_file(path)
            names = [PurePosixPath(path).name for path in files.ls(f"{root}/stages", detail=False)]
            named = {found.sha256 for found in map(self._pointer, names) if found}
            for path in files.ls(f"{root}/objects", detail=False):
                # the age, as a node may have put an object whose name is yet to come
                if PurePosixPath(path).name not in named and self._modified(path) < before:
                    freed += files.size(path) or 0
                    files.rm_file(path)
        return freed

    def _put(self, name: str, stream: IO[bytes]) -> str:
        files, root = self._place
        stream.seek(0)
        parts = hashlib.sha256()
        while part := stream.read(PART):
            parts.update(part)
        digest = parts.hexdigest()
        with self._reached():
            if not files.exists(f"{root}/objects/{digest}"):
                stream.seek(0)
                self._write(f"{root}/objects/{digest}", lambda to: shutil.copyfileobj(stream, to, PART))
            size = stream.seek(0, 2)
            self._point(name, Pointer(digest, size))
        return digest

    def _point(self, name: str, pointer: Pointer) -> None:
        text = json.dumps({"sha256": pointer.sha256, "size": pointer.size}) + "\n"
        self._write(f"{self._place[1]}/stages/{_plain(name)}", lambda to: to.write(text.encode()))

    def _pointer(self, name: str) -> Pointer | None:
        files, root = self._place
        try:
            found = json.loads(files.cat_file(f"{root}/stages/{_plain(name)}"))
            return Pointer(found["sha256"], found["size"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # not there, or damaged: it is made anew
            return None

    @contextmanager
    def _got(self, name: str) -> Iterator[IO[bytes] | None]:
        """Fetch an object into a local file, its hash checked."""
        _, root = self._place
        with tempfile.TemporaryFile() as stream:
            with self._reached():
                pointer = self._pointer(name)
                whole = pointer is not None and self._fetch(pointer, stream)
                if pointer and whole and self._modified(f"{root}/stages/{name}") < datetime.now(UTC) - REFRESH:
                    self._point(name, pointer)
            stream.seek(0)
            yield stream if whole else None

    def _fetch(self, pointer: Pointer, stream: IO[bytes]) -> bool:
        files, root = self._place
        path = f"{root}/objects/{pointer.sha256}"
        digest = hashlib.sha256()
        try:
            with files.open(path, "rb") as source:
                while part := source.read(PART):
                    digest.update(part)
                    stream.write(part)
        except FileNotFoundError:  # pruned
            return False
        if digest.hexdigest() != pointer.sha256:
            progress.stage("store", f"{path} is damaged and is made anew")
            files.rm_file(path)
            return False
        return True

    def _write(self, path: str, fill: Callable[[IO[bytes]], object]) -> None:
        """Write a file that nobody sees before it is whole; who writes the same at once writes the same bytes."""
        files, _ = self._place
        protocol = files.protocol if isinstance(files.protocol, str) else files.protocol[0]
        final = path if protocol not in RENAMING else f"{path}.{uuid.uuid4().hex}.part"
        with files.open(final, "wb") as stream:
            fill(stream)
        if final != path:
            files.mv(final, path)

    def _modified(self, path: str) -> datetime:
        files, _ = self._place
        found: datetime = files.modified(path)
        return found if found.tzinfo else found.replace(tzinfo=UTC)

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except BitferryError:
            raise
        except Exception as error:  # each file system has errors of its own
            raise InputError(f"the store {self.url} cannot be used: {first_line(error)}") from error


def _plain(name: str) -> str:
    if not name or PurePosixPath(name).name != name or name.startswith("."):
        raise ValueError(f"'{name}' is no name for a store")
    return name


def _pack(folder: Path, stream: IO[bytes]) -> None:
    """Write a tar of a folder that depends on names and bytes only, not on times, owners or order on disk."""
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise InputError(f"{path} is neither a file nor a folder; the store takes nothing else")
            member = tarfile.TarInfo(path.relative_to(folder).as_posix())
            member.type, member.mode = (tarfile.DIRTYPE, 0o755) if path.is_dir() else (tarfile.REGTYPE, 0o644)
            if path.is_dir():
                tar.addfile(member)
                continue
            member.size = path.stat().st_size
            with path.open("rb") as content:
                tar.addfile(member, content)


def _unpack(stream: IO[bytes], into: Path, what: str) -> None:
    """Unpack files and folders; raise InputError for links, devices and names that lead out."""
    into.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if not (member.isreg() or member.isdir()) or path.is_absolute() or ".." in path.parts:
                    raise InputError(f"{what} holds '{member.name}', which is no plain file or folder; it is not used")
                tar.extract(member, into, filter="data")
    except tarfile.TarError as error:
        raise InputError(f"{what} is no folder: {first_line(error)}") from error
