"""How fast and how large: the eager float model, the runtime's own float and the artifact, measured together."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from bitferry import targets
from bitferry.device import machine
from bitferry.device.arrays import Images, Outputs, Predict
from bitferry.device.errors import StageFailed
from bitferry.device.preprocess import Preprocessing
from bitferry.device.timing import Call, Series
from bitferry.pipeline.artifacts import Compiled
from bitferry.pipeline.figures import Candidate, Footprint, Latency, Ratio, Throughput
from bitferry.pipeline.measure import execution, latency
from bitferry.pipeline.measure.latency import Effort
from bitferry.pipeline.measure.suspicion import contradiction, suspicions
from bitferry.pipeline.statistics import ratio_interval

EAGER = "eager PyTorch"
BATCHES = (1, 8)
ONEDNN_SETTING = "ONEDNN_DEFAULT_FPMATH_MODE"
SHARE = 0.08
"""Of the time for latencies, that each throughput setting gets."""


@dataclass(frozen=True)
class Fresh:
    """What a new process said of an artifact, and its scores for the golden files."""

    footprint: Footprint
    scores: Outputs


def measure(
    eager: Predict,
    artifact: Compiled,
    runtime_float: Compiled | None,
    image: Images,
    *,
    effort: Effort,
    footprint: Footprint,
    timed_as: str = EAGER,
) -> tuple[Latency, tuple[Series, ...]]:
    """Time all of them interleaved with the artifact's threads, then what the artifact can do at once.

    `image` 1×H×W×3 is repeated to the artifact's batch, the same for all; each time is of the whole batch. Gives every
    timed call as well, in the order of the candidates. `timed_as` says what the float model, `eager`, is.
    """
    compiled = [*([runtime_float] if runtime_float else []), artifact]
    predicts = {timed_as: eager} | {_name(one): _load(one, artifact.threads) for one in compiled}
    images = np.repeat(image, artifact.batch, axis=0)
    torch.set_num_threads(artifact.threads)
    seconds = latency.SECONDS[effort]
    start = time.perf_counter()
    with machine.other_load() as others:
        series = latency.interleave({name: _call(p, images) for name, p in predicts.items()}, seconds=seconds)
    spent = time.perf_counter() - start
    candidates = [_eager(series[timed_as], timed_as)] + [_candidate(one, series[_name(one)]) for one in compiled]
    at_best = throughput(artifact, image, seconds * SHARE) if effort != "quick" else None
    candidates[-1] = replace(candidates[-1], throughput=at_best, footprint=footprint)
    medians = [s.block_medians for s in series.values()]
    speedup = Ratio(*ratio_interval(medians[0], medians[-1]))
    told = suspicions(series, threads=artifact.threads, conditions=machine.conditions(others()))
    timed = Latency(
        threads=artifact.threads,
        batch=artifact.batch,
        seconds=spent,
        candidates=tuple(candidates),
        speedup=speedup,
        runtime_speedup=Ratio(*ratio_interval(medians[1], medians[-1])) if runtime_float else None,
        suspicions=(*told, *contradiction(candidates[0], candidates[-1], speedup)),
    )
    return timed, tuple(series.values())


def throughput(compiled: Compiled, image: Images, seconds: float) -> Throughput:
    """Find the best of streams × batches: one stream with every thread, or one per thread; images/s."""
    found = []
    for streams in dict.fromkeys((1, compiled.threads)):
        threads = max(1, compiled.threads // streams)
        predicts = [_load(compiled, threads) for _ in range(streams)]
        for batch in BATCHES if compiled.batch == 1 else (compiled.batch,):
            images = np.repeat(image, batch, axis=0)
            rate = _rate(predicts, images, seconds)
            found.append(Throughput(rate, streams, threads, batch))
    return max(found, key=lambda one: one.images_per_second)


def fresh(compiled: Compiled, contract: Preprocessing, golden: Sequence[Path]) -> Fresh:
    """Load the artifact in a new process without torch, and answer for image files; raise StageFailed if it cannot."""
    arguments = [
        compiled.target,
        str(compiled.path),
        compiled.precision,
        json.dumps(asdict(compiled.options)),
        json.dumps(asdict(contract)),
        *map(str, golden),
    ]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "bitferry.device.footprint", *arguments],
        capture_output=True, text=True, check=False,
        process_group=0,  # where Ctrl-C, which would look like a fault of the artifact, does not reach it
    )  # fmt: skip
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise StageFailed(f"a fresh process cannot run {compiled.path} (exit {done.returncode}): {last}")
    said = json.loads(done.stdout.splitlines()[-1])
    scores = np.array(said.pop("scores"), np.float32)
    return Fresh(Footprint(file_bytes=size(compiled.path.parent), **said), scores)


def _rate(predicts: Sequence[Predict], images: Images, seconds: float) -> float:
    def stream(predict: Predict) -> int:
        count = 0
        while time.perf_counter() < end:
            predict(images)
            count += len(images)
        return count

    for predict in predicts:
        predict(images)
    with ThreadPoolExecutor(len(predicts)) as pool:
        start = time.perf_counter()
        end = start + seconds
        count = sum(pool.map(stream, predicts))
    return count / (time.perf_counter() - start)


def _eager(series: Series, timed_as: str) -> Candidate:
    precision = eager_precision() if timed_as == EAGER else "float32"
    return Candidate(f"{timed_as} {precision}", precision, None, latency.timing(series), None, None)


def eager_precision() -> str:
    """Name the precision PyTorch computes float32 layers in: a setting or an environment variable can make it less."""
    kernels = cast("Any", torch.backends.mkldnn)  # its stubs lack what it has
    asked = {kernels.conv.fp32_precision, kernels.matmul.fp32_precision, os.environ.get(ONEDNN_SETTING, "").lower()}
    low = bool(asked & {"bf16", "any"}) or torch.get_float32_matmul_precision() == "medium"
    return "bfloat16" if low and targets.has_bfloat16() else "float32"


def _candidate(compiled: Compiled, series: Series) -> Candidate:
    ran = execution.precision(execution.executed(compiled), compiled.precision)
    asked = "" if ran == compiled.precision else f" ({compiled.precision} asked for)"
    return Candidate(f"{compiled.target} {ran}{asked}", ran, None, latency.timing(series), None, None)


def _name(compiled: Compiled) -> str:
    return f"{compiled.target} {compiled.precision}"


def _load(compiled: Compiled, threads: int) -> Predict:
    options = replace(compiled.options, threads=threads)
    return targets.get(compiled.target).load(compiled.path, precision=compiled.precision, options=options)


def _call(predict: Predict, image: Images) -> Call:
    return lambda: predict(image)


def size(folder: Path) -> int:
    """Give the bytes of every file in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
