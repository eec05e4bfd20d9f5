"""Which preprocessings a model may have been trained with: its library's, the usual ones, the images' own."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median_low

import numpy as np
from PIL import Image

from device.errors import InputError
from device.preprocess import Preprocessing
from pipeline.init.architecture import Interpolation, Usual
from pipeline.init.pictures import Pictures

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
NONE = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
LOOKED_AT, STEP, LARGEST = 64, 32, 224
WHY_SIZE = "from the images' own size; what was it trained with?"
Ways = list[tuple[str, Preprocessing]]


def candidates(
    found: Pictures,
    usual: Usual | None,
    size: int | None,
    *,
    fixed: tuple[int | None, int | None] = (None, None),
    inside: bool = False,
) -> Ways:
    """Name the preprocessings to try, the likeliest first; `inside` says that the model normalizes by itself."""
    shapes = _geometries(found, usual, size, fixed)
    if inside:
        return [("pixels as they are", replace(shape, scale=1.0)) for shape in shapes]
    own = _own(found)
    values = {"ImageNet's mean and std": IMAGENET, "0.5 and 0.5": HALVES, "0 to 1": NONE, "the images' own": own}
    if usual and (usual.mean, usual.std) not in values.values():
        values = {usual.says: (_three(usual.mean), _three(usual.std))} | values
    elif usual:
        values = dict(sorted(values.items(), key=lambda pair: pair[1] != (usual.mean, usual.std)))
    return [(name, replace(shape, mean=mean, std=std)) for shape in shapes for name, (mean, std) in values.items()]


def notice(found: Pictures) -> tuple[str, ...]:
    """Say what is special about the images."""
    modes = {image.mode for image in _looked_at(found)}
    if modes and modes <= {"L", "1", "I;16", "LA"}:
        return (
            "The images are grey: the model gets the same values as R, G and B, so that color makes no difference.",
        )
    return ()


def _geometries(
    found: Pictures, usual: Usual | None, size: int | None, fixed: tuple[int | None, int | None]
) -> list[Preprocessing]:
    """Give the library's size and the images' own, the latter also rounded to what convolutions halve evenly."""
    if fixed[0] and fixed[1]:
        return [Preprocessing(height=fixed[0], width=fixed[1])]
    interpolation: Interpolation = usual.interpolation if usual else "bilinear"
    if size is not None:
        resize = round(size * usual.resize / usual.size) if usual and usual.resize else size
        return [_shape(size, resize, interpolation)]
    own = _median_side(found)
    rounded = min(LARGEST, max(STEP, round(own / STEP) * STEP))
    shapes = [_shape(usual.size, usual.resize, interpolation)] if usual else []
    if not usual or own < usual.size / 2 or own < LARGEST / 2:
        shapes += [_shape(side, None, interpolation) for side in dict.fromkeys((rounded, min(own, LARGEST)))]
    return list(dict.fromkeys(shapes))


def _shape(side: int, resize: int | None, interpolation: Interpolation) -> Preprocessing:
    try:
        return Preprocessing(height=side, width=side, resize=resize, interpolation=interpolation)
    except ValueError as error:
        raise InputError(f"--size {side}: {error}") from None


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
