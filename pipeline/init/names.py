"""The names of a model's classes, in its order: from folders, a file, ImageNet's list, or just their number."""

import re
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from bitferry.device.errors import InputError
from bitferry.pipeline import progress
from bitferry.pipeline.init.pictures import Pictures

Classes = tuple[str, ...] | int | str
WNID = re.compile(r"n\d{8}")
"""What ImageNet calls a class."""


def of(classes: Classes) -> tuple[str, ...]:
    """Give the names themselves; of a file's path, its lines."""
    if isinstance(classes, int):
        return tuple(str(index) for index in range(classes))
    return tuple(Path(classes).read_text(encoding="utf-8").splitlines()) if isinstance(classes, str) else classes


def settle(found: Pictures, head: int | None, file: Path | None, stem: Path) -> tuple[Classes, Pictures]:
    """Bring the labels and the model's `head` together; raise InputError where their numbers differ.

    With a file of names, or ImageNet's, the images may be of fewer classes than the model knows.
    """
    names = _listed(file) if file else _imagenet(found, head)
    if names is not None:
        if head is not None and len(names) != head:
            raise InputError(f"{file} has {len(names)} names, and the model gives {head} scores; expected as many")
        return _kept(names, stem), _checked(_from_zero(found, len(names)), names)
    if found.classes is None:
        found = _from_zero(found, head)
        return _counted(found, head), found
    if head is not None and head != len(found.classes):
        raise InputError(_mismatch(found.classes, head))
    return found.classes, found


def _mismatch(names: Sequence[str], head: int) -> str:
    shown = ", ".join(names[:3]) + ("…" if len(names) > 3 else "")
    more = (
        "the model knows classes that have no images"
        if head > len(names)
        else "there are images of classes that the model does not know"
    )
    return (
        f"the model gives {head} scores, and the images are of {len(names)} classes ({shown}): {more}; give a text "
        f"file of its {head} class names in its order, one per line, with --classes, or "
        + ("images of all of them" if head > len(names) else "take the other folders away")
    )


def _from_zero(found: Pictures, count: int | None) -> Pictures:
    """Give labels that were counted from 1 to the number of classes counted from 0, and say so."""
    if found.classes is not None or found.task == "segmentation" or count is None or not _indices(found):
        return found
    labels = _indices(found)
    if (labels[0], labels[-1]) != (1, count):
        return found
    progress.stage("init", f"the labels are counted from 1 to {count}; in the lists they are counted from 0")
    return found.from_one()


def _indices(found: Pictures) -> list[int]:
    """Give the labels that are numbers, in order; nothing where some are none, or where they say yes or no."""
    if found.arrays:
        if found.task != "classification":
            return []
        return [int(label) for label in np.unique(np.concatenate([labels for _, labels in found.arrays.values()]))]
    words = {part.strip() for lines in found.lines.values() for _, label in lines for part in label.split("|")} - {""}
    return sorted(map(int, words)) if all(word.isdecimal() for word in words) else []


def _counted(found: Pictures, head: int | None) -> int:
    """Give how many classes there are where labels are indices or masks."""
    if found.arrays:
        labels = [labels for _, labels in found.arrays.values()]
        if found.task == "multilabel":
            count = int(labels[0].shape[1])
            if head not in (None, count):
                raise InputError(f"the labels are of {count} classes, and the model gives {head} scores")
            return count
        largest = max(
            int(one[one != 255].max(initial=0)) if found.task == "segmentation" else int(one.max()) for one in labels
        )
    else:
        words = [part for lines in found.lines.values() for _, label in lines for part in label.split("|")]
        largest = max((int(word) for word in words if word.isdecimal()), default=0)
    if head is None and found.task == "segmentation":
        raise InputError("masks do not say how many classes there are; name them with --classes, one per line")
    if head is not None and largest >= head:
        raise InputError(
            f"there is a label {largest}, and the model gives {head} scores, which are counted from 0; are the labels "
            "counted from 1, or those of another model?"
        )
    return head if head is not None else largest + 1


def _listed(file: Path) -> tuple[str, ...]:
    try:
        names = tuple(line.strip() for line in file.read_text(encoding="utf-8-sig").strip().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the class names {file} cannot be read: {error}") from error
    if len(names) < 2:
        raise InputError(f"{file} has {len(names)} names; expected two or more, one per line")
    return names


def _imagenet(found: Pictures, head: int | None) -> tuple[str, ...] | None:
    """Give ImageNet's 1000 classes where some folders are named like them; timm has the list."""
    names = found.classes or ()
    if head != 1000 or len(names) == 1000 or not names or not all(WNID.fullmatch(name) for name in names):
        return None
    if not find_spec("timm"):
        return None
    from timm.data.imagenet_info import ImageNetInfo  # noqa: PLC0415 - an optional package

    known = tuple(str(name) for name in ImageNetInfo().label_names())
    if not set(names) <= set(known):
        return None
    progress.stage("init", f"the {len(names)} folders are of ImageNet's 1000 classes, in its order")
    return known


def _checked(found: Pictures, names: Sequence[str]) -> Pictures:
    """Give what was found with all of the model's classes, of which every label must be one."""
    if found.classes is None:
        return found
    strange = [name for name in found.classes if name not in names]
    if strange:
        raise InputError(
            f"'{strange[0]}' is among the images' classes and not in the list of names; they must be alike"
        )
    return replace(found, classes=tuple(names))


def _kept(names: tuple[str, ...], stem: Path) -> Classes:
    """Write a long list of names to a file of its own."""
    if len(names) <= 50:
        return names
    path = stem.with_name(f"{stem.name}-classes.txt")
    path.write_text("\n".join(names) + "\n", encoding="utf-8")
    return str(path)
