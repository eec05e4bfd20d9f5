"""A class for every pixel: maps as image files, the share of each class, and a sample of scores that is small."""

import colorsys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bitferry.device.arrays import Outputs

Maps = NDArray[np.uint8]
"""H×W or N×H×W: the class of each pixel."""
IGNORED = 255
"""No class: a pixel that the model did not look at, or that does not count."""
THIN_SCORES = 8192
FEWEST_PIXELS = 64


def maps(scores: Outputs) -> Maps:
    """Choose each pixel's class; scores N×K×H×W."""
    return np.asarray(scores.argmax(axis=1), np.uint8)


def thin(scores: Outputs) -> Outputs:
    """Keep all scores of a few pixels, N×K×P of N×K×H×W, spread evenly; scores that are no map stay as they are.

    The scores of a map are a class's worth of floats for every pixel: a hundred images fill a memory.
    """
    if scores.ndim < 4:
        return scores
    flat = scores.reshape(*scores.shape[:2], -1)
    return np.ascontiguousarray(flat[:, :, _picked(scores.shape[1], flat.shape[2])])


def thin_masks(masks: NDArray[Any], classes: int) -> NDArray[Any]:
    """Keep the same pixels of masks: N×P of N×H×W."""
    flat = masks.reshape(len(masks), -1)
    return flat[:, _picked(classes, flat.shape[1])]


def _picked(classes: int, pixels: int) -> NDArray[np.int64]:
    """Say which of an image's pixels `thin` keeps."""
    wanted = min(pixels, max(FEWEST_PIXELS, THIN_SCORES // classes))
    return np.linspace(0, pixels - 1, wanted).astype(np.int64)


def shares(found: Maps, classes: int) -> NDArray[np.float64]:
    """Give the share of pixels of each class."""
    return np.bincount(found.ravel(), minlength=classes) / found.size


def picture(found: Maps) -> Image.Image:
    """Give a map H×W as an indexed picture: its values are the classes, shown in colours."""
    image = Image.fromarray(found)
    image.putpalette(PALETTE)  # which makes a grey image an indexed one
    return image


def write(found: Maps, path: Path) -> None:
    """Write a map H×W as an indexed PNG."""
    picture(found).save(path, "PNG", optimize=True)


def _colour(index: int) -> tuple[int, int, int]:
    """Give class 0 black, no class white, and the others hues far apart: steps of the golden ratio."""
    if index in (0, IGNORED):
        return (0, 0, 0) if index == 0 else (255, 255, 255)
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.55 + 0.4 * (index % 2), 0.95 - 0.3 * (index % 3) / 2)
    return round(255 * red), round(255 * green), round(255 * blue)


PALETTE = [level for index in range(256) for level in _colour(index)]
