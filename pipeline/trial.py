"""One candidate of a search: what was measured of it, what sets it against the others, and why it was chosen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bitferry.device.timing import Series
from bitferry.pipeline.figures import Change, Ratio
from bitferry.pipeline.measure.execution import executed
from bitferry.pipeline.measure.speed import size
from bitferry.pipeline.run import Deployment
from bitferry.pipeline.statistics import decibels, ratio_interval
from bitferry.pipeline.verdict import Blame, Outcome, Weighed

LEAST_COST = 0.1
"""Of a typical layer's, for one that costs less or nothing: what is measured of a layer is no more exact."""


@dataclass(frozen=True)
class Trial:
    """One candidate that was built, and what was found of it so far."""

    way: Deployment
    noise: float
    """Of the scores of the search's calibration images, as a share of their power."""
    series: Series | None = None
    outcome: Outcome | None = None
    """None where it was not judged."""
    change: Change | None = None

    @property
    def ms(self) -> float:
        """Median of a call; infinite where it was not timed."""
        return 1e3 * float(np.median(self.series.seconds)) if self.series else np.inf

    @property
    def bytes(self) -> int:
        """Of the artifact with the files that belong to it."""
        return size(self.way.compiled.path.parent)


def weighed(trial: Trial, chosen: Trial, trials: Sequence[Trial]) -> Weighed:
    """Give a candidate as the verdict has it."""
    dominated = any(_better(other, trial) for other in trials)
    return Weighed(
        name=trial.way.title,
        precision=trial.way.precision,
        keep=trial.way.keep,
        threads=trial.way.compiled.threads,
        ms=trial.ms,
        over_chosen=_ratio(trial, chosen),
        sqnr_db=decibels(1.0, trial.noise),
        file_bytes=trial.bytes,
        outcome=trial.outcome,
        drop_upper_pp=trial.change.drop_upper_pp if trial.change else None,
        confidence=trial.change.confidence if trial.change else None,
        pareto=not dominated,
        chosen=trial is chosen,
    )


def cost_of_float(int8: Trial, other: Trial) -> dict[str, float]:
    """Measure how many microseconds longer than in int8 each layer takes in another precision, with equal settings."""
    alike = replace(other.way, options=int8.way.options)
    times = [{one.name: one.microseconds for one in executed(way.compiled)} for way in (int8.way, alike)]
    pairs = {name: (times[0][name], times[1].get(name)) for name in times[0]}
    return {name: dear - cheap for name, (cheap, dear) in pairs.items() if cheap is not None and dear is not None}


def by_worth(blames: Sequence[Blame], costs: Mapping[str, float]) -> list[str]:
    """Order layers by the noise that goes for each microsecond it costs; unknown costs are taken for the median."""
    typical = max(1.0, float(np.median(list(costs.values()) or [0.0])))
    least = LEAST_COST * typical
    worth = {one.name: one.noise / max(costs.get(one.name, typical), least) for one in blames}
    return sorted(worth, key=lambda name: -worth[name])


def _ratio(trial: Trial, chosen: Trial) -> Ratio | None:
    """Give the time of a candidate over that of the chosen one."""
    if trial.series is None or chosen.series is None:
        return None
    return Ratio(*ratio_interval(trial.series.block_medians, chosen.series.block_medians))


def _better(one: Trial, other: Trial) -> bool:
    """Say whether one is at least as fast, as near to the float model and as small as the other, and in one more so."""
    a, b = ((trial.ms, trial.noise, trial.bytes) for trial in (one, other))
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b


def reason(trials: Sequence[Trial], chosen: Trial) -> str:
    """Say in a sentence why this one."""
    title, fastest = chosen.way.title, min(trials, key=lambda one: one.ms)
    int8 = min((one for one in trials if one.way.precision == "int8"), key=lambda one: one.ms, default=None)
    if chosen.outcome == "fail":
        return f"nothing is inside the budget; {title} is the nearest to the float model of those that were judged"
    if chosen.outcome != "pass":
        return f"nothing is proved inside the budget with these images; {title} is the one that more may prove"
    if chosen is fastest and int8 is not None and chosen.way.precision != "int8":
        return f"int8 does not pay here: {title} is {int8.ms / chosen.ms:.2f} times as fast, and inside the budget"
    if chosen is fastest:
        return f"{title} is the fastest of {len(trials)}, and proved inside the budget"
    return (
        f"{title} is the fastest that is proved inside the budget; {fastest.way.title} is "
        f"{chosen.ms / fastest.ms:.2f} times as fast, and is not"
    )


def within(trial: Trial) -> bool:
    """Say whether it lost no more than the budget, proved or not."""
    return trial.change is not None and trial.change.drop_pp <= trial.way.run.recipe.budget.accuracy_drop_pp
