"""Signed archives of a real bundle, as several tests need them."""

import json
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitferry.device import whole
from bitferry.device.signature import FILE
from bitferry.pipeline.shipping import keys, sign

TIED: dict[str, Any] = {
    "os": platform.system(),
    "machine": platform.machine(),
    "isa": [],
    "gpu": None,
    "python": ">=3.11",
    "packages": {"openvino": ">=2026"},
}


def rehash(bundle: Path, **changed: Any) -> None:
    """Write the manifest anew for the files as they are now, with some of its fields changed."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    found = whole.digests(bundle, without=frozenset({"manifest.json", FILE}))
    known = manifest["files"]
    manifest["files"] = {
        name: known.get(name, {}) | {"sha256": digest, "size_bytes": (bundle / name).stat().st_size}
        for name, digest in found.items()
    }
    (bundle / "manifest.json").write_text(json.dumps(manifest | changed))


@dataclass(frozen=True)
class Shop:
    """Makes signed archives of one bundle with one key."""

    bundle: Path
    folder: Path

    @property
    def key(self) -> Path:
        return self.folder / "fleet.key"

    @property
    def public(self) -> Path:
        return self.folder / "fleet.pub"

    def copy(self, version: str, change: Callable[[Path], object] | None = None, **fields: Any) -> Path:
        """Copy the bundle as another version, with its files changed and its manifest fitting them."""
        place = self.folder / f"{self.bundle.name.rpartition('-')[0]}-{version}"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.bundle, place)
        if change:
            change(place)
        rehash(place, **{"version": version, **fields})
        return place

    def archive(
        self, version: str, change: Callable[[Path], object] | None = None, *, key: Path | None = None, **fields: Any
    ) -> Path:
        """Sign such a copy and pack it."""
        place = self.copy(version, change, **fields)
        sign.sign(place, key or self.key)
        return sign.archive(place)

    def device(self, name: str = "root") -> Path:
        """Give a device's root that trusts the key."""
        from bitferry.device import agent  # noqa: PLC0415

        root = self.folder / name
        assert agent.main(["trust", str(self.public), "--root", str(root)]) == 0
        return root


def open_shop(bundle: Path, folder: Path) -> Shop:
    """Make a key for a bundle."""
    keys.new(folder / "fleet")
    return Shop(bundle, folder)
