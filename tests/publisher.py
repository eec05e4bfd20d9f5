"""What the tests of publishing and updating share: a repository of archives with a web server, and a device."""

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tuf.api.metadata import Metadata, Signed

from bitferry.device import update
from bitferry.pipeline.shipping import publish, roles
from bitferry.pipeline.shipping.repository import DAYS, Days
from bitferry.pipeline.shipping.roles import Role
from tests.served import Server

SIZE = 300_000


@dataclass(frozen=True)
class Late(Days):
    """Signatures of one role that have expired already."""

    role: Role = "timestamp"

    def end(self, role: Role) -> datetime:
        return datetime.now(UTC).replace(microsecond=0) + timedelta(days=-1 if role == self.role else 9)


def write_archive(folder: Path, version: str, *, name: str = "small", target: str = "openvino") -> Path:
    """Write an archive's file; what is in it matters to nobody here."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{target}-{version}.tar.gz"
    path.write_bytes(random.Random(path.name).randbytes(SIZE))  # noqa: S311  no secret
    return path


@dataclass
class Publisher:
    """A publisher's folders, the server before them, and one device."""

    folder: Path
    server: Server = field(repr=False)

    @property
    def repository(self) -> Path:
        return self.folder / "repository"

    @property
    def keys(self) -> Path:
        return self.folder / "keys"

    @property
    def device(self) -> Path:
        return self.folder / "device"

    def publish(
        self, version: str, *, name: str = "small", target: str = "openvino", days: Days = DAYS
    ) -> publish.Published:
        archive = write_archive(self.folder / "made", version, name=name, target=target)
        manifest = {"name": name, "target": target, "version": version}
        return publish.add(self.repository, self.keys, archive, manifest, days=days)

    def pin(self) -> None:
        """Tell the device whom to trust."""
        (self.device / "tuf").mkdir(parents=True)
        shutil.copyfile(self.repository / "metadata/root.json", self.device / "tuf/root.json")

    def fetch(self, *, name: str | None = None, target: str | None = None) -> Path:
        return update.fetch(self.server.url, self.device, name=name, target=target)

    def copy(self, name: str) -> Path:
        """Keep the repository as it is now."""
        return Path(shutil.copytree(self.repository, self.folder / name))

    def restore(self, copy: Path) -> None:
        """Bring the repository back as it was."""
        shutil.rmtree(self.repository)
        shutil.copytree(copy, self.repository)

    def metadata(self, role: Role) -> Path:
        """Find the file of a role that clients read now."""
        if role == "timestamp":
            return self.repository / "metadata/timestamp.json"
        numbers = [int(p.name.partition(".")[0]) for p in self.repository.glob(f"metadata/*.{role}.json")]
        return self.repository / f"metadata/{max(numbers)}.{role}.json"

    def forge(self, role: Role, change: Callable[[Signed], None], *, place: Path | None = None) -> Path:
        """Change a role's file and sign it with its real key, as whoever stole that key could."""
        metadata: Metadata[Any] = Metadata.from_file(str(self.metadata(role)))
        change(metadata.signed)
        signers = roles.load(self.keys)
        names = tuple(metadata.signatures)
        metadata.signatures.clear()
        for keyid in names:
            metadata.sign(signers[keyid], append=True)
        path = place or self.metadata(role)
        metadata.to_file(str(path))
        return path
