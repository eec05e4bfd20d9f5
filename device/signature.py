"""Signatures in the OpenSSF model-signing format: which files somebody who has the key vouched for.

A signature file is a Sigstore bundle (v0.3) around a DSSE envelope, whose payload is an in-toto statement that lists
the sha256 of every file (https://github.com/sigstore/model-transparency). Keys are on the curves P-256, P-384 or P-521.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from bitferry.device import strict, whole
from bitferry.device.errors import InputError

FILE = whole.SIGNATURE
UNLIKE, REMEDY = "is not as it was signed", "take it anew from where it was published"
MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://model_signing/signature/v1.0"
HASHES: Mapping[str, hashes.HashAlgorithm] = {
    "secp256r1": hashes.SHA256(),
    "secp384r1": hashes.SHA384(),
    "secp521r1": hashes.SHA512(),
}


@dataclass(frozen=True)
class Key:
    """A public key and its name: the sha256 of its PEM text."""

    public: ec.EllipticCurvePublicKey
    name: str


@dataclass(frozen=True)
class Signed:
    """What was signed: a folder's name, and the sha256 of every file in it."""

    name: str
    digests: Mapping[str, str]
    key: str


def public_key(content: bytes, where: str) -> Key:
    """Read a public key as PEM; raise InputError for any other kind."""
    try:
        key = serialization.load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(f"{where} is no public key in PEM; `bitferry keys new` makes one") from error
    return key_of(key, where)


def key_of(key: object, where: str) -> Key:
    """Name a public key; raise InputError for a kind that the format does not have."""
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in HASHES:
        raise InputError(f"{where} is a key of another kind; P-256, P-384 and P-521 are signed with")
    return Key(key, hashlib.sha256(pem(key).encode()).hexdigest())


def pem(key: ec.EllipticCurvePublicKey) -> str:
    """Write a public key as text."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(serialization.Encoding.PEM, form).decode()


def statement(name: str, digests: Mapping[str, str]) -> bytes:
    """Write what is signed for a folder called `name`: the sha256 of every file, the same bytes every time."""
    ordered = sorted(digests.items())
    root = hashlib.sha256(b"".join(bytes.fromhex(digest) for _, digest in ordered)).hexdigest()
    fields = {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": root}}],
        "predicateType": PREDICATE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": [FILE],
            },
            "resources": [{"name": name, "algorithm": "sha256", "digest": digest} for name, digest in ordered],
        },
    }
    return json.dumps(fields, separators=(",", ":")).encode()


def enclose(payload: bytes, signature: bytes, key: Key) -> bytes:
    """Write the signature file."""
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
    }
    material = {"publicKey": {"hint": key.name}, "tlogEntries": []}
    fields = {"mediaType": MEDIA_TYPE, "verificationMaterial": material, "dsseEnvelope": envelope}
    return json.dumps(fields).encode()


def encoded(payload: bytes, kind: str = PAYLOAD_TYPE) -> bytes:
    """Encode what the key signs: DSSE's pre-authentication encoding."""
    return b" ".join([b"DSSEv1", str(len(kind)).encode(), kind.encode(), str(len(payload)).encode(), payload])


def verify(content: bytes, keys: Sequence[Key], where: str) -> Signed:
    """Give what a signature file vouches for; raise InputError unless one of these keys made it."""
    fields = strict.read(content, where)
    try:
        envelope, hint = fields["dsseEnvelope"], fields["verificationMaterial"]["publicKey"]["hint"]
        signatures = [base64.b64decode(one["sig"], validate=True) for one in envelope["signatures"][:2]]
        payload = base64.b64decode(envelope["payload"], validate=True)
        kind, count = envelope["payloadType"], len(envelope["signatures"])
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise InputError(f"{where} is no signature in the OpenSSF model-signing format ({error!r:.120})") from error
    if kind != PAYLOAD_TYPE or count != 1:
        raise InputError(f"{where} has {count} signatures of {kind!r:.60}; one of {PAYLOAD_TYPE!r} is expected")
    key = by(keys, hint, signatures[0], encoded(payload), where)
    return _signed(strict.read(payload, where), key, where)


def check(folder: Path, keys: Sequence[Key]) -> Signed:
    """Compare every file of an unpacked bundle with its signature; raise InputError naming what differs.

    What was rebuilt on the device is signed by nobody; `rebuilt.find` compares it with a manifest of its own.
    """
    path = folder / FILE
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{folder} is not signed: it has no {FILE}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    signed = verify(content, keys, str(path))
    apart = frozenset({FILE, *whole.PARTS})
    whole.compare(whole.digests(folder, without=apart), signed.digests, f"{folder} {UNLIKE}", REMEDY)
    return signed


def by(keys: Sequence[Key], name: object, signature: bytes, message: bytes, where: str) -> Key:
    """Give the key that signed a message; raise InputError unless it is one of these."""
    for key in keys:
        if key.name == name:
            try:
                key.public.verify(signature, message, ec.ECDSA(HASHES[key.public.curve.name]))
            except InvalidSignature:
                raise InputError(f"{where} does not fit what it signs: one of the two was changed") from None
            return key
    trusted = ", ".join(key.name[:12] for key in keys) or "none"
    raise InputError(
        f"{where} was made with the key {str(name)[:12]!r}, which is not trusted here (trusted: {trusted})"
    )


def _signed(fields: Mapping[str, Any], key: Key, where: str) -> Signed:
    """Read the statement, whose signature is right: then only a version of another kind is refused."""
    try:
        predicate, (subject,) = fields["predicate"], fields["subject"]
        form, listed = predicate["serialization"], predicate["resources"]
        digests = {str(one["name"]): bytes.fromhex(one["digest"]).hex() for one in listed}
        kinds = {one["algorithm"] for one in listed} | {form["hash_type"]}
        types = (fields["_type"], fields["predicateType"], form["method"])
        root = hashlib.sha256(b"".join(bytes.fromhex(one["digest"]) for one in listed)).hexdigest()
        whole = root == subject["digest"]["sha256"] and len(digests) == len(listed)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where} does not list the files it signs ({error!r:.120})") from error
    if types != (STATEMENT, PREDICATE, "files") or kinds != {"sha256"} or not whole:
        raise InputError(
            f"{where} signs {cast(object, types[1])!r:.80}, by {kinds}; the sha256 of each file is expected"
        )
    strict.names(digests, where)
    return Signed(str(subject["name"]), digests, key.name)
