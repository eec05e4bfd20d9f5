"""CIFAR-10 and CIFAR-100 in their original batches, which are pickles: read by what makes arrays and nothing else."""

import io
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitferry.device.errors import InputError, first_line
from bitferry.pipeline.data import labels, sample
from bitferry.pipeline.data.formats.torchvision import download, root_of, some_files
from bitferry.pipeline.data.sample import Sample, Wanted
from bitferry.pipeline.data.source import Table, Whole

SIDE = 32
BATCHES = {
    ("CIFAR10", True): ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)]),
    ("CIFAR10", False): ("cifar-10-batches-py", ["test_batch"]),
    ("CIFAR100", True): ("cifar-100-python", ["train"]),
    ("CIFAR100", False): ("cifar-100-python", ["test"]),
}
NAMES = {"CIFAR10": ("batches.meta", "label_names", "labels"), "CIFAR100": ("meta", "fine_label_names", "fine_labels")}


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
    if wanted.contract.views > 1:
        raise InputError(f"{name} has one image per answer, preprocessing.views = {wanted.contract.views}")
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
    pixels, truth = _pixels(held.get("data")), held.get(key)
    if pixels is None or not isinstance(truth, list) or len(truth) != len(pixels):
        raise InputError(f"{path}: expected `data` N×{3 * SIDE * SIDE} uint8 and as many `{key}`; it is not CIFAR's")
    return np.ascontiguousarray(pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)), truth


def _pixels(held: object) -> NDArray[np.uint8] | None:
    """Make the array that a pickle describes, where it is one of N×3072 bytes in C's order."""
    match held:
        case _Array(state=(_, (int(rows), int(columns)), _Type(name="u1"), False | 0, (bytes() | str()) as data)):
            content = data if isinstance(data, bytes) else data.encode("latin1", "replace")  # Python 2 had no bytes
            if columns == 3 * SIDE * SIDE and len(content) == rows * columns:
                return np.frombuffer(content, np.uint8).reshape(rows, columns)
    return None


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


class _Array:
    """What stands in for an array: the description of one, which NumPy itself would follow without much of a look."""

    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Type:
    """What stands in for a type of numbers."""

    def __init__(self, name: object = None, *_: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        """Take the byte order and the like, which bytes have none of."""


def _array(*_: object) -> _Array:
    return _Array()


def _bytes(text: object, encoding: object) -> bytes:
    """Give bytes as Python 3 wrote them for Python 2."""
    if not isinstance(text, str) or encoding != "latin1":
        raise InputError("holds bytes that no batch of CIFAR's does; it is not opened")
    return text.encode("latin1")


STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _array, ("numpy._core.multiarray", "_reconstruct"): _array,
    ("numpy", "ndarray"): _Array, ("numpy", "dtype"): _Type, ("_codecs", "encode"): _bytes,
}  # fmt: skip
"""For all that an array is pickled as, by Python 2 and 3."""


class _Arrays(pickle._Unpickler):  # the one in Python: the one in C writes of damaged files to stderr
    """An unpickler that makes descriptions of arrays, numbers, texts, lists and dictionaries."""

    def find_class(self, module: str, name: str) -> object:
        """Refuse whatever a plain array does not need."""
        if (module, name) not in STAND_INS:
            raise InputError(f"asks for {module}.{name}, which no batch of CIFAR's does; it is not opened")
        return STAND_INS[module, name]
