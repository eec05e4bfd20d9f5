"""Image bytes → uint8 array: the only implementation, used in calibration, verification and on the device."""

import hashlib
import io
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from device.arrays import Images
from device.errors import InputError

MOST_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs (twice its warning threshold)
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
Image.MAX_IMAGE_PIXELS = None  # `decode` has its own check, with a message that names the file


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
        return self._finish(decode(content, name))

    def fit(self, pixels: NDArray[np.uint8]) -> Images:
        """Turn raw pixels, H×W grey or H×W×3 RGB, into one H×W×3 array of the input size."""
        return self._finish(Image.fromarray(pixels).convert("RGB"))

    def _finish(self, image: Image.Image) -> Images:
        resample = RESAMPLING[self.interpolation]
        if self.resize is None:
            image = image.resize((self.width, self.height), resample)
        else:
            image = self._crop(image, self.resize, resample)
        array = np.asarray(image, dtype=np.uint8)
        return np.ascontiguousarray(array[..., ::-1]) if self.color == "BGR" else array

    def _crop(self, image: Image.Image, shorter: int, resample: Image.Resampling) -> Image.Image:
        """Resize the shorter side and crop the centre, rounding as torchvision's Resize and CenterCrop do."""
        longer = shorter * max(image.size) // min(image.size)
        size = (shorter, longer) if image.width <= image.height else (longer, shorter)
        left = round((size[0] - self.width) / 2)
        top = round((size[1] - self.height) / 2)
        return image.resize(size, resample).crop((left, top, left + self.width, top + self.height))


def decode(content: bytes, name: str) -> Image.Image:
    """Decode an image file to 8-bit RGB, upright by its EXIF orientation; alpha is dropped, 16-bit keeps its top 8."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise InputError(f"{name}: {image.width}×{image.height} pixels, more than the {MOST_PIXELS} allowed")
            upright = ImageOps.exif_transpose(image)
            return _eight_bits(upright, name).convert("RGB")
    except UnidentifiedImageError:
        raise InputError(f"{name}: not an image ({_seen(content)}); JPEG, PNG and other formats are read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{name}: a broken image ({error})") from error


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Keep the top 8 bits of 16-bit pixels; refuse pixels of no known range."""
    if image.mode not in ("F", "I") and not image.mode.startswith("I;16"):
        return image
    pixels = np.asarray(image)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
        raise InputError(f"{name}: pixels of mode {image.mode} have no fixed range; save it with 8 or 16 bits")
    return Image.fromarray((pixels.astype(np.uint32) >> 8).astype(np.uint8))


def _seen(content: bytes) -> str:
    if not content:
        return "the file is empty"
    return f"{len(content)} bytes that begin with {content[:12]!r}"
