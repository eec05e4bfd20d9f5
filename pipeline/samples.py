"""What a list or an array file holds, undecoded: the views of each answer, with a label or a mask."""

import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from device import preprocess
from device.errors import InputError
from device.preprocess import Preprocessing
from pipeline import labels
from pipeline.measure.metrics import Task

HEADINGS = ("file", "path", "image", "filename")
VIEWS_JOINED = " + "
SMALL, MOST_SHRUNK = 100_000_000, 200
"""Bytes of an array that is no harm however well it is compressed; how many times smaller a larger one may be."""


@dataclass(frozen=True)
class Picture:
    """One image or mask before decoding."""

    source: str
    form: str
    """How the bytes are to be read: `file`, or the shape of raw pixels. The same bytes in another shape are another
    picture."""
    content: Callable[[], bytes]
    """Its encoded bytes, or its raw pixels when it comes from an array."""
    decode: Callable[[bytes], Image.Image]
    """To RGB, upright; a mask to its class indices as grey."""


@dataclass(frozen=True)
class Sample:
    """What one answer is about, with the truth."""

    views: tuple[Picture, ...]
    labels: tuple[int, ...]
    """The indices of its classes: one, or for multi-label data any number; none where a mask tells."""
    mask: Picture | None = None

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return (*self.views, *([self.mask] if self.mask else []))

    @property
    def source(self) -> str:
        return VIEWS_JOINED.join(view.source for view in self.views)


def from_list(
    path: Path, classes: Sequence[str], contract: Preprocessing, task: Task, *, labelled: bool = True
) -> list[Sample]:
    """Read lines of files, relative to the list and one for each view, and a label or a mask, with tabs between."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        wanted = form(contract, task)
        raise InputError(f"{path} is not a list: expected text lines of {wanted} ({error.reason})") from None
    samples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (number == 1 and line.split("\t")[0].lower() in HEADINGS):
            continue
        cells = line.split("\t")
        if len(cells) < contract.views + labelled:
            raise InputError(f"{path}:{number}: expected {form(contract, task)}, found {line!r}")
        views = tuple(file(path.parent / name) for name in cells[: contract.views])
        text = cells[contract.views].strip() if len(cells) > contract.views else ""
        if not text and not labelled:
            samples.append(Sample(views, ()))
        elif task == "segmentation":
            samples.append(Sample(views, (), _mask_file(path.parent / text, classes)))
        else:
            samples.append(Sample(views, labels.of_text(text, classes, task, f"{path}:{number}")))
    return samples


def form(contract: Preprocessing, task: Task) -> str:
    """Say how a line of a list is written."""
    return "`" + (contract.views - 1) * "file<TAB>" + labels.WAYS[task].removeprefix("`")


def from_arrays(
    path: Path, classes: Sequence[str], contract: Preprocessing, task: Task, *, labelled: bool = True
) -> list[Sample]:
    """Read `images` (N×H×W grey or N×H×W×3 RGB, N×V×… of several views, uint8) and `labels` of an .npz file."""
    try:
        _refuse_bomb(path)
        with np.load(path, allow_pickle=False) as arrays:
            images, truth = arrays["images"], arrays["labels"] if labelled else None
    except (OSError, ValueError, TypeError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} is not an .npz with arrays `images` and `labels`: {error}") from error
    except MemoryError as error:
        raise InputError(f"{path} says that it holds more than this machine has memory for: {error}") from error
    views = () if contract.views == 1 else (contract.views,)
    size = images.shape[1 + len(views) :]
    shaped = images.shape[1 : 1 + len(views)] == views and (len(size) == 2 or size[2:] == (3,)) and 0 not in size
    if images.dtype != np.uint8 or not shaped:
        wanted = "N×H×W or N×H×W×3" if not views else f"N×{contract.views}×H×W or N×{contract.views}×H×W×3"
        raise InputError(f"{path}: expected `images` {wanted} uint8, found {images.dtype} {images.shape}")
    pictures = [
        tuple(_array_view(f"{path.name}[{i}]", view) for view in (image if views else image[None]))
        for i, image in enumerate(images)
    ]
    if truth is None:
        return [Sample(views, ()) for views in pictures]
    if task == "segmentation":
        return _with_masks(pictures, truth, (len(images), *size[:2]), classes, path)
    found = labels.of_array(truth, len(images), classes, path, task)
    return [Sample(views, label) for views, label in zip(pictures, found, strict=True)]


def _refuse_bomb(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.file_size > max(SMALL, MOST_SHRUNK * record.compress_size):
                raise InputError(
                    f"{path} is a decompression bomb: its {record.filename} has {record.compress_size} bytes and says "
                    f"that it unpacks to {record.file_size}; save the images as they are"
                )


def _with_masks(
    pictures: Sequence[tuple[Picture, ...]],
    masks: NDArray[Any],
    wanted: tuple[int, ...],
    classes: Sequence[str],
    path: Path,
) -> list[Sample]:
    if masks.shape != wanted or masks.dtype.kind not in "iub":
        found = f"{masks.dtype} {masks.shape}"
        raise InputError(f"{path}: expected `labels` of shape {wanted}, a class index for each pixel, found {found}")
    checked = [np.asarray(labels.mask(mask, f"{path.name}[{i}]", classes)) for i, mask in enumerate(masks)]
    return [
        Sample(views, (), _array_view(f"{path.name}[{i}]", mask, mode="L"))
        for i, (views, mask) in enumerate(zip(pictures, checked, strict=True))
    ]


def _array_view(source: str, pixels: NDArray[np.uint8], *, mode: str = "RGB") -> Picture:
    def decode(content: bytes) -> Image.Image:
        return Image.fromarray(np.frombuffer(content, np.uint8).reshape(pixels.shape)).convert(mode)

    return Picture(source, str(pixels.shape), pixels.tobytes, decode)


def file(path: Path) -> Picture:
    """Give an image file."""
    return Picture(str(path), "file", partial(_read, path), lambda content: preprocess.decode(content, str(path)))


def _mask_file(path: Path, classes: Sequence[str]) -> Picture:
    def decode(content: bytes) -> Image.Image:
        return labels.decode_mask(content, str(path), classes)

    return Picture(str(path), "file", partial(_read, path), decode)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(f"the image {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
