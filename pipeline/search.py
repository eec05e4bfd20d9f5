"""precision = "auto": the fastest artifact of a target that is proved inside the accuracy budget, and what was weighed.

Every precision that the target runs at speed here is built, and timed against the others with the recipe's settings
and those that the target has besides: fewer threads, 16-bit rests. Fastest first, they are then judged on the
evaluation data until one is inside the budget. Layers that int8 makes slower than float, each timed by the runtime,
are left in float. Where int8 is faster than what is inside, it is made with more effort: with more steps, then
fine-tuned where there are training images. What is not inside even then leaves room for mixes: int8 with those layers
in float that take most noise away for each microsecond.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from bitferry import targets
from bitferry.device import pixels
from bitferry.device.arrays import Images
from bitferry.device.errors import InputError, first_line
from bitferry.pipeline import interrupt, progress
from bitferry.pipeline.artifacts import FloatOnnx
from bitferry.pipeline.division import LEAST, divide
from bitferry.pipeline.judge import judge_answers
from bitferry.pipeline.measure import execution, latency, sensitivity
from bitferry.pipeline.run import Deployment, Run
from bitferry.pipeline.statistics import noise_share
from bitferry.pipeline.trial import Trial, by_worth, cost_of_float, reason, weighed, within
from bitferry.pipeline.verdict import Search
from bitferry.pipeline.verify import artifact_answers, compared, eager, float_answers, load_artifact
from bitferry.targets import Precision

SHORT: Sequence[Precision] = ("float8", "float16", "bfloat16")
BLAMED = 32
"""Images that show which layers are to blame: each layer is left in float once on all of them."""
MOST_LOOKS = 6
SECONDS = 6.0
"""Of timing for each comparison."""
WORTH = 0.98
"""Of the best one's time, that a mix must stay under."""
HALF = 0.5
"""Of the noise of the mix that was judged last, that the next must stay under to be looked at."""


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
    with progress.timed("search", name), interrupt.until_stopped(partial(progress.stage, "search")) as stopped:
        search = _Searching(run, stopped, run.recipe.search.minutes)
        search.weigh_whole(name, found.fast)
        search.weigh_slowed()
        search.weigh_efforts()
        search.weigh_mixes()
    told = search.told()
    progress.stage("search", told.reason)
    return replace(search.chosen.way, search=told)


def _images(run: Run) -> Images:
    """Give the calibration images that int8 is validated on, not those it is fitted on; all where they are too few."""
    given = run.calibration.images
    division = divide(given, run.recipe.quantization.first_images)
    places = division.validation if len(division.validation) else division.fitting
    return given[places[:LEAST]]


class _Searching:
    """A search on its way: what was tried, in the order it was tried."""

    def __init__(self, run: Run, stopped: Callable[[], bool], minutes: float) -> None:
        self.run, self.stopped, self.minutes, self.deadline = run, stopped, minutes, np.inf
        self.trials: list[Trial] = []
        self.left_out: dict[str, str] = {}
        self.looks, self.timings, self.start = 0, 0, time.monotonic()
        self.images = _images(run)
        self.reference = pixels.thin(eager(run.model.module())(self.images))

    @property
    def best(self) -> Trial | None:
        """Give the fastest that is inside the budget."""
        return min((one for one in self.trials if one.outcome == "pass"), key=lambda one: one.ms, default=None)

    @property
    def chosen(self) -> Trial:
        """Give the best, or the fastest that more images may bring inside, or the nearest to the float model."""
        undecided = [one for one in self.trials if one.outcome == "undecided" and within(one)]
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
        others = [other for trial in built for other in self._otherwise(trial, fast)]
        self.trials = self._timed([*built, *others])
        self.deadline = time.monotonic() + 60 * self.minutes  # what comes now may be left out
        judged: set[str] = set()
        for trial in sorted(self.trials, key=lambda one: one.ms):
            if trial.way.compiled.key not in judged and self.looks < MOST_LOOKS:
                judged.add(trial.way.compiled.key)
                if self._look(trial).outcome == "pass":
                    return

    def weigh_efforts(self) -> None:
        """Where int8 is faster and not proved inside the budget, quantize with more effort: the same graph, nearer."""
        best, int8 = self.best, self._int8()
        if int8 is None or (best is not None and int8.ms > WORTH * best.ms):
            return
        if isinstance(self.run.model, FloatOnnx):  # these efforts are PyTorch's
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

    def weigh_slowed(self) -> None:
        """Leave those layers in float that int8 makes slower here, where together they are worth a candidate."""
        int8 = self._int8()
        whole = min((one for one in self.trials if one.way.precision != "int8"), key=lambda one: one.ms, default=None)
        if int8 is None or whole is None or self._over():
            return
        known = sensitivity.layer_names(int8.way.program)  # a runtime may have names of its own
        slowed = {name: -cost for name, cost in cost_of_float(int8, whole).items() if cost < 0 and name in known}
        if 1e-3 * sum(slowed.values()) < (1 - WORTH) * int8.ms:
            return
        mix = self._built(replace(int8.way, keep=tuple(slowed)))
        if mix:
            before, mix = self._timed([self.best or int8, mix])
            self.trials.append(mix)
            if mix.ms <= WORTH * before.ms and self.looks < MOST_LOOKS:
                self._look(mix)

    def weigh_mixes(self) -> None:
        """Between int8 and a slower one that is inside the budget, leave in float what is most to blame."""
        best, int8 = self.best, self._int8()
        if best is None or int8 is None or int8.ms > WORTH * best.ms:
            return
        try:
            with interrupt.stopping(self._over):
                blames = sensitivity.blames(int8.way.program, self.images[:BLAMED])
        except interrupt.Ended:
            raise
        except interrupt.Stopped:
            return
        names = by_worth(blames, cost_of_float(int8, best))
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

    def _otherwise(self, trial: Trial, fast: Sequence[Precision]) -> Iterator[Trial]:
        """Give the same with the target's other settings; anew where they change more than how it is run."""
        given = self.run.recipe.options(trial.way.name)
        for options in given.alternatives(trial.way.precision, fast):
            way = replace(trial.way, options=options)
            same = way.compiled.key == trial.way.compiled.key
            found = replace(trial, way=way) if same else self._built(way)
            if found:
                yield found

    def _int8(self) -> Trial | None:
        """Give the int8 that is quantized as the recipe says, with as many threads as the fastest of those has."""
        plain = [one for one in self.trials if one.way.precision == "int8" and not one.way.keep]
        plain = [one for one in plain if one.way.settings == self.run.recipe.quantization]
        return min(plain, key=lambda one: one.ms, default=None)

    def _built(self, way: Deployment, *, needed: bool = False) -> Trial | None:
        """Compile and answer a few images; None, with a line, for what cannot be, unless nothing else is left.

        What is wrong with the recipe ends the search: InputError.

        What comes after the whole precisions ends where it is when the time is over, or with Ctrl-C.
        """
        over = self._over if self.trials else lambda: False
        try:
            with interrupt.stopping(over):
                scores = pixels.thin(load_artifact(way.compiled)(self.images))
        except interrupt.Ended:
            raise
        except interrupt.Stopped:
            progress.stage("search", f"{way.title} is left out: it was not done in time; another run goes on with it")
            return None
        except InputError:
            raise
        except Exception as error:  # torch, torchao and the runtimes raise anything
            if needed:
                raise
            self._without(way, first_line(error))
            return None
        if not np.isfinite(scores).all():
            self._without(way, "its scores are not finite")
            return None
        layers = execution.executed(way.compiled)
        if layers and not needed and not any(layer.precision == way.precision for layer in layers):
            self._without(way, f"none of its {len(layers)} layers runs in {way.precision} here")
            return None
        return Trial(way, noise_share(self.reference, scores))

    def _without(self, way: Deployment, why: str) -> None:
        """Leave a candidate out, and say why."""
        self.left_out[way.title] = why
        progress.stage("search", f"{way.title} is left out: {why}")

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
        outcome, reason = judge_answers(found, recipe.budget)
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
        front = tuple(weighed(one, chosen, self.trials) for one in sorted(self.trials, key=lambda one: one.ms))
        left_out = tuple(f"{title}: {why}" for title, why in self.left_out.items())
        seconds = time.monotonic() - self.start
        return Search(reason(self.trials, chosen), front, self.looks, seconds, left_out, len(self.images))
