"""Folders that `datasets` wrote by save_to_disk: Arrow files, mapped into memory."""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitferry.device.errors import InputError, first_line
from bitferry.pipeline.data.formats import path_of
from bitferry.pipeline.data.formats.parquet import FAULTS, needs_pyarrow
from bitferry.pipeline.data.sample import Sample, Wanted
from bitferry.pipeline.data.source import Table, Whole

if TYPE_CHECKING:
    import pyarrow as pa

    from bitferry.pipeline.data.columns import Rows

STATE, SEVERAL = "state.json", "dataset_dict.json"


def reads(source: Whole) -> bool:
    """Take a folder with the file that save_to_disk writes."""
    path = path_of(source)
    return path is not None and any((path / name).is_file() for name in (STATE, SEVERAL))


def files(source: Whole) -> Iterable[Path]:
    """List every file of the folder."""
    path = path_of(source)
    return sorted(one for one in path.rglob("*") if one.is_file()) if path else []


def read(source: Whole, wanted: Wanted) -> list[Sample]:
    """Read labels and groups; images when they are decoded."""
    path = path_of(source) or Path()
    if (path / SEVERAL).is_file():
        splits = sorted(one.parent.name for one in path.glob(f"*/{STATE}"))
        raise InputError(f"{path} holds several data sets ({', '.join(splits)}); name one, as {path.name}/{splits[0]}")
    try:
        from bitferry.pipeline.data import columns  # noqa: PLC0415 - pyarrow is an extra
    except ModuleNotFoundError as error:
        raise needs_pyarrow(source, error) from None
    named = source if isinstance(source, Table) else Table(path=source)
    return columns.read([_rows(path, _opened(path, file)) for file in _shards(path)], named, wanted)


def _shards(path: Path) -> list[Path]:
    try:
        state = json.loads((path / STATE).read_text())
        names = [str(one["filename"]) for one in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path / STATE} is not what `datasets` writes: {first_line(error)}") from error
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise InputError(f"{path / STATE} names {outside[0]}, a file that is not in {path}")
    if state.get("_indices_data_files"):
        raise InputError(f"{path} holds a selection of another data set; save it again after flatten_indices()")
    return [path / name for name in names]


def _opened(path: Path, file: Path) -> "pa.Table":
    import pyarrow as pa  # noqa: PLC0415 - an extra

    try:
        table = pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
        table.schema.to_string()  # names that are no text are found here
        table.validate(full=True)  # else a damaged offset is followed out of the file
    except (*FAULTS, pa.ArrowException) as error:
        raise InputError(f"{file} is not an Arrow file that can be read: {first_line(error)}") from error
    return table


def _rows(path: Path, table: "pa.Table") -> "Rows":
    from bitferry.pipeline.data.columns import Rows  # noqa: PLC0415 - pyarrow is an extra

    return Rows(str(path), path, table.schema, table.num_rows, partial(_small, table), partial(_cell, table))


def _small(table: "pa.Table", names: Sequence[str]) -> Mapping[str, list[Any]]:
    return {name: table.column(name).to_pylist() for name in names}  # validated, so no text is broken


def _cell(table: "pa.Table", column: str, index: int) -> Any:
    try:
        return table.column(column)[index].as_py()
    except ValueError as error:  # a name in it that is no text
        raise InputError(f"column '{column}' cannot be read at {index}: {first_line(error)}") from error
