"""torchvision's data sets by their name, from files as it lays them out; fetched only where that was asked for."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bitferry.device.errors import InputError, first_line
from bitferry.pipeline import progress
from bitferry.pipeline.data import labels
from bitferry.pipeline.data.sample import Picture, Sample, Wanted
from bitferry.pipeline.data.source import Table, Whole, title

UNSAFE = {"LSUN", "LSUNClass"}
"""What torchvision unpickles without a look at what it is."""
TARGETS = ("targets", "labels", "_labels", "y")
"""Where its classes keep all labels, so that no image is decoded for one."""


def reads(source: Whole) -> bool:
    """Take a table with `torchvision`."""
    return isinstance(source, Table) and source.torchvision is not None


def files(source: Whole) -> Iterable[Path]:
    """List the files below the root."""
    return some_files(source)


def some_files(source: Whole) -> list[Path]:
    """List every file below a table's root."""
    root = root_of(source) if isinstance(source, Table) else None
    return sorted(one for one in root.rglob("*") if one.is_file()) if root else []


def root_of(source: Table) -> Path:
    """Give the folder that holds its files."""
    return source.root or Path()


def read(source: Whole, wanted: Wanted) -> list[Sample]:
    """Give every image with its target; images that are files are decoded when they are wanted."""
    assert isinstance(source, Table)  # noqa: S101 - `reads`
    if wanted.contract.views > 1:
        raise InputError(f"{title(source)} has one image per answer, preprocessing.views = {wanted.contract.views}")
    opened = _opened(source, wanted)
    own, targets = _own(opened, source, wanted), _targets(opened)
    found = []
    for i in range(len(opened)):
        where = f"{source.torchvision}[{i}]"
        picture = Picture(where, "pixels", partial(_pixels, opened, i), _image)
        if wanted.task == "segmentation":
            found.append(Sample((picture,), (), _mask(where, opened, i, wanted.classes)))
            continue
        value = _value(opened[i][1] if targets is None else targets[i], len(wanted.classes), where)
        found.append(Sample((picture,), labels.of_value(value, own, wanted.classes, wanted.task, where)))
    return found


def _value(target: Any, classes: int, where: str) -> object:
    """Give a target as a plain index, name or list; 0 or 1 for each class as false or true."""
    value = target.tolist() if hasattr(target, "tolist") else target
    if isinstance(value, list) and len(value) == classes and set(value) <= {0, 1}:
        return [bool(one) for one in value]
    if not isinstance(value, int | str | list):
        told = f"expected the index of a class, found a {type(value).__name__}"
        raise InputError(f"{where}: {told}; this data set is not about classes")
    return value


def _opened(source: Table, wanted: Wanted) -> Any:
    try:
        return _made(source, download=False)
    except InputError:
        raise
    except (RuntimeError, OSError, ValueError, TypeError, KeyError, ModuleNotFoundError) as error:
        if "not found" not in str(error).lower() and not isinstance(error, FileNotFoundError):
            raise InputError(f"{title(source)} cannot be read: {first_line(error)}") from error
    download(source, wanted, "one of its files")
    return _made(source, download=False)


def _made(source: Table, *, download: bool) -> Any:
    from torchvision import datasets  # noqa: PLC0415 - seconds to import

    name = str(source.torchvision)
    if name not in datasets.__all__ or name in UNSAFE:
        why = "unpickles what it finds" if name in UNSAFE else "is none of torchvision's data sets"
        raise InputError(f"{name} {why}; write the images into shards, Parquet files or a folder")
    more = {"download": True} if download else {}
    return getattr(datasets, name)(str(root_of(source)), **source.options, **more)


def download(source: Table, wanted: Wanted, missing: str) -> None:
    """Fetch what torchvision can where --download was given; raise InputError else."""
    if not wanted.download:
        raise InputError(
            f"{title(source)} is not there ({missing} is missing); put its files there as torchvision lays them "
            "out, or let torchvision fetch them with --download"
        )
    progress.stage("data", f"torchvision fetches {source.torchvision} into {root_of(source)}")
    try:
        _made(source, download=True)
    except InputError:
        raise
    except Exception as error:  # the network, a full disk, a data set that cannot be fetched
        raise InputError(f"torchvision could not fetch {source.torchvision}: {first_line(error)}") from error


def _own(opened: Any, source: Table, wanted: Wanted) -> list[int] | None:
    names = getattr(opened, "classes", None)
    if wanted.task == "segmentation" or not isinstance(names, list | tuple):
        return None
    return labels.of_names([_plain(one) for one in names], wanted.classes, str(source.torchvision))


def _plain(name: object) -> str:
    """Give a class's name; ImageNet's are tuples of words for the same."""
    return str(name[0]) if isinstance(name, tuple) else str(name)


def _targets(opened: Any) -> Sequence[Any] | None:
    kept = (getattr(opened, name, None) for name in TARGETS)
    return next((one for one in kept if one is not None and len(one) == len(opened)), None)


def _pixels(opened: Any, index: int) -> bytes:
    try:
        image = opened[index][0]
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's, of a broken file
        raise InputError(f"image {index}: a broken image ({first_line(error)})") from error
    if not isinstance(image, Image.Image):
        raise InputError(f"image {index} is a {type(image).__name__}; expected a picture")
    return _packed(np.asarray(image.convert("RGB")))


def _mask(where: str, opened: Any, index: int, classes: Sequence[str]) -> Picture:
    def values() -> bytes:
        mask = opened[index][1]
        if not isinstance(mask, Image.Image):
            told = f"expected a mask, found a {type(mask).__name__}"
            raise InputError(f"{where}: {told}; this data set is not about segmentation")
        return _packed(np.asarray(labels.mask(np.asarray(mask), f"{where} mask", classes)))

    return Picture(f"{where} mask", "pixels", values, _image)


def _packed(array: NDArray[np.uint8]) -> bytes:
    """Give pixels with their shape before them: they are in no file of their own, which would tell it."""
    return " ".join(map(str, array.shape)).encode() + b"\n" + array.tobytes()


def _image(content: bytes) -> Image.Image:
    shape, _, body = content.partition(b"\n")
    return Image.fromarray(np.frombuffer(body, np.uint8).reshape([int(one) for one in shape.split()]))
