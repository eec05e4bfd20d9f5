"""Our int8 on ONNX Runtime against ONNX Runtime's own `quantize_static`: latency and SQNR of the scores.

    python benchmarks/onnxruntime_placement.py RECIPE... [--seconds 60] [--threads 2] [--build build]

`quantize_static` is given the float ONNX that bitferry exports, and the same calibration images one by one, in every
way it has: Q/DQ or quantized operators, weights per channel or per tensor, activations uint8 or int8, and with the
normalization of the pixels left in float. One more row is not offered to its users: its best way on the float graph as
`targets/onnxruntime.py` rearranges it, which shows what is won by the rearrangement and what by the Q/DQ placement.
All are timed interleaved in one process at batch 1, with the same session options. Prints a table and the ratio of our
latency to that of its fastest result, and keeps every sample in benchmarks/results/.
"""

import argparse
import json
import logging
import tempfile
import timeit
from functools import partial
from pathlib import Path

import numpy as np
from common import batch_of_one, every_static, result_path, static

from bitferry import targets
from bitferry.device.arrays import Predict
from bitferry.device.timing import Call, Series
from bitferry.pipeline import recipe
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.division import drawn
from bitferry.pipeline.measure import latency
from bitferry.pipeline.run import Deployment, Run
from bitferry.pipeline.statistics import ratio_interval, sqnr_db
from bitferry.pipeline.verify import eager

NAME = "onnxruntime"
OURS, FLOAT, REARRANGED = "bitferry int8", "float32", "quantize_static on our float graph"

HOPELESS = 10
"""Times as slow as ours: not worth the minutes that timing it takes."""


def candidates(run: Run, folder: Path, threads: int) -> dict[str, Predict]:
    target = targets.get(NAME)
    options = target.Options(threads=threads)
    ours, plain = (Deployment(run, NAME, precision) for precision in ("int8", "float32"))
    images = drawn(run.calibration.images, run.recipe.quantization.first_images)
    paths = {OURS: ours.compiled.path, FLOAT: plain.compiled.path}
    (folder / "ours").mkdir()
    given = batch_of_one(plain.simplified.path, folder / "float.onnx")
    rearranged = batch_of_one(plain.compiled.path, folder / "ours/float.onnx")
    paths |= {way.label: static(way, given, images, folder) for way in every_static()}
    best = next(way for way in every_static() if way.label == "QDQ channel UInt8 normalization float")
    paths[REARRANGED] = static(best, rearranged, images, folder / "ours")
    return {label: target.load(path, precision="int8", options=options) for label, path in paths.items()}


def measure(path: Path, build: Path, seconds: float, threads: int) -> dict[str, object]:
    """Print one recipe's table; give its raw samples."""
    run = Run(recipe.read(path), path, Cache(build / recipe.read(path).name))
    images = run.evaluation.images[:256].copy()
    reference = eager(run.model.module())(images)
    with tempfile.TemporaryDirectory() as folder:
        predicts = candidates(run, Path(folder), threads)
        quality = {label: sqnr_db(reference, predict(images)) for label, predict in predicts.items()}
        calls = {label: partial(predict, images[:1]) for label, predict in predicts.items()}
        limit = HOPELESS * best_of_five(calls[OURS])
        worth = {label: call for label, call in calls.items() if label == OURS or best_of_five(call) < limit}
        series = latency.interleave(worth, seconds=seconds)
    show(f"{run.recipe.name}, {threads} threads", series, quality)
    return {"sqnr_db": quality, "seconds": {label: one.seconds.tolist() for label, one in series.items()}}


def best_of_five(call: Call) -> float:
    return min(timeit.repeat(call, number=1, repeat=5))


def show(title: str, series: dict[str, Series], quality: dict[str, float]) -> None:
    print(f"\n{title:44}{'p50 ms':>8}{'SQNR dB':>9}")
    for label, samples in sorted(series.items(), key=lambda item: float(np.median(item[1].seconds))):
        print(f"{label:44}{np.median(samples.seconds) * 1e3:8.2f}{quality[label]:9.1f}")
    others = {label: one for label, one in series.items() if label not in (OURS, FLOAT, REARRANGED)}
    best = min(others, key=lambda label: float(np.median(others[label].seconds)))
    for label in sorted(quality.keys() - series.keys()):
        print(f"{label:44}{f'over {HOPELESS}×':>8}{quality[label]:9.1f}")
    for label in (best, REARRANGED):
        value, low, high = ratio_interval(series[OURS].block_medians, series[label].block_medians)
        print(f"{OURS} takes {value:.3f} ({low:.3f} to {high:.3f}) of the time of {label}; ", end="")
        print(f"SQNR {quality[OURS]:.2f} against {quality[label]:.2f} dB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path, metavar="RECIPE")
    parser.add_argument("--seconds", type=float, default=60, help="of timing for each recipe (default: 60)")
    parser.add_argument("--threads", type=int, default=targets.usable_cpus())
    parser.add_argument("--build", type=Path, default=Path("build"), help="where stages keep their output")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # quantize_static warns of what a comparison of all its ways does on purpose
    kept = {path.stem: measure(path, options.build, options.seconds, options.threads) for path in options.recipes}
    environment = vars(targets.get(NAME).environment(options=targets.get(NAME).Options()))
    result = {"environment": environment, "threads": options.threads, "recipes": kept}
    result_path("onnxruntime-placement").write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
