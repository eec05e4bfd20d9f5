"""Images that say nothing: calibration images of one colour each or of noise, and values of few bits kept in 16."""

from collections.abc import Sequence

import numpy as np

from bitferry.device.arrays import Images
from bitferry.device.errors import InputError
from bitferry.pipeline.data.split import Split

NOISE, APART, LOOKED_AT = 0.1, 2, 64
"""A correlation of pixels that far apart that no picture has, and how many images are looked at."""
LEAST_OF_16_BITS = 4096
"""What the largest pixel of all 16-bit images of a split must reach, unless all are black: 12-bit values do not."""


def refuse(calibration: Split, evaluation: Split) -> None:
    """Raise InputError for calibration images of one colour each, or whose pixels have nothing to do with those nearby.

    Ranges from such pixels mean nothing. Where the evaluation images are like that too, it is what the model is for.
    """
    if _flat(calibration.images) and not _flat(evaluation.images):
        raise InputError(f"every calibration image is of one colour, and the evaluation images are not; {_REAL_IMAGES}")
    found, usual = likeness(calibration.images), likeness(evaluation.images)
    if found < NOISE < 3 * NOISE < usual:
        raise InputError(
            f"the calibration images look like random noise: pixels correlate with those nearby by {found:.2f}, in the "
            f"evaluation images by {usual:.2f}; {_REAL_IMAGES}"
        )


def refuse_few_bits(largest: Sequence[int], split: str) -> None:
    """Raise InputError for a split whose 16-bit images, by the largest pixel of each, hold values of fewer bits.

    Each alone may be dark; the top 8 bits of all of them would be next to nothing.
    """
    most = max(largest, default=0)
    if 0 < most < LEAST_OF_16_BITS:
        raise InputError(
            f"the largest pixel of the {len(largest)} {split} images of 16 bits is {most}, as of "
            f"{most.bit_length()}-bit data, of which {most >> 8} would be left in 8 bits; "
            "scale the values to 0…65535, or save them with 8 bits"
        )


_REAL_IMAGES = "give real images of the kind that the device will see"


def _flat(images: Images) -> bool:
    return all(bool((image == image[..., :1, :1, :]).all()) for image in images)


def likeness(images: Images) -> float:
    """Give the correlation of pixels with the second to their right, the median of some images; 1 of one colour.

    Not the first: resizing mixes noise with its neighbours.
    """
    chosen = np.linspace(0, len(images) - 1, min(len(images), LOOKED_AT)).astype(int)
    found = []
    for image in images[chosen].astype(np.float64):
        if image.shape[-2] > APART:
            left, right = (part - part.mean() for part in (image[..., :-APART, :], image[..., APART:, :]))
            power = np.sqrt(np.square(left).sum() * np.square(right).sum())
            found.append(float((left * right).sum() / power) if power > 0 else 1.0)
    return float(np.median(found)) if found else 1.0
