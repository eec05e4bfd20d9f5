"""The signed files of a TUF repository: read back and verified, and written in an order that a kill cannot spoil."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, Targets, Timestamp

from bitferry.device import atomic
from bitferry.device.errors import InputError, first_line
from bitferry.pipeline.shipping import roles
from bitferry.pipeline.shipping.roles import ROLES, Role, Signers

S = TypeVar("S", Root, Targets, Snapshot, Timestamp)


@dataclass(frozen=True)
class Days:
    """How long each role's signature holds; clients refuse what is older."""

    root: int = 365
    targets: int = 365
    snapshot: int = 30
    timestamp: int = 30

    def __post_init__(self) -> None:
        for role in ROLES:
            if getattr(self, role) < 1:
                raise InputError(f"a signature of {role} cannot hold {getattr(self, role)} days; give 1 or more")

    def end(self, role: Role) -> datetime:
        """Say when a signature that is made now expires."""
        try:
            return datetime.now(UTC).replace(microsecond=0) + timedelta(days=getattr(self, role))
        except OverflowError:
            raise InputError(f"a signature of {role} cannot hold {getattr(self, role)} days; give fewer") from None


DAYS = Days()


@dataclass(frozen=True)
class State:
    """What a repository says now."""

    targets: Targets
    snapshot: Snapshot
    timestamp: Timestamp


class Repository:
    """REPOSITORY/metadata and REPOSITORY/targets, static files that any web server can host."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metadata = folder / "metadata"
        self.targets = folder / "targets"

    def root(self) -> Root | None:
        """Read the newest root, signed as it and the one before it ask; None where there is none yet."""
        version = self._last("root")
        if not version:
            return None
        newest = self._read(self._place("root", version), Root)
        before = self._place("root", version - 1)
        judges = [newest.signed, *([self._read(before, Root).signed] if version > 1 else [])]
        for judge in judges:
            self._verify(newest, "root", judge)
        return newest.signed

    def state(self, root: Root) -> State | None:
        """Read what the timestamp points to, every file verified; None before there is a timestamp.

        What is not signed by this repository's keys must not be signed anew, however it came there.
        """
        path = self.metadata / "timestamp.json"
        if not path.exists():
            return None
        timestamp = self._read(path, Timestamp)
        self._verify(timestamp, "timestamp", root)
        snapshot = self._pointed("snapshot", timestamp.signed.snapshot_meta, Snapshot, root)
        targets = self._pointed("targets", snapshot.meta["targets.json"], Targets, root)
        return State(targets, snapshot, timestamp.signed)

    def write_root(self, root: Root, before: Root | None, signers: Signers) -> None:
        """Write N.root.json, signed for those who trust it and those who trust the one before, and root.json."""
        judges = {str(self._place("root", judge.version)): judge for judge in (before, root) if judge}
        metadata = Metadata(root)
        roles.sign(metadata, "root", judges, signers)
        self._write("root", root.version, metadata.to_bytes())

    def write(self, state: State | None, targets: Targets, roots: list[Root], signers: Signers, days: Days) -> State:
        """Sign the next snapshot and timestamp, and `targets` unless they are the state's; a pointer is written last.

        Versions that a killed run used are skipped: a client may have seen the timestamp that named them.
        """
        judges = {str(self._place("root", root.version)): root for root in roots}
        files: list[tuple[Role, int, bytes]] = []
        snapshot = Snapshot(self._last("snapshot") + 1, expires=days.end("snapshot"), meta={})
        if state is not None:
            snapshot.version = max(snapshot.version, state.timestamp.version + 1)
            snapshot.meta = dict(state.snapshot.meta)
        if state is None or targets is not state.targets:
            targets.version, targets.expires = self._last("targets") + 1, days.end("targets")
            files.append(("targets", targets.version, _signed(targets, "targets", judges, signers)))
            snapshot.meta["targets.json"] = MetaFile.from_data(targets.version, files[-1][2], ["sha256"])
        files.append(("snapshot", snapshot.version, _signed(snapshot, "snapshot", judges, signers)))
        # The same number for both: one of its own could be lost with timestamp.json in a power cut, and used twice.
        timestamp = Timestamp(snapshot.version, expires=days.end("timestamp"))
        timestamp.snapshot_meta = MetaFile.from_data(snapshot.version, files[-1][2], ["sha256"])
        last = _signed(timestamp, "timestamp", judges, signers)
        for file in files:
            self._write(*file)
        atomic.write(self.metadata / "timestamp.json", last)
        return State(targets, snapshot, timestamp)

    def sweep(self) -> None:
        """Make the folders, throw away what a killed run left half-written, and finish its root.json."""
        for folder in (self.metadata, self.targets):
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob(".*.part"):
                path.unlink()
        newest, copy = self._place("root", self._last("root")), self.metadata / "root.json"
        if newest.exists() and (not copy.exists() or copy.read_bytes() != newest.read_bytes()):
            atomic.write(copy, newest.read_bytes())

    def _write(self, role: Role, version: int, content: bytes) -> None:
        atomic.write(self._place(role, version), content)
        atomic.write(self.metadata / f"{role}.json", content)

    def _place(self, role: Role, version: int) -> Path:
        return self.metadata / f"{version}.{role}.json"

    def _last(self, role: Role) -> int:
        numbers = [path.name.partition(".")[0] for path in self.metadata.glob(f"*.{role}.json")]
        return max((int(number) for number in numbers if number.isdecimal()), default=0)

    def _pointed(self, role: Role, entry: MetaFile, kind: type[S], root: Root) -> S:
        path = self._place(role, entry.version)
        metadata = self._read(path, kind)
        try:
            entry.verify_length_and_hashes(path.read_bytes())
        except RepositoryError as error:
            raise _foreign(path, error) from error
        self._verify(metadata, role, root)
        return metadata.signed

    def _read(self, path: Path, kind: type[S]) -> Metadata[S]:
        try:
            metadata = Metadata[S].from_bytes(path.read_bytes())
        except (OSError, RepositoryError) as error:
            raise InputError(f"{path} cannot be read: {first_line(error)}; bring it back from a copy") from error
        if not isinstance(metadata.signed, kind):
            raise InputError(f"{path} is signed as {metadata.signed.type}; bring it back from a copy")
        return metadata

    def _verify(self, metadata: Metadata[S], role: Role, root: Root) -> None:
        try:
            root.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
        except RepositoryError as error:
            raise _foreign(self.metadata / f"{role}.json", error) from error


def _signed(signed: S, role: Role, judges: Mapping[str, Root], signers: Signers) -> bytes:
    metadata = Metadata(signed)
    roles.sign(metadata, role, judges, signers)
    return metadata.to_bytes()


def _foreign(path: Path, error: RepositoryError) -> InputError:
    return InputError(
        f"{path} is not what this repository's keys signed ({first_line(error)}); "
        "nothing was signed; bring the folder back from a copy"
    )
