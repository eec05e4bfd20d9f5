"""One purpose's images, decoded, with their labels: what every stage that looks at images is given."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitferry.device.arrays import Images
from bitferry.device.errors import InputError
from bitferry.pipeline.division import NotFinite

Labels = NDArray[np.integer[Any]]
"""N class indices; for multi-label data N×K, 1 where an image is of the class and 0 where it is not; for segmentation
N×H×W uint8, a class index for each pixel or 255 where none counts."""


@dataclass(frozen=True)
class Roomy:
    """The images of a split larger than the model takes them, of the same dimensions, for random crops."""

    images: Images
    masks: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Split:
    """Images of one purpose, decoded and resized by the recipe's contract: N×H×W×3 uint8 (of several views N×V×H×W×3),
    memory-mapped."""

    name: str
    images: Images
    labels: Labels
    sources: tuple[str, ...]
    """Where each image came from, for messages."""
    digests: tuple[bytes, ...]
    """A hash of each image's pixels, for the leak check."""
    key: str
    hashes: NDArray[np.uint16] | None = None
    """A perceptual hash of each image, N×16, by which near duplicates are found."""
    roomy: Roomy | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Name the image of this split, by where it came from, whose scores are found not finite in here."""
        try:
            yield
        except NotFinite as error:
            same = (self.images == error.image).reshape(len(self), -1).all(1)
            place = int(same.argmax())  # of copies the first
            raise InputError(
                f"the float model's scores of {self.sources[place]}, number {place + 1} of {len(self)} {self.name} "
                "images, are not finite; take it out"
            ) from error
