"""A bundle alone, on any machine that has its runtime → is it whole, does it answer as verified, how fast here."""

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

import targets
from device import golden, runner
from device.errors import InputError
from pipeline import cache, dataset, progress
from pipeline.artifacts import Split
from pipeline.figures import Change, Suspicion, Timing
from pipeline.measure import kept, latency, segmentation
from pipeline.measure.accuracy import paired_change
from pipeline.measure.latency import Effort
from pipeline.measure.suspicion import other_load, suspicions
from pipeline.report import record
from pipeline.report.terminal import STYLES
from pipeline.verdict import Built, Outcome, Verdict
from targets import Environment


@dataclass(frozen=True)
class Recheck:
    """What a bundle did on this machine."""

    bundle: str
    outcome: Outcome
    headline: str
    reasons: tuple[str, ...]
    golden: dict[str, float]
    """Each golden file's largest score difference from the expected, as a share of the largest score."""
    score_limit: float
    timing: Timing
    verified_median_ms: float | None
    """On the machine that built the bundle; None where that could not run it."""
    accuracy: Change | None
    """Against the float model's recorded answers; None without `--data`."""
    images: int | None
    """How many were answered for it."""
    environment: Environment
    suspicions: tuple[Suspicion, ...]


def verify(bundle: Path, data: Path | None = None, *, effort: Effort = "default") -> Recheck:
    """Check every file, answer for the golden files, time the artifact, and measure its accuracy on `data` if given.

    `data` must hold the images that the bundle was verified on, or some of them: the float model is not in a
    bundle, only its answer for each image is. A bundle that was built unmeasured gets its verdict by this, in its
    manifest. Raises InputError for a bundle that is not as it was built.
    """
    manifest = runner.read_manifest(bundle)
    target = targets.get(manifest["target"])
    options = runner.options_of(target, manifest["model"]["options"])
    loaded = runner.Runner(bundle, target)
    verified = record.read_built(bundle / record.VERDICT)
    with progress.timed("verify", str(bundle)):
        limit, differences = golden.compare(bundle, manifest, loaded.preprocessing, loaded.predict)
        timing, found = _time(loaded, options, effort)
        change, images = _accuracy(loaded, bundle, data, verified) if data else (None, None)
    faults = _faults(differences, limit)
    environment = target.environment(options=options)
    there = verified.latency.artifact.timing.median_ms if isinstance(verified, Verdict) else None
    compared = f"{there:.2f} there" if there else "not measured where it was built"
    rechecked = Recheck(
        bundle=str(bundle),
        outcome="fail" if faults else _outcome(change, verified),
        headline=_headline(not faults, change, environment, verified),
        reasons=(*faults, *_told(change, verified), f"{timing.median_ms:.2f} ms here, {compared}"),
        golden=differences,
        score_limit=limit,
        timing=timing,
        verified_median_ms=there,
        accuracy=change,
        images=images,
        environment=environment,
        suspicions=found,
    )
    if change and not isinstance(verified, Verdict):
        _complete(bundle, manifest, rechecked)
    return rechecked


def _faults(differences: dict[str, float], limit: float) -> list[str]:
    """Name the golden files that are answered otherwise."""
    return [
        f"{name}: differs by {difference:.2g} of the largest score, {limit:.2g} allowed"
        for name, difference in differences.items()
        if not difference <= limit
    ]


def _complete(bundle: Path, manifest: dict[str, Any], found: Recheck) -> None:
    """Put the verdict that was missing into the manifest; each later measurement takes the place of the one before."""
    measured = {"outcome": found.outcome, "headline": found.headline, "measured": _fields(found)}
    bundle = bundle.resolve()  # `.` has no name
    part = bundle.with_name(f".{bundle.name}.manifest")
    part.write_text(json.dumps(manifest | {"verdict": manifest["verdict"] | measured}, indent=2) + "\n")
    part.replace(bundle / "manifest.json")
    progress.stage("verify", f"{bundle}/manifest.json now holds the verdict")


def _fields(found: Recheck) -> dict[str, object]:
    return asdict(found) | {"golden": golden.finite(found.golden)}


def show(found: Recheck, *, as_json: bool) -> int:
    """Print what was found; give the exit code."""
    if as_json:
        print(json.dumps(_fields(found), indent=2, allow_nan=False))
        return 0 if found.outcome == "pass" else 1
    console = Console()
    console.print(f"[{STYLES[found.outcome]}]{found.outcome}[/] {escape(found.headline)}", soft_wrap=True)
    for line in (*found.reasons, *(f"suspicious: {one.finding}; {one.remedy}" for one in found.suspicions)):
        console.print(f"     {escape(line)}", soft_wrap=True)
    return 0 if found.outcome == "pass" else 1


def _outcome(change: Change | None, verified: Built) -> Outcome:
    """Judge the drop in right answers; where the budget is about another metric, it is only told."""
    allowed, judged = verified.budget_drop_pp, change is not None and verified.budget_metric == change.metric
    if not judged and not isinstance(verified, Verdict):
        return "undecided"
    if change is None or not judged or change.drop_upper_pp <= allowed:
        return "pass"
    return "fail" if change.drop_lower_pp > allowed else "undecided"


def _headline(passed: bool, change: Change | None, here: Environment, verified: Built) -> str:
    same = "the same runtime and processor" if here == verified.environment else _differs(here, verified.environment)
    inside = _outcome(change, verified) == "pass"
    missed = "" if inside else ", but on these images the budget is not shown to be kept"
    if not isinstance(verified, Verdict):
        same, missed = (
            f"{here.device}, where it is measured first",
            "" if inside else "; the budget is not shown to be kept",
        )
        missed += "" if change else " (pass --data with the evaluation images)"
    return f"{'answers' if passed else 'does not answer'} as it was verified, on {same}{missed}"


def _differs(here: Environment, there: Environment) -> str:
    names = [name for name, value in asdict(here).items() if value != asdict(there)[name]]
    return "another machine: " + ", ".join(f"{n} {_plain(here, n)} instead of {_plain(there, n)}" for n in names)


def _plain(environment: Environment, name: str) -> str:
    value = getattr(environment, name)
    return " ".join(value) if isinstance(value, tuple) else str(value)


def _told(change: Change | None, verified: Built) -> tuple[str, ...]:
    if change is None:
        return ()
    judged = verified.budget_metric
    budget = (
        f"{verified.budget_drop_pp:g} pp allowed"
        if judged == change.metric
        else f"the budget is about {judged}, not judged here"
    )
    what = "right" if change.method == "tango" else change.metric
    right = f"{change.percent:.2f} % {what}, float {change.float_percent:.2f} %"
    return (f"{right}; at most {change.drop_upper_pp:.2f} pp worse, {budget}",)


def _time(loaded: runner.Runner, options: targets.Options, effort: Effort) -> tuple[Timing, tuple[Suspicion, ...]]:
    threads = options.threads or targets.usable_cpus()
    batch = 1 if options.batch == "dynamic" else options.batch
    image = np.full((batch, *loaded.preprocessing.shape), 127, np.uint8)
    with other_load() as others:
        series = latency.interleave({"artifact": lambda: loaded.predict(image)}, seconds=latency.SECONDS[effort] / 2)
    return latency.timing(series["artifact"]), suspicions(series, threads=threads, others=others())


def _accuracy(loaded: runner.Runner, bundle: Path, data: Path, verified: Built) -> tuple[Change, int]:
    """Answer `data` and pair each image, by its pixels, with the float model's recorded answer; give how many."""
    recorded = record.read_answers(bundle / record.ANSWERS)
    images = _split(loaded, data)
    rows = {digest.tobytes(): i for i, digest in enumerate(recorded.digests)}
    pairs = [(i, rows[digest]) for i, digest in enumerate(images.digests) if digest in rows]
    if not pairs:
        raise InputError(f"none of the {len(images)} images of {data} is one that {bundle} was verified on")
    if len(pairs) < len(images):
        progress.stage("verify", f"{len(images) - len(pairs)} images left out: the bundle was not verified on them")
    ours, theirs = (np.array(column) for column in zip(*pairs, strict=True))
    found = kept.answer(loaded.predict, images.images[ours], "evaluate")
    labels, before, confidence = images.labels[ours], recorded.float_answers[theirs], verified.budget_confidence
    if found.maps is not None:
        after = segmentation.counts(found.maps, labels, len(loaded.classes))
        exact = segmentation.unpacked(segmentation.perfect(after), before)
        return segmentation.change(verified.budget_metric, exact, after, confidence), len(pairs)
    right = record.right(record.chosen(found.scores, labels), labels)
    name = "top-1" if labels.ndim == 1 else "whole answers"
    return paired_change(name, record.right(before, labels), right, confidence), len(pairs)


def _split(loaded: runner.Runner, data: Path) -> Split:
    with tempfile.TemporaryDirectory() as folder:
        build = cache.Cache(Path(folder) / "build")
        found = dataset.split("evaluation", data, loaded.classes, loaded.preprocessing, build, task=loaded.task)
        return Split(
            found.name, np.array(found.images), np.array(found.labels), found.sources, found.digests, found.key
        )
