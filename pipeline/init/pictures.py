"""What labelled images somebody has, in whatever layout, → a list or array file for each split."""

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from bitferry.device.errors import InputError
from bitferry.pipeline import cache
from bitferry.pipeline.data.formats.folder import ENDINGS, image_files
from bitferry.pipeline.init import tables
from bitferry.pipeline.measure.metrics import Task

CALIBRATION_SHARE, MOST_CALIBRATION = 0.25, 512
TRAIN, JUDGED = ("train", "training"), ("test", "val", "valid", "validation")
"""Folders of an image folder that was divided already; the first of the latter that has labels is judged on."""
PAIRS = (("images", "masks"), ("images", "labels"), ("images", "annotations"), ("JPEGImages", "SegmentationClass"),
         ("image", "mask"), ("img", "mask"))  # fmt: skip
MASK_ENDS = ("", "_mask", "-mask", "_label", "_seg")
OTHERS = (
    "train/ and val/ of such, images/ and masks/, a list of file<TAB>label lines, or an .npz with images and labels"
)
LAYOUTS = f"expected a folder with one folder of images per class, {OTHERS}"
T = TypeVar("T")
Line = tuple[Path, str]
"""An image and its label, or its mask."""


@dataclass(frozen=True)
class Pictures:
    """Labelled images, undecoded, in splits that share none."""

    task: Task
    classes: tuple[str, ...] | None
    """In order; None where the labels are indices."""
    lines: Mapping[str, Sequence[Line]]
    """By split; empty for an `.npz`."""
    arrays: Mapping[str, tuple[NDArray[np.uint8], NDArray[np.integer]]]
    """By split: images and labels of an `.npz`."""
    told: str
    """What was found, for a person."""

    def from_one(self) -> "Pictures":
        """Give the same with labels counted from 0 where they were counted from 1."""
        lines = {name: [(path, _one_less(label)) for path, label in part] for name, part in self.lines.items()}
        arrays = {name: (images, labels - 1) for name, (images, labels) in self.arrays.items()}
        return replace(self, lines=lines, arrays=arrays)

    def write(self, stem: Path) -> dict[str, Path]:
        """Write a file for each split, `<stem>-<split>.tsv` or `.npz`, and give them by split."""
        written = {}
        for name, lines in self.lines.items():
            written[name] = stem.with_name(f"{stem.name}-{name}.tsv")
            rows = "".join(f"{path.resolve()}\t{label}\n" for path, label in lines)
            written[name].write_text("file\tlabel\n" + rows, encoding="utf-8")
        for name, (images, labels) in self.arrays.items():
            written[name] = stem.with_name(f"{stem.name}-{name}.npz")
            np.savez(written[name], images=images, labels=labels)
        return written


def find(given: Path) -> Pictures:
    """Tell what `given` holds; raise InputError when it is no layout that is known."""
    if given.suffix == ".npz" and given.is_file():
        return _of_arrays(given)
    if given.is_file():
        return _of_list(given)
    if not given.is_dir():
        raise InputError(f"the image folder {given} does not exist")
    inside = {path.name.lower(): path for path in sorted(given.iterdir()) if path.is_dir()}
    train = next((inside[name] for name in TRAIN if name in inside), None)
    judged = [inside[name] for name in JUDGED if name in inside]
    if train and judged:
        return _divided(train, judged)
    pairs = masked(given)
    if pairs:
        lines = _split({"": pairs}, given)
        return Pictures("segmentation", None, lines, {}, f"{len(pairs)} images, each with its mask")
    found = _of_classes(given)
    told = f"{len(found)} class folders, {sum(map(len, found.values()))} images"
    return Pictures("classification", tuple(found), _split(_labelled(found), given), {}, told)


def _one_less(label: str) -> str:
    return "|".join(str(int(part) - 1) for part in label.split("|") if part.strip())


def masked(folder: Path) -> list[Line]:
    """Pair images with masks: in two folders side by side, or as `a.jpg` with `a.png` or `a_mask.png`."""
    names = {path.name: path for path in folder.iterdir() if path.is_dir()}
    for images, masks in PAIRS:
        if images in names and masks in names:
            beside = {path.stem: path for path in image_files(names[masks])}
            return _paired(image_files(names[images]), beside)
    files = [path for path in image_files(folder) if path.parent == folder]
    masks_here = {path.stem: path for path in files if path.suffix.lower() == ".png"}
    return _paired([path for path in files if path not in set(masks_here.values())], masks_here) or _paired(
        [path for path in files if not path.stem.endswith(MASK_ENDS[1:])], masks_here
    )


def _paired(images: Sequence[Path], masks: Mapping[str, Path]) -> list[Line]:
    found = [(path, next((masks[path.stem + end] for end in MASK_ENDS if path.stem + end in masks), None))
             for path in images]  # fmt: skip
    return [(path, str(mask.resolve())) for path, mask in found if mask is not None and mask != path]


def _of_classes(folder: Path) -> dict[str, list[Path]]:
    """Give the images of each class folder, a copy of another left out: in another split it would be a leak."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    if len(names) < 2:
        raise InputError(
            f"{folder} has {len(names)} class folders; expected at least two, each with images, or {OTHERS}"
        )
    found = {name: image_files(folder / name) for name in names}
    empty = [name for name, files in found.items() if not files]
    if empty:
        raise InputError(f"{folder / empty[0]} has 0 images; expected one or more in the folder of each class")
    copies = _copies([path for files in found.values() for path in files])
    return {name: [path for path in files if path not in copies] for name, files in found.items()}


def _copies(files: Sequence[Path]) -> set[Path]:
    """Give the files whose bytes an earlier one has, hashing only those of one size."""
    sizes = defaultdict[int, list[Path]](list)
    for path in files:
        sizes[path.stat().st_size].append(path)
    seen, copies = set[str](), set[Path]()
    for path in (path for same in sizes.values() if len(same) > 1 for path in same):
        digest = cache.file_hash(path)
        copies |= {path} if digest in seen else set()
        seen.add(digest)
    return copies


def _labelled(found: Mapping[str, Sequence[Path]]) -> dict[str, list[Line]]:
    return {name: [(path, name) for path in files] for name, files in found.items()}


def _split(groups: Mapping[str, Sequence[Line]], source: Path) -> dict[str, list[Line]]:
    """Take a quarter of each group, seeded, for calibration and the rest for evaluation."""
    total = sum(map(len, groups.values()))
    if total < 2:
        raise InputError(f"{source} has {total} labelled images; expected two or more, for two lists")
    parts: dict[str, list[Line]] = {"calibration": [], "evaluation": []}
    for number, (lines, classes) in enumerate(_pooled([list(lines) for lines in groups.values()])):
        mixed = sorted(lines)
        random.Random(number).shuffle(mixed)  # noqa: S311 - a split, not a secret
        count = _share(len(mixed), len(groups), classes)
        parts["calibration"] += mixed[:count]
        parts["evaluation"] += mixed[count:]
    return parts


def _pooled(groups: Sequence[list[T]]) -> Iterator[tuple[list[T], int]]:
    """Give each group and how many classes it is of; those of one image, which none can be taken of, are one group."""
    several = [members for members in groups if len(members) > 1]
    yield from ((members, 1) for members in several)
    single = [member for members in groups if len(members) == 1 for member in members]
    if single:
        yield single, len(single)


def _share(images: int, groups: int, classes: int = 1) -> int:
    most = -(-MOST_CALIBRATION * classes // groups)
    return min(images - 1, max(1, min(int(images * CALIBRATION_SHARE), most)))


def _divided(train: Path, judged: Sequence[Path]) -> Pictures:
    """Take calibration images out of the training ones, and judge on the others."""
    pairs = masked(train)
    chosen = next((one for one in judged if masked(one) or any(path.is_dir() for path in one.iterdir())), judged[0])
    if pairs:
        parts, classes = _split({"": pairs}, train), None
        judged_lines = masked(chosen)
        task: Task = "segmentation"
    else:
        found, other = _of_classes(train), _of_classes(chosen)
        strange = sorted(set(found) ^ set(other))
        if strange:
            raise InputError(f"{train} and {chosen} have different class folders, as '{strange[0]}'; rename them alike")
        parts, classes, task = _split(_labelled(found), train), tuple(found), "classification"
        judged_lines = [line for lines in _labelled(other).values() for line in lines]
    if not judged_lines:
        raise InputError(f"{chosen} has no labelled images; {LAYOUTS}")
    lines = {"train": parts["evaluation"], "calibration": parts["calibration"], "evaluation": judged_lines}
    told = f"{len(lines['train'])} training images, {len(lines['calibration'])} of {train.name}/ for calibration"
    return Pictures(task, classes, lines, {}, f"{told}, {len(judged_lines)} of {chosen.name}/ to judge on")


def _of_list(path: Path) -> Pictures:
    """Read `file<TAB>label` lines: classes, several with `|` between, or masks."""
    lines = [(path.parent / file, label) for file, label in tables.read(path, LAYOUTS)]
    texts = {label for _, label in lines}
    if all(Path(text).suffix.lower() in ENDINGS for text in texts):
        return _listed(
            "segmentation", None, [(file, str((path.parent / mask).resolve())) for file, mask in lines], path
        )
    several = any("|" in text or not text for text in texts)
    names = {part.strip() for text in texts for part in text.split("|") if part.strip()}
    classes = None if all(re.fullmatch(r"\d+", name) for name in names) else tuple(sorted(names))
    return _listed("multilabel" if several else "classification", classes, lines, path)


def _listed(task: Task, classes: tuple[str, ...] | None, lines: Sequence[Line], path: Path) -> Pictures:
    groups = defaultdict[str, list[Line]](list)
    for file, label in lines:
        groups[label if task == "classification" else ""].append((file, label))
    return Pictures(task, classes, _split(groups, path), {}, f"a list of {len(lines)} images")


def _of_arrays(path: Path) -> Pictures:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    except Exception as error:  # a broken archive makes NumPy raise a dozen kinds
        raise InputError(f"{path} is not an .npz with arrays `images` and `labels`: {error}") from error
    if len(images) != len(labels) or len(images) < 2:
        raise InputError(f"{path} has {len(images)} images and {len(labels)} labels; expected two or more, as many")
    tasks: dict[int, Task] = {1: "classification", 2: "multilabel"}
    task = tasks.get(labels.ndim, "segmentation")
    kinds = np.unique(labels).tolist() if labels.ndim == 1 else []
    groups = [np.flatnonzero(labels == label).tolist() for label in kinds] or [list(range(len(images)))]
    chosen: list[int] = []
    for number, (members, classes) in enumerate(_pooled(groups)):
        random.Random(number).shuffle(members)  # noqa: S311 - a split, not a secret
        chosen += members[: _share(len(members), len(groups), classes)]
    held = np.zeros(len(images), bool)
    held[chosen] = True
    parts = {"calibration": (images[held], labels[held]), "evaluation": (images[~held], labels[~held])}
    return Pictures(task, None, {}, parts, f"{len(images)} images in an array file")
