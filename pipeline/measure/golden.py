"""Image files made from evaluation images, to prove the whole path: bytes in, scores out, here and on the device."""

import io
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bitferry.device import pixels
from bitferry.device.arrays import Images, Outputs, Predict
from bitferry.device.errors import StageFailed
from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline import cache
from bitferry.pipeline.data.split import Split
from bitferry.pipeline.verdict import Golden, GoldenFile

KINDS = {
    "golden-1.jpg": "JPEG",
    "golden-2.png": "PNG",
    "golden-3.png": "grey PNG",
    "golden-4.jpg": "JPEG turned by EXIF",
}
ENLARGED = (1.5, 1.25)
"""Height and width over the model's input, so that resizing is part of the proof."""
TORCHVISION_LIMIT = 1.0
"""Mean levels of 255 that two right decoders and resamplers may differ by: twice the worst that
benchmarks/preprocessing.py found over 256 photographs (0.43, nearest; 0.07 bilinear)."""
LEAST_LIMIT, MOST_LIMIT = 1e-3, 0.25
"""Of the scores, as a share of the largest. On this machine a fresh process runs the same kernels and is held to the
least."""
UNMEASURED_LIMIT = 0.05
"""The least where another runtime stands in for the one that will be held to its scores: 16-bit kernels, other sums."""
EXIF_ORIENTATION, TURNED = 0x0112, 6


def make(evaluation: Split, contract: Preprocessing, build: cache.Cache) -> Path:
    """Write one file of each kind into a folder, from images spread over the evaluation data."""
    key = cache.key("golden", code=__file__, packages=("pillow",), data=evaluation.key, contract=contract)
    return build.folder("golden", key, partial(_make, evaluation, contract))


def views(name: str, contract: Preprocessing) -> list[str]:
    """Name the files of one answer: `golden-1.jpg`, and for each further view `golden-1-view-2.jpg`."""
    stem, dot, ending = name.partition(".")
    return [name, *(f"{stem}-view-{number}{dot}{ending}" for number in range(2, contract.views + 1))]


def paths(folder: Path, contract: Preprocessing) -> list[Path]:
    """List every golden file, those of one answer together."""
    return [folder / view for name in KINDS for view in views(name, contract)]


def answer(folder: Path, contract: Preprocessing, predict: Predict) -> Outputs:
    """Answer for each golden file of a folder, in their order; of maps, the scores of a few pixels."""
    groups = contract.groups(paths(folder, contract))
    return pixels.thin(predict(np.stack([contract.read(group) for group in groups])))


def prove(
    folder: Path,
    contract: Preprocessing,
    predict: Predict,
    fresh: Outputs,
    baseline: Predict,
    least: float = LEAST_LIMIT,
) -> Golden:
    """Compare the scores that a fresh process gave for each file with this one's, and the pixels with torchvision's.

    Another machine may run other kernels, so the limit for its scores is twice what the artifact itself differs from
    the float model on these files, at least `least` and at most 0.25. Raises StageFailed where scores are not finite.
    """
    here, exact = (answer(folder, contract, one) for one in (predict, baseline))
    if not (np.isfinite(here).all() and np.isfinite(fresh).all() and np.isfinite(exact).all()):
        raise StageFailed("the scores of the golden files are not all finite")
    largest = float(max(1e-6, np.abs(here).max()))
    files = [
        GoldenFile(name, kind, float(np.abs(fresh[i] - here[i]).max() / largest), *_opinions(folder, name, contract))
        for i, (name, kind) in enumerate(KINDS.items())
    ]
    limit = float(np.clip(2 * np.abs(here - exact).max() / largest, least, MOST_LIMIT))
    return Golden(files=tuple(files), score_limit=limit, torchvision_limit=TORCHVISION_LIMIT)


def second_opinion(contract: Preprocessing, content: bytes) -> Images | None:
    """Decode and resize with torchvision alone, tensors from bytes to pixels; None for lanczos, which it lacks."""
    from torchvision.io import ImageReadMode, decode_image  # noqa: PLC0415 - a second to import
    from torchvision.transforms.v2 import functional as F  # noqa: PLC0415

    modes = {"nearest": "nearest-exact", "bilinear": "bilinear", "bicubic": "bicubic"}
    if contract.interpolation not in modes:
        return None
    raw = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    image = decode_image(raw, ImageReadMode.RGB, apply_exif_orientation=True)
    mode = F.InterpolationMode(modes[contract.interpolation])
    size = [contract.height, contract.width]
    if contract.resize is None:
        image = F.resize(image, size, mode, antialias=True)
    else:
        image = F.center_crop(F.resize(image, [contract.resize], mode, antialias=True), size)
    array: Images = image.permute(1, 2, 0).numpy()
    return array[..., ::-1] if contract.color == "BGR" else array


def expected(golden: Golden, scores: Outputs, contract: Preprocessing) -> str:
    """Give the text of `golden/expected.json`: what the device must answer for each file, and how closely."""
    rows = {
        name: {"kind": kind, "scores": scores[i].tolist()}
        | ({"views": views(name, contract)} if contract.views > 1 else {})
        for i, (name, kind) in enumerate(KINDS.items())
    }
    return json.dumps({"score_limit": golden.score_limit, "files": rows}, indent=1) + "\n"


def _opinions(folder: Path, name: str, contract: Preprocessing) -> tuple[float | None, float | None]:
    """Give the mean and the largest difference of the pixels from torchvision's, of the view that differs most."""
    found = []
    for view in views(name, contract):
        content = (folder / view).read_bytes()
        other = second_opinion(contract, content)
        if other is None:
            return None, None
        difference = np.abs(other.astype(np.int16) - contract.load(content, view))
        found.append((float(difference.mean()), float(difference.max())))
    return max(found)


def _make(evaluation: Split, contract: Preprocessing, out: Path) -> None:
    picked = np.linspace(0, len(evaluation) - 1, len(KINDS)).astype(int)
    for (name, kind), index in zip(KINDS.items(), picked, strict=True):
        arrays = evaluation.images[index].reshape(-1, contract.height, contract.width, 3)
        for view, array in zip(views(name, contract), arrays, strict=True):
            image = Image.fromarray(np.ascontiguousarray(array[..., ::-1] if contract.color == "BGR" else array))
            height, width = (round(side * factor) for side, factor in zip(array.shape[:2], ENLARGED, strict=True))
            image = image.resize((width, height), Image.Resampling.BICUBIC)
            (out / view).write_bytes(_encoded(image, kind))


def _encoded(image: Image.Image, kind: str) -> bytes:
    """Encode an image; the turned one lies on its side, with the note that says how to set it upright."""
    stream, options = io.BytesIO(), {}
    if kind.endswith("EXIF"):
        image = image.transpose(Image.Transpose.ROTATE_90)
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = TURNED
        options = {"exif": exif}
    if kind.startswith("grey"):
        image = image.convert("L")
    if "JPEG" in kind:
        image.save(stream, "JPEG", quality=95, **options)
    else:
        image.save(stream, "PNG")
    return stream.getvalue()
