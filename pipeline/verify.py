"""Judge a compiled artifact against the eager float model: same images, same threads, one process."""

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import nn

import targets
from device.arrays import Images, Outputs, Predict
from pipeline import cache, export, progress, trace
from pipeline.artifacts import Compiled, FloatModel, Program, Split, Verified
from pipeline.figures import Accuracy, Latency
from pipeline.measure import execution, golden, ladder, layers, speed
from pipeline.measure.accuracy import judge_accuracy, measure, percent
from pipeline.measure.latency import Effort
from pipeline.recipe import Budget, Recipe
from pipeline.verdict import SCHEMA, Execution, Golden, Ladder, LayerError, Outcome, Verdict

BATCH = 64
LAYER_IMAGES = 32
PACKAGES = ("bitferry", "torch", "torchvision", "torchao", "onnx", "onnxsim", "onnxruntime", "numpy", "pillow")
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


@dataclass(frozen=True)
class Measured:
    """The figures that a verdict is drawn from."""

    accuracy: Accuracy
    latency: Latency
    ladder: Ladder
    golden: Golden


def verify(
    recipe: Recipe, way: Way, evaluation: Split, build: cache.Cache, *, command: str, effort: Effort = "default"
) -> Verified:
    """Answer every evaluation image, time the candidates, find where accuracy is lost, and compare with the budget.

    What only depends on files (answers, the ladder) is computed once for them; what depends on the moment is
    measured anew.
    """
    model, compiled = way.program.baseline, way.compiled
    baseline = float_scores(model, evaluation, build)
    scores = artifact_scores(compiled, evaluation, build)
    climbed = _ladder(way, evaluation, baseline, build)
    files = golden.make(evaluation, model.preprocessing, build)
    with progress.timed("verify", compiled.target):
        accuracy = measure(baseline, scores, evaluation, recipe)
        fresh = speed.fresh(compiled, model.preprocessing, [files / name for name in golden.KINDS])
        predict = load_artifact(compiled)
        proved = golden.prove(files, model.preprocessing, predict, fresh.scores, eager(model.module()))
        timed = speed.measure(
            eager(model.module()),
            compiled,
            way.runtime_float,
            evaluation.images[:1].copy(),
            effort=effort,
            footprint=fresh.footprint,
        )
    timed = _with_accuracy(timed, accuracy, way.runtime_float, evaluation, recipe, build)
    verdict = _verdict(recipe, way, evaluation, Measured(accuracy, timed, climbed, proved), command)
    return Verified(verdict, baseline, scores, fresh.scores, files, evaluation)


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
    return target.load(compiled.path, precision=compiled.precision, threads=compiled.threads)


def float_scores(model: FloatModel, evaluation: Split, build: cache.Cache) -> Outputs:
    """Answer every evaluation image with the float model, once."""
    key = cache.key("baseline", code=__file__, packages=("torch",), model=model.key, data=evaluation.key)
    load = partial(eager, model.module())
    return _scores(build, "baseline", key, load, evaluation.images, "float")


def artifact_scores(compiled: Compiled, evaluation: Split, build: cache.Cache) -> Outputs:
    """Answer every evaluation image with the artifact, once per artifact, runtime and machine."""
    environment = targets.get(compiled.target).environment()
    key = cache.key(
        "answers", code=__file__, artifact=compiled.key, environment=environment, data=evaluation.key,
        threads=compiled.threads,
    )  # fmt: skip
    load = partial(load_artifact, compiled)
    return _scores(build, "answers", key, load, evaluation.images, f"{compiled.target} {compiled.precision}")


def judge(measured: Measured, budget: Budget) -> tuple[Outcome, tuple[str, ...]]:
    """Pass when every bound is inside the budget, fail when one is outside, otherwise undecided; with reasons."""
    outcome, reason, _ = judge_accuracy(measured.accuracy, budget.accuracy_drop_pp)
    checks = [(outcome, reason), _speed_check(measured.latency, budget.min_speedup), *_golden_checks(measured.golden)]
    outcomes = [outcome for outcome, _ in checks]
    worst: Outcome = "fail" if "fail" in outcomes else "undecided" if "undecided" in outcomes else "pass"
    return worst, tuple(reason for _, reason in checks)


def headline(outcome: Outcome, target: str, precision: str, measured: Measured) -> str:
    """Say the verdict in one sentence."""
    ratio, change = measured.latency.speedup.value, measured.accuracy.judged
    pace = f"{ratio:.1f}× faster" if ratio >= 1 else f"{1 / ratio:.1f}× slower"
    missed = outcome == "fail" and change.drop_lower_pp > 0
    bound = f"at least {change.drop_lower_pp:.2f}" if missed else f"at most {change.drop_upper_pp:.2f}"
    worse = f"{bound} pp worse ({change.metric}), {change.confidence:.0%} sure"
    opening = {
        "pass": f"Ship {precision} on {target}",
        "fail": f"Do not ship {precision} on {target}",
        "undecided": f"Undecided about {precision} on {target}",
    }[outcome]
    return f"{opening}: {pace} than eager float, {worse}"


def _verdict(recipe: Recipe, way: Way, evaluation: Split, measured: Measured, command: str) -> Verdict:
    compiled = way.compiled
    outcome, reasons = judge(measured, recipe.budget)
    environment = targets.get(compiled.target).environment()
    return Verdict(
        schema=SCHEMA,
        recipe=recipe.name,
        version=recipe.version,
        target=compiled.target,
        precision=compiled.precision,
        outcome=outcome,
        headline=headline(outcome, compiled.target, compiled.precision, measured),
        reasons=reasons,
        budget_drop_pp=recipe.budget.accuracy_drop_pp,
        accuracy=measured.accuracy,
        latency=measured.latency,
        execution=_execution(way),
        ladder=measured.ladder,
        golden=measured.golden,
        environment=environment,
        versions={name: version(name) for name in PACKAGES} | {environment.runtime: environment.version},
        command=command,
        compiled_key=compiled.key,
        data_key=evaluation.key,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _execution(way: Way) -> Execution:
    ran = _executed(way.compiled)
    floats = _executed(way.runtime_float) if way.runtime_float else None
    return Execution(
        summary=execution.summary(way.compiled.precision, ran),
        layers=ran,
        float_summary=execution.summary("float32", floats) if floats is not None else None,
    )


def _executed(compiled: Compiled) -> tuple[targets.Layer, ...]:
    return tuple(targets.get(compiled.target).executed(compiled.path, precision=compiled.precision))


def _ladder(way: Way, evaluation: Split, baseline: Outputs, build: cache.Cache) -> Ladder:
    """Climb, each step's answers and the layers' errors kept for the other targets that share them."""
    sample = ladder.sample(evaluation, baseline)

    def answering(name: str, step: ladder.Step, images: Images) -> Outputs:
        key = _key("rung", way, evaluation, step=name, of=step.key)
        made = build.folder(
            "rung", key, lambda out: np.save(out / "scores.npy", ladder.answer(name, step, images)), of=name
        )
        scores: Outputs = np.load(made / "scores.npy")
        return scores

    errors: tuple[LayerError, ...] = ()
    if way.program.precision == "int8":
        key = _key("layers", way, evaluation, of=way.program.key)
        make = partial(_layer_errors, way.program, sample.images[:LAYER_IMAGES])
        errors = LAYERS.validate_json((build.folder("layers", key, make) / "layers.json").read_bytes())
    lossy = None if way.program.precision != "int8" else next(iter(way.steps))
    return ladder.climb(sample, way.steps, lossy=lossy, layers=errors, answering=answering)


def _key(stage: str, way: Way, evaluation: Split, **inputs: object) -> str:
    codes = [cache.file_hash(Path(str(module.__file__))) for module in (ladder, layers, trace, export)]
    environment = targets.get(way.compiled.target).environment().isa
    return cache.key(
        stage, code=__file__, codes=codes, packages=PACKAGES, isa=environment, data=evaluation.key, **inputs
    )


def _layer_errors(program: Program, images: Images, out: Path) -> None:
    (out / "layers.json").write_bytes(LAYERS.dump_json(layers.compare(program, images)))


def _with_accuracy(
    timed: Latency,
    accuracy: Accuracy,
    runtime_float: Compiled | None,
    evaluation: Split,
    recipe: Recipe,
    build: cache.Cache,
) -> Latency:
    """Write each candidate's accuracy beside its latency; the runtime's float is answered for it."""
    percents = [accuracy.judged.float_percent]
    if runtime_float:
        scores = artifact_scores(runtime_float, evaluation, build)
        percents.append(percent(scores, evaluation, recipe))
    percents.append(accuracy.judged.percent)
    pairs = zip(timed.candidates, percents, strict=True)
    return replace(timed, candidates=tuple(replace(one, accuracy_percent=value) for one, value in pairs))


def _speed_check(timed: Latency, wanted: float | None) -> tuple[Outcome, str]:
    ratio = timed.speedup
    told = f"{ratio.lower:.2f} to {ratio.upper:.2f} times as fast as {timed.eager.name}"
    if wanted is None or ratio.lower >= wanted:
        return "pass", f"{told}, " + ("no minimum asked for" if wanted is None else f"{wanted:g} asked for")
    return ("fail" if ratio.upper < wanted else "undecided"), f"{told}, {wanted:g} asked for"


def _golden_checks(proved: Golden) -> list[tuple[Outcome, str]]:
    """Fail when a fresh process answers otherwise, or when torchvision reads a file otherwise."""
    checks: list[tuple[Outcome, str]] = []
    for file in proved.files:
        if not file.score_difference <= proved.score_limit:
            told = f"by {file.score_difference:.2g} of the largest score, at most {proved.score_limit:.2g} allowed"
            checks.append(("fail", f"{file.name} ({file.kind}): a fresh process answers otherwise, {told}"))
        if file.torchvision_mean is not None and file.torchvision_mean > proved.torchvision_limit:
            told = f"by {file.torchvision_mean:.1f} levels on average, {proved.torchvision_limit:g} allowed"
            checks.append(("fail", f"{file.name} ({file.kind}): torchvision decodes and resizes it otherwise, {told}"))
    return checks


def _scores(build: cache.Cache, stage: str, key: str, load: "partial[Predict]", images: Images, of: str) -> Outputs:
    def make(out: Path) -> None:
        torch.set_num_threads(targets.usable_cpus())
        np.save(out / "scores.npy", _answer(load(), images, f"evaluate {of}"))

    scores: Outputs = np.load(build.folder(stage, key, make, of=of) / "scores.npy")
    return scores


def _answer(predict: Predict, images: Images, text: str) -> Outputs:
    starts = range(0, len(images), BATCH)
    batches = progress.track(starts, text, total=len(starts))
    return np.concatenate([predict(images[i : i + BATCH].copy()) for i in batches])
