"""CIFAR-10 and CIFAR-100 in their original batches, which are pickles: read by what makes arrays and nothing else."""

import io
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from device.errors import InputError, first_line
from pipeline.data import labels, sample
from pipeline.data.formats.torchvision import download, root_of, some_files
from pipeline.data.sample import Sample, Wanted
from pipeline.data.source import Table, Whole

SIDE = 32
BATCHES = {
    ("CIFAR10", True): ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)]),
    ("CIFAR10", False): ("cifar-10-batches-py", ["test_batch"]),
    ("CIFAR100", True): ("cifar-100-python", ["train"]),
    ("CIFAR100", False): ("cifar-100-python", ["test"]),
}
NAMES = {"CIFAR10": ("batches.meta", "label_names", "labels"), "CIFAR100": ("meta", "fine_label_names", "fine_labels")}
MAY_MAKE = {
    ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
}  # fmt: skip
"""What an array is pickled as, by Python 2 and 3."""


def reads(source: Whole) -> bool:
    """Take a table that names one of the two."""
    return isinstance(source, Table) and source.torchvision in NAMES


def files(source: Whole) -> Iterable[Path]:
    """List the files below the root."""
    return some_files(source)


def read(source: Whole, wanted: Wanted) -> list[Sample]:
    """Read the batches of `train = true` or `false`, with torchvision's choice of names."""
    assert isinstance(source, Table)  # noqa: S101 - `reads`
    name, train = str(source.torchvision), source.options.get("train", True)
    if {*source.options} - {"train"} or not isinstance(train, bool):
        raise InputError(f"{name} takes `train = true` or `false` and nothing else, found {source.options}")
    folder_name, batches = BATCHES[name, train]
    folder = root_of(source) / folder_name
    if not (folder / batches[0]).is_file():
        download(source, wanted, f"{folder}/{batches[0]}")
    meta, names_key, labels_key = NAMES[name]
    own = labels.of_names(_names(folder / meta, names_key), wanted.classes, name)
    found = []
    for batch in batches:
        pixels, truth = _batch(folder / batch, labels_key)
        for i, (image, label) in enumerate(zip(pixels, truth, strict=True)):
            chosen = labels.of_value(label, own, wanted.classes, wanted.task, f"{batch}[{i}]")
            found.append(Sample((sample.pixels(f"{batch}[{i}]", image),), chosen))
    return found


def _names(path: Path, key: str) -> list[str]:
    names = _unpickled(path).get(key)
    if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
        raise InputError(f"{path} has no list of names as '{key}'; it is not CIFAR's")
    return names


def _batch(path: Path, key: str) -> tuple[NDArray[np.uint8], Sequence[int]]:
    """Give N×32×32×3 pixels, which lie as planes in the file, and their labels."""
    held = _unpickled(path)
    pixels, truth = held.get("data"), held.get(key)
    shaped = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape[1:] == (3 * SIDE * SIDE,)
    if not isinstance(pixels, np.ndarray) or not shaped or not isinstance(truth, list) or len(truth) != len(pixels):
        raise InputError(f"{path}: expected `data` N×{3 * SIDE * SIDE} uint8 and as many `{key}`; it is not CIFAR's")
    return np.ascontiguousarray(pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)), truth


def _unpickled(path: Path) -> dict[str, object]:
    try:
        found = _Arrays(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except InputError as error:
        raise InputError(f"{path} {error}") from None
    except Exception as error:  # a pickle that is broken raises anything
        raise InputError(f"{path} is not a batch of CIFAR's: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__}; it is not a batch of CIFAR's")
    return found


class _Arrays(pickle.Unpickler):
    """An unpickler that makes arrays, numbers, texts, lists and dictionaries."""

    def find_class(self, module: str, name: str) -> object:
        """Refuse whatever a plain array does not need."""
        if (module, name) not in MAY_MAKE:
            raise InputError(f"asks for {module}.{name}, which no batch of CIFAR's does; it is not opened")
        return super().find_class(module, name)
