"""What is kept of a model's answers to every evaluation image, and the batches they are answered in."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bitferry.device import pixels
from bitferry.device.arrays import Images, Outputs, Predict
from bitferry.device.pixels import Maps

Track = Callable[[Sequence[int]], Iterable[int]]
"""What goes through the batches, maybe with a bar that counts them."""

BATCH = 64
BATCH_BYTES = 200_000_000
"""Of the scores of one batch; the activations on the way to a map are some times as many."""


@dataclass(frozen=True)
class Kept:
    """One model's answers, small enough to keep."""

    scores: Outputs
    """N×K; of a segmentation model those of a few pixels of each image, N×K×P (see `device/pixels.py`)."""
    maps: Maps | None = None
    """N×H×W, the class of every pixel; segmentation only."""


def answer(predict: Predict, images: Images, track: Track = iter) -> Kept:
    """Answer every image, a batch at a time."""
    first = predict(images[:1].copy())
    batch = int(np.clip(BATCH_BYTES // max(1, first.nbytes), 1, BATCH))
    parts: list[Kept] = []
    for start in track(range(0, len(images), batch)):
        scores = predict(images[start : start + batch].copy())
        parts.append(Kept(pixels.thin(scores), pixels.maps(scores) if scores.ndim == 4 else None))
    found = maps(*parts)
    return Kept(np.concatenate([part.scores for part in parts]), np.concatenate(found) if found else None)


def maps(*kept: Kept) -> tuple[Maps, ...]:
    """Give the maps of several models; none where they do not answer by maps."""
    return tuple(one.maps for one in kept if one.maps is not None)


def write(kept: Kept, folder: Path) -> None:
    """Write `scores.npy`, and the maps packed."""
    np.save(folder / "scores.npy", kept.scores)
    if kept.maps is not None:
        np.savez_compressed(folder / "maps.npz", maps=kept.maps)


def read(folder: Path) -> Kept:
    """Read what `write` wrote."""
    packed = folder / "maps.npz"
    if not packed.exists():
        return Kept(np.load(folder / "scores.npy"))
    with np.load(packed) as arrays:
        return Kept(np.load(folder / "scores.npy"), arrays["maps"])
