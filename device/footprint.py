"""What a fresh process needs to load one artifact and answer for image files, and its answers. Run as `python -m`."""

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any, cast

import numpy as np

from bitferry.device import pixels
from bitferry.device.arrays import Images
from bitferry.device.preprocess import Preprocessing
from bitferry.device.runner import Runtime, options_of


def measure(target: str, path: Path, precision: str, options: dict[str, Any], images: Images) -> dict[str, Any]:
    """Load the artifact and answer for each image N×H×W×3, one by one; milliseconds, bytes and the scores.

    Of maps it gives the scores of a few pixels.
    """
    runtime = cast(Runtime, importlib.import_module(f"bitferry.targets.{target}"))
    chosen = options_of(runtime, options)
    base, start = peak_memory(), time.perf_counter()
    predict = runtime.load(path, precision=precision, options=chosen)
    loaded = time.perf_counter()
    first = predict(images[:1])
    answered = time.perf_counter()
    scores = [pixels.thin(first), *(pixels.thin(predict(image[None])) for image in images[1:])]
    return {
        "load_ms": (loaded - start) * 1e3,
        "first_answer_ms": (answered - loaded) * 1e3,
        "peak_memory_bytes": peak_memory(),
        "base_memory_bytes": base,
        "scores": np.concatenate(scores).tolist(),
    }


def peak_memory() -> int:
    """Give the largest resident memory of this process so far, in bytes.

    Linux hands a child the peak of its parent in `ru_maxrss`, so its own counter is read there.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource  # noqa: PLC0415 - not on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    name, file, asked, given, contract, *golden = sys.argv[1:]
    preprocessing = Preprocessing.from_json(json.loads(contract))
    groups = preprocessing.groups([Path(image) for image in golden])
    pictures = np.stack([preprocessing.read(group) for group in groups])
    print(json.dumps(measure(name, Path(file), asked, json.loads(given), pictures)))
