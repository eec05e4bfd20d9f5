"""Parquet files with a column of encoded images; read a group of rows at a time."""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitferry.device.errors import InputError, TargetUnavailable, first_line
from bitferry.pipeline.data.formats import path_of, several
from bitferry.pipeline.data.sample import Sample, Wanted
from bitferry.pipeline.data.source import Table, Whole

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

    from bitferry.pipeline.data.columns import Rows

FAULTS = (OSError, ValueError, IndexError, MemoryError)
"""What reading damaged files raises, besides Arrow's own errors."""
MOST_GROUPS = 4
"""Groups of rows that are kept in memory for each file."""


def reads(source: Whole) -> bool:
    """Take what ends in .parquet, and folders of nothing else."""
    path = path_of(source)
    return path is not None and (path.suffix == ".parquet" or _of_parquet(path))


def files(source: Whole) -> Iterable[Path]:
    """List the files."""
    path = path_of(source)
    if path is None:
        return []
    return sorted(path.glob("*.parquet")) if path.is_dir() else several(path)


def read(source: Whole, wanted: Wanted) -> list[Sample]:
    """Read labels and groups; images when they are decoded."""
    try:
        from bitferry.pipeline.data import columns  # noqa: PLC0415 - pyarrow is an extra
    except ModuleNotFoundError as error:
        raise needs_pyarrow(source, error) from None
    named = source if isinstance(source, Table) else Table(path=source)
    return columns.read([_rows(path) for path in files(source)], named, wanted)


def needs_pyarrow(source: Whole, error: ModuleNotFoundError) -> TargetUnavailable:
    """Say what would read the source."""
    told = f"{path_of(source)} needs the Python package '{error.name}', which is not installed"
    return TargetUnavailable(f"{told}; install it with: pip install 'bitferry[data]'")


def _of_parquet(path: Path) -> bool:
    found = [one for one in path.iterdir() if not one.name.startswith(".")] if path.is_dir() else []
    return bool(found) and all(one.suffix == ".parquet" for one in found)


def _rows(path: Path) -> "Rows":
    import pyarrow as pa  # noqa: PLC0415 - an extra
    from pyarrow.parquet import ParquetFile  # noqa: PLC0415

    from bitferry.pipeline.data.columns import Rows  # noqa: PLC0415

    try:
        opened = ParquetFile(path, memory_map=True)
        schema, groups = opened.schema_arrow, _Groups(path, opened)
        schema.to_string()  # names that are no text are found here
    except (*FAULTS, pa.ArrowException) as error:
        raise InputError(f"{path} is not a Parquet file that can be read: {first_line(error)}") from error
    return Rows(str(path), path.parent, schema, groups.starts[-1], partial(_small, path, opened), groups.cell)


def _small(path: Path, opened: "ParquetFile", names: Sequence[str]) -> Mapping[str, list[Any]]:
    import pyarrow as pa  # noqa: PLC0415 - an extra

    try:
        table = opened.read(columns=list(names))
        table.validate(full=True)
        found: dict[str, list[Any]] = table.to_pydict()
        if any(len(column) != opened.metadata.num_rows for column in found.values()):
            raise InputError(f"{path} cannot be read: its columns are not of one length")
    except (*FAULTS, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}") from error
    return found


class _Groups:
    """The groups of rows of one file, of which a few are kept; threads that want the same one wait for it."""

    def __init__(self, path: Path, opened: "ParquetFile") -> None:
        sizes = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
        self.path, self.opened, self.starts = path, opened, [0, *accumulate(sizes)]
        self.kept: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self.lock = threading.Lock()

    def cell(self, column: str, index: int) -> Any:
        """Give one value."""
        import pyarrow as pa  # noqa: PLC0415 - an extra

        group = next(i for i, start in enumerate(self.starts[1:]) if index < start)
        with self.lock:
            if (column, group) not in self.kept:
                try:
                    table = self.opened.read_row_group(group, columns=[column])
                    table.validate(full=True)
                except (*FAULTS, pa.ArrowException) as error:
                    raise InputError(f"{self.path} cannot be read: {first_line(error)}") from error
                self.kept[column, group] = table.column(column)
            self.kept.move_to_end((column, group))
            if len(self.kept) > MOST_GROUPS:
                self.kept.popitem(last=False)
            found = self.kept[column, group]
        if index - self.starts[group] >= len(found):
            raise InputError(f"{self.path} cannot be read: its column '{column}' ends before row {index}")
        return found[index - self.starts[group]].as_py()
