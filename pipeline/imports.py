"""What a stranger's Python files import, and which installed packages that comes from."""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

from bitferry.pipeline.cache import MARK


def beside(folder: Path) -> list[Path]:
    """List the Python files of a folder and below; not those of environments, builds and hidden folders."""
    found = sorted(folder.glob("*.py"))
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))):
        if inner.name != "site-packages" and not any((inner / mark).exists() for mark in (MARK, "pyvenv.cfg")):
            found += beside(inner)
    return found


def imported(files: Iterable[Path]) -> list[str]:
    """Give the top-level names that Python files import anywhere in them; none for one that is no Python."""
    return sorted({name for file in files for name in _of(file)})


def versions(files: Iterable[Path]) -> dict[str, str]:
    """Give the installed packages that files import from by themselves, with their versions."""
    names = {normal(one) for module in imported(files) for one in providing().get(module, ())}
    return {name: metadata.version(name) for name in sorted(names)}


@cache
def providing() -> Mapping[str, list[str]]:
    """Give the installed packages that each top-level module comes from."""
    return metadata.packages_distributions()


def normal(name: str) -> str:
    """Normalize a package's name (PyPA's specification of names)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _of(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
