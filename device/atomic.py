"""Files that are whole on the disk or not there, whenever the power goes."""

import contextlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path


def write(path: Path, content: bytes) -> None:
    """Write a file under another name, bring it to the disk, then give it its name."""
    part = path.with_name(f".{path.name}.part")
    pour(part, [content])
    os.replace(part, path)  # noqa: PTH105 - the calls of this file are those that can be interrupted
    settle(path.parent)


def pour(path: Path, parts: Iterable[bytes], *, mode: int = 0o644) -> int:
    """Write a new file from parts and bring it to the disk; give how many bytes it has. Links are not followed."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    handle, count = os.open(path, flags, mode), 0
    try:
        for part in parts:
            left = memoryview(part)
            while left:
                left = left[os.write(handle, left) :]
            count += len(part)
        os.fsync(handle)
    finally:
        os.close(handle)
    return count


def settle(folder: Path) -> None:
    """Bring a folder's names to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def point(link: Path, to: str) -> None:
    """Let a symbolic link point elsewhere, at once: it points to the old or to the new."""
    part = link.with_name(f".{link.name}.part")
    part.unlink(missing_ok=True)
    os.symlink(to, part)  # noqa: PTH211
    os.replace(part, link)  # noqa: PTH105
    settle(link.parent)


EXCHANGE, HERE = 2, -100
"""Linux's RENAME_EXCHANGE (renameat2(2)) and AT_FDCWD."""


def publish(made: Path, final: Path, old: Path) -> None:
    """Give a finished folder its place; what was there goes to `old`, and is removed.

    Linux exchanges the two at once, so that a whole folder is there whenever this ends. Where the system or the file
    system cannot, a kill between two renames leaves what was there in `old`: `recover` brings it back.
    """
    recover(final, old)
    _discard(old)
    if not final.exists():
        made.rename(final)
    elif _exchange(made, final):
        made.rename(old)
    else:
        final.rename(old)
        try:
            made.rename(final)
        except OSError:
            old.rename(final)
            raise
    _discard(old)


def recover(final: Path, old: Path) -> None:
    """Bring back what a `publish` that was killed between its two renames had put aside."""
    if old.exists() and not final.exists():
        old.rename(final)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths trade their folders at once; say whether the system could."""
    try:
        import ctypes  # noqa: PLC0415 - which some builds of Python lack

        found = ctypes.CDLL(None).renameat2(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE)
    except (ImportError, AttributeError, OSError, TypeError):  # not Linux, or a C library without it
        return False
    return int(found) == 0


def _discard(folder: Path) -> None:
    with contextlib.suppress(OSError):  # what cannot be removed does no harm
        remove(folder)


def remove(folder: Path) -> None:
    """Delete a folder with everything in it, what is read-only too; nothing outside, for links are not followed."""
    if not folder.is_symlink() and folder.is_dir():
        folder.chmod(stat.S_IRWXU)
        for child in folder.iterdir():
            remove(child)
        folder.rmdir()
    else:
        folder.unlink(missing_ok=True)


def protect(folder: Path) -> None:
    """Take the right to write from every file in a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(stat.S_IMODE(path.stat().st_mode) & ~0o222)
