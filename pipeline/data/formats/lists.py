"""Lines of files, one for each view, with a label or a mask after them and tabs between."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from bitferry.device.errors import InputError
from bitferry.pipeline.data import labels, sample
from bitferry.pipeline.data.sample import Sample, Wanted
from bitferry.pipeline.data.source import Whole

HEADINGS = ("file", "path", "image", "filename")
GROUP = "group"
"""The heading of a column that says what images share."""


def reads(source: Whole) -> bool:
    """Take any file that no other format knows."""
    return isinstance(source, Path) and source.is_file()


def files(source: Whole) -> Iterable[Path]:
    """Give the list itself."""
    return [source] if isinstance(source, Path) else []


def read(source: Whole, wanted: Wanted) -> list[Sample]:
    """Read lines whose files lie relative to the list."""
    assert isinstance(source, Path)  # noqa: S101 - `reads`
    try:
        lines = source.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not a list: expected text lines of {form(wanted)} ({error.reason})") from None
    first = lines[0].lower().split("\t") if lines else [""]
    headings = first if first[0] in HEADINGS else []
    group = headings.index(GROUP) if GROUP in headings else None
    if group is not None and group < wanted.contract.views + wanted.labelled:
        raise InputError(f"{source}:1: the column '{GROUP}' stands where {form(wanted)} belongs; put it after those")
    return [
        _sample(source, number, line, group, wanted)
        for number, line in enumerate(lines, start=1)
        if line.strip() and not (number == 1 and headings)
    ]


def _sample(source: Path, number: int, line: str, group: int | None, wanted: Wanted) -> Sample:
    cells, views = line.split("\t"), wanted.contract.views
    if len(cells) < views + wanted.labelled:
        raise InputError(f"{source}:{number}: expected {form(wanted)}, found {line!r}")
    pictures = tuple(sample.file(source.parent / name) for name in cells[:views])
    text = cells[views].strip() if len(cells) > views and group != views else ""
    shared = _cell(cells, group)
    if not text and not wanted.labelled:
        return Sample(pictures, (), group=shared)
    if wanted.task == "segmentation":
        return Sample(pictures, (), sample.mask_file(source.parent / text, wanted.classes), shared)
    found = labels.of_text(text, wanted.classes, wanted.task, f"{source}:{number}")
    return Sample(pictures, found, group=shared)


def _cell(cells: Sequence[str], place: int | None) -> str:
    return cells[place].strip() if place is not None and place < len(cells) else ""


def form(wanted: Wanted) -> str:
    """Say how a line of a list is written."""
    return "`" + (wanted.contract.views - 1) * "file<TAB>" + labels.WAYS[wanted.task].removeprefix("`")
