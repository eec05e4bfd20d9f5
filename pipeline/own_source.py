"""Which bitferry this is: its own source files, what of them runs on a device, and the commit where git knows it."""

import ast
import hashlib
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from bitferry.pipeline import cache

SOURCES = Path(__file__).parents[1]
PACKAGES = ("pipeline", "targets", "device")
SHIPPED = ("bitferry.device", "bitferry.targets")
"""Packages whose modules a bundle carries, where it needs them."""


def source_hash(*, leave_out: Sequence[str] = ()) -> str:
    """Hash bitferry's own source files with their names, those aside whose path begins as one of `leave_out`."""
    files = sorted(path for package in PACKAGES for path in (SOURCES / package).rglob("*"))
    digest = hashlib.sha256()
    for path in (path for path in files if path.suffix in {".py", ".jinja"}):
        name = path.relative_to(SOURCES).as_posix()
        if not name.startswith(tuple(leave_out)):
            digest.update(f"{name} {cache.file_hash(path)}\n".encode())
    return digest.hexdigest()


def shipped(sources: Iterable[str]) -> dict[str, str]:
    """Return what runs on a device beside these sources: the modules of `SHIPPED` that they import, directly or not.

    Each module's text by its path in the import root's parent, as `bitferry/device/runner.py`.
    """
    found, waiting = dict[str, str](), list(sources)
    while waiting:
        for name in _imported(waiting.pop()) - set(found):
            found[name] = (SOURCES.parent / name).read_text()
            waiting.append(found[name])
    return found


def _imported(source: str) -> set[str]:
    """List the files of `SHIPPED` that a module's source imports."""
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {name.name for node in imports for name in node.names}
    for node in imports:
        if isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    places = [module.replace(".", "/") for module in modules if module.startswith(tuple(f"{one}." for one in SHIPPED))]
    packages = {f"{package.replace('.', '/')}/__init__.py" for package in SHIPPED}
    return packages | {f"{place}.py" for place in places if (SOURCES.parent / f"{place}.py").is_file()}


def own_commit() -> Mapping[str, object]:
    """Give the commit of bitferry's own checkout; that of a repository it is merely installed in means nothing."""
    top = _git(SOURCES, "rev-parse", "--show-toplevel")
    ours = top is not None and Path(top).resolve() == SOURCES.resolve()
    return commit(SOURCES, [SOURCES / name for name in PACKAGES]) if ours else {"commit": None, "modified": None}


def commit(folder: Path, files: Sequence[Path]) -> Mapping[str, object]:
    """Give the commit that a folder's repository is at, and whether these files differ from it; None without one."""
    found = _git(folder, "rev-parse", "HEAD")
    if found is None:
        return {"commit": None, "modified": None}
    changed = _git(folder, "status", "--porcelain", "--ignored", "--", *(str(path.resolve()) for path in files))
    lines = [line for line in (changed or "").splitlines() if "__pycache__" not in line]
    return {"commit": found, "modified": bool(lines)}


def version(package: str) -> str | None:
    """Give an installed package's version; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=False)
    except OSError:  # there is no git
        return None
    return done.stdout.strip() if done.returncode == 0 else None
