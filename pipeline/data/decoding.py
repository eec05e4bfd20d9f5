"""Samples → arrays in a folder, a chunk at a time, so that memory stays small however many there are."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from PIL import Image

from bitferry.device.arrays import Images
from bitferry.device.errors import InputError
from bitferry.device.preprocess import Preprocessing, largest_of_16_bits
from bitferry.pipeline import progress
from bitferry.pipeline.data import broken, labels, near, senseless
from bitferry.pipeline.data.sample import Sample
from bitferry.targets import usable_cpus

CHUNK_BYTES, MOST_CHUNK = 256_000_000, 256
MOST_SIDE = 8192


@dataclass(frozen=True)
class Job:
    """What the samples of a split are decoded to."""

    name: str
    classes: tuple[str, ...]
    contract: Preprocessing
    roomy: Preprocessing | None
    """How they are kept besides, larger, for random crops."""
    broken_share: float


@dataclass(frozen=True)
class Fitted:
    """One sample as it is kept."""

    pixels: Images
    mask: NDArray[np.uint8] | None
    roomy: Images | None
    roomy_mask: NDArray[np.uint8] | None
    digest: str
    hashed: near.Hashes
    largest: int | None
    """Its largest pixel, where its file has 16 bits."""


def roomier(contract: Preprocessing, room: float) -> Preprocessing:
    """Give the contract of images so many times larger, with all of the shorter side in them."""
    side = max(contract.height, contract.width)
    scale = room * (contract.resize or side) / side
    scale = min(scale, MOST_SIDE / side)
    height, width = round(contract.height * scale), round(contract.width * scale)
    return replace(contract, height=height, width=width, resize=max(height, width) if contract.resize else None)


def decode(job: Job, found: Sequence[Sample], root: Path, folder: Path) -> None:
    """Write images.npy, digests.json, hashes.npy, broken.json and any masks.npy and roomy.npy into the folder.

    Raises InputError when more are broken than the job allows, with a list of them in `root`.
    """
    arrays = _arrays(job, found, folder)
    digests: list[str] = []
    hashes: list[near.Hashes] = []
    lost: dict[int, str] = {}
    wide = list[int]()
    chunk = int(np.clip(CHUNK_BYTES // sum(one[0].nbytes for one in arrays.values()), 1, MOST_CHUNK))
    with ThreadPoolExecutor(usable_cpus()) as pool:
        chunks = range(0, len(found), chunk)
        for start in progress.track(chunks, f"decode {job.name}", total=len(chunks)):
            fitted = pool.map(partial(_fitted_or_why, job), found[start : start + chunk])
            for index, one in enumerate(fitted, start):
                if isinstance(one, str):
                    lost[index] = one
                    continue
                _put(arrays, len(digests), one)
                digests.append(one.digest)
                hashes.append(one.hashed)
                wide += [] if one.largest is None else [one.largest]
    broken.refuse_many(job.name, len(found), lost, job.broken_share, root)
    broken.write(lost, folder)
    senseless.refuse_few_bits(wide, job.name)
    if "masks" in arrays:
        labels.refuse_unmarked(arrays["masks"][: len(digests)], job.name, job.classes)
    for name, array in arrays.items():
        array.flush()
        if lost:
            _shorten(folder / f"{name}.npy", len(digests))
    np.save(folder / "hashes.npy", np.stack(hashes))
    (folder / "digests.json").write_text(json.dumps(digests))


def _arrays(
    job: Job, found: Sequence[Sample], folder: Path
) -> dict[str, "np.memmap[tuple[int, ...], np.dtype[np.uint8]]"]:
    masked = any(sample.mask for sample in found)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, masks, contract in (("images", "masks", job.contract), ("roomy", "roomy_masks", job.roomy)):
        if contract is not None:
            shapes[name] = contract.shape
            shapes |= {masks: (contract.height, contract.width)} if masked else {}
    return {
        name: open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.uint8, shape=(len(found), *shape))
        for name, shape in shapes.items()
    }


def _put(arrays: dict[str, "np.memmap[tuple[int, ...], np.dtype[np.uint8]]"], row: int, one: Fitted) -> None:
    values = {"images": one.pixels, "masks": one.mask, "roomy": one.roomy, "roomy_masks": one.roomy_mask}
    for name, array in arrays.items():
        value = values[name]
        if value is not None:
            array[row] = value


def _shorten(path: Path, count: int) -> None:
    """Keep the first rows of an array file, a chunk at a time."""
    whole, short = np.load(path, mmap_mode="r"), path.with_suffix(".short")
    kept = open_memmap(short, mode="w+", dtype=whole.dtype, shape=(count, *whole.shape[1:]))
    for start in range(0, count, MOST_CHUNK):
        kept[start : start + MOST_CHUNK] = whole[start : min(start + MOST_CHUNK, count)]
    kept.flush()
    short.replace(path)


def _fitted_or_why(job: Job, sample: Sample) -> Fitted | str:
    """Give what the model takes, or why an image cannot be decoded; what is wrong with a mask is no such fault."""
    try:
        contents = [view.content() for view in sample.views]
        views = [view.decode(content) for view, content in zip(sample.views, contents, strict=True)]
        pixels = job.contract.join([job.contract.finish(image) for image in views])
        roomy = None if job.roomy is None else job.roomy.join([_enlarged(image, job.roomy) for image in views])
    except InputError as error:
        return broken.reason(error)
    mask = _mask(sample, views[0])
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()[:32]
    masks = [_placed(mask, contract) for contract in (job.contract, job.roomy)]
    wide = [largest_of_16_bits(one) for one, view in zip(contents, sample.views, strict=True) if view.form == "file"]
    largest = max((one for one in wide if one is not None), default=None)
    return Fitted(pixels, masks[0], roomy, masks[1], digest, near.hash_of(pixels), largest)


def fitted(contract: Preprocessing, sample: Sample) -> tuple[Images, NDArray[np.uint8] | None]:
    """Give what the model takes of one sample, and its mask; raise InputError for an image that is broken."""
    views = [view.decode(view.content()) for view in sample.views]
    pixels = contract.join([contract.finish(image) for image in views])
    return pixels, _placed(_mask(sample, views[0]), contract)


def _mask(sample: Sample, view: Image.Image) -> Image.Image | None:
    """Decode the sample's mask; raise InputError where it is not as large as its image, the first view."""
    if sample.mask is None:
        return None
    mask = sample.mask.decode(sample.mask.content())
    if mask.size != view.size:
        sizes = ["×".join(map(str, one.size)) for one in (mask, view)]
        raise InputError(f"the mask {sample.mask.source} is {sizes[0]} pixels, its image {sizes[1]}: {sample.source}")
    return mask


def _enlarged(image: Image.Image, roomy: Preprocessing) -> Images:
    """Resize and crop an image that only training sees, by PyTorch, which is faster than Pillow."""
    import torch  # noqa: PLC0415 - only a training takes long enough
    from torchvision.transforms.v2 import InterpolationMode, functional  # noqa: PLC0415

    height, width = roomy.height, roomy.width
    if roomy.resize is not None:
        scale = roomy.resize / min(image.size)
        height, width = max(height, round(image.height * scale)), max(width, round(image.width * scale))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    how = InterpolationMode.BICUBIC if roomy.interpolation in ("bicubic", "lanczos") else InterpolationMode.BILINEAR
    resized = functional.resize(pixels, [height, width], how, antialias=True).permute(1, 2, 0).numpy()
    top, left = round((height - roomy.height) / 2), round((width - roomy.width) / 2)
    cut = resized[top : top + roomy.height, left : left + roomy.width]
    return np.ascontiguousarray(cut[..., ::-1] if roomy.color == "BGR" else cut)


def _placed(mask: Image.Image | None, contract: Preprocessing | None) -> NDArray[np.uint8] | None:
    """Resize and crop a mask as the image it belongs to, the first view."""
    return None if mask is None or contract is None else np.asarray(contract.place(mask, Image.Resampling.NEAREST))
