"""Training images changed at random, by torchvision's operators: views and mask of one sample alike."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv
from torchvision.transforms.v2.functional import InterpolationMode

from bitferry.device.arrays import Images
from bitferry.device.pixels import IGNORED
from bitferry.pipeline.augmentation import Augmentation

NEAREST, BILINEAR = InterpolationMode.NEAREST, InterpolationMode.BILINEAR
EXACT = InterpolationMode.NEAREST_EXACT
TRIES = 10
"""At a rectangle of the asked area that fits, before the whole image is taken, as torchvision does."""
ERASED, ERASED_RATIO = (0.02, 0.33), (0.3, 3.3)
RAND_CHANGES, RAND_STRENGTH = 2, 9 / 30

Place = tuple[int, int, int, int]
"""Top, left, height and width of a rectangle."""
Random = np.random.Generator


@dataclass(frozen=True)
class Geometry:
    """What moves pixels, which the mask needs too."""

    crop: Place
    flips: tuple[bool, bool]
    """Left to right, top to bottom."""
    angle: float


def sample(
    views: Images, mask: Images | None, size: tuple[int, int], how: Augmentation, random: Random
) -> list[Tensor]:
    """Change one sample's views, V×H×W×3, and its mask, H×W; give both of the size that the model takes, V×3×H×W.

    Of what is cut out nothing else is read, so that images may stay in a mapped file.
    """
    geometry = _geometry(how, views.shape[1:3], random)
    changed = _moved(_cut(views, geometry), size, geometry.angle, BILINEAR)
    moved = None if mask is None else _moved(_cut(mask[None, ..., None], geometry), size, geometry.angle, NEAREST)
    changed = _coloured(changed, how, random)
    changed, moved = _automatic(changed, moved, how, random)
    if how.erase and random.random() < how.erase:
        top, left, height, width = _rectangle(size, ERASED, ERASED_RATIO, random)
        colour = changed.float().mean((0, 2, 3)).to(torch.uint8)[:, None, None]
        changed = tv.erase(changed, top, left, height, width, colour.expand(3, height, width))
        if moved is not None:
            moved = tv.erase(moved, top, left, height, width, torch.tensor(IGNORED, dtype=torch.uint8))
    return [changed] if moved is None else [changed, moved[0, 0]]


def _cut(images: Images, to: Geometry) -> Tensor:
    """Copy a rectangle of images N×H×W×C, mirrored where that is asked: here one copy does both."""
    top, left, height, width = to.crop
    part = images[:, top : top + height, left : left + width]
    part = part[:, :, ::-1] if to.flips[0] else part
    return torch.from_numpy(np.array(part[:, ::-1] if to.flips[1] else part)).permute(0, 3, 1, 2)


def _geometry(how: Augmentation, size: tuple[int, ...], random: Random) -> Geometry:
    whole = (0, 0, size[0], size[1])
    crop = whole if how.crop is None else _rectangle((size[0], size[1]), how.crop, how.ratio, random)
    flips = tuple(asked and bool(random.random() < 0.5) for asked in (how.horizontal_flip, how.vertical_flip))
    angle = float(random.uniform(-how.rotate, how.rotate)) if how.rotate else 0.0
    return Geometry(crop, (flips[0], flips[1]), angle)


def _rectangle(size: tuple[int, int], area: tuple[float, float], ratio: tuple[float, float], random: Random) -> Place:
    """Give a rectangle of a random share of the area, as torchvision's RandomResizedCrop draws it."""
    height, width = size
    for _ in range(TRIES):
        share = random.uniform(*area) * height * width
        shape = float(np.exp(random.uniform(*np.log(ratio)))) * width / height
        w, h = round((share * shape) ** 0.5), round((share / shape) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            return int(random.integers(height - h + 1)), int(random.integers(width - w + 1)), h, w
    return 0, 0, height, width


def _moved(images: Tensor, size: tuple[int, int], angle: float, how: InterpolationMode) -> Tensor:
    if images.shape[-2:] != size:
        way = EXACT if how is NEAREST else how  # by pixels' centres, as masks are decoded and images are resized
        images = tv.resize(images, list(size), way, antialias=how is BILINEAR)
    if not angle:
        return images
    fill = [float(IGNORED)] if how is NEAREST else [float(one) for one in images.float().mean((0, 2, 3)).round()]
    turned: Tensor = tv.rotate(images, angle, how, fill=fill)
    return turned


def _coloured(images: Tensor, how: Augmentation, random: Random) -> Tensor:
    """Jitter brightness, contrast, saturation and hue, in an order of chance."""
    jitters: list[tuple[float, Callable[[Tensor, float], Tensor], float]] = [
        (how.brightness, tv.adjust_brightness, 1), (how.contrast, tv.adjust_contrast, 1),
        (how.saturation, tv.adjust_saturation, 1), (how.hue, tv.adjust_hue, 0),
    ]  # fmt: skip
    asked = [one for one in jitters if one[0]]
    for index in random.permutation(len(asked)):
        strength, change, middle = asked[index]
        images = change(images, float(random.uniform(middle - strength, middle + strength)))
    return images


def _automatic(images: Tensor, mask: Tensor | None, how: Augmentation, random: Random) -> tuple[Tensor, Tensor | None]:
    """Apply one change of random strength (trivial), or some of one strength (rand); `mask` moves along."""
    times = {"none": 0, "trivial": 1, "rand": RAND_CHANGES}[how.auto]
    for _ in range(times):
        strength = float(random.random()) if how.auto == "trivial" else RAND_STRENGTH
        names = sorted(MOVES) + sorted(CHANGES)
        name = names[int(random.integers(len(names)))]
        signed = strength if random.random() < 0.5 else -strength
        if name in CHANGES:
            images = CHANGES[name](images, strength, signed)
            continue
        images = MOVES[name](images, signed, BILINEAR, 0)
        mask = None if mask is None else MOVES[name](mask, signed, NEAREST, IGNORED)
    return images, mask


def _affine(images: Tensor, how: InterpolationMode, fill: int, *, shift: tuple[int, int] = (0, 0),
            shear: tuple[float, float] = (0.0, 0.0), angle: float = 0.0) -> Tensor:  # fmt: skip
    moved: Tensor = tv.affine(images, angle, list(shift), 1.0, list(shear), how, [float(fill)])
    return moved


Move = Callable[[Tensor, float, InterpolationMode, int], Tensor]
Change = Callable[[Tensor, float, float], Tensor]
WIDEST_SHEAR, FARTHEST, MOST_DEGREES = 45.0, 32 / 224, 135.0
MOVES: dict[str, Move] = {
    "rotate": lambda x, s, how, fill: _affine(x, how, fill, angle=MOST_DEGREES * s),
    "shear_x": lambda x, s, how, fill: _affine(x, how, fill, shear=(WIDEST_SHEAR * s, 0.0)),
    "shear_y": lambda x, s, how, fill: _affine(x, how, fill, shear=(0.0, WIDEST_SHEAR * s)),
    "shift_x": lambda x, s, how, fill: _affine(x, how, fill, shift=(round(x.shape[-1] * FARTHEST * s), 0)),
    "shift_y": lambda x, s, how, fill: _affine(x, how, fill, shift=(0, round(x.shape[-2] * FARTHEST * s))),
}
"""What `auto` may do that a mask does too; the strength is −1 to 1."""
CHANGES: dict[str, Change] = {
    "nothing": lambda x, s, signed: x,
    "brightness": lambda x, s, signed: tv.adjust_brightness(x, 1 + 0.99 * signed),
    "colour": lambda x, s, signed: tv.adjust_saturation(x, 1 + 0.99 * signed),
    "contrast": lambda x, s, signed: tv.adjust_contrast(x, 1 + 0.99 * signed),
    "sharpness": lambda x, s, signed: tv.adjust_sharpness(x, 1 + 0.99 * signed),
    "posterize": lambda x, s, signed: tv.posterize(x, 8 - round(6 * s)),
    "solarize": lambda x, s, signed: tv.solarize(x, 255 * (1 - s)),
    "autocontrast": lambda x, s, signed: tv.autocontrast(x),
    "equalize": lambda x, s, signed: tv.equalize(x),
}
