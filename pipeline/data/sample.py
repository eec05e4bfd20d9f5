"""One answer's images, undecoded, with the truth; and what is asked of every format that gives them."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bitferry.device import preprocess
from bitferry.device.errors import InputError
from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline.data import labels
from bitferry.pipeline.measure.metrics import Task

VIEWS_JOINED = " + "
UNREADABLE = "unreadable"
"""In place of the hash of a file that cannot be read."""
RECENT = 1 << 20
"""Files whose hash is remembered, as long as their size and time stay."""


@dataclass(frozen=True)
class Wanted:
    """What is asked of a source."""

    classes: Sequence[str]
    contract: Preprocessing
    task: Task
    labelled: bool = True
    """Whether the labels are needed; without, they are read where there are any."""
    download: bool = False
    """Whether torchvision may fetch what is not there."""


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
    path: Path | None = None
    """The file that holds it and nothing else, where there is one."""

    def sha256(self) -> str:
        """Hash the content; what cannot be read has no hash, and is told when it is decoded."""
        try:
            if self.path is not None:
                found = self.path.stat()
                return _file_sha256(self.path, found.st_size, found.st_mtime_ns)
            return hashlib.sha256(self.content()).hexdigest()
        except (OSError, InputError, ValueError):  # ValueError: a NUL in the name
            return UNREADABLE


@lru_cache(RECENT)
def _file_sha256(path: Path, size: int, time_ns: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Sample:
    """What one answer is about, with the truth."""

    views: tuple[Picture, ...]
    labels: tuple[int, ...]
    """The indices of its classes: one, or for multi-label data any number; none where a mask tells."""
    mask: Picture | None = None
    group: str = ""
    """What it shares with others that must not be in another split, as a patient; empty where nothing is said."""

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return (*self.views, *([self.mask] if self.mask else []))

    @property
    def source(self) -> str:
        return VIEWS_JOINED.join(view.source for view in self.views)

    def sha256(self) -> list[str]:
        """Hash each of its pictures."""
        return [picture.sha256() for picture in self.pictures]


def file(path: Path) -> Picture:
    """Give an image file."""
    return encoded(str(path), partial(_read, path), path=path)


def mask_file(path: Path, classes: Sequence[str]) -> Picture:
    """Give a mask file."""
    return encoded_mask(str(path), partial(_read, path), classes, path=path)


def encoded(source: str, content: Callable[[], bytes], *, path: Path | None = None) -> Picture:
    """Give an encoded image, in a file of its own or elsewhere."""
    return Picture(source, "file", content, lambda found: preprocess.decode(found, source), path)


def encoded_mask(
    source: str, content: Callable[[], bytes], classes: Sequence[str], *, path: Path | None = None
) -> Picture:
    """Give an encoded mask."""
    return Picture(source, "file", content, lambda found: labels.decode_mask(found, source, classes), path)


def pixels(source: str, array: NDArray[np.uint8], *, mode: str = "RGB") -> Picture:
    """Give an array H×W or H×W×3 as a picture."""

    def decode(content: bytes) -> Image.Image:
        return Image.fromarray(np.frombuffer(content, np.uint8).reshape(array.shape)).convert(mode)

    return Picture(source, str(array.shape), array.tobytes, decode)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(f"the image {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
