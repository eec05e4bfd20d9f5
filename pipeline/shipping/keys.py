"""Keys that sign bundles: made here, listed for devices."""

import os
from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from bitferry.device import signature, trust
from bitferry.device.errors import InputError
from bitferry.device.signature import HASHES, Key

PRIVATE, PUBLIC = ".key", ".pub"


def new(path: Path, password: str | None = None) -> tuple[Path, Path]:
    """Write PATH.key, which only its owner may read, and PATH.pub; never over what is there."""
    if password == "":
        raise InputError("BITFERRY_KEY_PASSWORD is set and empty; unset it for a key without a password")
    places = [path.with_name(path.name + ending) for ending in (PRIVATE, PUBLIC)]
    if taken := [place for place in places if place.exists() or place.is_symlink()]:
        raise InputError(f"{taken[0]} exists; bundles that it signed would be lost. Name another file")
    made = ec.generate_private_key(ec.SECP256R1())
    hidden = serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
    secret = made.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, hidden)
    path.parent.mkdir(parents=True, exist_ok=True)
    for place, content, mode in zip(
        places, (secret, signature.pem(made.public_key()).encode()), (0o600, 0o644), strict=True
    ):
        handle = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
    return places[0], places[1]


def private(path: Path, password: str | None = None) -> ec.EllipticCurvePrivateKey:
    """Read a private key; raise InputError for one that is none, is locked or is of another kind."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password.encode() if password else None)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; `bitferry keys new` makes a key") from error
    except TypeError as error:
        needed = (
            "has a password; pass it in BITFERRY_KEY_PASSWORD" if not password else "has no password, one was given"
        )
        raise InputError(f"{path} {needed}") from error
    except ValueError as error:
        reason = "its password is another" if password else "it is no private key in PEM"
        raise InputError(f"{path} cannot be used: {reason}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InputError(f"{path} is a key of another kind; P-256, P-384 and P-521 are signed with")
    signature.key_of(key.public_key(), str(path))
    return key


def sign(message: bytes, key: ec.EllipticCurvePrivateKey) -> bytes:
    """Sign, with the same bytes every time (RFC 6979)."""
    return key.sign(message, ec.ECDSA(HASHES[key.curve.name], deterministic_signing=True))


def name_of(key: ec.EllipticCurvePrivateKey, where: str) -> Key:
    """Give the public half."""
    return signature.key_of(key.public_key(), where)


def sign_list(publics: Sequence[Path], number: int, key: Path, out: Path, password: str | None = None) -> Path:
    """Write the list `number` of the keys that devices are to trust, signed by one that they trust now."""
    listed = tuple(signature.public_key(_read(path), str(path)) for path in publics)
    payload, signing = trust.text(number, listed), private(key, password)
    trust.parse(payload, "the list")
    made = sign(signature.encoded(payload, trust.KIND), signing)
    try:
        with out.open("xb") as file:
            file.write(trust.enclose(payload, made, name_of(signing, str(key))))
    except FileExistsError:
        raise InputError(f"{out} exists; name another file with --output") from None
    return out


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
