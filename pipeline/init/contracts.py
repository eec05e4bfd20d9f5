"""Which preprocessings a model may have been trained with: its library's, the usual ones, the images' own."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median_low

import numpy as np
from PIL import Image

from bitferry.device.errors import InputError
from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline.init.architecture import Interpolation, Usual
from bitferry.pipeline.init.pictures import Pictures

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NONE = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
CLIP = ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758))
CIFAR = {
    "CIFAR-10's mean and std": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "CIFAR-100's mean and std": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "SVHN's mean and std": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
}
"""Of small images in colour."""
GREY = {"MNIST's mean and std": (0.1307, 0.3081), "Fashion-MNIST's mean and std": (0.2860, 0.3530)}
BYTES = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
CAFFE = ((123.68, 116.779, 103.939), (1.0, 1.0, 1.0))
SMALL, RESIZED = 40, 256 / 224
"""Pixels of a side up to which images are small; the standard resizing before a centre crop, as of 256 for 224."""
LOOKED_AT, STEP, LARGEST = 64, 32, 224
WHY_SIZE = "from the images' own size; what was it trained with?"
Ways = list[tuple[str, Preprocessing]]
Sides = tuple[int, int]
"""Height and width."""
Values = tuple[tuple[float, float, float], tuple[float, float, float]]


def candidates(
    found: Pictures,
    usual: Usual | None,
    size: Sides | None,
    *,
    fixed: tuple[int | None, int | None] = (None, None),
    inside: bool = False,
) -> Ways:
    """Name the preprocessings to try, the likeliest first; `inside` says that the model normalizes by itself."""
    shapes = _geometries(found, usual, size, fixed)
    if inside:
        return [("pixels as they are", replace(shape, scale=1.0)) for shape in shapes]
    values = _values(found)
    if usual and (usual.mean, usual.std) not in values.values():
        values = {usual.says: (_three(usual.mean), _three(usual.std))} | values
    elif usual:
        values = dict(sorted(values.items(), key=lambda pair: pair[1] != (usual.mean, usual.std)))
    ways = [(name, replace(shape, mean=mean, std=std)) for shape in shapes for name, (mean, std) in values.items()]
    whole = {"0 to 255": BYTES, "0 to 255, less ImageNet's mean": CAFFE}
    return ways + [(name, replace(shapes[0], scale=1.0, mean=mean, std=std)) for name, (mean, std) in whole.items()]


def _values(found: Pictures) -> dict[str, Values]:
    """Give the usual means and standard deviations, the likelier first for such images."""
    looked_at = _looked_at(found)
    small = bool(looked_at) and max(max(image.size) for image in looked_at) <= SMALL
    usual = {"ImageNet's mean and std": IMAGENET, "0.5 and 0.5": HALVES, "0 to 1": NONE}
    own = {"the images' own": _own(found)}
    if small and _grey(looked_at):
        return usual | {name: ((mean,) * 3, (std,) * 3) for name, (mean, std) in GREY.items()} | own
    if small:
        return CIFAR | usual | own
    return usual | {"CLIP's mean and std": CLIP} | own


def variants(best: Preprocessing, found: Pictures) -> Ways:
    """Name other ways to the same input size: the standard resizing and crop, stretched, bilinear and bicubic."""
    side = (best.height, best.width)
    shapes: list[Preprocessing] = []
    if best.height == best.width and best.height > SMALL:
        for resize in (round(best.height * RESIZED), best.height, None):
            shapes += [replace(best, resize=resize, interpolation=way) for way in ("bilinear", "bicubic")]
    elif any(image.size[::-1] != side for image in _looked_at(found)):
        shapes += [replace(best, interpolation=way) for way in ("bilinear", "bicubic")]
    return [(_said(shape), shape) for shape in shapes if shape != best]


def _said(shape: Preprocessing) -> str:
    crop = f"resized to {shape.resize} and cropped" if shape.resize else "stretched"
    return f"{crop}, {shape.interpolation}"


def notice(found: Pictures) -> tuple[str, ...]:
    """Say what is special about the images."""
    if _grey(_looked_at(found)):
        return (
            "The images are grey: the model gets the same values as R, G and B, so that color makes no difference.",
        )
    return ()


def _grey(looked_at: Sequence[Image.Image]) -> bool:
    modes = {image.mode for image in looked_at}
    return bool(modes) and modes <= {"L", "1", "I;16", "LA"}


def _geometries(
    found: Pictures, usual: Usual | None, size: Sides | None, fixed: tuple[int | None, int | None]
) -> list[Preprocessing]:
    """Give the library's size and the images' own, the latter also rounded to what convolutions halve evenly."""
    interpolation: Interpolation = usual.interpolation if usual else "bilinear"
    if fixed[0] and fixed[1]:
        if size is not None and size != fixed:
            raise InputError(f"--size {size[0]}x{size[1]}: the model takes {fixed[0]}x{fixed[1]} and nothing else")
        return [_shape((fixed[0], fixed[1]), _standard((fixed[0], fixed[1]), usual), interpolation)]
    if size is not None:
        return [_shape(size, _standard(size, usual), interpolation)]
    own = _median_side(found)
    rounded = min(LARGEST, max(STEP, round(own / STEP) * STEP))
    shapes = [_shape((usual.size, usual.size), usual.resize, interpolation)] if usual else []
    if not usual or own < usual.size / 2 or own < LARGEST / 2:
        sides = dict.fromkeys((rounded, min(own, LARGEST)))
        shapes += [_shape((side, side), _standard((side, side), None), interpolation) for side in sides]
    return list(dict.fromkeys(shapes))


def _standard(size: Sides, usual: Usual | None) -> int | None:
    """Give the shorter side before the crop, in the library's proportion or the standard one; None to stretch."""
    height, width = size
    if height != width or (usual and usual.resize is None) or (not usual and height <= LARGEST / 2):
        return None
    return round(height * (usual.resize / usual.size if usual and usual.resize else RESIZED))


def _shape(size: Sides, resize: int | None, interpolation: Interpolation) -> Preprocessing:
    try:
        return Preprocessing(height=size[0], width=size[1], resize=resize, interpolation=interpolation)
    except ValueError as error:
        raise InputError(f"--size {size[0]}x{size[1]}: {error}") from None


def _median_side(found: Pictures) -> int:
    sides = [min(image.size) for image in _looked_at(found)]
    return median_low(sides) if sides else LARGEST


def _looked_at(found: Pictures) -> list[Image.Image]:
    """Open some of the images, their pixels unread; what cannot be opened is told later, by its name."""
    if found.arrays:
        return [Image.fromarray(image) for image in found.arrays["evaluation"][0][:LOOKED_AT] if image.ndim in (2, 3)]
    opened = [_opened(path) for path in _some([path for path, _ in found.lines["evaluation"]])]
    return [image for image in opened if image is not None]


def _some(paths: Sequence[Path]) -> list[Path]:
    chosen = np.linspace(0, len(paths) - 1, min(len(paths), LOOKED_AT)).astype(int)
    return [paths[index] for index in chosen]


def _opened(path: Path) -> Image.Image | None:
    try:
        with Image.open(path) as image:
            return image.copy() if image.size[0] * image.size[1] < 1 << 22 else image
    except (OSError, ValueError, Image.DecompressionBombError):
        return None


def _own(found: Pictures) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Give the mean and standard deviation of some images' pixels, of each channel."""
    pixels = []
    for image in _looked_at(found):
        try:
            pixels.append(np.asarray(image.convert("RGB").resize((64, 64)), np.float64).reshape(-1, 3) / 255)
        except (OSError, ValueError):
            continue
    whole = np.concatenate(pixels) if pixels else np.zeros((1, 3))
    mean, std = (tuple(round(float(value), 3) for value in one) for one in (whole.mean(0), whole.std(0).clip(0.01)))
    return _three(mean), _three(std)


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    first, second, third = values
    return (float(first), float(second), float(third))
