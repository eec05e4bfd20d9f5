"""Images and labels from a folder, a list or an array file, decoded once; and the leak check between splits."""

import hashlib
import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from device import preprocess
from device.arrays import Images
from device.errors import InputError
from device.preprocess import Preprocessing
from pipeline import cache, progress
from pipeline.artifacts import Labels, Split
from pipeline.measure.metrics import Task
from targets import usable_cpus

CHUNK = 256
ENDINGS = {".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".avif"}
MOST_COPIES = 0.01
"""Share of a split's images that may be copies of others in it; each counts as evidence, and a copy is none."""


@dataclass(frozen=True)
class Sample:
    """One image before decoding."""

    source: str
    labels: tuple[int, ...]
    """The indices of its classes: one, or for multi-label data any number."""
    form: str
    """How the bytes are to be read: `file`, or the shape of raw pixels. The same bytes in another shape are another
    picture."""
    content: Callable[[], bytes]
    """Its encoded bytes, or its raw pixels when it comes from an array."""
    fit: Callable[[bytes], Images]


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
    samples = _samples(source, classes, contract, task)
    if not samples:
        raise InputError(f"the {name} data {source} holds no images")
    with ThreadPoolExecutor(usable_cpus()) as pool:
        hashes = list(pool.map(_content_hash, samples))
    key = cache.key(
        "data",
        code=__file__,
        packages=("pillow",),
        preprocess=cache.file_hash(Path(preprocess.__file__)),
        contract=contract,
        task=task,
        samples=[(digest, sample.form, sample.labels) for digest, sample in zip(hashes, samples, strict=True)],
    )
    folder = build.folder("data", key, partial(_decode, name, samples, contract), of=name)
    return Split(
        name=name,
        images=np.load(folder / "images.npy", mmap_mode="r"),
        labels=_label_array(samples, len(classes), task),
        sources=tuple(sample.source for sample in samples),
        digests=tuple(bytes.fromhex(d) for d in json.loads((folder / "digests.json").read_text())),
        key=key,
    )


def _label_array(samples: Sequence[Sample], classes: int, task: Task) -> Labels:
    if task == "classification":
        return np.array([sample.labels[0] for sample in samples], dtype=np.int64)
    labels = np.zeros((len(samples), classes), dtype=np.int64)
    for row, sample in zip(labels, samples, strict=True):
        row[list(sample.labels)] = 1
    return labels


def refuse_leaks(*splits: Split) -> None:
    """Raise InputError when one image, by its pixels, is in two splits, or too often in one."""
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


def _content_hash(sample: Sample) -> str:
    return hashlib.sha256(sample.content()).hexdigest()


def _decode(name: str, samples: Sequence[Sample], contract: Preprocessing, folder: Path) -> None:
    """Write images.npy and digests.json, a chunk at a time so that memory stays small."""
    shape = (len(samples), contract.height, contract.width, 3)
    images = open_memmap(folder / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
    digests: list[str] = []
    with ThreadPoolExecutor(usable_cpus()) as pool:
        chunks = range(0, len(samples), CHUNK)
        for start in progress.track(chunks, f"decode {name}", total=len(chunks)):
            part = samples[start : start + CHUNK]
            images[start : start + len(part)] = np.stack(list(pool.map(lambda s: s.fit(s.content()), part)))
            digests += [hashlib.sha256(i.tobytes()).hexdigest()[:32] for i in images[start : start + len(part)]]
    images.flush()
    (folder / "digests.json").write_text(json.dumps(digests))


def _samples(source: Path, classes: Sequence[str], contract: Preprocessing, task: Task) -> list[Sample]:
    if source.is_dir() and task == "multilabel":
        raise InputError(
            f"{source} is a folder, whose layout can name only one class per image; for task 'multilabel' give "
            "a list of `file<TAB>A|B` lines, or an .npz with `labels` N×K of 0 and 1"
        )
    if source.is_dir():
        return _from_folder(source, classes, contract)
    if not source.is_file():
        raise InputError(f"the data {source} does not exist")
    if source.suffix == ".npz":
        return _from_arrays(source, classes, contract, task)
    return _from_list(source, classes, contract, task)


def _from_folder(root: Path, classes: Sequence[str], contract: Preprocessing) -> list[Sample]:
    """Read root/CLASS/**/IMAGE, the layout of torchvision's ImageFolder."""
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise InputError(f"{root} has no class folders; expected {root}/{classes[0]}/… with images, or use a list file")
    labels = _folder_labels([folder.name for folder in folders], classes, root)
    return [
        _file_sample(path, (label,), contract)
        for folder, label in zip(folders, labels, strict=True)
        for path in image_files(folder)
    ]


def image_files(folder: Path) -> list[Path]:
    """List the images below a folder by their endings, in order; what is hidden is left out."""
    found = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in ENDINGS and path.is_file())
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _folder_labels(names: Sequence[str], classes: Sequence[str], root: Path) -> list[int]:
    """Match folders with classes by name; where none matches but the counts agree, by sorted order (torchvision)."""
    strange = [name for name in names if name not in classes]
    if not strange:
        return [_by_name(name, classes) for name in names]
    if len(strange) == len(names) == len(classes):
        progress.stage("data", f"{root}: no folder is named like a class; taken in sorted order")
        return list(range(len(names)))
    raise InputError(
        f"{root} has folders that are no class of this recipe: {_some(strange)}; the classes are {_some(classes)}"
    )


def _from_list(path: Path, classes: Sequence[str], contract: Preprocessing, task: Task) -> list[Sample]:
    """Read lines of `file<TAB>label`: an index or a class name, the file relative to the list.

    A multi-label line has any number of them with `|` between; none when the image is of no class.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a list: expected text lines of `file<TAB>label` ({error.reason})") from None
    samples = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (number == 1 and line.split("\t")[0].lower() in ("file", "path", "image", "filename")):
            continue
        name, tab, rest = line.partition("\t")
        if not tab:
            wanted = (
                "`file<TAB>A|B`, nothing after the tab for no label" if task == "multilabel" else "`file<TAB>label`"
            )
            raise InputError(f"{path}:{number}: expected {wanted}, found {line!r}")
        text = rest.split("\t")[0].strip()
        parts = [text] if task == "classification" else [part.strip() for part in text.split("|") if text]
        labels = tuple(_label(part, classes, f"{path}:{number}") for part in parts)
        samples.append(_file_sample(path.parent / name, labels, contract))
    return samples


def _from_arrays(path: Path, classes: Sequence[str], contract: Preprocessing, task: Task) -> list[Sample]:
    """Read `images` (N×H×W grey or N×H×W×3 RGB, uint8) and `labels` of an .npz file."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    except (OSError, ValueError, TypeError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} is not an .npz with arrays `images` and `labels`: {error}") from error
    if images.dtype != np.uint8 or not (images.ndim == 3 or images.shape[3:] == (3,)) or 0 in images.shape[1:]:
        raise InputError(f"{path}: expected `images` N×H×W or N×H×W×3 uint8, found {images.dtype} {images.shape}")
    fit = partial(_fit, contract, images.shape[1:])
    return [
        Sample(f"{path.name}[{i}]", sample_labels, str(image.shape), image.tobytes, fit)
        for i, (image, sample_labels) in enumerate(
            zip(images, _array_labels(labels, len(images), classes, path, task), strict=True)
        )
    ]


def _array_labels(
    labels: NDArray[Any], images: int, classes: Sequence[str], path: Path, task: Task
) -> list[tuple[int, ...]]:
    """Read N integers, or for multi-label data N×K of 0 and 1, as the classes of each image."""
    found = f"found {labels.dtype} {labels.shape}"
    if task == "multilabel":
        wanted = (images, len(classes))
        if labels.shape != wanted or labels.dtype.kind not in "iub":
            raise InputError(f"{path}: expected `labels` of shape {wanted}, 0 or 1 for each class, {found}")
        strange = sorted(set(np.unique(labels).tolist()) - {0, 1})
        if strange:
            raise InputError(f"{path}: expected `labels` of 0 and 1 only, found {_some([str(v) for v in strange])}")
        return [tuple(np.flatnonzero(row).tolist()) for row in labels]
    if labels.shape != (images,) or labels.dtype.kind not in "iu":
        hint = '; for several labels per image set task = "multilabel"' if labels.ndim == 2 else ""
        raise InputError(f"{path}: expected `labels` of {images} integers, {found}{hint}")
    _refuse_strange_labels(labels.astype(np.int64), classes, path)
    return [(label,) for label in labels.tolist()]


def _fit(contract: Preprocessing, shape: tuple[int, ...], content: bytes) -> Images:
    return contract.fit(np.frombuffer(content, np.uint8).reshape(shape))


def _file_sample(path: Path, labels: tuple[int, ...], contract: Preprocessing) -> Sample:
    return Sample(str(path), labels, "file", partial(_read, path), lambda content: contract.load(content, str(path)))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(f"the image {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _label(text: str, classes: Sequence[str], where: str) -> int:
    if text in classes:
        return _by_name(text, classes)
    if not text.isdecimal():
        hint = '; for several labels per image set task = "multilabel"' if "|" in text else ""
        raise InputError(f"{where}: '{text}' is neither a class of this recipe ({_some(classes)}) nor an index{hint}")
    if int(text) >= len(classes):
        raise InputError(f"{where}: label {text} is out of range; there are {len(classes)} classes, counted from 0")
    return int(text)


def _by_name(name: str, classes: Sequence[str]) -> int:
    if classes.count(name) > 1:
        raise InputError(
            f"the class name '{name}' stands for {classes.count(name)} classes; use indices in a list file"
        )
    return classes.index(name)


def _refuse_strange_labels(labels: Labels, classes: Sequence[str], path: Path) -> None:
    strange = Counter(labels[(labels < 0) | (labels >= len(classes))].tolist())
    if strange:
        found = ", ".join(str(label) for label in sorted(strange)[:5])
        raise InputError(f"{path}: labels out of range ({found}); there are {len(classes)} classes, counted from 0")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
