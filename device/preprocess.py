"""Image bytes → uint8 array: the only implementation, used in calibration, verification and on the device."""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from bitferry.device import mistaken
from bitferry.device.arrays import Images
from bitferry.device.errors import InputError

MOST_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs (twice its warning threshold)
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
Image.MAX_IMAGE_PIXELS = None  # `decode` has its own check, with a message that names the file
MOST_VIEWS = 16
File = TypeVar("File")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """The contract between an image file and the model.

    Decoding, orientation, colour, resizing and cropping happen here and give uint8. `scale`, `mean` and `std`
    are applied inside the exported graph: (pixel · scale − mean) / std, per channel in `color` order.
    """

    height: int
    width: int
    resize: int | None = None
    """Length in pixels the shorter side is resized to before the centre crop; None stretches to the input size."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    color: Literal["RGB", "BGR"] = "RGB"
    scale: float = 1 / 255
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    views: int = 1
    """Images that one answer is about, each preprocessed alike; the model takes them as so many arguments, in order."""

    def __post_init__(self) -> None:
        if not (0 < self.height <= 8192 and 0 < self.width <= 8192):
            raise ValueError(f"the input is {self.height}×{self.width} pixels; each side must be 1 to 8192")
        if self.resize is not None and not max(self.height, self.width) <= self.resize <= 16384:
            raise ValueError(
                f"resize = {self.resize} is not between the longer side of the crop "
                f"({max(self.height, self.width)}) and 16384"
            )
        if not self.scale > 0 or any(not s > 0 for s in self.std):
            raise ValueError(f"scale = {self.scale} and std = {list(self.std)} must be above zero")
        if not 1 <= self.views <= MOST_VIEWS:
            raise ValueError(f"views = {self.views} must be 1 to {MOST_VIEWS}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Give the shape of what one answer is about: H×W×3, or V×H×W×3 of several views."""
        return (self.height, self.width, 3) if self.views == 1 else (self.views, self.height, self.width, 3)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Preprocessing":
        """Rebuild the contract from a manifest's `preprocessing` entry."""
        try:
            return cls(**(fields | {"mean": tuple(fields["mean"]), "std": tuple(fields["std"])}))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"the manifest's preprocessing contract cannot be used: {error}") from error

    def sha256(self) -> str:
        """Hash the contract, so that a change in it shows."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def load(self, content: bytes, name: str) -> Images:
        """Turn the bytes of an image file into one H×W×3 array; `name` is for the message if they are broken."""
        return self.finish(decode(content, name))

    def read(self, paths: Sequence[Path]) -> Images:
        """Read the image files of one answer, one for each view, into what the model takes."""
        try:
            return self.join([self.load(path.read_bytes(), str(path)) for path in paths])
        except OSError as error:
            raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error

    def join(self, views: Sequence[Images]) -> Images:
        """Put the H×W×3 views of one answer together: of one view itself, of several V×H×W×3."""
        return views[0] if self.views == 1 else np.stack(views)

    def groups(self, files: Sequence[File]) -> list[Sequence[File]]:
        """Divide files into those of each answer, in order; raise InputError when some are left over."""
        if len(files) % self.views:
            raise InputError(
                f"this model looks at {self.views} images at a time; {len(files)} do not divide into those"
            )
        return [files[i : i + self.views] for i in range(0, len(files), self.views)]

    def fit(self, pixels: NDArray[np.uint8]) -> Images:
        """Turn raw pixels, H×W grey or H×W×3 RGB, into one H×W×3 array of the input size."""
        return self.finish(Image.fromarray(pixels).convert("RGB"))

    def finish(self, image: Image.Image) -> Images:
        """Resize and crop a decoded image into one H×W×3 array."""
        array = np.asarray(self.place(image, RESAMPLING[self.interpolation]), dtype=np.uint8)
        return np.ascontiguousarray(array[..., ::-1]) if self.color == "BGR" else array

    def place(self, image: Image.Image, resample: Image.Resampling) -> Image.Image:
        """Resize and crop, the crop rounded as torchvision's CenterCrop rounds it."""
        size = self._resized(image.size)
        if size[0] * size[1] > MOST_PIXELS:
            raise InputError(
                f"an image of {image.width}×{image.height} is too narrow: resized it has {size[0]}×{size[1]}"
            )
        left, top = round((size[0] - self.width) / 2), round((size[1] - self.height) / 2)
        return image.resize(size, resample).crop((left, top, left + self.width, top + self.height))

    def undo(self, array: NDArray[np.uint8], size: tuple[int, int], *, outside: int) -> NDArray[np.uint8]:
        """Put a map H×W of the input back over an image of `size` (width, height); `outside` where it was cropped."""
        whole = self._resized(size)
        left, top = round((whole[0] - self.width) / 2), round((whole[1] - self.height) / 2)
        canvas = Image.new("L", whole, outside)
        canvas.paste(Image.fromarray(array), (left, top))
        return np.asarray(canvas.resize(size, Image.Resampling.NEAREST))

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """Give the width and height before the crop, rounded as torchvision's Resize rounds them."""
        if self.resize is None:
            return self.width, self.height
        longer = self.resize * max(size) // min(size)
        return (self.resize, longer) if size[0] <= size[1] else (longer, self.resize)


def decode(content: bytes, name: str) -> Image.Image:
    """Decode an image file to 8-bit RGB, upright by its EXIF orientation; alpha is dropped, 16-bit keeps its top 8."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            refuse_large(image, name)
            _refuse_wide(image, name)
            return _eight_bits(ImageOps.exif_transpose(image), name).convert("RGB")
    except UnidentifiedImageError:
        raise InputError(f"{name}: not an image ({_seen(content)}); JPEG, PNG and other formats are read") from None
    except InputError:
        raise
    except Exception as error:  # Pillow's plugins raise anything
        raise InputError(f"{name}: a broken image ({error})") from error


def refuse_large(image: Image.Image, name: str) -> None:
    """Raise InputError for an image that is too large to decode."""
    if image.width * image.height > MOST_PIXELS:
        raise InputError(f"{name}: {image.width}×{image.height} pixels, more than the {MOST_PIXELS} allowed")


def _refuse_wide(image: Image.Image, name: str) -> None:
    """Raise InputError for pixels of 32 bits."""
    if image.mode == "I" and image.format == "TIFF":  # other formats use this mode for 16 bits
        raise InputError(f"{name}: pixels of 32 bits have no fixed range; save it with 8 or 16 bits")


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Keep the top 8 bits of 16-bit pixels; refuse pixels of no known range.

    How large they are is no fault here: a right camera may see the dark. A split of which none is large is refused.
    """
    if not _is_wide(image):
        return image
    pixels = np.asarray(image)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
        raise InputError(f"{name}: pixels of mode {image.mode} have no fixed range; save it with 8 or 16 bits")
    return Image.fromarray((pixels.astype(np.uint32) >> 8).astype(np.uint8))


def _is_wide(image: Image.Image) -> bool:
    return image.mode in ("F", "I") or image.mode.startswith("I;16")


def largest_of_16_bits(content: bytes) -> int | None:
    """Give the largest pixel of an image file that `decode` takes, where it has 16 bits; None where it has not."""
    with Image.open(io.BytesIO(content)) as image:
        return int(np.asarray(image).max()) if _is_wide(image) else None


def _seen(content: bytes) -> str:
    if not content:
        return "the file is empty"
    what = mistaken.told(content)
    return f"it is {what}" if what else f"{len(content)} bytes that begin with {content[:12]!r}"
