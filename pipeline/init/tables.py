"""A list of image files and labels, its columns parted by tabs, commas, semicolons or spaces → rows of the two."""

import csv
from collections.abc import Sequence
from pathlib import Path

from bitferry.device.errors import InputError
from bitferry.pipeline import progress

FILES = ("file", "path", "image", "filename", "file_name", "filepath", "image_path", "img", "image_id", "id", "name")
LABELS = (
    "label", "labels", "class", "class_id", "category", "target", "mask", "y", "class_name", "label_name", "diagnosis",
)  # fmt: skip
"""What columns are called; of several that are there the first of these is taken."""


def read(path: Path, layouts: str) -> list[tuple[str, str]]:
    """Read a list; raise InputError where it is none, with the layouts that are known."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a list of text lines ({error.reason}); {layouts}") from None
    if not lines:
        raise InputError(f"{path} is no list of file<TAB>label lines: it is empty")
    rows, separator = _rows(lines)
    file, label, headed = _columns(rows[0])
    numbered = list(enumerate(rows, start=1))[headed:]
    short = next((number for number, row in numbered if len(row) <= max(file, label)), None)
    if short is not None:
        raise InputError(f"{path} is no list of file<TAB>label lines: its entry {short} is {lines[short - 1]!r}")
    if separator != "tabs":
        named = f", of the columns '{rows[0][file]}' and '{rows[0][label]}'" if headed else ""
        progress.stage("init", f"{path} has {separator} between its columns{named}")
    return [(row[file].strip(), row[label].strip()) for _, row in numbered]


def _rows(lines: Sequence[str]) -> tuple[list[list[str]], str]:
    """Part lines by what stands in the most of them; give what that is as well."""
    for sign, name in (("\t", "tabs"), (",", "commas"), (";", "semicolons")):
        if sum(sign in line for line in lines) > len(lines) / 2:
            return (
                list(csv.reader(lines, delimiter=sign)) if sign != "\t" else [line.split(sign) for line in lines]
            ), name
    rows = [line.rsplit(maxsplit=1) for line in lines]
    return rows, "spaces" if any(len(row) > 1 for row in rows) else "tabs"


def _columns(first: Sequence[str]) -> tuple[int, int, bool]:
    """Give the places of the file and of its label, and whether the first row has their names."""
    names = [cell.strip().lower() for cell in first]
    file = next((names.index(name) for name in FILES if name in names), None)
    label = next((names.index(name) for name in LABELS if name in names and names.index(name) != file), None)
    if file is None and label is None:
        return 0, 1, False
    file = file if file is not None else 0 if label != 0 else 1
    return file, label if label is not None else 1 if file != 1 else 0, True
