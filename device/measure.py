"""What a machine does with a bundle, in numbers: how fast it loads and answers, and its answers for given images."""

import json
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitferry.device import kept, machine
from bitferry.device.arrays import Images
from bitferry.device.errors import InputError, first_line
from bitferry.device.machine import Conditions, Machine
from bitferry.device.runner import Runner, Runtime
from bitferry.device.timing import BLOCKS, Series, interleave

QUICK_SECONDS = 0.2
SECONDS = 1.5
"""Spent on the timed calls, where the model allows it."""


@dataclass(frozen=True)
class Measurement:
    """What was measured of a bundle, and where; nothing is summed up, so that another machine can judge it."""

    machine: Machine
    environment: dict[str, Any]
    """As the target tells it (see `Environment` in `targets/`)."""
    rebuilt: bool
    """Whether a file compiled on this machine ran in place of the bundle's own."""
    threads: int
    load_ms: float
    first_ms: float
    """The very first answer."""
    seconds: tuple[tuple[float, ...], ...]
    """Of each timed call, block by block."""
    first_seconds: float
    warm_up_calls: int
    settled: bool
    conditions: Conditions

    @property
    def series(self) -> Series:
        """Give the timed calls as what is judged."""
        return Series(np.array(self.seconds), self.first_seconds, self.warm_up_calls, self.settled)


def measure(
    runner: Runner, runtime: Runtime, *, seconds: float = SECONDS, blocks: Iterable[int] = range(BLOCKS)
) -> Measurement:
    """Time calls of the model's own batch, 1 where that is dynamic, for about `seconds`; say what ran them."""
    batch = 1 if runner.options.batch == "dynamic" else runner.options.batch
    image = np.full((batch, *runner.preprocessing.shape), 127, np.uint8)
    with machine.other_load() as others:
        calls = {"artifact": lambda: runner.predict(image)}
        series = interleave(calls, seconds=seconds, blocks=blocks)["artifact"]
    return Measurement(
        machine=machine.here(),
        environment=asdict(runtime.environment(options=runner.options)),
        rebuilt=runner.rebuilt,
        threads=runner.options.threads or machine.usable_cpus(),
        load_ms=runner.load_ms,
        first_ms=runner.first_ms,
        seconds=tuple(map(tuple, series.seconds.tolist())),
        first_seconds=series.first_seconds,
        warm_up_calls=series.warm_up_calls,
        settled=series.settled,
        conditions=machine.conditions(others()),
    )


def quick(runner: Runner) -> float:
    """Give the median of a few calls of the model's own batch in milliseconds: enough to see that it is not slow."""
    batch = 1 if runner.options.batch == "dynamic" else runner.options.batch
    image = np.full((batch, *runner.preprocessing.shape), 127, np.uint8)
    series = interleave({"artifact": lambda: runner.predict(image)}, seconds=QUICK_SECONDS)["artifact"]
    return 1e3 * float(np.median(series.seconds))


def answer(runner: Runner, images: Path) -> None:
    """Answer for the images of a file, already preprocessed; write `scores.npy`, and `maps.npz` of maps, beside it.

    The file is an `.npz` with an array `images`, or an `.npy`, which is not read into memory as a whole.
    """
    kept.write(kept.answer(runner.predict, _read(images, runner.preprocessing.shape)), images.parent)


def show(found: Measurement, *, as_json: bool) -> None:
    """Print what was measured, as JSON with every sample or as a line for a person."""
    if as_json:
        print(json.dumps(asdict(found), allow_nan=False))
        return
    calls, place = np.array(found.seconds), found.environment
    print(
        f"{1e3 * float(np.median(calls)):.3f} ms, the median of {calls.size} calls; loaded in {found.load_ms:.0f} ms; "
        f"{place['runtime']} {place['version']} on {found.machine.cpu}, {found.machine.hostname}"
    )


def _read(path: Path, shape: tuple[int, ...]) -> Images:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        images = found["images"] if isinstance(found, np.lib.npyio.NpzFile) else found
    except KeyError:
        raise InputError(f"{path} has no array `images`") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} holds no images: {first_line(error)}") from error
    if images.dtype != np.uint8 or images.shape[1:] != shape or not len(images):
        wanted = "×".join(map(str, ("N", *shape)))
        raise InputError(
            f"{path} holds {images.dtype} of shape {images.shape}; expected uint8 {wanted}, preprocessed as the "
            "manifest says"
        )
    return images
