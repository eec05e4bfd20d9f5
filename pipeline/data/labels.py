"""What data says of each image: one class, any number of them, or a class for every pixel."""

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from bitferry.device.errors import InputError
from bitferry.device.pixels import IGNORED
from bitferry.device.preprocess import refuse_large
from bitferry.pipeline import progress
from bitferry.pipeline.data.split import Labels
from bitferry.pipeline.measure.metrics import Task

Found = tuple[int, ...]
"""The indices of an image's classes."""
LOSSY = ("JPEG", "MPO", "WEBP", "AVIF")
WAYS: dict[Task, str] = {
    "classification": "`file<TAB>label`",
    "multilabel": "`file<TAB>A|B`, nothing after the tab for no label",
    "segmentation": "`file<TAB>mask.png`",
}
"""How a line of a list is written for each task; of several views, one file each before the last."""
FOLDER_HINTS: dict[Task, str] = {
    "multilabel": "whose layout can name only one class per image; for task 'multilabel' give a list of "
    "`file<TAB>A|B` lines, or an .npz with `labels` N×K of 0 and 1",
    "segmentation": "whose layout can name only one class per image; for task 'segmentation' give a list of "
    "`file<TAB>mask.png` lines, or an .npz with `labels` N×H×W",
}


def of_text(text: str, classes: Sequence[str], task: Task, where: str) -> tuple[int, ...]:
    """Read a list's label: an index or a class name; for multi-label data any number with `|` between."""
    parts = [text] if task == "classification" else [part.strip() for part in text.split("|") if text]
    return tuple(_label(part, classes, where) for part in parts)


def of_folders(names: Sequence[str], classes: Sequence[str], root: Path) -> list[int]:
    """Match folders with classes by name; where none matches but the counts agree, by sorted order (torchvision)."""
    unnamed = f"{root}: no folder is named like a class; taken in sorted order"
    return _matched(names, classes, f"{root} has folders that are", unnamed)


def of_names(names: Sequence[str], classes: Sequence[str], where: str) -> list[int]:
    """Match a data set's own names of its classes with the recipe's, in its order where none is known by name."""
    unnamed = f"{where}: no class has a name of the recipe's; taken in its order"
    return _matched(names, classes, f"{where} has classes that are", unnamed)


def _matched(names: Sequence[str], classes: Sequence[str], strangers: str, unnamed: str) -> list[int]:
    strange = [name for name in names if name not in classes]
    if not strange:
        return [_by_name(name, classes) for name in names]
    if len(strange) == len(names) == len(classes):
        progress.stage("data", unnamed)
        return list(range(len(names)))
    raise InputError(f"{strangers} no class of this recipe: {_some(strange)}; the classes are {_some(classes)}")


def of_value(value: object, own: Sequence[int] | None, classes: Sequence[str], task: Task, where: str) -> Found:
    """Read a record's label: an index, a name, or for multi-label data a list of either, or K of true and false.

    `own` gives the recipe's class for each index of the data set's, where it has names of its own.
    """
    if isinstance(value, str):
        return of_text(value, classes, task, where)
    values: list[Any] = list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
    if task == "multilabel" and _of_each_class(values, classes, where):
        if strange := sorted({float(one) for one in values} - {0.0, 1.0}):
            raise InputError(f"{where}: expected a 0 or 1 for each class, found {strange[0]:g}")
        return tuple(index for index, one in enumerate(values) if one)
    if task == "classification" and len(values) != 1:
        hint = '; for several labels per image set task = "multilabel"' if values else ""
        raise InputError(f"{where}: expected one label, found {len(values)}{hint}")
    return tuple(_of_one(one, own, classes, where) for one in values)


def _of_each_class(values: Sequence[object], classes: Sequence[str], where: str) -> bool:
    """Say whether a list has 0 or 1 for each class; it is of indices where these differ, or are of other types."""
    if len(values) != len(classes) or all(isinstance(one, bool | float) for one in values):
        return len(values) == len(classes)
    if not all(type(one) is int and one in (0, 1) for one in values):
        return False
    if len(values) == len(set(values)) == 2:
        raise InputError(f"{where}: {values} may be indices, or 0 and 1 for each class; write true and false, or names")
    return len(set(values)) < len(values)


def _of_one(value: object, own: Sequence[int] | None, classes: Sequence[str], where: str) -> int:
    if isinstance(value, str):
        return _label(value, classes, where)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{where}: expected the index or the name of a class, found {value!r}")
    if not 0 <= value < len(classes if own is None else own):
        known = len(classes if own is None else own)
        raise InputError(f"{where}: label {value} is out of range; there are {known} classes, counted from 0")
    return value if own is None else own[value]


def of_array(
    labels: NDArray[Any], images: int, classes: Sequence[str], path: Path, task: Task
) -> list[tuple[int, ...]]:
    """Read N integers, or for multi-label data N×K of 0 and 1, as the classes of each image."""
    found = f"found {labels.dtype} {labels.shape}"
    if task == "multilabel":
        wanted = (images, len(classes))
        if labels.shape != wanted or labels.dtype.kind not in "iub":
            raise InputError(f"{path}: expected `labels` of shape {wanted}, 0 or 1 for each class, {found}")
        strange = sorted(set(np.unique(labels).tolist()) - {0, 1})
        if strange:
            raise InputError(f"{path}: expected `labels` of 0 and 1 only, found {_some([str(v) for v in strange])}")
        return [tuple(np.flatnonzero(row).tolist()) for row in labels]
    if labels.shape != (images,) or labels.dtype.kind not in "iu":
        hint = {2: '; for several labels per image set task = "multilabel"'}.get(labels.ndim, "")
        hint = '; for a class for every pixel set task = "segmentation"' if labels.ndim == 3 else hint
        raise InputError(f"{path}: expected `labels` of {images} integers, {found}{hint}")
    _refuse_strange(labels.astype(np.int64), classes, path)
    return [(label,) for label in labels.tolist()]


def gathered(labels: Sequence[tuple[int, ...]], classes: int, task: Task) -> Labels:
    """Put the labels of all images together: N, or for multi-label data N×K of 0 and 1."""
    if task == "classification":
        return np.array([one[0] for one in labels], dtype=np.int64)
    found = np.zeros((len(labels), classes), dtype=np.int64)
    for row, one in zip(found, labels, strict=True):
        row[list(one)] = 1
    return found


def decode_mask(content: bytes, name: str, classes: Sequence[str]) -> Image.Image:
    """Decode a mask, an indexed or grey image file, to 8-bit grey: a class index for each pixel, 255 for none."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            refuse_large(image, f"the mask {name}")
            kind, mode = image.format, image.mode
            values = np.asarray(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"the mask {name} cannot be read: {error}") from error
    if kind in LOSSY:
        raise InputError(f"the mask {name} is a {kind} file, which does not keep the values; save it as PNG")
    if values.ndim != 2 or mode == "F":
        raise InputError(
            f"the mask {name} has pixels of mode {mode}; expected an indexed or grey PNG whose values are class indices"
        )
    return mask(values, name, classes)


def mask(values: NDArray[Any], name: str, classes: Sequence[str]) -> Image.Image:
    """Make sure that H×W values are class indices or 255, and give them as 8-bit grey."""
    found = np.unique(values)
    strange = found[(found < 0) | ((found >= len(classes)) & (found != IGNORED))]
    if len(strange):
        raise InputError(
            f"the mask {name} has values that are no class ({_some([str(v) for v in strange])}); there are "
            f"{len(classes)} classes, counted from 0, and {IGNORED} marks pixels that do not count"
        )
    return Image.fromarray(values.astype(np.uint8))


def refuse_unmarked(masks: NDArray[np.uint8], name: str, classes: Sequence[str]) -> None:
    """Refuse masks N×H×W of 0 and 255, which a tool wrote that means a class by 255, or of 255 alone."""
    found = set(np.flatnonzero(sum(np.bincount(one.ravel(), minlength=256) for one in masks)).tolist())
    if IGNORED in found and len(found) <= 2:
        only = f"is of class '{classes[min(found)]}'" if len(found) == 2 else "is left"
        raise InputError(
            f"in the {name} masks every pixel that counts {only}, the others being {IGNORED}, which marks pixels that "
            f"do not count; write each class as its index, 0 to {len(classes) - 1}"
        )


def _label(text: str, classes: Sequence[str], where: str) -> int:
    if text in classes:
        return _by_name(text, classes)
    if not text.isdecimal():
        hint = '; for several labels per image set task = "multilabel"' if "|" in text else ""
        raise InputError(f"{where}: '{text}' is neither a class of this recipe ({_some(classes)}) nor an index{hint}")
    if int(text) >= len(classes):
        raise InputError(f"{where}: label {text} is out of range; there are {len(classes)} classes, counted from 0")
    return int(text)


def _by_name(name: str, classes: Sequence[str]) -> int:
    if classes.count(name) > 1:
        raise InputError(
            f"the class name '{name}' stands for {classes.count(name)} classes; use indices in a list file"
        )
    return classes.index(name)


def _refuse_strange(labels: Labels, classes: Sequence[str], path: Path) -> None:
    strange = Counter(labels[(labels < 0) | (labels >= len(classes))].tolist())
    if strange:
        found = ", ".join(str(label) for label in sorted(strange)[:5])
        raise InputError(f"{path}: labels out of range ({found}); there are {len(classes)} classes, counted from 0")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
