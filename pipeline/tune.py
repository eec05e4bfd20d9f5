"""Search for the training settings that validate best, by Ray Tune, on training images held out."""

# Ray takes seconds to import and is an extra; torch takes seconds.
# ruff: noqa: PLC0415

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitferry.device.errors import InputError, StageFailed, TargetUnavailable, first_line
from bitferry.pipeline import cache, progress
from bitferry.pipeline.measure.metrics import higher_is_better
from bitferry.pipeline.recipe import Recipe
from bitferry.pipeline.recipe import read as read_recipe
from bitferry.pipeline.training import rewrite, space
from bitferry.pipeline.training.space import Range, Space, Value

if TYPE_CHECKING:
    from ray.tune import ResultGrid, Tuner

    from bitferry.pipeline.training.course import Job

INSTALL = "pip install 'bitferry[tune]'"
HELD_OUT = 0.1
"""Share of the training images by which settings are compared where the recipe holds none out."""
SHARES = 4
"""How many trials run at once on many CPUs; on few, as many as there are."""
WORTHLESS = -1e9
"""What a trial that failed reached; a number, for it to be compared."""
REDUCTION = 3
"""Of ASHA (Li et al. 2020): one of so many trials goes on at each rung."""
SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
JOB, ROOM, CPUS = "job", "room", "cpus"


@dataclass(frozen=True)
class Wanted:
    """How much to search, and where."""

    trials: int
    minutes: float | None
    space: tuple[str, ...]


@dataclass(frozen=True)
class Trial:
    """Settings that were tried."""

    settings: Mapping[str, Value]
    percent: float | None
    """Of the metric · 100, on the images held out; None where it failed."""
    epochs: int


@dataclass(frozen=True)
class Tuned:
    """What a search found: the best first."""

    metric: str
    trials: tuple[Trial, ...]
    output: str | None

    def text(self) -> str:
        """Tell all trials in lines, the best first."""
        lines = [f"{_percent(one.percent)}\t{one.epochs} epochs\t{_told(one.settings)}" for one in self.trials]
        return "\n".join([*lines, *([f"recipe\t{self.output}"] if self.output else [])])

    def json(self) -> str:
        """Give the same for programs."""
        return json.dumps({"metric": self.metric, "trials": [asdict(t) for t in self.trials], "output": self.output})


def tune(path: Path, wanted: Wanted, output: Path | None, *, build: Path, download: bool = False) -> Tuned:
    """Try the recipe's own settings and others of the space; one that was killed goes on where it was.

    Raises InputError for settings that no training can have, or an output that is no file beside the recipe.
    """
    recipe = read_recipe(path)
    tried = space.read(wanted.space, recipe)
    _check_output(path, output)
    _written(path, {key: getattr(recipe.training, key) for key in tried})
    try:
        from ray import tune as _  # noqa: F401 - to say so before the data is read
    except ModuleNotFoundError as error:
        raise TargetUnavailable(f"the search needs Ray Tune; install it (`{INSTALL}`)") from error
    found = _search(recipe, path, wanted, tried, cache.Cache(build / recipe.name), download)
    trials = _ranked(found)
    if not trials and found.errors:
        raise StageFailed(f"every trial failed, the first with: {str(found.errors[0]).strip().splitlines()[-1]}")
    if not trials:
        raise StageFailed("the search ended before any trial had validated once; give it more --minutes")
    if trials[0].percent is None:
        raise StageFailed("every trial failed; see what the recipe's own settings do with `bitferry train`")
    if output is not None:
        output.write_text(_written(path, trials[0].settings), encoding="utf-8")
    return Tuned(recipe.metric, tuple(trials), str(output) if output else None)


def _written(path: Path, settings: Mapping[str, Value]) -> str:
    """Give the recipe's text with the settings; None is what the recipe leaves out, as it still does."""
    given = {key: value for key, value in settings.items() if value is not None}
    return rewrite.write(path.read_text(encoding="utf-8-sig"), given)


def _check_output(path: Path, output: Path | None) -> None:
    if output is None:
        return
    if output.exists():
        raise InputError(f"{output} is there already; name another file, or delete it")
    if output.resolve().parent != path.resolve().parent:
        beside = path.parent / output.name
        raise InputError(f"{output} is not beside the recipe, where its relative paths start; name {beside}")


def _search(
    recipe: Recipe, path: Path, wanted: Wanted, tried: Space, build: cache.Cache, download: bool
) -> "ResultGrid":
    from bitferry.pipeline.nightly import ray_session
    from bitferry.pipeline.run import Run
    from bitferry.pipeline.train import prepare
    from bitferry.pipeline.training.processes import pack

    training = recipe.training
    share = training.validation or HELD_OUT
    recipe = recipe.model_copy(update={"training": training.model_copy(update={"validation": share})})
    run = Run(recipe, path, build, download=download)
    run.check_data()
    job, key = prepare(recipe, run.training, build, folder=path.parent.resolve(), download=download)
    plan = cache.key("tune", code=__file__, job=key, space=repr(tried), trials=wanted.trials, minutes=wanted.minutes)
    room = (build.root / f"tune-{plan}").resolve()
    room.mkdir(parents=True, exist_ok=True)
    (room / JOB).write_bytes(pack(replace(job, start=job.start.resolve() if job.start else None)))
    os.environ.update(SETTINGS)
    with cache.locked(build.root / f".tune-{plan}.lock", "tune"):
        ray_session.connect(None)
        try:
            return _tuner(room, recipe, wanted, tried).fit()
        except Exception as error:  # whatever Ray raises
            raise StageFailed(f"Ray Tune ended: {first_line(error)}") from error
        finally:
            ray_session.disconnect()


def _tuner(room: Path, recipe: Recipe, wanted: Wanted, tried: Space) -> "Tuner":
    """Make Ray's search, or go on with the one that is in the room."""
    from ray import tune as ray_tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.basic_variant import BasicVariantGenerator

    cpus, gpus = _share()
    trainable = ray_tune.with_resources(_trial, {"cpu": cpus, "gpu": gpus})
    if ray_tune.Tuner.can_restore(str(room / "ray")):
        progress.stage("tune", f"goes on with {room}")
        return ray_tune.Tuner.restore(str(room / "ray"), trainable, resume_unfinished=True, resume_errored=True)
    own = {key: getattr(recipe.training, key) for key in tried}
    epochs, seed = recipe.training.epochs, recipe.training.seed
    return ray_tune.Tuner(
        trainable,
        param_space={ROOM: str(room), CPUS: cpus} | {key: _domain(values) for key, values in tried.items()},
        tune_config=ray_tune.TuneConfig(
            metric="value",
            mode="max",
            num_samples=wanted.trials,
            search_alg=BasicVariantGenerator(points_to_evaluate=[own], random_state=seed),
            scheduler=ASHAScheduler(time_attr="epoch", max_t=epochs, grace_period=1, reduction_factor=REDUCTION),
            time_budget_s=None if wanted.minutes is None else 60 * wanted.minutes,
            reuse_actors=True,
        ),
        run_config=ray_tune.RunConfig(
            name="ray", storage_path=str(room), verbose=0, callbacks=[_best_so_far(recipe.metric)]
        ),
    )


def _share() -> tuple[int, int]:
    """Give the CPUs and GPUs of a trial."""
    from bitferry.pipeline.training import machine
    from bitferry.targets import usable_cpus

    gpu = machine.kind() == "cuda"
    return max(1, usable_cpus() // SHARES), int(gpu)


def _domain(values: Range | tuple[Value, ...]) -> object:
    from ray import tune as ray_tune

    if not isinstance(values, Range):
        return ray_tune.choice(list(values))
    if values.whole:
        low, high = int(values.low), int(values.high) + 1
        return ray_tune.lograndint(low, high) if values.logarithmic else ray_tune.randint(low, high)
    draw = ray_tune.loguniform if values.logarithmic else ray_tune.uniform
    return draw(values.low, values.high)


def _trial(config: dict[str, Any]) -> None:
    """Train with one choice of settings, in a process of Ray's, and tell each validation."""
    from ray import tune as ray_tune

    from bitferry.pipeline.training import curves
    from bitferry.pipeline.training.course import WEIGHTS
    from bitferry.pipeline.training.processes import teach, unpack

    settings = {key: _rounded(value) for key, value in config.items() if key not in (ROOM, CPUS)}
    job = _job(unpack(Path(config[ROOM], JOB).read_bytes()), settings, Path(config[ROOM]))
    progress.console.quiet = True
    recipe = job.recipe
    sign = 1 if higher_is_better(recipe.metric, recipe.budget.metric_options, recipe.task, len(recipe.classes)) else -1

    def past() -> list[tuple[int, float]]:
        found = curves.validations(job.out, recipe.metric)
        return [(epoch, WORTHLESS if percent is None else sign * percent) for epoch, percent in found]

    told = list[int]()

    def tell(epoch: int, value: float, *, ended: bool = False) -> None:
        values = [value if math.isfinite(value) else WORTHLESS]
        values += [one for _, one in past()] if recipe.training.keeps_best else []
        told.append(epoch)
        ray_tune.report({"epoch": epoch, "value": max(values), "settings": settings, "ended": ended})

    try:
        if not (job.out / WEIGHTS).exists():
            teach(job, told=tell, threads=config[CPUS])
        if not told or told[-1] < recipe.training.epochs:  # ended by patience, or before the search was killed
            tell(*past()[-1], ended=True)
    except StageFailed:  # it diverged, which is an answer too
        ray_tune.report({"epoch": recipe.training.epochs, "value": WORTHLESS, "settings": settings, "ended": True})


def _job(job: "Job", settings: Mapping[str, Value], room: Path) -> "Job":
    """Give the training of a trial, which keeps its checkpoint under the name of its settings."""
    training = job.recipe.training.model_copy(update=dict(settings))
    own = room / "trials" / cache.key("trial", code=__file__, settings=dict(settings))
    own.mkdir(parents=True, exist_ok=True)
    batch = job.batch if training.batch_size == "auto" else training.batch_size
    flips = {"horizontal_flip": training.horizontal_flip} if "horizontal_flip" in settings else {}
    augmentation = job.recipe.augmentation.model_copy(update=flips)
    recipe = job.recipe.model_copy(update={"training": training, "augmentation": augmentation})
    return replace(job, recipe=recipe, batch=batch, checkpoint=own / "checkpoint.pt", curves=own / "curves", out=own)


def _best_so_far(metric: str) -> object:
    """Make what tells of each better validation while the search runs."""
    from ray import tune as ray_tune

    class Told(ray_tune.Callback):  # type: ignore[misc]
        best = WORTHLESS

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **_: Any) -> None:
            if result["value"] > Told.best:
                Told.best = result["value"]
                settings = _told(result["settings"])
                progress.stage(
                    "tune", f"best so far: {metric} {abs(Told.best):.2f} % after {result['epoch']} epochs, {settings}"
                )

    return Told()


def _ranked(found: "ResultGrid") -> list[Trial]:
    """Order the trials: those that were trained to the end first, and of each kind the better first."""
    results = [one.metrics for one in found if one.metrics and "value" in one.metrics]
    whole = max((one["epoch"] for one in results), default=0)

    def ended(one: Mapping[str, Any]) -> bool:
        return one["value"] > WORTHLESS and bool(one["ended"] or one["epoch"] == whole)

    results.sort(key=lambda one: (ended(one), one["value"]), reverse=True)
    return [
        Trial(one["settings"], abs(one["value"]) if one["value"] > WORTHLESS else None, one["epoch"]) for one in results
    ]


def _rounded(value: Value) -> Value:
    """Give a number as a person would write it into a recipe."""
    return float(f"{value:.3g}") if isinstance(value, float) else value


def _told(settings: Mapping[str, Value]) -> str:
    return " ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in settings.items()
    )


def _percent(value: float | None) -> str:
    return "failed" if value is None else f"{value:.2f} %"
