"""Archives of bundles → a TUF repository, from which devices take updates and nothing forged, old or mixed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tuf.api.metadata import Root, TargetFile, Targets

from bitferry.device import atomic, update, versions
from bitferry.device.archive import read_head
from bitferry.device.errors import InputError
from bitferry.pipeline import cache
from bitferry.pipeline.shipping import roles
from bitferry.pipeline.shipping.repository import DAYS, Days, Repository, State
from bitferry.pipeline.shipping.roles import ROLES, Role
from bitferry.pipeline.shipping.sign import refuse_unproved

FIELDS = ("name", "target", "version")
"""What a device chooses by."""
CHUNK = 1 << 20


@dataclass(frozen=True)
class Published:
    """What a repository says after a command."""

    repository: Path
    archives: tuple[str, ...]
    """All that devices can choose from."""
    expires: Mapping[Role, datetime]
    created: bool = False

    @property
    def first(self) -> tuple[Role, datetime]:
        """Say which role's signature expires first, and when: from then on devices refuse the repository."""
        return min(self.expires.items(), key=lambda item: item[1])


def run(repository: Path, keys: Path, archive: Path | None, role: str | None) -> Published:
    """Add an archive, replace a role's key, or without either sign anew."""
    if archive is not None and role is not None:
        raise InputError("an archive is published or a key replaced, one at a time")
    if archive is not None:
        return add(repository, keys, archive, read_head(archive).manifest)
    if not (repository / "metadata").is_dir():
        raise InputError(f"{repository} holds no repository; publish an archive there first")
    if role is None:
        return refresh(repository, keys)
    found = next((one for one in ROLES if one == role), None)
    if found is None:
        raise InputError(f"'{role}' is no role of a repository; there are {', '.join(ROLES)}")
    return rotate(repository, keys, found)


def add(repository: Path, keys: Path, archive: Path, manifest: Mapping[str, Any], *, days: Days = DAYS) -> Published:
    """Add an archive to a repository, which is made with four keys where there is none."""
    refuse_unproved(manifest, archive)
    fields = _fields(archive, manifest)
    with _opened(repository, keys) as place:
        root = place.root()
        made = root is None and _create(place, keys, days)
        root, signers = root or _existing(place), roles.load(keys)
        state = place.state(root)
        targets = deepcopy(state.targets) if state else Targets()
        digest = _digest(archive)
        _refuse_another(targets, archive, digest, fields)
        entry = TargetFile(archive.stat().st_size, {"sha256": digest}, archive.name, {"custom": {"bitferry": fields}})
        targets.targets[archive.name] = entry
        _copy(archive, place.targets / f"{digest}.{archive.name}", digest)
        return _published(place, root, place.write(state, targets, [root], signers, days), created=bool(made))


def refresh(repository: Path, keys: Path, *, days: Days = DAYS) -> Published:
    """Sign snapshot and timestamp anew, for devices to know that this is still the newest; needs only their keys."""
    with _opened(repository, keys) as place:
        root = _existing(place)
        state = _filled(place, root)
        return _published(place, root, place.write(state, state.targets, [root], roles.load(keys), days))


def rotate(repository: Path, keys: Path, role: Role = "root", *, days: Days = DAYS) -> Published:
    """Replace a role's key, in a new root that the old and the new root keys sign; devices follow it by themselves.

    What the old key signed is first signed by both, so that devices on either side of the new root can read it.
    """
    with _opened(repository, keys) as place:
        root = _existing(place)
        state = _filled(place, root)
        if root.roles[role].threshold != 1:
            raise InputError(
                f"{repository} asks for {root.roles[role].threshold} keys of {role}; only one is replaced here"
            )
        new = deepcopy(root)
        new.version, new.expires = root.version + 1, days.end("root")
        for keyid in tuple(new.roles[role].keyids):
            new.revoke_key(keyid, role)
        new.add_key(roles.make(keys, f"{role}-{new.version}").public_key, role)
        signers = roles.load(keys)
        if role != "root":
            state = place.write(state, deepcopy(state.targets), [root, new], signers, days)
        place.write_root(new, root, signers)
        return _published(place, new, state)


@contextmanager
def _opened(repository: Path, keys: Path) -> Iterator[Repository]:
    """Hold a repository, for one to write at a time; the lock lies beside it, where nothing is served."""
    folder = repository.resolve()
    if keys.resolve().is_relative_to(folder):
        raise InputError(f"{keys} is inside {repository}, which anyone may read; name a folder outside for the keys")
    place = Repository(folder)
    try:
        if folder.is_dir() and not place.metadata.exists() and any(folder.iterdir()):
            raise InputError(f"{repository} is not empty and no repository; name a new or empty folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with cache.locked(folder.with_name(f".{folder.name}.lock"), "publish"):
            place.sweep()
            yield place
    except OSError as error:
        raise InputError(f"{error.filename or repository} cannot be read or written: {error.strerror}") from error


def _create(place: Repository, keys: Path, days: Days) -> bool:
    root = Root(1, expires=days.end("root"), consistent_snapshot=True)
    for role in ROLES:
        root.add_key(roles.make(keys, role).public_key, role)
    place.write_root(root, None, roles.load(keys))
    return True


def _existing(place: Repository) -> Root:
    root = place.root()
    if root is None:
        raise InputError(f"{place.folder} holds no repository; publish a bundle there first")
    return root


def _filled(place: Repository, root: Root) -> State:
    state = place.state(root)
    if state is None:
        raise InputError(f"{place.folder} holds no bundle yet; publish one there first")
    return state


def _fields(archive: Path, manifest: Mapping[str, Any]) -> dict[str, str]:
    fields = {name: manifest.get(name) for name in FIELDS}
    missing = [name for name, value in fields.items() if not isinstance(value, str) or not value]
    if missing:
        raise InputError(f"{archive} has a manifest without {', '.join(missing)}; build the bundle again")
    if not update.NAME.fullmatch(archive.name):
        raise InputError(f"{archive} cannot be published under its name; rename it as NAME-TARGET-VERSION.tar.gz")
    given = {name: str(value) for name, value in fields.items()}
    versions.order(given["version"])  # devices compare by it
    return given


def _refuse_another(targets: Targets, archive: Path, digest: str, fields: Mapping[str, str]) -> None:
    """Raise InputError where the version is out already: a device that has it would never ask for other contents."""
    for path, entry in targets.targets.items():
        same = path == archive.name or (entry.custom or {}).get("bitferry") == fields
        if same and (path, entry.hashes.get("sha256")) != (archive.name, digest):
            raise InputError(
                f"{fields['name']} {fields['version']} for {fields['target']} is published already, as {path} "
                "with other contents; raise the recipe's version"
            )


def _digest(archive: Path) -> str:
    try:
        return cache.file_hash(archive)
    except OSError as error:
        raise InputError(f"{archive} cannot be read: {error.strerror}") from error


def _copy(archive: Path, place: Path, digest: str) -> None:
    """Bring the archive's bytes to where they are served; raise InputError when they changed meanwhile."""
    part = place.with_name(f".{place.name}.part")
    with archive.open("rb") as source:
        atomic.pour(part, iter(lambda: source.read(CHUNK), b""))
    if cache.file_hash(part) != digest:
        part.unlink()
        raise InputError(f"{archive} changed while it was published; publish it again")
    part.replace(place)
    atomic.settle(place.parent)


def _published(place: Repository, root: Root, state: State, *, created: bool = False) -> Published:
    expires: dict[Role, datetime] = {
        "root": root.expires,
        "targets": state.targets.expires,
        "snapshot": state.snapshot.expires,
        "timestamp": state.timestamp.expires,
    }
    return Published(place.folder, tuple(sorted(state.targets.targets)), expires, created)
