"""Is a folder exactly what was listed? Extra, missing and changed files are told apart."""

import hashlib
import stat
from collections.abc import Mapping
from pathlib import Path

from bitferry.device.errors import InputError

SIGNATURE = "model.sig"
REBUILT = "rebuilt"
PARTS = (REBUILT, ".rebuilt", ".rebuilt.old")
"""What compiling again on a device writes into a bundle: the second while it compiles, the third while it replaces."""


def digests(folder: Path, *, without: frozenset[str] = frozenset()) -> dict[str, str]:
    """Give the sha256 of every file of a folder but of the names `without`, of files or whole folders at its top.

    Raises InputError for links, devices and FIFOs, which are not read, and for what cannot be read.
    """
    try:
        return _digests(folder, without)
    except OSError as error:
        raise InputError(f"{error.filename or folder} cannot be read: {error.strerror}") from error


def _digests(folder: Path, without: frozenset[str]) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.split("/")[0] in without:
            continue
        kind = path.lstat().st_mode
        if stat.S_ISREG(kind):
            found[name] = sha256(path)
        elif not stat.S_ISDIR(kind):
            raise InputError(f"{path} is no plain file; a bundle has nothing else")
    return found


def sha256(path: Path) -> str:
    """Hash a file, a part at a time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def compare(found: Mapping[str, str], listed: Mapping[str, str], fault: str, remedy: str) -> None:
    """Raise InputError naming each file that is missing, changed or extra, between the fault and its remedy."""
    faults = {
        "missing": set(listed) - set(found),
        "changed": {name for name in set(found) & set(listed) if found[name] != listed[name]},
        "extra": set(found) - set(listed),
    }
    told = "; ".join(f"{kind}: {_some(names)}" for kind, names in faults.items() if names)
    if told:
        raise InputError(f"{fault} ({told}); {remedy}")


def _some(names: set[str]) -> str:
    shown = sorted(names)[:20]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more else "")
