"""Bad inputs, each tried through the product's own commands; the number in a test's name is its row in the table."""

import hashlib
import json
import shutil
from pathlib import Path

from tests.conftest import Project


def foreign(deployed: Project, target: str, folder: Path) -> Path:
    """Copy a real bundle, for a stranger to change."""
    return Path(shutil.copytree(deployed.folder / f"dist/small-{target}-1.0.0", folder / "bundle"))


def put(bundle: Path, name: str, content: bytes) -> None:
    """Change a file of a bundle as a forger does: in the manifest as well."""
    (bundle / name).write_bytes(content)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
