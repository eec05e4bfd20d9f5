"""What may have disturbed a timing, as data with a remedy: other load, noise, drift, first calls, clock, threads."""

import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from pipeline.figures import Candidate, Ratio, Suspicion
from pipeline.measure.latency import Series
from targets import usable_cpus

MOST_OTHER_LOAD = 0.1
"""Of all CPUs. PyTorch's threads spin while they wait for each other, so one busy neighbour slows it manyfold."""
MOST_COV = 0.025
"""Of the blocks' medians; the figure that NVIDIA's trtexec warns at."""
MOST_DRIFT = 0.05
SLOW_FIRST = 3.0
LEAST_CLOCK = 0.8
CPUS = Path("/sys/devices/system/cpu")
FAR = 3.5
"""Modified z-score of an outlier (Iglewicz & Hoaglin 1993), the deviation floored at 1 % of the median."""
MOST_OUTLIERS = 0.02


def suspicions(series: Mapping[str, Series], *, threads: int, others: float | None) -> tuple[Suspicion, ...]:
    """List everything about this measurement that a reader should know before believing it."""
    about_machine = (*_load(others), *_threads(threads), *_clock())
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


@contextmanager
def other_load() -> Iterator[Callable[[], float | None]]:
    """Give a function that says, once the block is over, which share of all CPUs others used (Linux; else None).

    Others are the other processes, and the host where this is a virtual machine.
    """
    before = _cpu_seconds()
    shares: list[float | None] = []
    yield lambda: shares[0]
    after = _cpu_seconds()
    if before is None or after is None or after[1] <= before[1]:
        shares.append(None)
    else:
        shares.append(max(0.0, (after[0] - before[0]) / (after[1] - before[1])))


def _load(others: float | None) -> Iterator[Suspicion]:
    if others is not None and others > MOST_OTHER_LOAD:
        yield Suspicion(
            "other load",
            f"other processes, or this machine's host, used {others:.0%} of the CPUs while timing, so the latencies "
            "are too high and their ratio may be off",
            "verify again when the machine is quiet",
        )


def _threads(threads: int) -> Iterator[Suspicion]:
    usable, quota = usable_cpus(), _quota()
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


def _clock() -> Iterator[Suspicion]:
    governors = {_text(path) for path in CPUS.glob("cpu[0-9]*/cpufreq/scaling_governor")}
    slow = sorted(governors - {"performance", None}, key=str)
    if slow:
        yield Suspicion(
            "clock",
            f"the CPU clock is governed by '{', '.join(map(str, slow))}' and changes with load",
            "set the governor to performance (cpupower frequency-set -g performance)",
        )
    shares = [
        now / most
        for cpu in CPUS.glob("cpu[0-9]*/cpufreq")
        if (now := _clock_of(cpu, "scaling_cur")) and (most := _clock_of(cpu, "cpuinfo_max"))
    ]
    if shares and float(np.median(shares)) < LEAST_CLOCK:
        yield Suspicion(
            "clock",
            f"right after timing the CPUs ran at {np.median(shares):.0%} of their highest clock",
            "let the machine cool, plug it in, and look for a power limit",
        )


def _clock_of(cpu: Path, which: str) -> float:
    """Give a frequency in kHz; 0 where this machine does not tell (virtual machines rarely do)."""
    text = _text(cpu / f"{which}_freq")
    return float(text) if text and text.isdecimal() else 0.0


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


def _cpu_seconds() -> tuple[float, float] | None:
    """Give the CPU seconds that others have used, and all that there were, since the machine started."""
    try:
        counts = [int(count) for count in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except OSError:
        return None
    ticks = os.sysconf("SC_CLK_TCK")
    idle = counts[3] + counts[4]
    times = os.times()
    return (sum(counts) - idle) / ticks - times.user - times.system, sum(counts) / ticks


def _quota() -> float | None:
    """Give the CPUs that this container may use (Linux control groups, version 2); None when not limited."""
    quota, _, period = (_text(Path("/sys/fs/cgroup/cpu.max")) or "max").partition(" ")
    return float(quota) / float(period) if quota != "max" and platform.system() == "Linux" else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
