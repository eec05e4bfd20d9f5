"""Makes results of nights out of plain numbers: full verdicts, answers and samples that agree with one another."""

import hashlib
from collections.abc import Mapping
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from bitferry.pipeline.figures import (
    Accuracy,
    Bin,
    Candidate,
    Change,
    ClassChange,
    Flips,
    Footprint,
    Latency,
    Percentile,
    Ratio,
    Reliability,
    Timing,
    WorstImage,
)
from bitferry.pipeline.nightly.night import ARTIFACT, EAGER, RUNTIME_FLOAT, Cell, Inputs, Result, Samples
from bitferry.pipeline.report.record import Recorded
from bitferry.pipeline.statistics import mcnemar_mid_p, tango_interval
from bitferry.pipeline.verdict import SCHEMA, Built, Execution, Golden, GoldenFile, Ladder, LayerError, Rung, Verdict
from bitferry.targets import Environment, Layer

KIND = "x86-64 avx512_vnni"
BLOCKS, CALLS = 40, 8
CLASSES = 10
EAGER_TIMES = 2.0
"""Eager PyTorch's time over that of the runtime's own float, where there is one."""


def cell(recipe: str = "small", target: str = "openvino", precision: str = "int8") -> Cell:
    """Make a cell."""
    return Cell(recipe, target, precision)


def nights(count: int, first: str = "2026-11-01T02:00:00Z") -> list[str]:
    """Name that many nights in a row."""
    start = datetime.fromisoformat(first)
    return [(start + timedelta(days=day)).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ") for day in range(count)]


def inputs(**changes: Any) -> Inputs:
    """Make what a result depends on; a mapping given is merged into the usual one, as `packages={"pillow": "12"}`."""
    usual = Inputs(
        recipe={"name": '"small"', "preprocessing.mean": "[0.3, 0.3, 0.3]", "training.epochs": "6"},
        data={name: digest(name) for name in ("train", "calibration", "evaluation")},
        weights=None,
        code=digest("code"),
        commit="1f0c9d2",
        packages={"torch": "2.14.1", "openvino": "2026.4.1", "onnxruntime": "1.31.1", "pillow": "13.0.0"},
        machine={"cpu": "Xeon", "isa": "avx2 avx512_vnni", "cpus": "8", "system": "Linux x86_64", "hostname": "node1"},
    )
    merged: dict[str, Any] = {
        name: {**old, **value} if isinstance(old := getattr(usual, name), Mapping) else value
        for name, value in changes.items()
    }
    return replace(usual, **merged)


def digest(text: str) -> str:
    """Give a sha256 that stands for some content."""
    return hashlib.sha256(text.encode()).hexdigest()


def answers(images: int = 400, right_fraction: float = 0.915, seed: int = 0, float_fraction: float = 0.92) -> Recorded:
    """Answer exactly that share of the images right; the images and their labels are the same whatever the rest is.

    The float model and seed 0 find the same images hard, so the lower share's right answers are among the higher's;
    another seed finds others hard, and then images are lost and gained at once.
    """
    digests = b"".join(hashlib.sha256(b"image %d" % index).digest()[:16] for index in range(images))
    labels = np.random.default_rng(7).integers(CLASSES, size=images)
    return Recorded(
        np.frombuffer(digests, np.uint8).reshape(images, 16),
        labels,
        _answered(labels, float_fraction, 0),
        _answered(labels, right_fraction, seed),
    )


def _answered(labels: np.ndarray[Any, np.dtype[np.int64]], share: float, seed: int) -> Any:
    wrong = np.random.default_rng(seed).permutation(len(labels))[round(share * len(labels)) :]
    given = labels.copy()
    given[wrong] = (given[wrong] + 1) % CLASSES
    return given


def verdict(
    of: Cell | None = None,
    *,
    recorded: Recorded | None = None,
    ms: float = 1.0,
    ratio: float = 0.5,
    ratio_spread: float = 0.01,
    file_bytes: int = 1_000_000,
    memory_bytes: int = 20_000_000,
    outcome: str = "pass",
    **more: Any,
) -> Verdict:
    """Make a whole verdict; `ratio` is the artifact's time over its baseline's, ± `ratio_spread` of itself.

    The baseline is the runtime's own float, for float32 eager PyTorch; `more` replaces fields of the verdict.
    """
    of, recorded = of or cell(), recorded or answers()
    plain = _built(of, outcome, recorded)
    footprint = Footprint(file_bytes, 40.0, 3 * ms, 90_000_000 + memory_bytes, 90_000_000)
    found = Verdict(
        **{one.name: getattr(plain, one.name) for one in fields(Built)},
        accuracy=accuracy(recorded),
        latency=latency(of, ms, ratio, ratio_spread, footprint),
        execution=Execution("int8 requested; 2 of 2 int8", (Layer("head", "matrix product", "int8"),), None),
    )
    return replace(found, **more)


def _built(of: Cell, outcome: str, recorded: Recorded) -> Built:
    right = 100 * float(recorded.right.mean()) if recorded.answers is not None else 0.0
    return Built(
        schema=SCHEMA,
        recipe=of.recipe,
        version="1.0.0",
        target=of.target,
        precision="int8" if of.precision == "auto" else of.precision,  # type: ignore[arg-type]
        outcome=outcome,  # type: ignore[arg-type]
        headline=f"{outcome} {of.precision} on {of.target}",
        reasons=("5 pp allowed",),
        budget_metric="top-1",
        budget_confidence=0.95,
        budget_drop_pp=5.0,
        ladder=Ladder(64, (Rung("float PyTorch", None, 0, right, 0.0),), None, (), (LayerError("head", 40.0, 41.0),)),
        golden=Golden((GoldenFile("golden-1.jpg", "JPEG", 0.0, 0.03, 1.0),), 0.01, 1.0),
        environment=Environment(of.target, "1.0", "Xeon", ("avx512_vnni",), "Linux x86_64"),
        versions={"torch": "2.14.1", "pillow": "13.0.0"},
        command=f"bitferry verify {of.recipe}.toml --target {of.target} --precision {of.precision}",
        compiled_key="0123456789abcdef",
        model_key="fedcba9876543210",
        data_key="0011223344556677",
        measured_at="2026-11-01T02:30:00+00:00",
    )


def accuracy(recorded: Recorded) -> Accuracy:
    """Sum the answers up as verification does, in what has a figure of its own."""
    before, after = recorded.float_right, recorded.right
    images, lost, gained = len(before), int((before & ~after).sum()), int((after & ~before).sum())
    bounds = [100 * bound for bound in tango_interval(lost, gained, images, 0.95)]
    shares = 100 * float(before.mean()), 100 * float(after.mean())
    assert recorded.answers is not None
    flips = Flips(lost, gained, int((recorded.float_answers != recorded.answers).sum()), mcnemar_mid_p(lost, gained))
    bins = (Bin(images, 90.0, shares[0]),)
    return Accuracy(
        images=images,
        judged=Change("top-1", "tango", *shares, shares[0] - shares[1], bounds[0], bounds[1], 0.95),
        others=(),
        flips=flips,
        classes=(ClassChange("Boot", images, *shares),),
        confusions=(),
        reliability=Reliability(3.0, 3.1, 90.0, 0.1, bins, bins),
        sqnr_db=30.0,
        worst=(WorstImage(0, "evaluation.npz[0]", "Boot", "Boot", 90.0, "Bag", 60.0, 30.0),),
    )


def latency(of: Cell, ms: float, ratio: float, spread: float, footprint: Footprint) -> Latency:
    """Make the timings of eager PyTorch, the runtime's float (not for float32) and the artifact, in that order."""
    over = Ratio(1 / ratio, 1 / (ratio * (1 + spread)), 1 / (ratio * (1 - spread)))
    own = of.precision != "float32"
    speedup = Ratio(*(EAGER_TIMES * x for x in (over.value, over.lower, over.upper))) if own else over
    eager = Candidate("eager PyTorch float32", "float32", None, timing(ms * speedup.value), None, None)
    middle = Candidate(f"{of.target} float32", "float32", None, timing(ms * over.value), None, None)
    artifact = Candidate(f"{of.target} {of.precision}", of.precision, None, timing(ms), None, footprint)
    candidates = (eager, middle, artifact) if own else (eager, artifact)
    return Latency(2, 1, 1.5, candidates, speedup, over if own else None, ())


def timing(ms: float) -> Timing:
    """Make the figures of calls that take about `ms`."""
    percentiles = (Percentile(50, ms, 1.01 * ms), Percentile(90, 1.1 * ms, 1.2 * ms))
    return Timing(BLOCKS * CALLS, BLOCKS, percentiles, 0.95 * ms, ms, 1.02 * ms, 5.0, 2 * ms, 5, ((1.2 * ms, 320),))


def samples(found: Verdict, seed: int = 0, noise: float = 0.05) -> Samples:
    """Draw timed calls, blocks × calls, around the verdict's medians."""
    rng, timed = np.random.default_rng(seed), found.latency
    names = (EAGER, RUNTIME_FLOAT, ARTIFACT) if timed.runtime_speedup else (EAGER, ARTIFACT)
    drawn = (rng.lognormal(np.log(one.timing.median_ms / 1e3), noise, (BLOCKS, CALLS)) for one in timed.candidates)
    return {name: seconds.astype(np.float32) for name, seconds in zip(names, drawn, strict=True)}


def result(
    of: Cell | None = None,
    *,
    recorded: Recorded | None = None,
    percent: float = 91.5,
    float_percent: float = 92.0,
    images: int = 400,
    seed: int = 0,
    made_from: Inputs | None = None,
    kind: str = KIND,
    **figures: Any,
) -> Result:
    """Make a measured result: give `recorded` (see `answers`), or the shares in percent; `figures` go to `verdict`."""
    of, made_from = of or cell(), made_from or inputs()
    recorded = recorded or answers(images, percent / 100, seed, float_percent / 100)
    found = verdict(of, recorded=recorded, **figures)
    return Result(
        cell=of,
        status="measured",
        key=digest(f"{of.name} {made_from}")[:16],
        inputs=made_from,
        kind=kind,
        seconds=12.5,
        attempts=1,
        verdict=found,
        samples=samples(found, seed),
        answers=recorded,
        measured_at=found.measured_at,
    )


def reused(earlier: Result) -> Result:
    """Make what a later night in which nothing changed has of a cell."""
    return replace(earlier, status="reused", seconds=0.0, attempts=0)


def unmeasured(of: Cell | None = None) -> Result:
    """Make the result of an artifact that was built for hardware that is not there."""
    plain = result(of)
    assert plain.answers is not None
    return replace(
        plain,
        verdict=_built(plain.cell, "unmeasured", plain.answers),
        samples={},
        answers=replace(plain.answers, answers=None),
    )


def failed(of: Cell | None = None, error: str = "conv2d takes no float8", **more: Any) -> Result:
    """Make the result of a cell that gave no verdict; `more` replaces fields of the result."""
    plain = Result(of or cell(), "failed", "0" * 16, inputs(), KIND, 3.0, 1, error=error, error_kind="ours")
    return replace(plain, **more)
