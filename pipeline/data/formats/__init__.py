"""The folder is the registry: each file reads one format, and says which sources it reads."""

import importlib
import pkgutil
import re
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Protocol, cast

from bitferry.device.errors import InputError
from bitferry.pipeline.data.sample import Sample, Wanted
from bitferry.pipeline.data.source import Table, Whole, title

PLAIN = ("folder", "lists")
"""What a folder or a file is that no other format knows."""
MOST_FILES = 100_000
"""That a name with braces may stand for."""
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Format(Protocol):
    """What a module in this folder provides."""

    def reads(self, source: Whole) -> bool:
        """Say whether the source is of this format, by its name and what is there."""

    def read(self, source: Whole, wanted: Wanted) -> list[Sample]:
        """Give what the source holds, undecoded; raise InputError for what cannot be meant."""

    def files(self, source: Whole) -> Iterable[Path]:
        """List the files that it is, besides image files that its samples name."""


def names() -> list[str]:
    """Name every format, those that look at the least last."""
    found = sorted(one.name for one in pkgutil.iter_modules(__path__))
    return [*(name for name in found if name not in PLAIN), *PLAIN]


def get(name: str) -> Format:
    """Import a format."""
    return cast(Format, importlib.import_module(f"{__name__}.{name}"))


def of(source: Whole) -> Format:
    """Find the format of a source; raise InputError where there is nothing."""
    for one in (get(name) for name in names()):
        if one.reads(source):
            return one
    if isinstance(source, Table) and source.path is not None and source.path.exists():
        raise InputError(
            f"{title(source)} has no columns to be named; a table with `path` is for Parquet files, `datasets` folders "
            "and shards. Write the path alone"
        )
    raise InputError(f"the data {title(source)} does not exist")


def path_of(source: Whole) -> Path | None:
    """Give the path that a source is named by, in a table or alone."""
    return source if isinstance(source, Path) else source.path


def several(pattern: Path) -> list[Path]:
    """Give the files that a name stands for, with `{000..003}` and `*` in it, in order.

    Raises InputError where one that is counted is missing, or none fits.
    """
    text = str(pattern)
    if "*" in text:
        found = sorted(pattern.parent.glob(pattern.name))
        if not found:
            raise InputError(f"no file is named like {pattern}")
        return found
    expanded = [Path(name) for name in _expanded(text)]
    missing = [path for path in expanded if not path.is_file()]
    if missing:
        told = f", one of {len(expanded)} that {pattern.name} stands for" if len(expanded) > 1 else ""
        raise InputError(f"the data {missing[0]} does not exist{told}")
    return expanded


def _expanded(text: str) -> Iterator[str]:
    """Write out each `{000..003}`, with as many digits as its first number has."""
    parts = _BRACES.split(text)
    ranges = []
    for first, last in zip(parts[1::3], parts[2::3], strict=True):
        if not int(first) <= int(last) < int(first) + MOST_FILES:
            raise InputError(f"{text}: {{{first}..{last}}} stands for no files, or for more than {MOST_FILES}")
        ranges.append([str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)])
    for chosen in product(*ranges):
        yield parts[0] + "".join(number + rest for number, rest in zip(chosen, parts[3::3], strict=True))
