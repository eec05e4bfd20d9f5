"""A source's images and labels, decoded once by the recipe's contract and kept by content: a split."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from bitferry.device import preprocess
from bitferry.device.errors import InputError
from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline import cache
from bitferry.pipeline.data import broken, decoding, formats, labels, splitting
from bitferry.pipeline.data.sample import Sample, Wanted
from bitferry.pipeline.data.source import BROKEN_SHARE, Part, Source, title
from bitferry.pipeline.data.split import Labels, Roomy, Split
from bitferry.pipeline.measure.metrics import Task
from bitferry.targets import usable_cpus

SEVERAL = 8
"""Calibration images that should not all be of one class."""
UNLABELLED = "calibration"
"""The split whose labels, where it has any, are not used but to see that it is not of one class."""


@dataclass(frozen=True)
class Handling:
    """How a split is read, besides what is asked of it."""

    broken_share: float = BROKEN_SHARE
    """So many of its images may be broken, and are left out."""
    room: float = 1.0
    """How many times larger than the model's input images are kept besides, for random crops."""
    download: bool = False
    """Whether torchvision may fetch what is not there."""


PLAINLY = Handling()


def read(
    name: str,
    source: Source,
    classes: Sequence[str],
    contract: Preprocessing,
    task: Task,
    *,
    download: bool = False,
    keep: Path | None = None,
) -> list[Sample]:
    """Read what a split holds, undecoded; raise InputError when there are no images, or a label is of no class.

    How one source is divided is written into the folder `keep`.
    """
    wanted = Wanted(classes, contract, task, name != UNLABELLED or isinstance(source, Part), download)
    whole = source.source if isinstance(source, Part) else source
    found = formats.of(whole).read(whole, wanted)
    if isinstance(source, Part):
        made = splitting.manifest(found, source, classes)
        found = splitting.part(found, made, source.part)
        if keep is not None:
            splitting.write(made, keep)
    if not found:
        raise InputError(f"the {name} data {title(source)} holds no images")
    if name != UNLABELLED:
        return found
    if task == "classification":
        _refuse_one_class(source, classes, found)
    return [replace(sample, labels=(), mask=None) for sample in found]


def files(source: Source) -> list[Path]:
    """List the files that a source is, besides image files that its samples name."""
    whole = source.source if isinstance(source, Part) else source
    pinned = [source.manifest] if isinstance(source, Part) and source.manifest else []
    return [*formats.of(whole).files(whole), *pinned]


def content(found: Sequence[Sample]) -> list[tuple[list[str], list[str], tuple[int, ...]]]:
    """Give what each sample holds: the sha256 of each of its files, how those are to be read, and its labels."""
    with ThreadPoolExecutor(usable_cpus()) as pool:
        hashes = list(pool.map(Sample.sha256, found))
    return [
        (digest, [picture.form for picture in sample.pictures], sample.labels)
        for digest, sample in zip(hashes, found, strict=True)
    ]


def split(
    name: str,
    source: Source,
    classes: Sequence[str],
    contract: Preprocessing,
    build: cache.Cache,
    *,
    task: Task = "classification",
    how: Handling = PLAINLY,
) -> Split:
    """Read a split, decoding every image by `contract`; the result is kept by content, not by file name.

    Raises InputError when there are no images, too many are broken, or a label does not fit the classes.
    """
    found = read(name, source, classes, contract, task, download=how.download, keep=build.root)
    roomy = decoding.roomier(contract, how.room) if how.room > 1 else None
    key = cache.key(
        "data",
        code=__file__,
        readers={path.name: cache.file_hash(path) for path in _readers()},
        packages=("pillow", "imagehash", *(("torchvision",) if roomy else ())),
        contract=contract,
        roomy=roomy,
        task=task,
        classes=len(classes),
        samples=content(found),
    )
    job = decoding.Job(name, tuple(classes), contract, roomy, how.broken_share)
    folder = build.folder("data", key, partial(decoding.decode, job, found, build.root), of=name)
    return _split(job, found, task, folder, build.root, key)


def _split(job: decoding.Job, found: Sequence[Sample], task: Task, folder: Path, root: Path, key: str) -> Split:
    """Open what was decoded into a folder, with the labels of what was not broken."""
    lost = broken.read(folder)
    broken.refuse_many(job.name, len(found), lost, job.broken_share, root)
    broken.tell(job.name, len(found), lost, folder)
    left = [sample for i, sample in enumerate(found) if i not in lost]
    return Split(
        name=job.name,
        images=np.load(folder / "images.npy", mmap_mode="r"),
        labels=_labels(job.name, folder, left, len(job.classes), task),
        sources=tuple(sample.source for sample in left),
        digests=tuple(bytes.fromhex(d) for d in json.loads((folder / "digests.json").read_text())),
        key=hashlib.sha256(f"{key} {lost}".encode()).hexdigest()[:16] if lost else key,
        hashes=np.load(folder / "hashes.npy"),
        roomy=_roomy(folder, task) if job.roomy else None,
    )


def _readers() -> list[Path]:
    """List the source files that decide what is read."""
    return [Path(preprocess.__file__), *sorted(Path(formats.__file__).parents[1].rglob("*.py"))]


def _labels(name: str, folder: Path, found: Sequence[Sample], classes: int, task: Task) -> Labels:
    if name == UNLABELLED:
        return np.zeros((len(found), 0), np.int64)
    if task == "segmentation":
        masks: Labels = np.load(folder / "masks.npy", mmap_mode="r")
        return masks
    return labels.gathered([sample.labels for sample in found], classes, task)


def _roomy(folder: Path, task: Task) -> Roomy:
    masks = np.load(folder / "roomy_masks.npy", mmap_mode="r") if task == "segmentation" else None
    return Roomy(np.load(folder / "roomy.npy", mmap_mode="r"), masks)


def _refuse_one_class(source: Source, classes: Sequence[str], found: Sequence[Sample]) -> None:
    """Refuse calibration images that are all in one class's folder, or listed with one label."""
    names = {classes[label] for sample in found for label in sample.labels}
    if isinstance(source, Path) and source.is_dir() and not names:
        relative = [Path(sample.source) for sample in found]
        names = {one.relative_to(source).parts[0] for one in relative if one.is_relative_to(source)}
    if len(names) == 1 and names <= set(classes) and len(found) >= SEVERAL:
        told = f"all {len(found)} calibration images in {title(source)} are of the class '{names.pop()}'"
        raise InputError(f"{told}; give some of every class, whose values reach further")
