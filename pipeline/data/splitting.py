"""One source → which image is in which split: every class in proportion, what belongs together in one, and told."""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from bitferry.device.errors import InputError, first_line
from bitferry.pipeline import cache, progress
from bitferry.pipeline.data.sample import Sample
from bitferry.pipeline.data.source import Part, Sizes, title
from bitferry.pipeline.section import Section

NAMES = ("evaluation", "calibration", "train")
UNUSED = "unused"
MANIFEST = "split.json"


class Entry(Section):
    """Where one image went."""

    name: str
    """Of the image, for people."""
    sha256: tuple[str, ...]
    """Of each of its files, by which it is found again."""
    split: str
    labels: tuple[str, ...]
    group: str = ""


class Manifest(Section):
    """Which image is in which split."""

    schema_version: int = 1
    source: str
    sizes: Sizes
    images: tuple[Entry, ...]


@dataclass(frozen=True)
class _Unit:
    """Images that stay together: of one group, or the same."""

    rows: tuple[int, ...]
    labels: Counter[int]


def part(found: Sequence[Sample], made: Manifest, part_name: str) -> list[Sample]:
    """Give the samples of one split, in an order that the seed decides, so that the front of it is of every kind."""
    names = {entry.sha256: entry.split for entry in made.images}
    chosen = [one for one in found if names.get(tuple(one.sha256())) == part_name]
    order = np.random.default_rng(made.sizes.seed).permutation(len(chosen))
    return [chosen[i] for i in order]


def manifest(found: Sequence[Sample], source: Part, classes: Sequence[str]) -> Manifest:
    """Say where each sample goes: as the manifest that the recipe pins says, or by shares and seed."""
    if source.manifest is not None:
        pinned = read(source.manifest)
        _refuse_other(pinned, found, source, classes)
        return pinned
    names = assign(found, source.split)
    entries = (
        Entry(
            name=Path(one.views[0].source).name,
            sha256=tuple(one.sha256()),
            split=name,
            labels=tuple(classes[label] for label in one.labels),
            group=one.group,
        )
        for one, name in zip(found, names, strict=True)
    )
    return Manifest(source=Path(title(source)).name, sizes=source.split, images=tuple(entries))


def write(made: Manifest, folder: Path) -> Path:
    """Write the manifest into a folder, where it is not there already, and say what is in it."""
    cache.own(folder)
    path, text = folder / MANIFEST, made.model_dump_json(indent=1) + "\n"
    if not path.is_file() or path.read_text() != text:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(text)
        temporary.replace(path)
        counts = Counter(entry.split for entry in made.images)
        progress.stage("split", f"{', '.join(f'{counts[name]} {name}' for name in NAMES)} images: {path}")
    return path


def read(path: Path) -> Manifest:
    """Read a manifest that an earlier run wrote; raise InputError for anything else."""
    try:
        made = Manifest.model_validate(json.loads(path.read_text()))
    except (OSError, ValueError, RecursionError) as error:
        told = f"{error.error_count()} of its fields are wrong" if isinstance(error, ValidationError) else error
        reason = getattr(error, "strerror", None) or first_line(ValueError(told))
        raise InputError(f"data.manifest {path} is not a {MANIFEST} that bitferry wrote: {reason}") from error
    strange = {entry.split for entry in made.images} - {*NAMES, UNUSED}
    if strange or made.schema_version != 1:
        what = f"a split '{strange.pop()}'" if strange else f"schema_version {made.schema_version}"
        raise InputError(f"data.manifest {path} has {what}, which this version of bitferry does not know")
    return made


def _refuse_other(pinned: Manifest, found: Sequence[Sample], source: Part, classes: Sequence[str]) -> None:
    """Refuse a source that lacks images of its manifest, or gives them other labels; say which it has besides."""
    there = {tuple(one.sha256()): one for one in found}
    known = {entry.sha256: entry for entry in pinned.images}
    missing = [entry.name for digest, entry in known.items() if digest not in there]
    if missing:
        told = f"{len(missing)} of the {len(known)} images of {source.manifest} are not in {title(source)}"
        raise InputError(f"{told}, or changed since, for example {missing[0]}; make the split again without `manifest`")
    for digest, entry in known.items():
        labels = tuple(classes[label] for label in there[digest].labels)
        if labels != entry.labels:
            told = f"{entry.name} is labelled {', '.join(labels) or 'with nothing'}"
            raise InputError(f"{told}, in {source.manifest} {', '.join(entry.labels) or 'with nothing'}")
    if source.part == NAMES[0] and len(there) > len(known):
        extra = len(there) - len(known)
        progress.stage("split", f"{extra} images that {source.manifest} does not know are left out")


def assign(found: Sequence[Sample], sizes: Sizes) -> list[str]:
    """Name the split of each sample: every class in proportion, groups whole (Sechidis et al. 2011)."""
    counts = _counts(len(found), sizes)
    units = _units(found)
    order = np.random.default_rng(sizes.seed).permutation(len(units))
    units = sorted((units[i] for i in order), key=lambda unit: -len(unit.rows))  # the largest find room first
    chosen = _stratified(units, counts)
    names = [UNUSED] * len(found)
    for unit, place in zip(units, chosen, strict=True):
        for row in unit.rows:
            names[row] = (*NAMES, UNUSED)[place]
    empty = [name for name, count in zip(NAMES, counts, strict=False) if count and name not in names]
    if empty:
        told = f"{len(found)} images in {len(units)} groups that stay whole"
        raise InputError(f"data.split leaves no image for {empty[0]}: there are {told}; give more, or other sizes")
    return names


def _counts(total: int, sizes: Sizes) -> NDArray[np.float64]:
    """Give how many images each split is to have, and how many stay unused."""
    wanted = [float(one if one >= 1 else round(one * total)) for one in (sizes.evaluation, sizes.calibration)]
    left = total - sum(wanted)
    train = left if sizes.train is None else sizes.train if sizes.train >= 1 else float(round(sizes.train * total))
    if left < 0 or train > left:
        asked = int(sum(wanted) + (0 if sizes.train is None else train))
        raise InputError(f"data.split asks for {asked} images, and there are {total}; ask for fewer")
    return np.array([*wanted, train, left - train])


def _units(found: Sequence[Sample]) -> list[_Unit]:
    """Join the samples of one group, and those of the same content, which would be a leak anywhere else."""
    parent = list(range(len(found)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first: dict[tuple[str, ...], int] = {}
    for row, one in enumerate(found):
        keys = [("content", *one.sha256()), *([("group", one.group)] if one.group else [])]
        for key in keys:
            parent[root(row)] = root(first.setdefault(key, row))
    rows: dict[int, list[int]] = defaultdict(list)
    for row in range(len(found)):
        rows[root(row)].append(row)
    return [_Unit(tuple(some), Counter(label for row in some for label in found[row].labels)) for some in rows.values()]


def _stratified(units: Sequence[_Unit], counts: NDArray[np.float64]) -> list[int]:
    """Give each unit's place: the rarest label first, where most of it is still wanted and there is room."""
    of_label: dict[int, list[int]] = defaultdict(list)
    for index, unit in enumerate(units):
        for label in unit.labels:
            of_label[label].append(index)
    left = Counter({label: sum(units[i].labels[label] for i in some) for label, some in of_label.items()})
    wanted = {label: counts / counts.sum() * total for label, total in left.items()}
    room, places = counts.copy(), [-1] * len(units)

    def place(index: int, wish: NDArray[np.float64]) -> None:
        unit = units[index]
        fits = room >= min(len(unit.rows), room.max())
        best = max(range(len(counts)), key=lambda split: (fits[split], wish[split], room[split]))
        places[index] = best
        room[best] -= len(unit.rows)
        for label, count in unit.labels.items():
            wanted[label][best] -= count
            left[label] -= count

    while +left:
        rarest = min((+left).items(), key=lambda pair: (pair[1], pair[0]))[0]
        for index in of_label[rarest]:
            if places[index] < 0:
                place(index, wanted[rarest])
    for index in range(len(units)):
        if places[index] < 0:
            place(index, room)
    return places
