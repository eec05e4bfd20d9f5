"""NumPy arrays: an .npz with `images` and `labels`, or two .npy files; nothing in them is ever unpickled."""

import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitferry.device.errors import InputError
from bitferry.pipeline.data import labels, sample
from bitferry.pipeline.data.sample import Picture, Sample, Wanted
from bitferry.pipeline.data.source import Table, Whole, title

SMALL, MOST_SHRUNK = 100_000_000, 200
"""Bytes of an array that is no harm however well it is compressed; how many times smaller a larger one may be."""
GROUPS = "groups"
FAULTS = (OSError, ValueError, TypeError, EOFError, RuntimeError, SyntaxError, OverflowError, tokenize.TokenError)
"""What NumPy raises of a damaged array, whose head it reads as Python's own notation."""


def reads(source: Whole) -> bool:
    """Take an .npz or .npy file, or a table with `images`."""
    if isinstance(source, Table):
        return source.images is not None
    return source.suffix in (".npz", ".npy") and source.is_file()


def files(source: Whole) -> Iterable[Path]:
    """Give the files of the arrays."""
    named = [source.images, source.labels] if isinstance(source, Table) else [source]
    return [path for path in named if path is not None]


def read(source: Whole, wanted: Wanted) -> list[Sample]:
    """Read `images` (N×H×W grey or N×H×W×3 RGB, N×V×… of several views, uint8), `labels` and any `groups`."""
    where = Path(title(source))
    arrays = _packed(source, wanted) if isinstance(source, Path) else _pair(source, wanted)
    images, truth = arrays["images"], arrays.get("labels")
    views = wanted.contract.views
    size = images.shape[1 + (views > 1) :]
    shaped = images.shape[1 : 1 + (views > 1)] == (views,) * (views > 1)
    if images.dtype != np.uint8 or not shaped or not (len(size) == 2 or size[2:] == (3,)) or 0 in size:
        form = "N×H×W or N×H×W×3" if views == 1 else f"N×{views}×H×W or N×{views}×H×W×3"
        raise InputError(f"{where}: expected `images` {form} uint8, found {images.dtype} {images.shape}")
    pictures = [
        tuple(sample.pixels(f"{where.name}[{i}]", view) for view in (image if views > 1 else image[None]))
        for i, image in enumerate(images)
    ]
    groups = _groups(arrays.get(GROUPS), len(images), where)
    if truth is None:
        return [Sample(views, (), group=group) for views, group in zip(pictures, groups, strict=True)]
    if wanted.task == "segmentation":
        masks = _masks(truth, (len(images), *size[:2]), wanted.classes, where)
        return [Sample(views, (), mask, group) for views, mask, group in zip(pictures, masks, groups, strict=True)]
    found = labels.of_array(truth, len(images), wanted.classes, where, wanted.task)
    return [Sample(*three[:2], group=three[2]) for three in zip(pictures, found, groups, strict=True)]


def _packed(path: Path, wanted: Wanted) -> dict[str, NDArray[Any]]:
    if path.suffix == ".npy":
        if wanted.labelled:
            raise InputError(
                f'{path} holds images without labels; write {{images = "{path.name}", labels = "….npy"}}, or an .npz'
            )
        return {"images": _array(path)}
    try:
        _refuse_bomb(path)
        with np.load(path, allow_pickle=False) as arrays:
            optional = [GROUPS] if GROUPS in arrays else []
            return {name: arrays[name] for name in ["images", *(["labels"] if wanted.labelled else []), *optional]}
    except (*FAULTS, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} is not an .npz with arrays `images` and `labels`: {error}") from error
    except MemoryError as error:
        raise InputError(f"{path} says that it holds more than this machine has memory for: {error}") from error


def _pair(source: Table, wanted: Wanted) -> dict[str, NDArray[Any]]:
    if source.labels is None and wanted.labelled:
        raise InputError(f"{source.images} holds images without labels; name their .npy file as `labels` beside it")
    labelled = wanted.labelled and source.labels is not None
    return {name: _array(Path(getattr(source, name))) for name in ["images", *(["labels"] if labelled else [])]}


def _array(path: Path) -> NDArray[Any]:
    """Map an .npy file, so that only what is looked at is read."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except FAULTS as error:
        raise InputError(f"{path} is not an .npy array: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(found, np.ndarray):
        raise InputError(f"{path} is not an .npy array; an .npz is named by its path alone")
    return found


def _refuse_bomb(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.file_size > max(SMALL, MOST_SHRUNK * record.compress_size):
                raise InputError(
                    f"{path} is a decompression bomb: its {record.filename} has {record.compress_size} bytes and says "
                    f"that it unpacks to {record.file_size}; save the images as they are"
                )


def _groups(groups: NDArray[Any] | None, images: int, where: Path) -> list[str]:
    if groups is None:
        return [""] * images
    if groups.shape != (images,) or groups.dtype.kind not in "iuUS":
        told = f"found {groups.dtype} {groups.shape}"
        raise InputError(f"{where}: expected `groups` of {images} numbers or names, {told}")
    return [str(one) for one in groups.tolist()]


def _masks(masks: NDArray[Any], wanted: tuple[int, ...], classes: Sequence[str], path: Path) -> list[Picture]:
    if masks.shape != wanted or masks.dtype.kind not in "iub":
        found = f"{masks.dtype} {masks.shape}"
        raise InputError(f"{path}: expected `labels` of shape {wanted}, a class index for each pixel, found {found}")
    checked = [np.asarray(labels.mask(mask, f"{path.name}[{i}]", classes)) for i, mask in enumerate(masks)]
    return [sample.pixels(f"{path.name}[{i}]", mask, mode="L") for i, mask in enumerate(checked)]
