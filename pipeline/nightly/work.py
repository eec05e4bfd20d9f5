"""What the nodes do: each stage of a cell as a function of an order, its output kept in the node's build folder."""

# A node imports torch when it builds, the driver never.
# ruff: noqa: PLC0415

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bitferry.pipeline import progress
from bitferry.pipeline.cache import file_hash
from bitferry.pipeline.figures import Ratio
from bitferry.pipeline.measure.latency import Effort
from bitferry.pipeline.nightly.inputs import here, installed
from bitferry.pipeline.nightly.night import ARTIFACT, EAGER, RUNTIME_FLOAT, Samples, disturbed
from bitferry.pipeline.nightly.parcel import unpack
from bitferry.pipeline.nightly.store import Store
from bitferry.pipeline.recipe import read
from bitferry.pipeline.report.record import REPORT, Recorded
from bitferry.pipeline.statistics import ratio_interval
from bitferry.pipeline.verdict import Built

if TYPE_CHECKING:
    from bitferry.device.timing import Series
    from bitferry.pipeline.artifacts import Unmeasured, Verified
    from bitferry.pipeline.figures import Latency
    from bitferry.pipeline.run import Deployment, Run


BUILD = "BITFERRY_BUILD"
"""Environment variable of a node: where it keeps what it builds, instead of the folder that the driver names."""
OURS = ("bitferry", "__main__")
LOADS = 3
"""Measurements of a cell in a night, its model loaded anew for each: what a load changes cannot be averaged out within
one. With three a slowdown of 3 % is found in time, with one it is not (docs/statistics.md)."""
TRIALS = 3
"""Measurements of a cell, where other processes are busy during each."""


@dataclass(frozen=True)
class Order:
    """What a node must know to work on a cell."""

    recipe: str
    """The recipe's file; with a parcel, its name in there."""
    target: str
    precision: str
    build: str
    """The folder for the stages' output; each recipe has one of its own in it."""
    effort: Effort = "default"
    minutes: float | None = None
    """Of a search, instead of the recipe's."""
    trust: bool = False
    store: str | None = None
    """Where nodes that share no disk exchange what they made; None for one machine."""
    parcel: str | None = None
    """The recipe's own files in the store."""


@dataclass(frozen=True)
class Made:
    """What came of measuring a cell, as it travels to the driver."""

    verdict: Built
    answers: Recorded
    samples: Samples
    report: bytes
    """report.html."""
    machine: dict[str, str]
    packages: dict[str, str]
    """Of the node that measured."""


def prepare(order: Order) -> None:
    """Read the data, train or load the float model, and answer every evaluation image with it."""
    from bitferry.pipeline.verify import float_answers

    run = _run(order)
    float_answers(run.model, run.evaluation, run.build)


def quantize(order: Order) -> None:
    """Make the quantized program."""
    _ = _deployment(order).program


def convert(order: Order) -> None:
    """Trace and export the program into what the target compiles from."""
    _ = _deployment(order).source


def compile(order: Order) -> None:
    """Compile for the target."""
    _ = _deployment(order).compiled


def evaluate(order: Order) -> None:
    """Answer every evaluation image with the artifact, and climb the ladder to it."""
    _deployment(order).evaluate()


def measure(order: Order) -> Made:
    """Time the artifact beside its baselines, and judge it; nothing else may run on this machine meanwhile."""
    from bitferry.pipeline.artifacts import Unmeasured
    from bitferry.pipeline.deploy import way
    from bitferry.pipeline.report import record

    run = _run(order)
    chosen = way(run, order.target) if order.precision == "auto" else _deployment(order)
    found = _together(chosen, [_undisturbed(chosen) for _ in range(1 if run.effort == "quick" else LOADS)])
    folder = run.build.root / "reports" / f"{found.verdict.target}-{found.verdict.precision}"
    answers = record.read_answers(folder / record.ANSWERS)
    samples = {} if isinstance(found, Unmeasured) else _samples(found)
    return Made(found.verdict, answers, samples, (folder / REPORT).read_bytes(), here(), installed())


def _undisturbed(chosen: "Deployment") -> "Verified | Unmeasured":
    """Measure; again where other processes were busy meanwhile, a few times at most, and with --quick once."""
    for _ in range(0 if chosen.run.effort == "quick" else TRIALS - 1):
        found = replace(chosen).verified
        if not disturbed(found.verdict):
            return found
        progress.stage("measure", "other processes were busy: once more")
    return replace(chosen).verified


def _together(chosen: "Deployment", runs: "Sequence[Verified | Unmeasured]") -> "Verified | Unmeasured":
    """Give the last measurement with the times of all, judged by them: each loaded the model anew, into other memory.

    The report is that of the whole.
    """
    from bitferry.pipeline.artifacts import Verified
    from bitferry.pipeline.report import record
    from bitferry.pipeline.verify import judged_again

    measured = [one for one in runs if isinstance(one, Verified)]
    if len(measured) < len(runs) or len(runs) == 1:
        return runs[-1]
    calls = [min(one.seconds.shape[1] for one in same) for same in zip(*(run.series for run in measured), strict=True)]
    series = tuple(
        replace(one, seconds=np.concatenate([run.series[at].seconds[:, : calls[at]] for run in measured]))
        for at, one in enumerate(measured[-1].series)
    )
    run = chosen.run
    found = judged_again(run.recipe.at_look(chosen.look), chosen.way, measured[-1], _latency(measured, series), series)
    record.write(found, run.build)
    return found


def _latency(measured: "Sequence[Verified]", series: "Sequence[Series]") -> "Latency":
    """Summarize the times of several measurements; what disturbed any of them may have disturbed the whole."""
    from bitferry.pipeline.measure.latency import timing

    last, medians = measured[-1].verdict.latency, [one.block_medians for one in series]
    ratios = [Ratio(*ratio_interval(one, medians[-1])) for one in medians[:-1]]
    told = {one.kind: one for run in measured for one in run.verdict.latency.suspicions}
    return replace(
        last,
        seconds=sum(run.verdict.latency.seconds for run in measured),
        candidates=tuple(replace(c, timing=timing(s)) for c, s in zip(last.candidates, series, strict=True)),
        speedup=ratios[0],
        runtime_speedup=ratios[1] if len(ratios) > 1 else None,
        suspicions=tuple(told.values()),
    )


def _samples(found: "Verified") -> Samples:
    names = (EAGER, RUNTIME_FLOAT, ARTIFACT) if len(found.series) == 3 else (EAGER, ARTIFACT)
    return {name: one.seconds.astype(np.float32) for name, one in zip(names, found.series, strict=True)}


def _deployment(order: Order) -> "Deployment":
    from bitferry.pipeline.run import Deployment
    from bitferry.targets import PRECISIONS

    precision = next(one for one in PRECISIONS if one == order.precision)
    return Deployment(_run(order), order.target, precision)


def _run(order: Order) -> "Run":
    """Open the recipe; what its other targets and precisions have in common stays in this process for the next."""
    order = replace(order, build=os.environ.get(BUILD, order.build))
    path = unpack(order.parcel, order.recipe, order.store, Path(order.build)) if order.parcel else Path(order.recipe)
    return _kept(path, file_hash(path), order)


def _kept(path: Path, digest: str, order: Order) -> "Run":
    shared = replace(order, target="", precision="auto" if order.precision == "auto" else "float32")
    return _opened(path, digest, shared)


_folders: set[Path] = set()


def _forget_modules_beside(folder: Path) -> None:
    """Let no recipe find what one before it, in this process, imported from beside itself."""
    _folders.add(folder)
    for name, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "/")
        beside = "site-packages" not in file.parts and any(file.resolve().is_relative_to(one) for one in _folders)
        if beside and name.partition(".")[0] not in OURS:
            del sys.modules[name]
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in _folders]


@lru_cache(maxsize=1)  # of several, one could import another's modules
def _opened(path: Path, digest: str, order: Order) -> "Run":
    from bitferry.pipeline import memory
    from bitferry.pipeline.cache import Cache
    from bitferry.pipeline.run import Run

    memory.keep_freed()
    _forget_modules_beside(path.parent.resolve())
    recipe = read(path, precision=order.precision, minutes=order.minutes)
    root = Path(order.build) / recipe.name
    build = Cache(root, Store(order.store)) if order.store else Cache(root)
    return Run(recipe, path, build, order.trust, order.effort)
