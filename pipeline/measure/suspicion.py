"""What may have disturbed a timing, as data with a remedy: other load, noise, drift, first calls, clock, threads."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from bitferry.device.machine import Conditions
from bitferry.device.timing import Series
from bitferry.pipeline.artifacts import Compiled, Program
from bitferry.pipeline.figures import Candidate, Ratio, Suspicion
from bitferry.pipeline.verdict import Ladder

MOST_OTHER_LOAD = 0.1
"""Of all CPUs. PyTorch's threads spin while they wait for each other, so one busy neighbour slows it manyfold."""
MOST_COV = 0.025
"""Of the blocks' medians; the figure that NVIDIA's trtexec warns at."""
MOST_DRIFT = 0.05
SLOW_FIRST = 3.0
LEAST_CLOCK = 0.8
FAR = 3.5
"""Modified z-score of an outlier (Iglewicz & Hoaglin 1993), the deviation floored at 1 % of the median."""
MOST_OUTLIERS = 0.02
KINDS = ("kernels", "other load", "threads", "clock", "drift", "noise", "first run")
"""What weighs most first."""


def suspicions(series: Mapping[str, Series], *, threads: int, conditions: Conditions) -> tuple[Suspicion, ...]:
    """List everything about this measurement that a reader should know before believing it."""
    about_machine = (*_load(conditions.others), *_threads(threads, conditions), *_clock(conditions))
    return (*about_machine, *_noise(series), *_drift(series), *_first(series))


def contradiction(eager: Candidate, artifact: Candidate, ratio: Ratio) -> tuple[Suspicion, ...]:
    """Tell where the quotient of the two medians of all calls lies outside the interval found block by block."""
    quotient = eager.timing.median_ms / artifact.timing.median_ms
    if ratio.lower <= quotient <= ratio.upper:
        return ()
    return (
        Suspicion(
            "noise",
            f"the medians of all calls give {quotient:.2f}×, the blocks {ratio.value:.2f}×: the speed changed between "
            "blocks",
            "believe neither until the machine is quiet",
        ),
    )


def lossy(climbed: Ladder, program: Program, compiled: Compiled) -> Iterator[Suspicion]:
    """Tell where an int8 artifact, the last step, loses what the int8 program before it still has."""
    *_, before, last = climbed.rungs
    if last.name in climbed.suspects and last.sqnr_db is not None and before.sqnr_db is not None:
        yield kernels(program, compiled, before.sqnr_db, last.sqnr_db)


def kernels(program: Program, compiled: Compiled, had: float, has: float) -> Suspicion:
    """Tell that a target's int8 kernels answer further from the float model than the int8 program: SQNR in dB."""
    scheme, target, environment = getattr(program, "scheme", None), compiled.target, compiled.environment
    full = scheme is not None and scheme.weight_bits == 8 and compiled.options.needs_vnni
    saturates = full and "int8" not in environment.fast
    why = (
        f"{environment.device} has no instructions for int8, and without them kernels cut off sums of products"
        if saturates
        else "its kernels compute something else than the program says"
    )
    return Suspicion(
        "kernels",
        f"{target}'s int8 answers are {has:.1f} dB from the float model, those of the int8 program that was compiled "
        f"{had:.1f} dB: {why}",
        "verify on the processor that it is for" if saturates else "keep layers in float, or try another target",
    )


def by_weight(found: Sequence[Suspicion]) -> list[Suspicion]:
    """Sort suspicions: those first that can turn a verdict, then those that an interval holds already."""
    return sorted(found, key=lambda one: KINDS.index(one.kind) if one.kind in KINDS else len(KINDS))


def _load(others: float | None) -> Iterator[Suspicion]:
    if others is not None and others > MOST_OTHER_LOAD:
        yield Suspicion(
            "other load",
            f"other processes, or this machine's host, used {others:.0%} of the CPUs while timing, so the latencies "
            "are too high and their ratio may be off",
            "verify again when the machine is quiet",
        )


def _threads(threads: int, conditions: Conditions) -> Iterator[Suspicion]:
    usable, quota = conditions.cpus, conditions.quota
    if threads > usable:
        yield Suspicion(
            "threads",
            f"{threads} threads on {usable} usable CPUs wait for each other",
            f"set targets.<target>.threads to {usable} or fewer in the recipe",
        )
    elif quota is not None and threads > quota:
        yield Suspicion(
            "threads",
            f"{threads} threads, but this container may use only {quota:g} CPUs, and is paused when it uses more",
            f"set targets.<target>.threads to {max(1, int(quota))}, or give the container more CPUs",
        )


def _clock(conditions: Conditions) -> Iterator[Suspicion]:
    slow = sorted(set(conditions.governors) - {"performance"})
    if slow:
        yield Suspicion(
            "clock",
            f"the CPU clock is governed by '{', '.join(slow)}' and changes with load",
            "set the governor to performance (cpupower frequency-set -g performance)",
        )
    if conditions.clock is not None and conditions.clock < LEAST_CLOCK:
        yield Suspicion(
            "clock",
            f"right after timing the CPUs ran at {conditions.clock:.0%} of their highest clock",
            "let the machine cool, plug it in, and look for a power limit",
        )


def _noise(series: Mapping[str, Series]) -> Iterator[Suspicion]:
    covs = {name: float(one.block_medians.std() / one.block_medians.mean()) for name, one in series.items()}
    noisy = [f"{name} by {cov:.0%}" for name, cov in covs.items() if cov > MOST_COV]
    if noisy:
        yield Suspicion(
            "noise",
            f"from block to block the median varies: {', '.join(noisy)} ({MOST_COV:.1%} is quiet)",
            "close other programs, or measure longer with --thorough; the interval already holds this noise",
        )
    far = [f"{name} {share:.0%}" for name, one in series.items() if (share := _outliers(one)) > MOST_OUTLIERS]
    if far:
        yield Suspicion(
            "noise",
            f"calls far from the median: {', '.join(far)}; they are kept, and are what the 99th percentile shows",
            "look for what runs now and then on this machine",
        )


def _outliers(series: Series) -> float:
    seconds = series.seconds
    middle = float(np.median(seconds))
    deviation = max(float(np.median(np.abs(seconds - middle))), 0.01 * middle)
    return float(np.mean(np.abs(0.6745 * (seconds - middle) / deviation) > FAR))


def _drift(series: Mapping[str, Series]) -> Iterator[Suspicion]:
    changes = {name: change for name, one in series.items() if (change := _change(one))}
    if changes:
        told = ", ".join(f"{n} {abs(c):.0%} {'slower' if c > 0 else 'faster'}" for n, c in changes.items())
        yield Suspicion(
            "drift",
            f"became slower or faster while timed: {told}",
            "let the machine cool or settle, then verify again",
        )


def _change(series: Series) -> float:
    """Compare the last third of the blocks with the first; 0 within twice the standard error of their medians."""
    medians = np.log(series.block_medians)
    third = len(medians) // 3
    begin, end = medians[:third], medians[-third:]
    change = float(np.median(end) - np.median(begin))
    error = 1.2533 * float(np.sqrt(begin.var(ddof=1) / third + end.var(ddof=1) / third))
    return float(np.expm1(change)) if abs(change) > max(MOST_DRIFT, 2 * error) else 0.0


def _first(series: Mapping[str, Series]) -> Iterator[Suspicion]:
    for name, one in series.items():
        times = one.first_seconds / float(np.median(one.seconds))
        if not one.settled:
            yield Suspicion(
                "first run",
                f"{name} was still getting faster after {one.warm_up_calls} calls of warm-up",
                "measure longer with --thorough",
            )
        elif times > SLOW_FIRST:
            yield Suspicion(
                "first run",
                f"the very first call of {name} took {one.first_seconds * 1e3:.1f} ms, {times:.1f} times the median",
                "warm the model up on the device before it has to answer in time",
            )
