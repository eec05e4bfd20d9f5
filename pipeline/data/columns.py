"""Tables of Apache Arrow with a column of images, as Parquet files and `datasets` folders hold them."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from bitferry.device.errors import InputError
from bitferry.pipeline.data import labels, sample
from bitferry.pipeline.data.records import GROUP, LABELS, MASKS, Record, to_sample
from bitferry.pipeline.data.sample import Picture, Sample, Wanted
from bitferry.pipeline.data.source import Table

IMAGES = ("image", "img", "images")
HF = b"huggingface"
"""Where `datasets` keeps what a column means."""


@dataclass(frozen=True)
class Rows:
    """Some rows of a data set: the small columns at hand, the images on demand."""

    where: str
    folder: Path
    """Beside which files lie that a column names instead of holding them."""
    schema: pa.Schema
    count: int
    small: Callable[[Sequence[str]], Mapping[str, list[Any]]]
    """Give whole columns."""
    cell: Callable[[str, int], Any]
    """Give one value of a column."""


@dataclass(frozen=True)
class Chosen:
    """Which columns hold what."""

    images: tuple[str, ...]
    label: str | None
    mask: str | None
    group: str | None


def read(parts: Sequence[Rows], named: Table, wanted: Wanted) -> list[Sample]:
    """Give the samples of all parts, whose classes are called alike."""
    own: dict[tuple[str, ...], list[int]] = {}
    found: list[Sample] = []
    for part in parts:
        chosen = _choose(part, named, wanted)
        names = _names(part.schema, chosen.label)
        if names and names not in own:
            own[names] = labels.of_names(names, wanted.classes, part.where)
        found += [to_sample(record, own.get(names), wanted) for record in _records(part, chosen)]
    return found


def _choose(rows: Rows, named: Table, wanted: Wanted) -> Chosen:
    """Pick the columns by name, or as the recipe names them; raise InputError where one is missing."""
    there = list(rows.schema.names)
    asked = [*named.image, named.label, named.mask, named.group]
    missing = [one for one in asked if one is not None and one not in there]
    if missing:
        raise InputError(f"{rows.where} has no column '{missing[0]}'; it has {', '.join(there)}")
    masks = [one for one in there if one in MASKS]
    images = named.image or _images(rows.schema, [named.mask or "", *masks], wanted.contract.views)
    if len(images) != wanted.contract.views:
        wants = f"{wanted.contract.views} column{'s'[: wanted.contract.views != 1]} of images"
        raise InputError(
            f"{rows.where}: expected {wants}, found {', '.join(images) or 'none'} among {', '.join(there)}; name them, "
            f'as {{path = "{Path(rows.where).name}", image = "…"}}'
        )
    label = named.label or next((one for one in LABELS if one in there), None)
    mask = named.mask or next(iter(masks), None)
    if wanted.labelled and (mask if wanted.task == "segmentation" else label) is None:
        what = "mask" if wanted.task == "segmentation" else "label"
        raise InputError(f"{rows.where} has no column '{what}'; it has {', '.join(there)}. Name it as `{what}`")
    group = named.group or (GROUP if GROUP in there else None)
    return Chosen(tuple(images), label, mask if wanted.task == "segmentation" else None, group)


def _images(schema: pa.Schema, others: Sequence[str], views: int) -> list[str]:
    """Name the columns that hold images: those said to, or those called so."""
    features = _features(schema)
    said = [one for one in schema.names if _type(features.get(one)) == "Image" and one not in others]
    if len(said) == views:
        return said
    return [one for one in schema.names if one in IMAGES and one not in others][:views] or said


def _features(schema: pa.Schema) -> dict[str, Any]:
    try:
        features = json.loads((schema.metadata or {}).get(HF, b"{}")).get("info", {}).get("features", {})
    except (json.JSONDecodeError, AttributeError, UnicodeDecodeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _type(feature: object) -> object:
    return feature.get("_type") if isinstance(feature, dict) else None


def _names(schema: pa.Schema, column: str | None) -> tuple[str, ...]:
    """Give the names of a column's classes, of one label or of lists of them; none where it has none."""
    feature = _features(schema).get(column or "")
    inner = feature.get("feature", feature) if isinstance(feature, dict) else feature
    inner = inner[0] if isinstance(inner, list) and inner else inner
    names = inner.get("names") if isinstance(inner, dict) and _type(inner) == "ClassLabel" else None
    return tuple(str(one) for one in names) if isinstance(names, list) else ()


def _records(rows: Rows, chosen: Chosen) -> Iterator[Record]:
    columns = rows.small([one for one in (chosen.label, chosen.group) if one is not None])
    for i in range(rows.count):
        where = f"{rows.where}[{i}]"
        views = tuple(_picture(rows, column, i, where) for column in chosen.images)
        mask = partial(_bytes, rows, chosen.mask, i, where) if chosen.mask else None
        label = columns[chosen.label][i] if chosen.label else None
        yield Record(where, views, label, mask, columns[chosen.group][i] if chosen.group else None)


def _picture(rows: Rows, column: str, index: int, where: str) -> Picture:
    return sample.encoded(
        where if column in IMAGES else f"{where}.{column}", partial(_bytes, rows, column, index, where)
    )


def _bytes(rows: Rows, column: str, index: int, where: str) -> bytes:
    """Give an encoded image: bytes, or a struct of `bytes` and `path` as `datasets` writes them."""
    value = rows.cell(column, index)
    if isinstance(value, dict):
        if value.get("bytes") is None and isinstance(value.get("path"), str):
            value = value["path"]
        else:
            value = value.get("bytes")
    if isinstance(value, str):
        return sample.file(rows.folder / value).content()
    if not isinstance(value, bytes):
        raise InputError(f"{where}: expected the bytes of an image file in column '{column}', found {value!r:.60}")
    return value
