"""How often the nightly matrix finds a true regression within three nights, and how often one that is none.

    python benchmarks/nightly_detection.py [--cells 2000] [--answered 400]

Simulated histories with seeds: 30 nights without a change for false alarms, and 24 of them before a change for the
delay. Latency: 3 % slower. A night's ratio is found by `ratio_interval` from 40 blocks of each load; every block of
either candidate varies by 5 %, each load into other memory by 1 %, and the whole night by 5 %, which the ratio removes.
The same with the blocks that benchmarks/self_ratio.py measured, and with a ratio that itself varies by 5 % from night
to night. Accuracy: 4,000 images, 1 pp lost, an artifact that is built anew each night and flips images at random.
Prints two tables; keeps the figures in benchmarks/results/.
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np
from common import RESULTS, result_path
from numpy.typing import NDArray

from bitferry.pipeline.nightly.apart import Apart, paired
from bitferry.pipeline.nightly.change_point import Step, follow
from bitferry.pipeline.nightly.pace import errors_of
from bitferry.pipeline.nightly.right_answers import step as step_of
from bitferry.pipeline.statistics import ratio_interval

NIGHTS, BEFORE, WITHIN = 30, 24, 3
BLOCKS, BLOCK_NOISE, NIGHT_NOISE, LOADING = 40, 0.05, 0.05, 0.01
SLOWER, WILD_SHARE, WILD = 1.03, 0.05, 1.3
IMAGES, RIGHT, LOST = 4000, 0.92, 40
BANK = 1500
"""Nights that are timed in the simulation; histories are drawn from them."""

Nights = NDArray[np.float64]
"""Each night's ratio with its interval's ends, N×3."""


@dataclass(frozen=True)
class Rates:
    """What one way of measuring finds, in percent."""

    name: str
    night_noise: float
    """Standard deviation of a night's figure; of ratios in percent, of accuracies in percentage points."""
    within: tuple[float, ...]
    """True changes found in the first night, the first two, the first three."""
    delay: float
    """Nights until half of them are found."""
    alarms: float
    """Regressions told where there is none, per 100 cell-nights."""
    settled: float | None
    """The same from the seventh night on, when a history is long enough to see how much the nights scatter; None for
    accuracy, whose nights are judged one in four."""
    improvements: float
    best_within: float
    """Of a test that knows the levels, the noise, the size and the night, at 1 false alarm in 100."""
    nights_needed: int
    """Until that test finds 95 %."""


def timed(loads: int, seed: int) -> Nights:
    """Time a night's ratio, of a model that takes as long as its baseline, again and again."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(BANK):
        night = rng.normal(0, NIGHT_NOISE)
        both = np.exp(night + rng.normal(0, BLOCK_NOISE, (2, loads, BLOCKS)))
        both[0] *= np.exp(rng.normal(0, LOADING, (loads, 1)))
        found.append(ratio_interval(both[0].ravel(), both[1].ravel()))
    return np.array(found)


def replayed(loads: int, seed: int) -> Nights:
    """Make nights of the blocks that a quiet machine took for a model and itself."""
    (path,) = sorted(RESULTS.glob("*-self-ratio-*.json"))[-1:]
    repeats = [one["blocks_ms"] for one in json.loads(path.read_text())["quiet"]["repeats"]]
    rng, found = np.random.default_rng(seed), []
    for _ in range(BANK):
        drawn = [repeats[i] for i in rng.choice(len(repeats), loads, replace=False)]
        sides = [np.concatenate([one[side] for one in drawn]) for side in ("a", "b")]
        found.append(ratio_interval(*(sides if rng.random() < 0.5 else sides[::-1])))
    return np.array(found)


def varying(nights: Nights, seed: int) -> Nights:
    """Let each night's ratio itself vary by 5 %, its interval as narrow as before."""
    return nights * np.exp(np.random.default_rng(seed).normal(0, NIGHT_NOISE, (len(nights), 1)))


def histories(bank: Nights, count: int, nights: int, seed: int, *, wild: bool, factor: float) -> list[Nights]:
    """Draw histories, slower by `factor` from night `BEFORE` on, and with a wild night in 20 if asked for."""
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(count):
        one = bank[rng.integers(len(bank), size=nights)].copy()
        one[BEFORE:] *= factor
        one[rng.random(nights) < WILD_SHARE * wild] *= WILD
        drawn.append(one)
    return drawn


def followed(history: Nights) -> list[Step | None]:
    """Judge every night of a history as a cell's nights are judged."""
    logs = np.log(history)
    return follow(logs[:, 0], errors_of(logs))


def latency(name: str, bank: Nights, cells: int, *, wild: bool = False) -> Rates:
    """Measure what is found of ratios that are slower by 3 %, and where nothing is."""
    calm = histories(bank, cells, NIGHTS, 1, wild=wild, factor=1.0)
    slow = histories(bank, cells, BEFORE + 4 * WITHIN, 2, wild=wild, factor=SLOWER)
    noise = float(np.log(bank[:, 0]).std())
    return rates(name, [signs(followed(one)) for one in calm], [signs(followed(one)) for one in slow], noise,
                 math.log(SLOWER))  # fmt: skip


def milliseconds(bank: Nights, cells: int) -> Rates:
    """Judge raw times, as if the night's own speed were the artifact's."""
    rng = np.random.default_rng(5)
    nights = bank * np.exp(rng.normal(0, NIGHT_NOISE, (len(bank), 1)))
    return latency("milliseconds in place of the ratio, 3 loads", nights, cells)


def signs(found: list[Step | None]) -> list[int]:
    """Give 1 for a night that is told to be slower or worse, −1 for the reverse, 0 for neither."""
    return [0 if step is None else int(np.sign(step.size)) for step in found]


def rates(name: str, calm: list[list[int]], changed: list[list[int]], noise: float, size: float) -> Rates:
    """Sum up what was told, the first night left out of the false alarms: it is the reference."""
    quiet = np.array(calm)[:, 1:] == 1
    told = np.array([one for one in changed if one[BEFORE - 1] != 1]) == 1
    after = told[:, BEFORE:]
    first = np.where(after.any(axis=1), after.argmax(axis=1) + 1, np.inf)
    normal = NormalDist()
    power = normal.cdf(size * math.sqrt(WITHIN) / noise - normal.inv_cdf(0.99))
    needed = ((normal.inv_cdf(0.95) + normal.inv_cdf(0.99)) * noise / size) ** 2
    return Rates(
        name=name,
        night_noise=100 * noise,
        within=tuple(100 * float((first <= nights).mean()) for nights in range(1, WITHIN + 1)),
        delay=float(np.median(first)),
        alarms=100 * float(quiet.mean()),
        settled=100 * float(quiet[:, 6:].mean()) if quiet.shape[1] == NIGHTS - 1 else None,
        improvements=100 * float((np.array(calm)[:, 1:] == -1).mean()),
        best_within=100 * power,
        nights_needed=math.ceil(needed),
    )


def answered(rng: np.random.Generator, nights: int, discordance: float, lost: int) -> NDArray[np.bool_]:
    """Answer 4,000 images each night: some flip a coin each time, so that two nights differ in that share of all.

    From night `BEFORE` on, `lost` of those that were always right are wrong.
    """
    coins = round(2 * discordance * IMAGES)
    right = np.zeros((nights, IMAGES), bool)
    right[:, : round(RIGHT * IMAGES)] = True
    right[:, -coins:] = rng.random((nights, coins)) < 0.5
    right[BEFORE:, :lost] = False
    return right


def told(right: NDArray[np.bool_], night: int, *, series: bool) -> int:
    """Judge one night beside the first, and if asked for together with those between."""
    apart: Apart = paired(right[0], right[night])
    if apart.sure:
        return 1 if apart.drop_pp > 0 else -1
    percents = 100 * right[: night + 1].mean(axis=1)
    drawn = percents[np.append(True, np.diff(percents) != 0)]
    step = step_of(drawn, apart) if series and len(drawn) > 1 else None
    return 0 if step is None else -int(np.sign(step.size))


def accuracy(discordance: float, cells: int, *, series: bool) -> Rates:
    """Measure what is found of answers that lost 1 pp, and where they did not."""
    rng, calm, changed = np.random.default_rng(11), [], []
    for _ in range(cells):
        right = answered(rng, NIGHTS, discordance, 0)
        calm.append([0, *(told(right, night, series=series) for night in range(1, NIGHTS, 4))])
        right = answered(rng, BEFORE + WITHIN, discordance, LOST)
        changed.append([0] * (BEFORE - 1) + [told(right, n, series=series) for n in range(BEFORE - 1, BEFORE + WITHIN)])
    noise = math.sqrt(discordance / 2 / IMAGES)
    way = "with the nights between" if series else "beside the reference alone"
    return rates(f"{discordance:.0%} of answers differ, {way}", calm, changed, noise, LOST / IMAGES)


def show(title: str, found: list[Rates]) -> None:
    """Print a table as the documentation has it."""
    print(f"\n| {title} | a night's noise | found in 1, 2, 3 nights | half found by night "
        "| false regressions, from night 7 "
          "| false improvements | best possible in 3 | nights it needs |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for one in found:
        settled = "" if one.settled is None else f", {one.settled:.2f}"
        within = ", ".join(f"{share:.1f}" for share in one.within)
        print(
            f"| {one.name} | {one.night_noise:.2f} | {within} % | {one.delay:g} | {one.alarms:.2f}{settled} | "
            f"{one.improvements:.2f} | {one.best_within:.1f} % | {one.nights_needed} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cells", type=int, default=2000, help="histories of each row on latency (default: 2000)")
    parser.add_argument("--answered", type=int, default=400, help="of each row on accuracy (default: 400)")
    options = parser.parse_args()
    banks = {loads: timed(loads, loads) for loads in (1, 2, 3)}
    rows = [latency(f"{n} load{'s' * (n > 1)} a night", bank, options.cells) for n, bank in banks.items()]
    rows.append(latency("3 loads, a night in 20 is 30 % slow", banks[3], options.cells, wild=True))
    rows += [latency(f"measured blocks, {n} load{'s' * (n > 1)}", replayed(n, n), options.cells) for n in (1, 3, 8)]
    rows.append(latency("a ratio that varies by 5 %, 3 loads", varying(banks[3], 9), options.cells))
    rows.append(milliseconds(banks[3], options.cells))
    show("3 % slower", rows)
    answers = [
        accuracy(share, options.answered, series=series) for series in (False, True) for share in (0.02, 0.04, 0.08)
    ]
    show("1 pp of 4,000 images lost", answers)
    kept = {"cells": vars(options), "latency": [asdict(r) for r in rows], "accuracy": [asdict(r) for r in answers]}
    result_path("nightly-detection").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
