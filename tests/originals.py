"""Small data sets and weights in the very layout of the originals, with the embedded images in them."""

import csv
import io
import pickle
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from recipes.chexpert import FINDINGS
from tests.conftest import EMBEDDED

Pixels = NDArray[np.uint8]
CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TINTS = np.random.default_rng(0).uniform(0.3, 1.0, (64, 3))


def pictures(count: int, *, skip: int = 0, size: tuple[int, int] = (32, 32)) -> Iterator[tuple[Pixels, int]]:
    """Give embedded images in the colour of their class, H×W×3 of the size (width, height), with their labels."""
    with np.load(EMBEDDED / "train.npz") as arrays:
        images, labels = arrays["images"][skip : skip + count], arrays["labels"][skip : skip + count]
    for image, label in zip(images, labels.tolist(), strict=True):
        grey = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
        yield (grey[..., None] * TINTS[label]).astype(np.uint8), label


_Pickler: Any = vars(pickle)["_Pickler"]
"""The one written in Python, whose opcodes can be chosen."""


class _Python2(_Pickler):  # type: ignore[misc]
    """Write texts and bytes as Python 2 did, which is what the originals were written by."""

    def _string(self, value: str | bytes) -> None:
        content = value.encode("latin1") if isinstance(value, str) else value
        short = len(content) < 256
        head = (
            pickle.SHORT_BINSTRING + bytes([len(content)])
            if short
            else pickle.BINSTRING + struct.pack("<i", len(content))
        )
        self.write(head + content)
        self.memoize(value)

    dispatch: ClassVar[Any] = {**_Pickler.dispatch, str: _string, bytes: _string}


def python2(value: object) -> bytes:
    """Pickle as Python 2 and its NumPy did."""
    stream = io.BytesIO()
    _Python2(stream, 2).dump(value)
    return stream.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def cifar10(root: Path, *, each: int, test: int) -> None:
    """Write five training batches and the test batch."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = [(f"data_batch_{i}", each) for i in range(1, 6)] + [("test_batch", test)]
    found = pictures(5 * each + test)
    for number, (name, count) in enumerate(names, 1):
        some = [next(found) for _ in range(count)]
        batch: dict[str, Any] = {
            "batch_label": f"training batch {number} of 5",
            "labels": [label for _, label in some],
            "data": np.stack([image.transpose(2, 0, 1).ravel() for image, _ in some]),
            "filenames": [f"{CIFAR[label]}_s_{i:06}.png" for i, (_, label) in enumerate(some)],
        }
        (folder / name).write_bytes(python2(batch))
    meta = {"num_cases_per_batch": each, "label_names": list(CIFAR), "num_vis": 3072}
    (folder / "batches.meta").write_bytes(python2(meta))


def pets(root: Path, breeds: Sequence[str], *, trainval: int, test: int) -> None:
    """Write so many images of each breed for both lists; cats begin with a capital, as in the original."""
    folder = root / "oxford-iiit-pet"
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    found = pictures(len(breeds) * (trainval + test), size=(50, 40))
    for name, first, count in (("trainval", 1, trainval), ("test", 1 + trainval, test)):
        lines = []
        for number, breed in enumerate(breeds, 1):
            cat = number % 3 == 1
            stem = breed.replace(" ", "_") if cat else breed.replace(" ", "_").lower()
            for i in range(first, first + count):
                Image.fromarray(next(found)[0]).save(folder / f"images/{stem}_{i}.jpg", quality=95)
                lines.append(f"{stem}_{i} {number} {1 if cat else 2} {number // 3 + 1}")
        (folder / f"annotations/{name}.txt").write_text("\n".join(lines) + "\n")


def chexpert(folder: Path, *, patients: int) -> Path:
    """Write train.csv and its images: two visits each, the second of every fourth patient without a lateral image."""
    found, random = pictures(4 * patients, size=(39, 32)), np.random.default_rng(0)
    rows = []
    for patient in range(1, patients + 1):
        for study in (1, 2):
            values = random.choice(["", "0.0", "1.0", "-1.0"], len(FINDINGS), p=[0.5, 0.15, 0.3, 0.05]).tolist()
            views = ["frontal"] if study == 2 and patient % 4 == 0 else ["frontal", "lateral"]
            for number, view in enumerate(views, 1):
                name = f"train/patient{patient:05}/study{study}/view{number}_{view}.jpg"
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(next(found)[0]).convert("L").save(folder / name, quality=95)
                side = "AP" if view == "frontal" else ""
                rows.append([f"CheXpert-v1.0-small/{name}", "Female", "61", view.title(), side, *values])
    with (folder / "train.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *FINDINGS], *rows])
    return folder / "train.csv"


def voc(root: Path, *, train: int, val: int) -> None:
    """Write both lists, JPEG images, and masks as palette PNGs: an object of its class, a border of 255 around it."""
    folder = root / "VOCdevkit/VOC2012"
    for name in ("ImageSets/Segmentation", "JPEGImages", "SegmentationClass"):
        (folder / name).mkdir(parents=True)
    found = pictures(train + val, size=(50, 37))
    for split, count in (("train", train), ("val", val)):
        first = 0 if split == "train" else 1000
        names = [f"2007_{i:06}" for i in range(first, first + count)]
        for name in names:
            image, label = next(found)
            Image.fromarray(image).save(folder / f"JPEGImages/{name}.jpg", quality=95)
            bright = image.max(2)
            mask = np.where(bright > 60, label + 1, np.where(bright > 20, 255, 0)).astype(np.uint8)
            indexed = Image.fromarray(mask)
            indexed.putpalette(_palette())
            indexed.save(folder / f"SegmentationClass/{name}.png")
        (folder / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names) + "\n")


def _palette() -> list[int]:
    """Give the benchmark's colours: the bits of an index, taken in turns for red, green and blue, highest first."""
    return [sum(((index >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3))
            for index in range(256) for channel in range(3)]  # fmt: skip


def imagenet(folder: Path, *, calibration: int, evaluation: int) -> None:
    """Write the two lists of photographs that the recipes ask for."""
    (folder / "photos").mkdir(parents=True)
    found = pictures(calibration + evaluation, size=(50, 40))
    for name, count in (("calibration", calibration), ("evaluation", evaluation)):
        lines = []
        for i in range(count):
            image, label = next(found)
            Image.fromarray(image).save(folder / f"photos/{name}_{i:08}.JPEG", quality=95)
            lines.append(f"photos/{name}_{i:08}.JPEG\t{label}")
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")


def checkpoint(model: nn.Module, path: Path) -> None:
    """Save a model's weights, such as they are, as the libraries publish theirs."""
    path.parent.mkdir(exist_ok=True)
    torch.save(model.state_dict(), path)


def vgg16(features: nn.Module, path: Path) -> None:
    """Save VGG-16's convolutions, and a classifier under torchvision's names but smaller: its own takes 400 MB."""
    for layer in features.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    state: dict[str, Tensor] = {f"features.{name}": tensor for name, tensor in features.state_dict().items()}
    for number, shape in {"0": (9, 25088), "3": (9, 9), "6": (1000, 9)}.items():
        state |= {f"classifier.{number}.weight": torch.randn(shape), f"classifier.{number}.bias": torch.zeros(shape[0])}
    path.parent.mkdir(exist_ok=True)
    torch.save(state, path)


def old_densenet(model: nn.Module, path: Path) -> None:
    """Save DenseNet's weights under the names that torchvision's published file has: norm.1 for norm1."""
    state = model.state_dict()
    for kind in ("norm", "conv"):
        for number in ("1", "2"):
            state = {key.replace(f".{kind}{number}.", f".{kind}.{number}.") if "denselayer" in key else key: tensor
                     for key, tensor in state.items()}  # fmt: skip
    path.parent.mkdir(exist_ok=True)
    torch.save(state, path)
