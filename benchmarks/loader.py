"""Images per second of bitferry's loader beside torchvision's DataLoader, on a folder of JPEG photographs.

    python benchmarks/loader.py [FOLDER] [--rounds 5] [--copies 2] [--docs]

Both decode the JPEGs, cut out a random part, resize it to 224×224 and mirror half of them: torchvision by ImageFolder,
transforms of v2 and a DataLoader of two processes, bitferry by `dataset.split` (decoded once) and `loader.batches`.
Each round takes both in turns, the other one first each time: a first epoch, from nothing kept, and later ones. FOLDER
holds photographs; without, enlarged pictures of the embedded ones are used, and the table says so. Ratios are of one
round's speeds, with the 95 % interval of their mean by Student's t. `--docs` writes the table into docs/data.md.
"""

import argparse
import io
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from common import result_path
from PIL import Image
from scipy import stats
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from bitferry import targets
from bitferry.device.machine import other_load
from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline import dataset, loader
from bitferry.pipeline.augmentation import Augmentation
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.data.formats.folder import image_files
from bitferry.pipeline.data.split import Split
from bitferry.pipeline.progress import console

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs/data.md"
BEGIN, END = "<!-- loader -->", "<!-- /loader -->"
SIDE, RESIZE, BATCH, WORKERS = 224, 256, 64, 2
HOW = Augmentation(horizontal_flip=True, crop=(0.08, 1.0))
CONTRACT = Preprocessing(height=SIDE, width=SIDE, resize=RESIZE)
CLASSES = ("a", "b")


def photographs(folder: Path | None) -> Iterator[bytes]:
    """Give JPEG files: those of a folder, or the embedded pictures enlarged to a photograph's size."""
    if folder is not None:
        yield from (path.read_bytes() for path in image_files(folder) if path.suffix.lower() in (".jpg", ".jpeg"))
        return
    with np.load(ROOT / "calibration_data/fashion_mnist/train.npz") as arrays:
        images = arrays["images"][:256]
    for image in images:
        large = Image.fromarray(image).convert("RGB").resize((500, 375), Image.Resampling.BICUBIC)
        yield _jpeg(large)


def _jpeg(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=90)
    return stream.getvalue()


def write(found: list[bytes], copies: int, folder: Path) -> int:
    """Write every photograph, and mirrored ones of it besides, into class folders."""
    count = 0
    for turn in range(copies):
        for i, content in enumerate(found):
            place = folder / CLASSES[i % 2] / f"{turn}-{i}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            turned = Image.open(io.BytesIO(content)).transpose(Image.Transpose(turn - 1)) if turn else None
            place.write_bytes(content if turned is None else _jpeg(turned.convert("RGB")))
            count += 1
    return count


def theirs(folder: Path) -> DataLoader[tuple[torch.Tensor, torch.Tensor]]:
    """Give torchvision's way, as its own training references have it, up to uint8 tensors."""
    steps = [v2.RandomResizedCrop(SIDE, scale=HOW.crop, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    images = ImageFolder(folder, v2.Compose(steps))
    return DataLoader(images, BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True)


def ours(folder: Path, build: Path) -> Split:
    """Give bitferry's way of the same: decoded once, kept larger than the model's input."""
    how = dataset.Handling(room=HOW.room)
    return dataset.split("train", folder, CLASSES, CONTRACT, Cache(build), how=how)


def seconds(run: Callable[[], int], count: int) -> float:
    """Time an epoch, and make sure that it had every image."""
    start = time.perf_counter()
    got = run()
    took = time.perf_counter() - start
    if got != count:
        raise SystemExit(f"an epoch of {got} images, not {count}")
    return took


def their_epoch(made: DataLoader[tuple[torch.Tensor, torch.Tensor]]) -> int:
    return sum(len(images) for images, _ in made)


def our_epoch(made: Split, number: int) -> int:
    order = np.random.default_rng(number).permutation(len(made))
    found = loader.batches(made, order, batch_size=BATCH, augmentation=HOW, task="classification", seed=number)
    return sum(len(images) for images, _ in found)


def one_round(folder: Path, count: int, number: int) -> dict[str, dict[str, float]]:
    """Time a first and a later epoch of both, in turns; give images per second."""
    speeds: dict[str, dict[str, float]] = {"first": {}, "later": {}}
    with tempfile.TemporaryDirectory() as build:
        made: dict[str, Callable[[int], int]] = {}

        def begin_theirs() -> int:
            kept = theirs(folder)
            made["torchvision"] = lambda _: their_epoch(kept)
            return their_epoch(kept)

        def begin_ours() -> int:
            kept = ours(folder, Path(build) / "build")
            made["bitferry"] = lambda epoch: our_epoch(kept, epoch)
            return our_epoch(kept, 0)

        begin = {"torchvision": begin_theirs, "bitferry": begin_ours}
        names = sorted(begin, reverse=bool(number % 2))
        for name in names:
            speeds["first"][name] = count / seconds(begin[name], count)
        for name in reversed(names):
            speeds["later"][name] = count / seconds(lambda name=name: made[name](number + 1), count)  # type: ignore[misc]
    return speeds


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Give the mean of the logarithms' ratio, with its 95 % interval."""
    logs = np.log(ratios)
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / len(logs) ** 0.5
    return tuple(float(np.exp(logs.mean() + side * half)) for side in (0, -1, 1))  # type: ignore[return-value]


def ahead_from(rounds: list[dict[str, dict[str, float]]]) -> int | None:
    """Give the epoch by whose end bitferry has given more images in all; None where it never does."""
    took = {name: [float(np.median([1 / one[epoch][name] for one in rounds])) for epoch in ("first", "later")]
            for name in ("bitferry", "torchvision")}  # fmt: skip
    (first, later), (their_first, their_later) = took["bitferry"], took["torchvision"]
    if later >= their_later:
        return None if first >= their_first else 1
    return 1 + max(0, math.ceil((first - their_first) / (their_later - later)))


def table(rounds: list[dict[str, dict[str, float]]], told: str) -> str:
    lines = [
        "| epoch | bitferry, images/s | torchvision, images/s | ratio (95 % interval) |",
        "| --- | --- | --- | --- |",
    ]
    for epoch in ("first", "later"):
        speeds = {name: np.median([one[epoch][name] for one in rounds]) for name in ("bitferry", "torchvision")}
        value, low, high = interval([one[epoch]["bitferry"] / one[epoch]["torchvision"] for one in rounds])
        lines.append(
            f"| {epoch} | {speeds['bitferry']:,.0f} | {speeds['torchvision']:,.0f} | "
            f"{value:.2f} ({low:.2f} to {high:.2f}) |"
        )
    ahead = ahead_from(rounds)
    return "\n".join([*lines, "", f"{told} Over all epochs bitferry is ahead from number {ahead or '∞'} on."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, nargs="?", help="photographs (default: enlarged embedded pictures)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--copies", type=int, default=2, help="1 + mirrored and turned ones of each (default: 2)")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/data.md")
    asked = parser.parse_args()
    if asked.rounds < 2 or not 1 <= asked.copies <= 7:
        parser.error("--rounds is 2 or more, --copies 1 to 7")
    console.quiet = True
    with tempfile.TemporaryDirectory() as folder, other_load() as others:
        count = write(list(photographs(asked.folder)), asked.copies, Path(folder))
        their_epoch(theirs(Path(folder)))  # what both read lies in the system's cache from here on
        rounds = [one_round(Path(folder), count, number) for number in range(asked.rounds)]
    what = "photographs" if asked.folder else "enlarged embedded pictures"
    cpus, isa = os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count(), targets.cpu_isa()[-1:]
    told = (
        f"{count} JPEGs ({what} and mirrored ones), {asked.rounds} rounds in turns, batches of {BATCH}, {SIDE}×{SIDE} "
        f"pixels, torchvision with {WORKERS} processes; {cpus} CPUs ({' '.join(isa)}), which other "
        f"processes, DataLoader's among them, used for {others() or 0:.0%}."
    )
    found = table(rounds, told)
    result_path("loader").write_text(json.dumps({"told": told, "rounds": rounds, "other_load": others()}))
    print(found)
    if asked.docs:
        before, _, rest = DOCS.read_text().partition(BEGIN)
        DOCS.write_text(f"{before}{BEGIN}\n\n{found}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
