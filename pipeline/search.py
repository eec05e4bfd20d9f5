"""precision = "auto": the fastest artifact of a target that is proved inside the accuracy budget, and what was weighed.

Every precision that the target runs at speed here is built, and timed against the others with all threads and with
fewer. Fastest first, they are then judged on the evaluation data until one is inside the budget. Where int8 is faster
than that one, it is made with more effort: with more steps, then fine-tuned where there are training images. What is
not inside even then leaves room for mixes: int8 with those layers in float that are most to blame.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

import targets
from device import pixels
from device.errors import BitferryError, first_line
from pipeline import progress
from pipeline.figures import Change, Ratio
from pipeline.measure import latency, sensitivity
from pipeline.measure.accuracy import judge_accuracy
from pipeline.measure.latency import Series
from pipeline.measure.speed import size
from pipeline.run import Deployment, Run
from pipeline.statistics import decibels, noise_share, ratio_interval
from pipeline.verdict import Outcome, Search, Weighed
from pipeline.verify import artifact_answers, compared, eager, float_answers, load_artifact
from targets import Precision

SHORT: Sequence[Precision] = ("float8", "float16", "bfloat16")
IMAGES = 32
"""Of the calibration images, for what needs no proof: noise, and the layers to blame."""
MOST_LOOKS = 6
SECONDS = 6.0
"""Of timing for each comparison."""
WORTH = 0.98
"""Of the best one's time, that a mix must stay under."""
HALF = 0.5
"""Of the noise of the mix that was judged last, that the next must stay under to be looked at."""


@dataclass(frozen=True)
class Trial:
    """One candidate that was built, and what was found of it so far."""

    way: Deployment
    noise: float
    """Of the scores of some calibration images, as a share of their power."""
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


def choose(run: Run, name: str) -> Deployment:
    """Search for the recipe's model on the target called `name`; give the way to the artifact that was chosen.

    Ends after the recipe's `search.minutes`, or with Ctrl-C, with the best so far. What is built is kept, so a search
    that was killed goes on where it was. A target that cannot run here is not searched: its first precision is given.
    """
    options = run.recipe.options(name)
    found = targets.get(name).environment(options=options)
    if found.unmeasured:
        first = next(iter(targets.get(name).SCHEMES))
        progress.stage("search", f"{name} cannot be timed here, so {first} is built")
        return Deployment(run, name, first)
    with progress.timed("search", name), progress.until_stopped("search") as stopped:
        search = _Searching(run, stopped, time.monotonic() + 60 * run.recipe.search.minutes)
        search.weigh_whole(name, found.fast)
        search.weigh_efforts()
        search.weigh_mixes()
    told = search.told()
    progress.stage("search", told.reason)
    return replace(search.chosen.way, search=told)


class _Searching:
    """A search on its way: what was tried, in the order it was tried."""

    def __init__(self, run: Run, stopped: Callable[[], bool], deadline: float) -> None:
        self.run, self.stopped, self.deadline = run, stopped, deadline
        self.trials: list[Trial] = []
        self.looks, self.timings, self.start = 0, 0, time.monotonic()
        given = run.calibration.images  # spread, for a folder is sorted by class
        self.images = given[np.linspace(0, len(given) - 1, min(IMAGES, len(given))).round().astype(int)].copy()
        self.reference = pixels.thin(eager(run.model.module())(self.images))

    @property
    def best(self) -> Trial | None:
        """Give the fastest that is inside the budget."""
        return min((one for one in self.trials if one.outcome == "pass"), key=lambda one: one.ms, default=None)

    @property
    def chosen(self) -> Trial:
        """Give the best, or the fastest that more images may bring inside, or the nearest to the float model."""
        undecided = [one for one in self.trials if one.outcome == "undecided" and _within(one)]
        judged = [one for one in self.trials if one.outcome] or self.trials
        return self.best or min(undecided or judged, key=lambda one: one.ms if undecided else one.noise)

    def weigh_whole(self, name: str, fast: Sequence[Precision]) -> None:
        """Build every precision, time them all, and judge them from the fastest on."""
        schemes = targets.get(name).SCHEMES
        wanted = [one for one in schemes if one in fast or one not in SHORT]
        ways = [Deployment(self.run, name, precision) for precision in wanted]
        built: list[Trial] = []
        for way in ways:
            trial = self._built(way, needed=way is ways[-1] and not built)
            built += [trial] if trial else []
        fewer = [replace(trial, way=replace(trial.way, threads=n)) for trial in built for n in _fewer(trial.way)]
        self.trials = self._timed([*built, *fewer])
        judged: set[str] = set()
        for trial in sorted(self.trials, key=lambda one: one.ms):
            if trial.way.compiled.key not in judged and self.looks < MOST_LOOKS:
                judged.add(trial.way.compiled.key)
                if self._look(trial).outcome == "pass":
                    return

    def weigh_efforts(self) -> None:
        """Where int8 is faster and not proved inside the budget, quantize with more effort: the same graph, nearer."""
        best, int8 = self.best, self._int8(method=self.run.recipe.quantization.method)
        if int8 is None or (best is not None and int8.ms > WORTH * best.ms):
            return
        given = int8.way.settings
        efforts = {"more steps": given.thorough()}
        if self.run.recipe.data.train is not None:
            efforts["fine-tuned"] = given.model_copy(update={"method": "qat"})
        for note, settings in efforts.items():
            if settings == given or self.looks >= MOST_LOOKS or self._over():
                continue
            trial = self._built(replace(int8.way, quantization=settings, note=note))
            if trial is None:
                continue
            (trial,) = self._timed([trial])
            self.trials.append(trial)
            if trial.noise < int8.noise and self._look(trial).outcome == "pass":
                return

    def weigh_mixes(self) -> None:
        """Between int8 and a slower one that is inside the budget, leave in float what is most to blame."""
        best, int8 = self.best, self._int8(method=self.run.recipe.quantization.method)
        if best is None or int8 is None or int8.ms > WORTH * best.ms:
            return
        names = list(dict.fromkeys(one.name for one in sensitivity.blames(int8.way.program, self.images)))
        count, judged = 1, int8.noise
        while count <= len(names) // 2 and self.looks < MOST_LOOKS and not self._over():
            mix = self._built(replace(int8.way, keep=tuple(names[:count])))
            count *= 2
            if mix is None:
                continue
            against, mix = self._timed([best, mix])
            self.trials.append(mix)
            if mix.ms > WORTH * against.ms:
                return
            if mix.noise < HALF * judged:
                judged = mix.noise
                if self._look(mix).outcome == "pass":
                    return

    def _int8(self, method: str) -> Trial | None:
        """Give the int8 that is nearest to the float model, of those with as many threads as the fastest has."""
        whole = [one for one in self.trials if one.way.precision == "int8" and not one.way.keep]
        fastest = min(whole, key=lambda one: one.ms, default=None)
        alike = [one for one in whole if fastest and one.way.threads == fastest.way.threads]
        return min((one for one in alike if one.way.settings.method == method), key=lambda one: one.noise, default=None)

    def _built(self, way: Deployment, *, needed: bool = False) -> Trial | None:
        """Compile and answer a few images; None, with a line, for what cannot be, unless nothing else is left."""
        try:
            scores = pixels.thin(load_artifact(way.compiled)(self.images))
        except (BitferryError, RuntimeError, TypeError, ValueError) as error:  # what torch and torchao raise, too
            if needed:
                raise
            progress.stage("search", f"{way.title} is left out: {first_line(error)}")
            return None
        if not np.isfinite(scores).all():
            progress.stage("search", f"{way.title} is left out: its scores are not finite")
            return None
        return Trial(way, noise_share(self.reference, scores))

    def _timed(self, trials: Sequence[Trial]) -> list[Trial]:
        """Time them interleaved, each with its own threads."""
        image = np.repeat(self.images[:1], trials[0].way.compiled.batch, axis=0)
        calls = {str(i): partial(load_artifact(trial.way.compiled), image) for i, trial in enumerate(trials)}
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # nothing of PyTorch's runs, and its threads shall not wait beside
        try:
            series = latency.interleave(calls, seconds=SECONDS)
        finally:
            torch.set_num_threads(before)
        self.timings += 1
        return [replace(trial, series=series[str(i)]) for i, trial in enumerate(trials)]

    def _look(self, trial: Trial) -> Trial:
        """Judge a candidate on the evaluation data, at the confidence that this look is worth."""
        self.looks += 1
        run = self.run
        recipe = run.recipe.at_look(self.looks)
        answers = artifact_answers(trial.way.compiled, run.evaluation, run.build)
        found = compared(float_answers(run.model, run.evaluation, run.build), answers, run.evaluation, recipe)
        outcome, reason, _ = judge_accuracy(found, recipe.budget.accuracy_drop_pp)
        progress.stage("search", f"{trial.way.title}: {trial.ms:.2f} ms, {outcome}: {reason}")
        judged = replace(trial, way=replace(trial.way, look=self.looks), outcome=outcome, change=found.judged)
        self.trials = [judged if one is trial else one for one in self.trials]
        return judged

    def _over(self) -> bool:
        return self.stopped() or time.monotonic() > self.deadline

    def told(self) -> Search:
        """Say what was weighed, and why the chosen one was chosen; timed once more, all together, if not yet so."""
        if self.timings > 1:
            self.trials = self._timed(self.trials)
        chosen = self.chosen
        weighed = tuple(self._weighed(one, chosen) for one in sorted(self.trials, key=lambda one: one.ms))
        return Search(_reason(self.trials, chosen), weighed, self.looks, time.monotonic() - self.start)

    def _weighed(self, trial: Trial, chosen: Trial) -> Weighed:
        dominated = any(_better(other, trial) for other in self.trials)
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


def _ratio(trial: Trial, chosen: Trial) -> Ratio | None:
    """Give the time of a candidate over that of the chosen one."""
    if trial.series is None or chosen.series is None:
        return None
    return Ratio(*ratio_interval(trial.series.block_medians, chosen.series.block_medians))


def _better(one: Trial, other: Trial) -> bool:
    """Say whether one is at least as fast, as near to the float model and as small as the other, and in one more so."""
    a, b = ((trial.ms, trial.noise, trial.bytes) for trial in (one, other))
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b


def _reason(trials: Sequence[Trial], chosen: Trial) -> str:
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


def _fewer(way: Deployment) -> Iterator[int]:
    """Halve the number of threads down to one, where the recipe leaves it open."""
    if way.run.recipe.options(way.name).threads is None:
        count = way.compiled.threads // 2
        while count >= 1:
            yield count
            count //= 2


def _within(trial: Trial) -> bool:
    return trial.change is not None and trial.change.drop_pp <= trial.way.run.recipe.budget.accuracy_drop_pp
