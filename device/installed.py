"""What a device's root holds: the bundle that runs, the one before it, and a file that tells people.

ROOT/current is a symbolic link to one of ROOT/versions, and the only thing that says what runs. Beside each version
lies a note: which one ran before it, and which key signed it, for a key may be given up while its bundle still runs.
ROOT/status.json is for people, and nothing depends on it.
"""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from device import archive, atomic, strict, trust
from device.errors import BitferryError, InputError
from device.signature import Key, public_key

VERSIONS, CURRENT, NOTE = "versions", "current", ".json"


@dataclass(frozen=True)
class Installed:
    """A bundle in its place."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def title(self) -> str:
        """Name it for a person."""
        return f"{self.manifest['name']} {self.manifest['version']} for {self.manifest['target']}"


def current(root: Path) -> Installed | None:
    """Give what runs; None where nothing is installed."""
    link = root / CURRENT
    return read(root / VERSIONS / link.readlink().name) if link.is_symlink() else None


def read(folder: Path) -> Installed:
    """Read what lies in a folder of ROOT/versions."""
    path = folder / archive.MANIFEST
    try:
        return Installed(folder, strict.read(path.read_bytes(), str(path)))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); install another version") from error


def before(root: Path, here: Installed) -> Installed | None:
    """Give what ran before, if it is still there."""
    name = note(here.folder).get("before")
    try:
        return read(root / VERSIONS / name) if isinstance(name, str) and strict.plain(name) else None
    except BitferryError:
        return None


def note(folder: Path) -> Mapping[str, Any]:
    """Read what was noted of a version when it was installed; nothing where that is lost."""
    try:
        return strict.read(folder.with_name(folder.name + NOTE).read_bytes(), NOTE)
    except (OSError, BitferryError):
        return {}


def keys(root: Path, here: Installed) -> tuple[Key, ...]:
    """Give the keys that may have signed what runs: those that are trusted now, and the one that was then."""
    then = note(here.folder).get("key")
    return (*trust.read(root).keys, *([public_key(then.encode(), NOTE)] if isinstance(then, str) else []))


def status(root: Path) -> Mapping[str, Any]:
    """Say what runs, what ran before and what was done last, from what is there."""
    here = current(root)
    earlier = before(root, here) if here else None
    try:
        told = strict.read((root / "status.json").read_bytes(), "status.json")
    except (OSError, BitferryError):
        told = {}
    keys = trust.read(root) if (root / trust.FILE).exists() else None
    return {
        "current": _row(here),
        "previous": _row(earlier),
        "last": told.get("last"),
        "selftest": told.get("selftest"),
        "keys": {"version": keys.version, "sha256": [key.name for key in keys.keys]} if keys else None,
    }


def tell(root: Path, last: str, here: Installed | None, selftest: Mapping[str, Any] | None = None) -> None:
    """Write ROOT/status.json, for people; what cannot be written is not."""
    with contextlib.suppress(OSError, BitferryError):
        fields = {**status(root), "last": last}
        if selftest is not None or here is None:
            fields["selftest"] = selftest
        atomic.write(root / "status.json", json.dumps(fields, indent=2).encode() + b"\n")


def _row(one: Installed | None) -> dict[str, Any] | None:
    names = ("name", "version", "target")
    return {name: one.manifest[name] for name in names} | {"folder": str(one.folder)} if one else None
