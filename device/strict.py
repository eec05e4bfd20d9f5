"""JSON and file names from strangers: read strictly, or refused in one line."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from bitferry.device.errors import InputError

MOST_BYTES = 8 << 20
"""Of a manifest or a signature; one of ten thousand files has two."""
MOST_FILES = 10_000
MOST_NAME, MOST_PART = 240, 100
"""Bytes of a file's name and of each folder in it, which every archive and file system can hold."""


def read(content: bytes, name: str) -> dict[str, Any]:
    """Read one JSON object; raise InputError for what is too large, ambiguous or no JSON by its standard (RFC 8259)."""
    if len(content) > MOST_BYTES:
        raise InputError(f"{name} has {len(content):,} bytes; {MOST_BYTES:,} are allowed")
    try:
        found = json.loads(content.decode(), object_pairs_hook=_once, parse_constant=_refuse_constant)
    except RecursionError:
        raise InputError(f"{name} cannot be read: it is nested too deeply") from None
    except ValueError as error:  # what the two functions below raise, and broken UTF-8
        raise InputError(f"{name} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{name} cannot be read: expected a JSON object, found {type(found).__name__}")
    return found


def names(given: Sequence[str] | Mapping[str, object], where: str) -> None:
    """Raise InputError unless every name is a plain relative one, and no two are the same file anywhere.

    A file system that does not tell `A` from `a` would write one over the other.
    """
    if len(given) > MOST_FILES:
        raise InputError(f"{where} has {len(given):,} files; {MOST_FILES:,} are allowed")
    seen: set[str] = set()
    for name in given:
        if not plain(name):
            raise InputError(f"{where} names {name!r:.120}, which is no plain name inside a folder")
        if name.casefold() in seen:
            raise InputError(f"{where} names {name!r} twice")
        seen.add(name.casefold())
    folders = {"/".join(parts[:i]) for parts in (name.split("/") for name in seen) for i in range(1, len(parts))}
    if both := sorted(seen & folders):
        raise InputError(f"{where} has {both[0]!r} as a file and as a folder")


def plain(name: object) -> bool:
    """Say whether this is a relative file name of ordinary characters, with `/` between folders and no way out."""
    if not isinstance(name, str) or not 0 < len(name.encode(errors="replace")) <= MOST_NAME or not name.isprintable():
        return False
    parts = name.split("/")
    if any(part in ("", ".", "..") or len(part.encode()) > MOST_PART for part in parts):
        return False
    return not any(character in name for character in '\\:*?"<>|')


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r:.120} is there twice")
        found[key] = value
    return found


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")
