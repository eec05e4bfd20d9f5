"""A model against itself: how often the interval of the ratio holds 1, quiet and with a busy neighbour.

    python benchmarks/self_ratio.py [--repeats 100]

ResNet-18 at 32×32 in int8 on OpenVINO, loaded twice anew for each repeat and timed as `bitferry verify` times.
Then the same while another process keeps one core busy half of the time, in bursts of 0.05 to 1 s. Prints the
coverage, the widths and what reloading changes; keeps every block's medians in benchmarks/results/.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import torchvision

from bitferry import targets
from bitferry.device.arrays import Images
from bitferry.device.machine import other_load
from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline import dataset
from bitferry.pipeline.artifacts import Compiled, FloatModel
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.compile import compile
from bitferry.pipeline.export import export, simplify
from bitferry.pipeline.load import Deployable
from bitferry.pipeline.measure import latency
from bitferry.pipeline.progress import console
from bitferry.pipeline.quantize import quantize
from bitferry.pipeline.recipe import Quantization
from bitferry.pipeline.statistics import RELOAD, ratio_interval
from bitferry.pipeline.verify import load_artifact

HERE = Path(__file__).parent
CLASSES = tuple(str(index) for index in range(10))
TARGET = "openvino"
NEIGHBOUR = """
import random, time
while True:
    end = time.perf_counter() + random.uniform(0.05, 1)
    while time.perf_counter() < end:
        pass
    time.sleep(random.uniform(0.05, 1))
"""


def artifact(build: Cache) -> tuple[Compiled, Images]:
    """Build the int8 artifact and give one image for it."""
    contract = Preprocessing(height=32, width=32, mean=(0.286,) * 3, std=(0.353,) * 3)
    images = dataset.split("calibration", HERE.parent / "calibration_data/fashion_mnist/calibration.npz", CLASSES,
                           contract, build)  # fmt: skip
    torch.manual_seed(0)
    net = Deployable(torchvision.models.resnet18(num_classes=10), contract).eval()
    model = FloatModel(net, contract, CLASSES, key="resnet18-seed-0")
    target = targets.get(TARGET)
    options = target.Options()
    program = quantize(
        model, images, targets.scheme(target, "int8", options) or targets.Scheme(), Quantization(), build
    )
    source = simplify(export(program, images, build), images, build)
    made = compile(source, TARGET, program, images, build, options=options)
    return made, images.images[:1].copy()


@contextmanager
def neighbour(wanted: bool) -> Iterator[None]:
    """Keep one core busy half of the time while the block runs."""
    busy = subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) if wanted else None
    try:
        yield
    finally:
        if busy:
            busy.kill()
            busy.wait()


def repeats(made: Compiled, image: Images, count: int) -> Iterator[dict[str, object]]:
    """Time the artifact against itself again and again, both loaded anew."""
    for seed in range(count):
        first, second = load_artifact(made), load_artifact(made)
        calls = {"a": lambda p=first: p(image), "b": lambda p=second: p(image)}
        series = latency.interleave(calls, seconds=latency.SECONDS["default"], seed=seed)
        medians = {name: one.block_medians for name, one in series.items()}
        value, low, high = ratio_interval(medians["a"], medians["b"])
        yield {
            "ratio": value,
            "low": low,
            "high": high,
            "blocks_ms": {n: (1e3 * m).tolist() for n, m in medians.items()},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=100, help="of each half (default: 100, some 7 minutes each)")
    count = parser.parse_args().repeats
    console.quiet = True
    kept: dict[str, object] = {
        "environment": vars(targets.get(TARGET).environment(options=targets.get(TARGET).Options())),
        "reload_allowance": RELOAD,
    }
    with tempfile.TemporaryDirectory() as folder:
        made, image = artifact(Cache(Path(folder) / "build"))
        for name, wanted in (("quiet", False), ("busy neighbour", True)):
            with neighbour(wanted), other_load() as others:
                found = list(repeats(made, image, count))
            kept[name] = {"repeats": found, "other_load": others()}
            lows, highs, ratios = (np.array([one[k] for one in found], float) for k in ("low", "high", "ratio"))
            widths = 50 * (highs - lows)
            bare = np.sum((lows * math.exp(RELOAD) <= 1) & (highs * math.exp(-RELOAD) >= 1))
            print(
                f"{name}: {np.sum((lows <= 1) & (highs >= 1))} of {count} intervals hold 1 ({bare} without the "
                f"allowance for reloading); half-width {np.median(widths):.1f} % (median), {widths.max():.1f} % "
                f"(largest); the ratio's standard deviation is {100 * np.log(ratios).std():.2f} %; others used "
                f"{others() or 0:.0%} of the CPUs",
                flush=True,
            )
    path = HERE / f"results/{datetime.now(UTC):%Y-%m-%d}-self-ratio-{'-'.join(targets.cpu_isa()[-1:]) or 'cpu'}.json"
    path.write_text(json.dumps(kept) + "\n")


if __name__ == "__main__":
    main()
