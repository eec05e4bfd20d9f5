"""The private keys of a repository's roles: PEM files in a folder of their own, found by their public halves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import Metadata, Root, T

from bitferry.device import atomic
from bitferry.device.errors import InputError, first_line

Role = Literal["root", "targets", "snapshot", "timestamp"]
ROLES: tuple[Role, ...] = get_args(Role)
Signers = Mapping[str, CryptoSigner]
"""By the identifier of the public key, which is what a root names."""


def make(keys: Path, name: str) -> CryptoSigner:
    """Make the key KEYS/<name>.pem, readable by its owner alone; one that a killed run left is used."""
    path = keys / f"{name}.pem"
    if path.exists():
        return _load(path)
    keys.mkdir(mode=0o700, parents=True, exist_ok=True)
    signer = CryptoSigner.generate_ed25519()
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)  # a killed run's; whatever its rights are, they are not kept
    atomic.pour(part, [signer.private_bytes], mode=0o600)
    part.replace(path)
    atomic.settle(keys)
    return signer


def load(keys: Path) -> dict[str, CryptoSigner]:
    """Load every key in a folder."""
    signers = [_load(path) for path in sorted(keys.glob("*.pem"))]
    return {signer.public_key.keyid: signer for signer in signers}


def sign(metadata: Metadata[T], role: Role, roots: Mapping[str, Root], signers: Signers) -> None:
    """Sign for everyone who trusts one of `roots`; raise InputError naming the one that needs a key not given."""
    metadata.signatures.clear()
    for keyid in dict.fromkeys(keyid for root in roots.values() for keyid in root.get_delegated_role(role).keyids):
        if keyid in signers:
            metadata.sign(signers[keyid], append=True)
    for place, root in roots.items():
        try:
            root.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
        except UnsignedMetadataError:
            raise InputError(
                f"{place} lets other keys sign {role} than those given; "
                "name the folder with the keys that this repository was made with"
            ) from None


def _load(path: Path) -> CryptoSigner:
    try:
        return CryptoSigner(load_pem_private_key(path.read_bytes(), None))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} is no private key that can be used: {first_line(error)}") from error
