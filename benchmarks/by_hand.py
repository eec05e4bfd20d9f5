"""The work of a person without bitferry: a torchvision model, and images read and judged by a few lines of one's own.

Imported by `peer_nncf.py` and `peer_olive.py`, which run in environments of their own; hence nothing of bitferry's is
used here. The recipe says what the model, the images and their preprocessing are, so that the work is the same.
"""

import statistics
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.float32]
"""1×3×H×W, normalized: what a torchvision model takes."""
Predict = Callable[[Pixels], NDArray[np.float32]]

HEADINGS = ("file", "path", "image", "filename")
WARM_UP, CALLS = 20, 200


@dataclass(frozen=True)
class Job:
    """What the work is about."""

    recipe: Mapping[str, Any]
    folder: Path
    """Of the recipe, where its relative paths start."""
    state: Path
    """The weights, as `torch.save` writes a state dict."""

    @classmethod
    def read(cls, recipe: Path, state: Path) -> "Job":
        return cls(tomllib.loads(recipe.read_text(encoding="utf-8-sig")), recipe.parent, state)

    @property
    def classes(self) -> list[str]:
        given = self.recipe["classes"]
        if isinstance(given, str):
            return [line.strip() for line in (self.folder / given).read_text().strip().splitlines()]
        return [str(i) for i in range(given)] if isinstance(given, int) else list(given)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Give the shape of one image."""
        contract = self.recipe["preprocessing"]
        return 1, 3, contract["height"], contract["width"]

    def model(self) -> torch.nn.Module:
        kind, _, name = self.recipe["model"]["source"].partition(":")
        if kind != "torchvision" or self.recipe.get("task", "classification") != "classification":
            raise SystemExit("the work by hand knows torchvision's classifiers only")
        options = {"num_classes": len(self.classes)} | self.recipe["model"].get("options", {})
        made: torch.nn.Module = torchvision.models.get_model(name, weights=None, **options)
        made.load_state_dict(torch.load(self.state, weights_only=True))
        return made.eval()

    def images(self, split: str) -> Iterator[tuple[Pixels, int]]:
        """Decode the images of `calibration` or `evaluation` one by one, with their classes."""
        for image, label in self._encoded(self.folder / Path(self.recipe["data"][split]).expanduser()):
            yield self._prepared(image), label

    def calibration(self) -> list[Pixels]:
        """Give as many calibration images as bitferry uses."""
        count = self.recipe.get("quantization", {}).get("images")
        return [image for image, _ in self.images("calibration")][: count if isinstance(count, int) else None]

    def _encoded(self, source: Path) -> Iterator[tuple[Image.Image, int]]:
        if source.suffix == ".npz":
            with np.load(source) as arrays:
                pairs = zip(arrays["images"], arrays["labels"].tolist(), strict=True)
                yield from ((Image.fromarray(pixels), label) for pixels, label in pairs)
        elif source.is_dir():
            folder = torchvision.datasets.ImageFolder(str(source))
            yield from ((Image.open(path), label) for path, label in folder.samples)
        else:
            for line in source.read_text(encoding="utf-8-sig").splitlines():
                name, _, label = line.partition("\t")
                if label and name.lower() not in HEADINGS:
                    which = int(label) if label.isdigit() else self.classes.index(label)
                    yield Image.open(source.parent / name), which

    def _prepared(self, image: Image.Image) -> Pixels:
        contract = self.recipe["preprocessing"]
        if contract.keys() & {"interpolation", "color", "views"}:
            raise SystemExit("the work by hand knows one RGB image with bilinear resizing only")
        height, width, resize = contract["height"], contract["width"], contract.get("resize")
        image = image.convert("RGB")
        if resize:
            image = torchvision.transforms.functional.resize(image, resize)
            image = torchvision.transforms.functional.center_crop(image, [height, width])
        else:
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        scaled = np.asarray(image, np.float32) * contract.get("scale", 1 / 255)
        mean, std = (np.array(contract.get(k, v), np.float32) for k, v in (("mean", [0] * 3), ("std", [1] * 3)))
        return np.ascontiguousarray(((scaled - mean) / std).transpose(2, 0, 1)[None])


def judge(job: Job, predicts: Mapping[str, Predict]) -> dict[str, dict[str, float]]:
    """Evaluate each on every evaluation image, and time it on the first."""
    right, count, first = dict.fromkeys(predicts, 0), 0, None
    for image, label in job.images("evaluation"):
        count, first = count + 1, image if first is None else first
        for name, predict in predicts.items():
            right[name] += int(predict(image).argmax() == label)
    if first is None:
        raise SystemExit("no evaluation images")
    return {
        name: {"top_1_percent": 100 * right[name] / count, "ms": 1e3 * latency(predict, first)}
        for name, predict in predicts.items()
    }


def latency(predict: Predict, image: Pixels) -> float:
    """Give the median seconds of a call."""
    taken = []
    for _ in range(WARM_UP + CALLS):
        start = time.perf_counter()
        predict(image)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[WARM_UP:])
