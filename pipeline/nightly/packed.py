"""A result as columns and contents, and back: figures are columns, everything large is a content kept by its hash."""

import hashlib
import io
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitferry.device.errors import InputError, first_line
from bitferry.pipeline import verdict
from bitferry.pipeline.nightly.night import Cell, Finding, Inputs, Point, Result, Samples
from bitferry.pipeline.report import record
from bitferry.pipeline.report.record import Recorded

Scalar = str | float | int | None

FIGURES = tuple(one.name for one in fields(Point) if one.name not in ("night", "cell"))
"""The columns of a Point beside its night and cell, in their order."""
FACTS = ("seconds", "attempts", "error", "error_kind", "measured_at")
"""Further plain columns of a Result."""
CONTENTS = ("inputs", "packages", "verdict", "truth", "float_answers", "answers", "samples")
"""Columns that point at contents; see migrations/2.sql."""
FINDING = tuple(one.name for one in fields(Finding) if one.name != "cell")
"""The columns of a Finding beside its cell."""
ANSWERS = ("truth", "float_answers", "answers")


def columns(night: str, result: Result) -> dict[str, Scalar]:
    """Give what anyone can query: the night, the cell, a Point's figures and the result's facts."""
    point = Point.of(night, result)
    plain = {name: getattr(point, name) for name in FIGURES} | {name: getattr(result, name) for name in FACTS}
    return {"night": night, **asdict(result.cell), **plain}


def contents(result: Result) -> dict[str, bytes]:
    """Give what is kept by its hash; what seldom changes is apart, so that it is kept once for many nights."""
    made_from = asdict(result.inputs)
    found = {"packages": _json(made_from.pop("packages")), "inputs": _json(made_from)}
    if result.verdict:
        found["verdict"] = _json(verdict.fields(result.verdict))
    if result.samples:
        found["samples"] = npz({name: one.astype(np.float32) for name, one in result.samples.items()})
    given = result.answers
    if given:
        found["truth"] = npz({"digests": given.digests, "labels": given.labels.astype(np.int32)})
        found["float_answers"] = npz({"float_answers": given.float_answers.astype(np.int32)})
    if given and given.answers is not None:
        found["answers"] = npz({"answers": given.answers.astype(np.int32)})
    return found


def result(cell: Cell, row: Mapping[str, Any], kept: Mapping[str, bytes], place: str) -> Result:
    """Put a result together again; `place` names it in an error.

    Raises InputError when a content is damaged, or the verdict is of a schema that this bitferry does not read.
    """
    return Result(
        cell=cell,
        status=row["status"],
        key=row["key"],
        inputs=inputs(kept),
        kind=row["kind"],
        verdict=record.parsed(kept["verdict"], f"the verdict of {place}") if "verdict" in kept else None,
        samples=samples(kept),
        answers=answers(kept, place),
        **{name: row[name] for name in FACTS},
    )


def inputs(kept: Mapping[str, bytes]) -> Inputs:
    """Read what a result depends on."""
    return Inputs(**json.loads(kept["inputs"]), packages=json.loads(kept["packages"]))


def samples(kept: Mapping[str, bytes]) -> Samples:
    """Read the timed calls; empty where they were not kept."""
    return arrays(kept["samples"]) if "samples" in kept else {}


def answers(kept: Mapping[str, bytes], place: str) -> Recorded | None:
    """Read what was answered; None where it was not kept."""
    found = {name: array for part in ANSWERS if part in kept for name, array in arrays(kept[part]).items()}
    return record.recorded(found, f"what is kept of {place}") if found else None


def finding(one: Finding) -> dict[str, Scalar]:
    """Give a finding as columns."""
    plain = {name: getattr(one, name) for name in FINDING}
    return asdict(one.cell) | plain | {"changed": _json(one.changed).decode()}


def finding_of(cell: Cell, values: Sequence[Any]) -> Finding:
    """Put a finding together again from the columns of FINDING."""
    row = dict(zip(FINDING, values, strict=True))
    return Finding(cell=cell, **row | {"changed": tuple(json.loads(row["changed"]))})


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def npz(found: Mapping[str, NDArray[Any]]) -> bytes:
    """Write arrays as an .npz file; equal arrays give equal bytes."""
    file, named = io.BytesIO(), dict[str, Any](found)
    np.savez(file, **named)
    return file.getvalue()


def arrays(content: bytes) -> dict[str, NDArray[Any]]:
    """Read the arrays of an .npz file."""
    with np.load(io.BytesIO(content)) as found:
        return dict(found)


def npz_part(content: bytes | None, names: str) -> bytes | None:
    """Take some arrays, named with commas between, or all of them, out of an .npz file; None where it has none."""
    found = arrays(content) if content else {}
    wanted = {name: array for name, array in found.items() if not names or name in names.split(",")}
    return npz(wanted) if wanted else None


def digest(content: bytes | None) -> str | None:
    """Give the sha256 of a content, in hex."""
    return None if content is None else hashlib.sha256(content).hexdigest()


def deflated(content: bytes | None) -> bytes | None:
    """Compress a content where that makes it smaller: what the sqlite3 shell's `sqlar_uncompress` reverts."""
    return None if content is None else min(content, zlib.compress(content, 9), key=len)


def inflated(kept: bytes, size: int, sha256: str, place: str) -> bytes:
    """Unpack a content; raise InputError when it is not what was kept."""
    try:
        content = kept if len(kept) == size else zlib.decompressobj().decompress(kept, size)
    except zlib.error as error:
        raise InputError(f"what is kept of {place} is damaged: {first_line(error)}; take a copy of the file") from error
    if digest(content) != sha256:
        raise InputError(f"what is kept of {place} is damaged: it has another sha256; take an earlier copy of the file")
    return content
