"""Calibration images in an order of their own, and divided: what some of them make, others judge.

The order is that of a hash of each image's pixels. So the same images in another list give the same int8 program, a
folder that is sorted by class comes mixed, and the first N are drawn evenly. Copies of an image count once.
"""

import hashlib
from collections.abc import Sized
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitferry.device.arrays import Images, Outputs
from bitferry.device.errors import InputError

LEAST, MOST = 128, 256
"""Validation images: half of what is given up to the first, a quarter up to the second."""
PIXELS = 6_400_000
"""Of the validation images together, above `LEAST` of them: every step that is judged runs them all."""
FEWEST = 16
"""Validation images, and images to fit on, below which nothing is chosen by comparison."""

SEEN = ", which the ranges have seen"
"""Said of validation images once the ranges are of these as well."""


class NotFinite(InputError):
    """The float model answers an image with NaN or infinity; told by its pixels, as the list's order is given up."""

    def __init__(self, image: Images) -> None:
        super().__init__("the float model's scores of a calibration image are not finite")
        self.image = image


@dataclass(frozen=True)
class Division:
    """Positions in the list of calibration images, each in the order of the hashes."""

    fitting: NDArray[np.int64]
    validation: NDArray[np.int64]
    """Empty where there are too few images to divide; all of them are then fitted on."""
    copies: int
    """Images that are the same, byte for byte, as another one, and left out."""

    def __str__(self) -> str:
        copies = f"; copies left out: {self.copies}" if self.copies else ""
        if len(self.validation):
            return f"{len(self.fitting)} calibration images to fit on, {len(self.validation)} to validate{copies}"
        return (
            f"{len(self.fitting)} calibration images, all to fit on: fewer than {2 * FEWEST} are too few to choose by "
            f"comparison{copies}"
        )


def order(images: Images) -> NDArray[np.int64]:
    """Sort the positions of N images of any shape by a hash of their bytes; of equal images only one is kept."""
    places: dict[bytes, int] = {}
    for place, image in enumerate(images):
        places.setdefault(hashlib.sha256(image.tobytes()).digest(), place)
    return np.array([places[digest] for digest in sorted(places)], np.int64)


def drawn(images: Images, count: int | None) -> Images:
    """Copy `count` different images, drawn evenly whatever the order of the list; all of them for None."""
    return images[order(images)[:count]]


def divide(images: Images, count: int | None = None) -> Division:
    """Divide the calibration images, N×…×H×W×3, or `count` of them drawn evenly."""
    found = order(images)
    copies, found = len(images) - len(found), found[:count]
    held = _held(len(found), int(images[0].size) // 3)
    return Division(found[held:], found[:held], copies)


def _held(images: int, pixels: int) -> int:
    """Give the number of validation images out of some of so many pixels each."""
    most = int(np.clip(PIXELS // max(1, pixels), LEAST, MOST))
    held = min(max(min(images // 2, LEAST), images // 4), most)
    return held if held >= FEWEST else 0


def refuse_equal(images: Images) -> None:
    """Raise InputError where all of several images are the same, byte for byte."""
    if len(images) > 1 and bool((images == images[:1]).all()):
        raise InputError(f"all {len(images)} calibration images are the same picture; the ranges would mean nothing")


def refuse_infinite(scores: Outputs, images: Images) -> None:
    """Raise NotFinite for the first of the images whose scores, N×K or N×K×H×W, are not finite."""
    bad = np.flatnonzero(~np.isfinite(scores).reshape(len(scores), -1).all(1))
    if len(bad):
        raise NotFinite(images[bad[0]])


def on(images: Sized, of: str = "validation") -> str:
    """Say what a figure stands on, as "on 128 validation images"."""
    return f"on {len(images)} {of} image{'s' if len(images) != 1 else ''}"
