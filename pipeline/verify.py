"""Judge a compiled artifact against the eager float model: same images, same threads, one process."""

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import nn

from bitferry import targets
from bitferry.device import kept, pixels
from bitferry.device.arrays import Images, Outputs, Predict
from bitferry.device.errors import BitferryError, StageFailed, first_line
from bitferry.device.kept import Kept
from bitferry.device.timing import Series
from bitferry.pipeline import cache, export, progress, statistics, trace, unsupported
from bitferry.pipeline.artifacts import Baseline, Compiled, Program, Unmeasured, Verified
from bitferry.pipeline.data.split import Split
from bitferry.pipeline.figures import Accuracy, Latency
from bitferry.pipeline.judge import Measured, judge
from bitferry.pipeline.made_from import PACKAGES, made_from
from bitferry.pipeline.measure import accuracy, execution, golden, ladder, layers, segmentation, speed, suspicion
from bitferry.pipeline.measure.latency import Effort
from bitferry.pipeline.onnx_in import looked
from bitferry.pipeline.recipe import Recipe
from bitferry.pipeline.verdict import Built, Execution, Ladder, LayerError, Outcome, Verdict, searched

LAYER_IMAGES = 32
KEPT = [cache.file_hash(Path(str(module.__file__))) for module in (kept, pixels)]
LAYERS = TypeAdapter(tuple[LayerError, ...])


@dataclass(frozen=True)
class Way:
    """How one artifact came about: the program it was made from, and every step that can be run by itself."""

    program: Program
    compiled: Compiled
    runtime_float: Compiled | None
    """The same target's float32, where it has one and it is not the artifact itself."""
    steps: ladder.Steps
    """Each step between the float model and the artifact, in order; called, it loads."""


def verify(
    recipe: Recipe, way: Way, evaluation: Split, build: cache.Cache, *, command: str, effort: Effort = "default"
) -> Verified:
    """Answer every evaluation image, time the candidates, find where accuracy is lost, and compare with the budget.

    What only depends on files (answers, the ladder) is computed once for them; what depends on the moment is
    measured anew.
    """
    model, compiled = way.program.baseline, way.compiled
    baseline = float_answers(model, evaluation, build)
    answers = artifact_answers(compiled, evaluation, build)
    climbed = _ladder(way, evaluation, baseline.scores, build)
    files = golden.make(evaluation, model.preprocessing, build)
    with progress.timed("verify", compiled.target):
        found = compared(baseline, answers, evaluation, recipe)
        fresh = speed.fresh(compiled, model.preprocessing, golden.paths(files, model.preprocessing))
        predict = load_artifact(compiled)
        proved = golden.prove(files, model.preprocessing, predict, fresh.scores, eager(model.module()))
        timed, series = speed.measure(
            eager(model.module()),
            compiled,
            way.runtime_float,
            evaluation.images[:1].copy(),
            effort=effort,
            footprint=fresh.footprint,
            timed_as=model.timed_as,
        )
    timed = _with_accuracy(timed, found, way.runtime_float, evaluation, recipe, build)
    if compiled.precision == "int8":
        timed = replace(timed, suspicions=(*suspicion.lossy(climbed, way.program, compiled), *timed.suspicions))
    verdict = _verdict(recipe, way, evaluation, Measured(found, timed, climbed, proved), command)
    maps = kept.maps(baseline, answers)
    return Verified(verdict, baseline.scores, answers.scores, fresh.scores, files, evaluation, maps, series)


def evaluate(way: Way, evaluation: Split, build: cache.Cache) -> None:
    """Answer, climb and make golden files: all of `verify` that does not depend on the moment, to be reused by it."""
    baseline = float_answers(way.program.baseline, evaluation, build)
    for one in (way.compiled, way.runtime_float):
        if one and not one.environment.unmeasured:
            artifact_answers(one, evaluation, build)
    _ladder(way, evaluation, baseline.scores, build)
    golden.make(evaluation, way.program.baseline.preprocessing, build)


def unmeasured(recipe: Recipe, way: Way, evaluation: Split, build: cache.Cache, *, command: str) -> Unmeasured:
    """Say what is known of an artifact that this machine cannot run: how far the steps before it are from float.

    Its golden files are answered by the last of those steps; the machine that runs it is held to those answers.
    """
    model, compiled = way.program.baseline, way.compiled
    baseline = float_answers(model, evaluation, build)
    climbed = _ladder(way, evaluation, baseline.scores, build)
    files = golden.make(evaluation, model.preprocessing, build)
    last = list(way.steps.values())[-1].load()
    scores = golden.answer(files, model.preprocessing, last)
    proved = golden.prove(files, model.preprocessing, last, scores, eager(model.module()), golden.UNMEASURED_LIMIT)
    there = compiled.environment
    headline = f"Built {compiled.precision} on {compiled.target} for {there.device}, not measured: {there.unmeasured}"
    remedy = "`bitferry verify BUNDLE --data IMAGES` on a machine that runs it completes the verdict"
    verdict = Built(outcome="unmeasured", headline=headline, reasons=(remedy,), ladder=climbed, golden=proved,
                    **made_from(recipe, way.program, way.compiled, evaluation, command))  # fmt: skip
    progress.stage("verify", f"{compiled.target} cannot run here")
    return Unmeasured(verdict, baseline.scores, scores, files, evaluation, kept.maps(baseline))


def eager(module: nn.Module) -> Predict:
    """Wrap a PyTorch module as a Predict."""

    def predict(images: Images) -> Outputs:
        with torch.inference_mode():
            scores: Outputs = module(torch.from_numpy(images)).numpy()
        return scores

    return predict


def load_artifact(compiled: Compiled) -> Predict:
    """Load an artifact with the threads it is verified and shipped with."""
    target = targets.get(compiled.target)
    try:
        return target.load(compiled.path, precision=compiled.precision, options=compiled.options)
    except BitferryError:
        raise
    except Exception as error:  # the vendor's runtime may raise anything
        place = unsupported.in_compile(error, compiled.source.path, compiled.target)
        raise StageFailed(f"{compiled.target} cannot load {compiled.path}: {first_line(error)}; {place}") from error


def float_answers(model: Baseline, evaluation: Split, build: cache.Cache) -> Kept:
    """Answer every evaluation image with the float model, once."""
    key = cache.key(
        "baseline", code=__file__, codes=KEPT, packages=("torch", "onnxruntime"), model=model.key, data=evaluation.key,
        isa=targets.cpu_isa(),
    )  # fmt: skip
    load = partial(eager, model.module())
    return _answers(build, "baseline", key, load, evaluation.images, "float")


def artifact_answers(compiled: Compiled, evaluation: Split, build: cache.Cache) -> Kept:
    """Answer every evaluation image with the artifact, once per artifact, runtime and machine."""
    key = cache.key(
        "answers", code=__file__, codes=KEPT, artifact=compiled.key, environment=compiled.environment,
        data=evaluation.key, options=asdict(compiled.options),
    )  # fmt: skip
    load = partial(load_artifact, compiled)
    return _answers(build, "answers", key, load, evaluation.images, f"{compiled.target} {compiled.precision}")


def compared(baseline: Kept, answers: Kept, evaluation: Split, recipe: Recipe) -> Accuracy:
    """Compare the artifact's answers with the float model's, as the recipe's task has it."""
    if recipe.task == "segmentation":
        return segmentation.measure(baseline, answers, evaluation, recipe)
    return accuracy.measure(baseline.scores, answers.scores, evaluation, recipe)


def _percent(answers: Kept, evaluation: Split, recipe: Recipe) -> float:
    if recipe.task == "segmentation":
        return segmentation.percent(answers, evaluation, recipe)
    return accuracy.percent(answers.scores, evaluation, recipe)


def _verdict(recipe: Recipe, way: Way, evaluation: Split, measured: Measured, command: str) -> Verdict:
    ran = execution.told(way.program, way.compiled, way.runtime_float)
    outcome, headline, reasons = _judged(recipe, way, evaluation, measured, ran)
    return Verdict(
        outcome=outcome,
        headline=headline,
        reasons=reasons,
        accuracy=measured.accuracy,
        latency=measured.latency,
        execution=ran,
        ladder=measured.ladder,
        golden=measured.golden,
        **made_from(recipe, way.program, way.compiled, evaluation, command),
    )


def _judged(
    recipe: Recipe, way: Way, evaluation: Split, measured: Measured, ran: Execution
) -> tuple[Outcome, str, tuple[str, ...]]:
    asked, target = way.compiled.precision, way.compiled.target
    whole = replace(measured, asked=asked, layers=ran.layers, different=len(set(evaluation.digests)) or None)
    what = f"{execution.named(asked, ran.layers)} on {target}"
    return judge(whole, recipe.budget, evaluation.labels, what, way.program.baseline.record)


def judged_again(recipe: Recipe, way: Way, found: Verified, latency: Latency, series: tuple[Series, ...]) -> Verified:
    """Give a verification with other times, its verdict drawn anew from them."""
    verdict = found.verdict
    measured = Measured(verdict.accuracy, latency, verdict.ladder, verdict.golden)
    outcome, headline, reasons = _judged(recipe, way, found.evaluation, measured, verdict.execution)
    verdict = replace(verdict, latency=latency, outcome=outcome, headline=headline, reasons=reasons)
    return replace(found, verdict=searched(verdict, verdict.search), series=series)


def _ladder(way: Way, evaluation: Split, baseline: Outputs, build: cache.Cache) -> Ladder:
    """Climb, each step's answers and the layers' errors kept for the other targets that share them."""
    sample = ladder.sample(evaluation, baseline, way.program.baseline.name)

    def answering(name: str, step: ladder.Step, images: Images) -> Outputs:
        key = _key("rung", way, evaluation, step=name, of=step.key)
        made = build.folder(
            "rung", key, lambda out: np.save(out / "scores.npy", ladder.answer(name, step, images)), of=name
        )
        scores: Outputs = np.load(made / "scores.npy")
        return scores

    errors, spread = tuple[LayerError, ...](), None
    if way.program.quantized:
        key = _key("layers", way, evaluation, of=way.program.key)
        spread = np.unique(np.linspace(0, len(sample.images) - 1, LAYER_IMAGES).astype(int))
        make = partial(_layer_errors, way.program, sample.images[spread])
        errors = LAYERS.validate_json((build.folder("layers", key, make) / "layers.json").read_bytes())
    rounds = next((name for name, step in way.steps.items() if step.rounds), way.compiled.target)
    lossy = None if way.program.precision == "float32" else rounds
    climbed = ladder.climb(sample, way.steps, lossy=lossy, layers=errors, answering=answering)
    return replace(climbed, layer_images=None if spread is None else len(spread))


def _key(stage: str, way: Way, evaluation: Split, **inputs: object) -> str:
    codes = [
        cache.file_hash(Path(str(module.__file__))) for module in (ladder, layers, looked, statistics, trace, export)
    ]
    environment = way.compiled.environment.isa
    return cache.key(
        stage, code=__file__, codes=codes, packages=PACKAGES, isa=environment, data=evaluation.key, **inputs
    )


def _layer_errors(program: Program, images: Images, out: Path) -> None:
    (out / "layers.json").write_bytes(LAYERS.dump_json(layers.compare(program, images)))


def _with_accuracy(
    timed: Latency,
    found: Accuracy,
    runtime_float: Compiled | None,
    evaluation: Split,
    recipe: Recipe,
    build: cache.Cache,
) -> Latency:
    """Write each candidate's accuracy beside its latency; the runtime's float is answered for it."""
    percents = [found.judged.float_percent]
    if runtime_float:
        answers = artifact_answers(runtime_float, evaluation, build)
        percents.append(_percent(answers, evaluation, recipe))
    percents.append(found.judged.percent)
    pairs = zip(timed.candidates, percents, strict=True)
    return replace(timed, candidates=tuple(replace(one, accuracy_percent=value) for one, value in pairs))


def _answers(build: cache.Cache, stage: str, key: str, load: "partial[Predict]", images: Images, of: str) -> Kept:
    def make(out: Path) -> None:
        torch.set_num_threads(targets.usable_cpus())
        kept.write(kept.answer(load(), images, progress.counted(f"evaluate {of}")), out)

    return kept.read(build.folder(stage, key, make, of=of))
