"""Which keys a device trusts: one that was pinned by hand, then lists that a trusted key signed."""

import base64
import binascii
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitferry.device import atomic, signature, strict
from bitferry.device.errors import InputError
from bitferry.device.signature import Key

FILE, LOCK = "keys.json", ".lock"
KIND = "application/vnd.bitferry.keys+json"
MOST_KEYS = 16


@dataclass(frozen=True)
class Trusted:
    """The keys that a device takes bundles from, and the number of the list that says so."""

    version: int
    keys: tuple[Key, ...]


def read(root: Path) -> Trusted:
    """Read what a device trusts; raise InputError where nothing was pinned yet."""
    path = root / FILE
    try:
        return parse(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise InputError(f"{root} trusts no key yet; pin one with `bitferry trust KEY.pub --root {root}`") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def text(version: int, keys: tuple[Key, ...]) -> bytes:
    """Write a list of keys, the same bytes every time."""
    fields = {"version": version, "keys": [signature.pem(key.public) for key in keys]}
    return json.dumps(fields, indent=1).encode() + b"\n"


def parse(content: bytes, where: str) -> Trusted:
    """Read a list of keys."""
    fields = strict.read(content, where)
    version, listed = fields.get("version"), fields.get("keys")
    if type(version) is not int or version < 1 or not isinstance(listed, list) or not 0 < len(listed) <= MOST_KEYS:
        raise InputError(f"{where} is no list of keys: a version from 1 and 1 to {MOST_KEYS} keys are expected")
    keys = tuple(signature.public_key(str(one).encode(), where) for one in listed)
    if len({key.name for key in keys}) < len(keys):
        raise InputError(f"{where} lists a key twice")
    return Trusted(version, keys)


def take(root: Path, given: Path) -> Trusted:
    """Trust a key, PEM, where nothing is trusted yet; or a newer list that a trusted key signed."""
    try:
        content = given.read_bytes()
    except OSError as error:
        raise InputError(f"{given} cannot be read: {error.strerror}") from error
    if content.lstrip().startswith(b"-----BEGIN"):
        if (root / FILE).exists():
            raise InputError(f"{root} trusts keys already; a further one comes by a list that one of those signed")
        if content.count(b"-----BEGIN") > 1:
            raise InputError(f"{given} holds several keys; pin one, further ones come by a list (`bitferry keys list`)")
        found = text(1, (signature.public_key(content, str(given)),))
    else:
        found = newer(read(root), content, str(given))
    atomic.write(root / FILE, found)
    return read(root)


def claim(root: Path, given: Path) -> None:
    """Make the folder that a first key is pinned in; raise InputError where it is somebody else's."""
    if not given.is_file():
        raise InputError(f"{given} is no file; a public key or a signed list of keys is expected")
    root.mkdir(parents=True, exist_ok=True)
    if not (root / FILE).exists() and (others := [one.name for one in root.iterdir() if one.name != LOCK]):
        raise InputError(f"{root} holds {others[0]!r} and is no root of bitferry's; name a new or empty folder")


def newer(known: Trusted, content: bytes, where: str) -> bytes:
    """Give the list inside a signed one; raise InputError unless a trusted key signed it and its number is higher."""
    fields = strict.read(content, where)
    try:
        signatures: list[Any] = fields["signatures"]
        payload = base64.b64decode(fields["payload"], validate=True)
        (made,) = [(one["keyid"], base64.b64decode(one["sig"], validate=True)) for one in signatures[:2]]
        kind = fields["payloadType"]
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise InputError(f"{where} is neither a public key in PEM nor a signed list of keys ({error!r:.80})") from error
    if kind != KIND:
        raise InputError(f"{where} is no list of keys but {kind!r:.60}")
    signature.by(known.keys, made[0], made[1], signature.encoded(payload, KIND), where)
    found = parse(payload, where)
    if found.version <= known.version:
        raise InputError(f"{where} is list {found.version}, and {known.version} is trusted already")
    return payload


def enclose(payload: bytes, made: bytes, key: Key) -> bytes:
    """Write a signed list of keys, which is a DSSE envelope."""
    fields = {
        "payloadType": KIND,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": key.name, "sig": base64.b64encode(made).decode()}],
    }
    return json.dumps(fields, indent=1).encode() + b"\n"
