"""Near duplicates across splits: images saved again, resized or lightened, found by perceptual hashes and pixels."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bitferry.device.arrays import Images
from bitferry.device.errors import InputError
from bitferry.pipeline import cache, progress
from bitferry.pipeline.data.split import Split

MOST = 0.01
"""Share of a split's images that may look like images of another."""
SIDE = 16
"""Of a hash: the signs of so many times so many low frequencies, 256 bits."""
HASHED = 64
"""Side of what `phash` transforms."""
WORDS = SIDE * SIDE // 16
BITS = WORDS - 1
"""Bits by which two hashes may differ; in fewer than there are words of 16 bits, so one word is the same in both."""
THUMBNAIL, ALIKE = 32, 0.98
"""Side of what the pixels are compared on, and the correlation that near duplicates have there."""
MOST_AT_ONCE = 1 << 22
TOLD = 3

Hashes = NDArray[np.uint16]
"""N×16: 256 bits for each image."""


@dataclass(frozen=True)
class Pair:
    """Two images in two splits that look the same."""

    split: str
    image: str
    other_split: str
    other: str
    correlation: float


def hash_of(pixels: Images) -> Hashes:
    """Hash what one answer is about, H×W×3, several views side by side."""
    grey = Image.fromarray(_side_by_side(pixels)).convert("L")
    smaller = grey.reduce(max(1, min(grey.size) // HASHED))  # a mean of blocks first takes half of the time
    found = imagehash.phash(smaller, hash_size=SIDE)
    return np.packbits(found.hash).view(np.uint16)


def refuse(splits: list[Split], build: cache.Cache, *, allow: bool) -> list[Pair]:
    """Say which images look like some of another split; raise InputError where these are many, unless allowed."""
    key = cache.key("near", code=__file__, packages=("numpy", "imagehash", "pillow"), splits=[s.key for s in splits])
    folder = build.folder("near", key, partial(_find_all, splits))
    found = [Pair(**one) for one in json.loads((folder / "pairs.json").read_text())]
    if found:
        part, mine = max(((one, _of(found, one)) for one in splits), key=lambda pair: len(pair[1]) / len(pair[0]))
        count = len(mine)
        told = f"{count} of the {len(part)} {part.name} images look like images of another split: {_examples(mine)}"
        if count > MOST * len(part) and not allow:
            raise InputError(
                f"{told}. All are in {folder / 'pairs.json'}; take them out of one of the two, or where they are "
                'really different images set data.near_duplicates = "allow"'
            )
        progress.stage("data", f"{told}; all are in {folder / 'pairs.json'}")
    return found


def _of(found: list[Pair], part: Split) -> dict[str, str]:
    """Give each image of a split that has a pair, with what it looks like."""
    mine = {one.other: f"{one.image} ({one.split})" for one in found if one.other_split == part.name}
    return mine | {one.image: f"{one.other} ({one.other_split})" for one in found if one.split == part.name}


def _examples(mine: dict[str, str]) -> str:
    return "; ".join(f"{image} ≈ {other}" for image, other in [*mine.items()][:TOLD])


def _find_all(splits: list[Split], folder: Path) -> None:
    pairs = []
    for index, part in enumerate(splits):
        for other in splits[:index]:
            pairs += [
                {"split": part.name, "image": part.sources[i], "other_split": other.name, "other": other.sources[j],
                 "correlation": round(alike, 4)}
                for i, j, alike in between(part, other)
            ]  # fmt: skip
    (folder / "pairs.json").write_text(json.dumps(pairs, indent=1))


def between(part: Split, other: Split) -> list[tuple[int, int, float]]:
    """List the pairs of two splits that look the same and are not, pixel by pixel, with their correlation."""
    if part.hashes is None or other.hashes is None:
        return []
    found = []
    for i, j in pairs_within(part.hashes, other.hashes):
        alike = correlation(part.images[i], other.images[j])
        if alike >= ALIKE and part.digests[i] != other.digests[j]:
            found.append((i, j, alike))
    return found


def pairs_within(left: Hashes, right: Hashes) -> list[tuple[int, int]]:
    """List all pairs of hashes that differ in at most `BITS` bits (Norouzi et al. 2012: one word is then the same)."""
    found: set[tuple[int, int]] = set()
    for word in range(WORDS):
        order = np.argsort(right[:, word], kind="stable")
        keys = right[order, word]
        first, last = (np.searchsorted(keys, left[:, word], side) for side in ("left", "right"))
        for rows, places in _expanded(first, last):
            columns = order[places]
            apart = np.bitwise_count(left[rows] ^ right[columns]).sum(1)
            near = apart <= BITS
            found |= set(zip(rows[near].tolist(), columns[near].tolist(), strict=True))
    return sorted(found)


def _expanded(first: NDArray[np.int64], last: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], ...]]:
    """Write out the ranges first…last of each row as pairs, some millions at a time at most."""
    counts = last - first
    ends = np.cumsum(counts)
    start = 0
    while start < len(counts):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + MOST_AT_ONCE, "right")))
        some = counts[start:stop]
        rows = np.repeat(np.arange(start, stop), some)
        offsets = np.arange(some.sum()) - np.repeat(np.cumsum(some) - some, some)
        yield rows, np.repeat(first[start:stop], some) + offsets
        start = stop


def correlation(one: Images, other: Images) -> float:
    """Give the correlation of two images' thumbnails in grey; 1 where both are of one colour, and the same one."""
    left, right = _thumbnail(one), _thumbnail(other)
    left, right = left - left.mean(), right - right.mean()
    power = float(np.linalg.norm(left) * np.linalg.norm(right))
    if power == 0:
        return float(np.allclose(_thumbnail(one), _thumbnail(other), atol=2))
    return float((left * right).sum() / power)


def _thumbnail(pixels: Images) -> NDArray[np.float64]:
    image = Image.fromarray(_side_by_side(pixels)).convert("L")
    return np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR)).astype(np.float64)


def _side_by_side(pixels: Images) -> Images:
    return np.concatenate(list(pixels), axis=1) if pixels.ndim == 4 else np.ascontiguousarray(pixels)
