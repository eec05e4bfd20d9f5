"""What a device's root holds: the bundle that runs, the one before it, and a file that tells people.

ROOT/current is a symbolic link to one of ROOT/versions, and the only thing that says what runs. Beside each version
lies a note: which one ran before it, and which key signed it, for a key may be given up while its bundle still runs.
ROOT/rejected.json lists what answered otherwise here or was rolled back from, which an update does not take again; and
how often the self-test of others gave no answer.
ROOT/status.json is for people, and nothing depends on it.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitferry.device import archive, atomic, strict, trust
from bitferry.device.errors import BitferryError, InputError
from bitferry.device.signature import Key, public_key

VERSIONS, CURRENT, NOTE, REJECTED = "versions", "current", ".json", "rejected.json"
MOST_REJECTED = 100
"""Kept, the last ones."""
TRIES = 3
"""Of a bundle whose self-test gives no answer: the memory may have been full, or the machine busy."""


@dataclass(frozen=True)
class Installed:
    """A bundle in its place, as it was noted when it was installed: what lies there may be damaged since."""

    folder: Path
    name: str | None
    version: str | None
    target: str | None
    digest: str | None
    """The sha256 of its manifest."""

    @property
    def title(self) -> str:
        """Name it for a person."""
        return f"{self.name} {self.version} for {self.target}" if self.name else self.folder.name


def current(root: Path) -> Installed | None:
    """Give what runs; None where nothing is installed."""
    link = root / CURRENT
    if link.is_symlink():
        return read(root / VERSIONS / link.readlink().name)
    if link.exists():
        raise InputError(
            f"{link} is no symbolic link, so this is no root, or a copy of one; install into an empty folder"
        )
    return None


def read(folder: Path) -> Installed:
    """Read the note beside a folder of ROOT/versions, or where that is lost the manifest in it."""
    noted: Mapping[str, Any] = note(folder)
    if "digest" not in noted:
        with contextlib.suppress(OSError, BitferryError):
            content = (folder / archive.MANIFEST).read_bytes()
            noted = {**strict.read(content, str(folder)), "digest": hashlib.sha256(content).hexdigest()}
    fields = {name: noted.get(name) for name in ("name", "version", "target", "digest")}
    return Installed(folder, **{name: one if isinstance(one, str) else None for name, one in fields.items()})


def before(root: Path, here: Installed) -> Installed | None:
    """Give what ran before, if it is still there."""
    name = note(here.folder).get("before")
    known = isinstance(name, str) and strict.plain(name) and (root / VERSIONS / name).is_dir()
    return read(root / VERSIONS / str(name)) if known else None


def note(folder: Path) -> Mapping[str, Any]:
    """Read what was noted of a version when it was installed; nothing where that is lost."""
    try:
        return strict.read(folder.with_name(folder.name + NOTE).read_bytes(), NOTE)
    except (OSError, BitferryError):
        return {}


def rejected(root: Path) -> dict[str, str]:
    """List the bundles that were rejected, each by the sha256 of its manifest with the reason; none where that is lost.

    Any manifest of the same bytes is meant, under whatever name its archive comes.
    """
    return {digest: why for digest, why in _noted(root).items() if isinstance(why, str)}


def reject(root: Path, digest: str | None, why: str) -> None:
    """Note that a bundle is not to be taken by an update again; a disk that cannot be written keeps no note."""
    if digest:
        _write_noted(root, {name: one for name, one in _noted(root).items() if name != digest} | {digest: why})


def count_failure(root: Path, digest: str | None, why: str) -> str:
    """Count a try of a bundle that ended without an answer, the last of `TRIES` rejects it; say which it was."""
    noted = _noted(root)
    known = noted.pop(digest, None) if digest else None
    if digest is None or isinstance(known, str):
        return ""
    before = known.get("tries") if isinstance(known, dict) else 0
    tries = (before if type(before) is int else 0) + 1
    if tries >= TRIES:
        reject(root, digest, f"{tries} tries ended without an answer, the last so: {why}")
        return f"; that was try {tries} of {TRIES}, and an update does not take it again"
    _write_noted(root, noted | {digest: {"tries": tries, "last": why}})
    return f"; that was try {tries} of {TRIES}, and the next update tries again"


def readmit(root: Path, digest: str) -> None:
    """Forget that a bundle was rejected: it runs."""
    known = _noted(root)
    if known.pop(digest, None) is not None:
        _write_noted(root, known)


def refuse_rejected(root: Path, digest: str, path: Path) -> None:
    """Raise InputError for an archive whose bundle was rejected."""
    why = rejected(root).get(digest)
    if why:
        raise InputError(
            f"{path} was rejected here before: {why}; what runs stays, and the next version is taken; to try this one "
            f"again all the same, `install {path} --root {root}`"
        )


def _noted(root: Path) -> dict[str, Any]:
    """Read what is noted of bundles, by their manifests' sha256: why one was rejected, or its tries without answer."""
    try:
        return dict(strict.read((root / REJECTED).read_bytes(), REJECTED))
    except (OSError, BitferryError):
        return {}


def _write_noted(root: Path, found: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError):
        last = dict(list(found.items())[-MOST_REJECTED:])
        atomic.write(root / REJECTED, json.dumps(last, indent=2).encode() + b"\n")


def keys(root: Path, here: Installed) -> tuple[Key, ...]:
    """Give the keys that may have signed what runs: those that are trusted now, and the one that was then."""
    found = trust.read(root).keys
    with contextlib.suppress(BitferryError):  # a note that is damaged adds none
        found += (public_key(str(note(here.folder).get("key")).encode(errors="replace"), NOTE),)
    return found


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


def tell(root: Path, last: str, selftest: Mapping[str, Any] | None = None) -> None:
    """Write ROOT/status.json, for people; what cannot be written is not. The self-test is of what runs then."""
    with contextlib.suppress(OSError, BitferryError):
        fields = {**status(root), "last": last}
        if selftest is not None:
            fields["selftest"] = selftest or None
        atomic.write(root / "status.json", json.dumps(fields, indent=2).encode() + b"\n")


def _row(one: Installed | None) -> dict[str, Any] | None:
    if one is None:
        return None
    return {"name": one.name, "version": one.version, "target": one.target, "folder": str(one.folder)}
