"""A compiled artifact run for the first time, on calibration images, and held against what it was compiled from.

A compiler may take a model that its runtime cannot run, or computes otherwise. In float32, where nothing is rounded on
purpose, that is a failure whatever the budget allows. Elsewhere the verdict judges; what int8 kernels lose besides is
said.
"""

import math
from functools import partial

import numpy as np

from bitferry import targets
from bitferry.device.arrays import Images, Outputs
from bitferry.device.errors import StageFailed, TargetUnavailable, first_line
from bitferry.pipeline import conditioning, fault, progress, unsupported
from bitferry.pipeline.artifacts import Compiled, Program
from bitferry.pipeline.data.split import Split
from bitferry.pipeline.export import MOST_DB, MOST_LOST_DB
from bitferry.pipeline.measure import suspicion
from bitferry.pipeline.statistics import sqnr_db
from bitferry.pipeline.verify import eager, load_artifact

IMAGES = 8
LEAST_DB = 60.0
"""Of a float32 artifact's scores against those of what it was compiled from, which sums in another order."""
LEAST_INT8_DB = 20.0
"""Of a value in an int8 artifact against that of what it was compiled from, where ties may be rounded otherwise."""
CHAOTIC_DB = 40.0
"""Below this the order of sums decides answers."""


def check(compiled: Compiled, program: Program, calibration: Split) -> None:
    """Run an artifact; raise StageFailed where it fails, or where exact arithmetic answers otherwise than its source.

    `program` is what the source was made from. The operator to blame is looked for, and named with its layer.
    """
    picked = np.linspace(0, len(calibration) - 1, min(IMAGES, len(calibration))).round().astype(int)
    images = calibration.images[np.unique(picked)].copy()
    expected = fault.reference(compiled.source)(images)
    found = _answers(compiled, images)
    _check_scores(compiled, expected, found)
    exact = targets.is_exact(compiled.target, compiled.precision, compiled.options)
    if exact and not alike(expected, found):
        _check_apart(compiled, images, expected, found)
    if compiled.precision == "int8":
        _say_loss(compiled, program, images, expected, found)


def _answers(compiled: Compiled, images: Images) -> Outputs:
    try:
        return load_artifact(compiled)(images)
    except TargetUnavailable:
        raise
    except Exception as error:  # the vendor's runtime may raise anything
        told = f"was compiled, and fails when it runs: {first_line(error)}"
        raise _failure(compiled, told, fault.operator(compiled, images[:1], None)) from error


def alike(expected: Outputs, found: Outputs, least: float = LEAST_DB) -> bool:
    """Say whether exact answers differ by no more than the order of sums explains."""
    return expected.shape == found.shape and sqnr_db(expected, found) >= least


def _check_apart(compiled: Compiled, images: Images, expected: Outputs, found: Outputs) -> None:
    """Raise StageFailed where answers differ by more than the source's own do, when its weights change a little."""
    own = min(sqnr_db(expected, predict(images)) for predict in fault.disturbed(compiled.source))
    least = min(LEAST_DB, own - 20 * math.log10(conditioning.MARGIN))
    if least < CHAOTIC_DB:
        told = f"this model's own answers are {own:.1f} dB apart when its weights change by half a millionth"
        progress.stage("compile", f"{told}: the order of sums decides them, and no runtime can give the same")
    if not alike(expected, found, least):
        told = (
            f"answers {len(images)} calibration images otherwise than what it was compiled from: "
            f"{sqnr_db(expected, found):.1f} dB, at least {least:.3g} dB expected of {compiled.precision}"
        )
        raise _failure(compiled, told, fault.operator(compiled, images[:2], partial(alike, least=least)))


def _check_scores(compiled: Compiled, expected: Outputs, found: Outputs) -> None:
    """Raise StageFailed for scores that are no numbers, or not as many as the source gives."""
    if found.shape != expected.shape:
        told = f"gives scores of shape {found.shape}, and what it was compiled from {expected.shape}"
    elif np.isfinite(expected).all() and not np.isfinite(found).all():
        told = "gives scores that are NaN or infinite, and what it was compiled from does not"
    else:
        return
    raise _failure(compiled, told, None)


def _failure(compiled: Compiled, told: str, blamed: str | None) -> StageFailed:
    """Say of an artifact what is wrong with it, at which operator, and what else there is."""
    ways = unsupported.ways_out(targets.get(compiled.target).CONSUMES, compiled.target)
    where = f"what goes wrong first is {blamed}; " if blamed else ""
    return StageFailed(f"{compiled.target} {compiled.precision} {told}; {where}{ways}")


def _say_loss(compiled: Compiled, program: Program, images: Images, expected: Outputs, found: Outputs) -> None:
    """Say it where int8 kernels lose much that the int8 program has; two right ones differ by a rounding tie or two."""
    reference = eager(program.baseline.module())(images)
    had, has = sqnr_db(reference, expected), sqnr_db(reference, found)
    if has < min(had, MOST_DB) - MOST_LOST_DB:
        told = suspicion.kernels(program, compiled, had, has)
        blamed = fault.operator(compiled, images[:2], partial(alike, least=LEAST_INT8_DB))
        where = f"; what goes wrong first is {blamed}" if blamed else ""
        progress.stage("compile", f"{told.finding}{where}; {told.remedy}")
