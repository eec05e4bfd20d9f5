"""Images and labels from a folder, a list or an array file, decoded once; and the leak check between splits."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from PIL import Image

from device import preprocess
from device.arrays import Images
from device.errors import InputError
from device.preprocess import Preprocessing
from pipeline import cache, labels, progress, samples
from pipeline.artifacts import Labels, Split
from pipeline.measure.metrics import Task
from pipeline.samples import Sample
from targets import usable_cpus

CHUNK_BYTES, MOST_CHUNK = 256_000_000, 256
ENDINGS = {".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".avif"}
SEVERAL = 8
"""Calibration images that should not all be of one class."""
UNLABELLED = "calibration"
"""The split whose labels, where it has any, are not used but to see that it is not of one class."""
MOST_COPIES = 0.01
"""Share of a split's images that may be copies of others in it; each counts as evidence, and a copy is none."""
NOISE, APART, LOOKED_AT = 0.1, 2, 64
"""A correlation of pixels that far apart that no picture has, and how many images are looked at."""


def read(name: str, source: Path, classes: Sequence[str], contract: Preprocessing, task: Task) -> list[Sample]:
    """Read what a split holds, undecoded; raise InputError when there are no images, or a label is of no class."""
    found = _samples(source, classes, contract, task, labelled=name != UNLABELLED)
    if not found:
        raise InputError(f"the {name} data {source} holds no images")
    return found


def content(found: Sequence[Sample]) -> list[tuple[list[str], list[str], tuple[int, ...]]]:
    """Give what each sample holds: the sha256 of each of its files, how those are to be read, and its labels."""
    with ThreadPoolExecutor(usable_cpus()) as pool:
        hashes = list(pool.map(_content_hash, found))
    return [
        (digest, [picture.form for picture in sample.pictures], sample.labels)
        for digest, sample in zip(hashes, found, strict=True)
    ]


def split(
    name: str,
    source: Path,
    classes: Sequence[str],
    contract: Preprocessing,
    build: cache.Cache,
    *,
    task: Task = "classification",
) -> Split:
    """Read a split, decoding every image by `contract`; the result is kept by content, not by file name.

    Raises InputError when there are no images, one is broken, or a label does not fit the classes.
    """
    found = read(name, source, classes, contract, task)
    key = cache.key(
        "data",
        code=__file__,
        readers=[cache.file_hash(Path(str(module.__file__))) for module in (labels, samples, preprocess)],
        packages=("pillow",),
        contract=contract,
        task=task,
        classes=len(classes),
        samples=content(found),
    )
    folder = build.folder("data", key, partial(_decode, name, found, contract, classes), of=name)
    return Split(
        name=name,
        images=np.load(folder / "images.npy", mmap_mode="r"),
        labels=_labels(name, folder, found, len(classes), task),
        sources=tuple(sample.source for sample in found),
        digests=tuple(bytes.fromhex(d) for d in json.loads((folder / "digests.json").read_text())),
        key=key,
    )


def _labels(name: str, folder: Path, found: Sequence[Sample], classes: int, task: Task) -> Labels:
    if name == UNLABELLED:
        return np.zeros((len(found), 0), np.int64)
    if task == "segmentation":
        masks: Labels = np.load(folder / "masks.npy", mmap_mode="r")
        return masks
    return labels.gathered([sample.labels for sample in found], classes, task)


def refuse_leaks(*splits: Split) -> None:
    """Raise InputError when one image, by its pixels, is in two splits, or too often in one.

    Of several views all must be the same: a reference image may rightly be one view of many.
    """
    seen: dict[bytes, tuple[Split, str]] = {}
    for part in splits:
        copies = len(part) - len(set(part.digests))
        if copies > MOST_COPIES * len(part):
            raise InputError(
                f"{copies} of the {len(part)} {part.name} images are copies of others among them; remove them"
            )
        leaks = []
        for digest, source in zip(part.digests, part.sources, strict=True):
            first, other = seen.setdefault(digest, (part, source))
            if first is not part:
                leaks.append((source, first.name, other))
        if leaks:
            source, other_name, other = leaks[0]
            raise InputError(
                f"{len(leaks)} {part.name} images are also in the {other_name} data, "
                f"for example {source} = {other}; take them out of one of the two"
            )


def refuse_senseless(calibration: Split, evaluation: Split) -> None:
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


def _content_hash(sample: Sample) -> list[str]:
    return [hashlib.sha256(picture.content()).hexdigest() for picture in sample.pictures]


def _decode(name: str, found: Sequence[Sample], contract: Preprocessing, classes: Sequence[str], folder: Path) -> None:
    """Write images.npy, digests.json and any masks.npy, a chunk at a time so that memory stays small."""
    images = open_memmap(folder / "images.npy", mode="w+", dtype=np.uint8, shape=(len(found), *contract.shape))
    masks = None
    if found[0].mask:
        shape = (len(found), contract.height, contract.width)
        masks = open_memmap(folder / "masks.npy", mode="w+", dtype=np.uint8, shape=shape)
    digests: list[str] = []
    chunk = int(np.clip(CHUNK_BYTES // images[0].size, 1, MOST_CHUNK))
    with ThreadPoolExecutor(usable_cpus()) as pool:
        chunks = range(0, len(found), chunk)
        for start in progress.track(chunks, f"decode {name}", total=len(chunks)):
            pairs = list(pool.map(partial(fitted, contract), found[start : start + chunk]))
            for index, (pixels, mask) in enumerate(pairs, start):
                images[index] = pixels
                digests.append(hashlib.sha256(pixels.tobytes()).hexdigest()[:32])
                if masks is not None:
                    masks[index] = mask
    images.flush()
    if masks is not None:
        labels.refuse_unmarked(masks, name, classes)
        masks.flush()
    (folder / "digests.json").write_text(json.dumps(digests))


def fitted(contract: Preprocessing, sample: Sample) -> tuple[Images, NDArray[np.uint8] | None]:
    """Give what the model takes, and the mask resized and cropped as the image it belongs to, the first view."""
    images = [view.decode(view.content()) for view in sample.views]
    pixels = contract.join([contract.finish(image) for image in images])
    if sample.mask is None:
        return pixels, None
    mask = sample.mask.decode(sample.mask.content())
    if mask.size != images[0].size:
        sizes = ["×".join(map(str, one.size)) for one in (mask, images[0])]
        raise InputError(f"the mask {sample.mask.source} is {sizes[0]} pixels, its image {sizes[1]}: {sample.source}")
    return pixels, np.asarray(contract.place(mask, Image.Resampling.NEAREST))


def _samples(
    source: Path, classes: Sequence[str], contract: Preprocessing, task: Task, *, labelled: bool
) -> list[Sample]:
    found = _read(source, classes, contract, task, labelled=labelled)
    if labelled:
        return found
    if task == "classification":
        _refuse_one_class(source, classes, found)
    return [replace(sample, labels=(), mask=None) for sample in found]


def _refuse_one_class(source: Path, classes: Sequence[str], found: Sequence[Sample]) -> None:
    """Refuse calibration images that are all in one class's folder, or listed with one label."""
    names = {classes[label] for sample in found for label in sample.labels}
    if source.is_dir():
        names = {Path(sample.source).relative_to(source).parts[0] for sample in found}
    if len(names) == 1 and names <= set(classes) and len(found) >= SEVERAL:
        told = f"all {len(found)} calibration images in {source} are of the class '{names.pop()}'"
        raise InputError(f"{told}; give some of every class, whose values reach further")


def _read(source: Path, classes: Sequence[str], contract: Preprocessing, task: Task, *, labelled: bool) -> list[Sample]:
    if source.is_dir() and not labelled and contract.views == 1:
        return [Sample((samples.file(path),), ()) for path in image_files(source)]
    if source.is_dir() and task in labels.FOLDER_HINTS:
        raise InputError(f"{source} is a folder, {labels.FOLDER_HINTS[task]}")
    if source.is_dir() and contract.views > 1:
        raise InputError(
            f"{source} is a folder, which does not say which {contract.views} images belong together; for "
            f"preprocessing.views = {contract.views} give a list of {samples.form(contract, task)} lines, or an .npz"
        )
    if source.is_dir():
        return _from_folder(source, classes)
    if not source.is_file():
        raise InputError(f"the data {source} does not exist")
    if source.suffix == ".npz":
        return samples.from_arrays(source, classes, contract, task, labelled=labelled)
    return samples.from_list(source, classes, contract, task, labelled=labelled)


def _from_folder(root: Path, classes: Sequence[str]) -> list[Sample]:
    """Read root/CLASS/**/IMAGE, the layout of torchvision's ImageFolder."""
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise InputError(f"{root} has no class folders; expected {root}/{classes[0]}/… with images, or use a list file")
    found = labels.of_folders([folder.name for folder in folders], classes, root)
    return [
        Sample((samples.file(path),), (label,))
        for folder, label in zip(folders, found, strict=True)
        for path in image_files(folder)
    ]


def image_files(folder: Path) -> list[Path]:
    """List the images below a folder by their endings, in order; what is hidden is left out."""
    found = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in ENDINGS and path.is_file())
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
