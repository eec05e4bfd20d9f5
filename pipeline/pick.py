"""A large folder without labels → a list of calibration images: balanced over classes, and unlike each other."""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bitferry.device.arrays import Images
from bitferry.device.errors import InputError, first_line
from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline import cache, progress, recipe
from bitferry.pipeline.artifacts import Baseline
from bitferry.pipeline.data import sample
from bitferry.pipeline.data.formats.folder import image_files
from bitferry.pipeline.load import load
from bitferry.pipeline.onnx_in.asked import is_onnx
from bitferry.pipeline.onnx_in.load import load as load_onnx
from bitferry.pipeline.run import Run
from bitferry.pipeline.verify import eager
from bitferry.targets import usable_cpus

CHUNK = 64


@dataclass(frozen=True)
class Seen:
    """An image that can be picked."""

    path: Path
    scores: NDArray[np.float32]
    """The float model's, K; of segmentation the mean over the pixels."""


def pick(path: Path, folder: Path, count: int, out: Path, *, build: Path, trust: bool = False) -> list[Path]:
    """Write `count` images of `folder` to the list `out`, which a recipe's `data.calibration` may name.

    Images that are also in the recipe's other data, and copies, are left out, as are files that cannot be read.
    Raises InputError where there are none, or the model takes several images at a time.
    """
    read = recipe.read(path)
    if read.preprocessing.views > 1:
        raise InputError(f"the model takes {read.preprocessing.views} images at a time, which a folder cannot pair up")
    files = image_files(folder) if folder.is_dir() else []
    if not files:
        raise InputError(f"{folder} is no folder with images")
    seen = _look(Run(read, path, cache.Cache(build / read.name), trust), files)
    classes = [int(one.scores.argmax()) if read.task == "classification" else 0 for one in seen]
    chosen = choose(np.stack([one.scores for one in seen]), classes, count)
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = [os.path.relpath(seen[i].path, out.parent) for i in sorted(chosen)]
    out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    per_class = np.bincount([classes[i] for i in chosen])
    spread = f" of {np.count_nonzero(per_class)} classes, as the float model sees them," * (
        read.task == "classification"
    )
    progress.stage("pick", f"{len(chosen)} of {len(files)} images{spread} in {out}")
    return [seen[i].path for i in chosen]


def choose(scores: NDArray[np.float32], classes: Sequence[int], count: int) -> list[int]:
    """Take turns among the classes, each giving what is farthest from all that it gave before (Gonzalez 1985).

    `scores` are N×K. The first of a class is the one nearest to its mean. Distances are of scores scaled to length 1,
    so that a picture that excites the model much is not unlike all others for that alone.
    """
    features = scores / np.maximum(np.linalg.norm(scores, axis=1, keepdims=True), 1e-12)
    rows = {label: np.flatnonzero(np.asarray(classes) == label) for label in sorted(set(classes))}
    far = {label: np.full(len(of), np.inf) for label, of in rows.items()}
    first = {label: int(np.square(features[of] - features[of].mean(0)).sum(1).argmin()) for label, of in rows.items()}
    chosen: list[int] = []
    while len(chosen) < min(count, len(scores)):
        for label, of in rows.items():
            if len(chosen) == count or not (far[label] >= 0).any():
                continue
            place = first.pop(label) if label in first else int(far[label].argmax())
            chosen.append(int(of[place]))
            far[label] = np.minimum(far[label], np.square(features[of] - features[of[place]]).sum(1))
            far[label][place] = -1  # taken
    return chosen


def _look(run: Run, files: Sequence[Path]) -> list[Seen]:
    """Decode each file as the recipe says and let the float model answer; say what was left out."""
    splits = [run.evaluation, *([run.training] if run.recipe.data.train else [])]
    elsewhere, mine = {digest for split in splits for digest in split.digests}, set[bytes]()
    answer, found, left_out, broken = eager(_model(run).module()), list[Seen](), Counter[str](), list[str]()
    contract, chunks = run.recipe.preprocessing, range(0, len(files), CHUNK)
    with ThreadPoolExecutor(usable_cpus()) as pool:
        for start in progress.track(chunks, "look at images", total=len(chunks)):
            fresh: list[tuple[Path, Images]] = []
            part = files[start : start + CHUNK]
            for path, image in zip(part, pool.map(partial(_decoded, contract), part), strict=True):
                if isinstance(image, str):
                    broken.append(image)
                    continue
                digest = bytes.fromhex(hashlib.sha256(image.tobytes()).hexdigest()[:32])
                if digest in elsewhere or digest in mine:
                    left_out["in the recipe's other data" if digest in elsewhere else "copies of others"] += 1
                    continue
                mine.add(digest)
                fresh.append((path, image))
            if fresh:
                scores = answer(np.stack([image for _, image in fresh]))
                rows = scores.reshape(*scores.shape[:2], -1).mean(2)
                finite = np.isfinite(rows).all(1)
                left_out["whose scores are not finite"] += int((~finite).sum())
                found += [Seen(path, row) for (path, _), row, well in zip(fresh, rows, finite, strict=True) if well]
    if broken:
        left_out[f"cannot be read, for example: {broken[0]}"] = len(broken)
    for reason, count in (+left_out).items():
        progress.stage("pick", f"left out {count}: {reason}")
    if not found:
        raise InputError(f"none of the {len(files)} images can be picked")
    return found


def _model(run: Run) -> Baseline:
    """Load the model without the calibration data, which need not be there yet; train it where it has no weights."""
    given = run.recipe.model.weights
    if is_onnx(run.recipe):
        return load_onnx(run.recipe, run.path.parent, run.build)
    if given is None and not run.recipe.model.whole:
        return run.model
    return load(run.recipe, given, folder=run.path.parent, trust=run.trust)


def _decoded(contract: Preprocessing, path: Path) -> Images | str:
    """Give what the model takes, or why not."""
    picture = sample.file(path)
    try:
        return contract.finish(picture.decode(picture.content()))
    except InputError as error:
        return first_line(error)
