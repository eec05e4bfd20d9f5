"""`batch_size = "auto"`: the largest power of two that this machine has memory for and that costs an image no more."""

import itertools
import json
import resource
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch

from bitferry.pipeline import cache, load, progress
from bitferry.pipeline.data.split import Split
from bitferry.pipeline.load import PACKAGES, Deployable, architecture
from bitferry.pipeline.recipe import Recipe
from bitferry.pipeline.training import losses, machine
from bitferry.pipeline.training.machine import Precision

if TYPE_CHECKING:
    from accelerate import Accelerator

LEAST, MOST = 8, 4096
STEPS_AN_EPOCH = 8
"""That are left at least, for there to be something to learn from."""
NO_SLOWER, HOPELESS = 0.95, 0.8
"""Of the most images a second that any size reached."""
MEASURED = 3
FREE_SHARE = 0.5
"""Of the free memory that the next size may take."""


def choose(recipe: Recipe, data: Split, build: cache.Cache, precision: Precision, folder: Path) -> int:
    """Give the batch size, measured where the recipe leaves it open and kept, so that it is the same another time."""
    given = recipe.training.batch_size
    if given != "auto":
        return given
    key = cache.key(
        "batch",
        code=__file__,
        packages=PACKAGES[recipe.model.source.partition(":")[0]],
        own_code=load.own_code(recipe, folder),
        own_imports=load.own_imports(recipe, folder),
        model=recipe.model.model_dump(mode="json"),
        contract=recipe.preprocessing,
        classes=len(recipe.classes),
        task=recipe.task,
        images=len(data),
        machine=machine.name(),
        precision=precision,
    )
    done = build.folder("batch", key, partial(_measure, recipe, data, precision, folder))
    size = int(json.loads((done / "batch.json").read_text())["batch_size"])
    progress.stage("batch", f"{size} images")
    return size


def _measure(recipe: Recipe, data: Split, precision: Precision, folder: Path, out: Path) -> None:
    most = min(MOST, max(2, len(data) // STEPS_AN_EPOCH))
    sizes = [2**i for i in range(1, MOST.bit_length()) if LEAST <= 2**i <= most] or [2 ** (most.bit_length() - 1)]
    paces: dict[int, float] = {}
    with machine.accelerator(precision) as accelerator:
        model = Deployable(architecture(recipe, folder), recipe.preprocessing).train()
        step = _Step(recipe, data, accelerator.prepare_model(model), accelerator)
        for size in progress.track(sizes, "batch size", total=len(sizes)):
            before = _peak_bytes()
            try:
                paces[size] = step.pace(size)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                break
            grown = _peak_bytes() - before
            if paces[size] < HOPELESS * max(paces.values()):
                break
            if accelerator.device.type == "cpu" and 2 * grown > FREE_SHARE * psutil.virtual_memory().available:
                break
    best = max(paces.values(), default=0.0)
    chosen = max((size for size, pace in paces.items() if pace >= NO_SLOWER * best), default=sizes[0])
    told = {"batch_size": chosen, "images_per_s": {str(size): round(pace, 1) for size, pace in paces.items()}}
    (out / "batch.json").write_text(json.dumps(told))


class _Step:
    """A step of learning, timed."""

    def __init__(self, recipe: Recipe, data: Split, model: torch.nn.Module, accelerator: "Accelerator") -> None:
        self.data, self.model, self.accelerator = data, model, accelerator
        self.loss = losses.loss(recipe.task, recipe.training, data.labels, len(recipe.classes))
        self.optimizer = accelerator.prepare_optimizer(torch.optim.AdamW(model.parameters(), 0.0))

    def pace(self, size: int) -> float:
        """Give the images a second of steps of that size; the first, which takes the memory, is not counted."""
        picked = np.fromiter(itertools.islice(itertools.cycle(range(len(self.data))), size), np.int64)
        device = self.accelerator.device
        images = torch.from_numpy(self.data.images[picked]).to(device)
        labels = torch.from_numpy(np.asarray(self.data.labels[picked])).to(device)
        seconds = []
        for _ in range(1 + MEASURED):
            start = time.perf_counter()
            loss = self.loss.sum(self.model(images), labels) / size
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.optimizer.zero_grad()
            float(loss.detach())  # waits for a GPU
            seconds.append(time.perf_counter() - start)
        return size / statistics.median(seconds[1:])


def _peak_bytes() -> int:
    """Give the most memory that this process ever held; Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
