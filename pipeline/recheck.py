"""A bundle alone, on any machine that has its runtime → is it whole, does it answer as verified, how fast there."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.markup import escape

from bitferry import targets
from bitferry.device import golden, kept, measure, runner, whole
from bitferry.device.errors import StageFailed
from bitferry.device.kept import Kept
from bitferry.device.machine import Machine
from bitferry.device.measure import Measurement
from bitferry.device.timing import BLOCKS
from bitferry.pipeline import progress
from bitferry.pipeline.bundle_data import Shown, budget, change_of, show_again
from bitferry.pipeline.figures import Change, Suspicion, Timing
from bitferry.pipeline.judge import doubted
from bitferry.pipeline.measure import latency
from bitferry.pipeline.measure.latency import Effort
from bitferry.pipeline.measure.suspicion import suspicions
from bitferry.pipeline.report import record
from bitferry.pipeline.report.terminal import STYLES, suspicious
from bitferry.pipeline.verdict import Built, Outcome, Verdict
from bitferry.targets import Environment

ENVIRONMENTS = TypeAdapter(Environment)
GAIN_PP = 1.0
"""Of `budget.accuracy_gain_pp`, for a bundle whose manifest does not say it."""


@dataclass(frozen=True)
class Found:
    """What a machine did with a bundle, not yet judged."""

    score_limit: float
    golden: dict[str, float]
    measurement: Measurement
    answered: Kept | None
    """For the images shown to it; None where none were."""


@dataclass(frozen=True)
class Recheck:
    """What a bundle did on one machine."""

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
    host: str | None
    """How another machine was reached; None where it was this one."""
    machine: Machine
    load_ms: float
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
    loaded = runner.Runner(bundle, target)
    verified = record.read_built(bundle / record.VERDICT)
    shown = show_again(bundle, manifest, data) if data else None
    with progress.timed("verify", str(bundle)):
        limit, differences = golden.compare(bundle, manifest, loaded.preprocessing, loaded.predict)
        blocks = progress.track(range(BLOCKS), "time", total=BLOCKS)
        measured = measure.measure(loaded, target, seconds=seconds(effort), blocks=blocks)
        answered = kept.answer(loaded.predict, shown.images, progress.counted("evaluate")) if shown else None
    return conclude(bundle, manifest, verified, Found(limit, differences, measured, answered), shown)


def seconds(effort: Effort) -> float:
    """Say how long a bundle's timed calls take, there being one candidate and not two."""
    return latency.SECONDS[effort] / 2


def conclude(
    bundle: Path,
    manifest: dict[str, Any],
    verified: Built,
    found: Found,
    shown: Shown | None = None,
    *,
    host: str | None = None,
) -> Recheck:
    """Judge what a machine did; where the bundle was built unmeasured, put the verdict into its manifest."""
    faults, told = _faults(found.golden, found.score_limit), found.measurement
    change = change_of(found.answered, shown, verified, manifest) if shown and found.answered else None
    timing, environment = latency.timing(told.series), _environment(told)
    outcome, doubt = _outcome(change, verified, manifest)
    there = verified.latency.artifact.timing.median_ms if isinstance(verified, Verdict) else None
    rechecked = Recheck(
        bundle=str(bundle),
        outcome="fail" if faults else outcome,
        headline=_headline(not faults, change, environment, verified, outcome),
        reasons=(*faults, *doubt, *_told(change, verified), _speed(timing, there, told, host)),
        golden=found.golden,
        score_limit=found.score_limit,
        timing=timing,
        verified_median_ms=there,
        accuracy=change,
        images=len(shown.images) if shown else None,
        host=host,
        machine=told.machine,
        load_ms=told.load_ms,
        environment=environment,
        suspicions=suspicions({"artifact": told.series}, threads=told.threads, conditions=told.conditions),
    )
    if outcome != "unmeasured" and change and not isinstance(verified, Verdict):
        _complete(bundle, manifest, rechecked)
    return rechecked


def _environment(told: Measurement) -> Environment:
    try:
        return ENVIRONMENTS.validate_python(told.environment)
    except ValidationError as error:
        raise StageFailed(f"{told.machine.hostname} does not say what ran the bundle: {told.environment}") from error


def _speed(timing: Timing, there: float | None, told: Measurement, host: str | None) -> str:
    """Tell the median beside the verified one."""
    place, other = ("on that machine", "where it was verified") if host else ("here", "there")
    compared = f"{there:.2f} {other}" if there else "not measured where it was built"
    rebuilt = ", as rebuilt on it" if host and told.rebuilt else ""
    return f"{timing.median_ms:.2f} ms {place}{rebuilt}, {compared}"


def _faults(differences: dict[str, float], limit: float) -> list[str]:
    """Name the golden files that are answered otherwise."""
    return [
        f"{name}: differs by {difference:.2g} of the largest score, {limit:.2g} allowed"
        for name, difference in differences.items()
        if not difference <= limit
    ]


def _complete(bundle: Path, manifest: dict[str, Any], found: Recheck) -> None:
    """Put the verdict that was missing into the manifest; each later measurement takes the place of the one before.

    A machine's name stays out of what is shipped.
    """
    fields = {name: value for name, value in _fields(found).items() if name != "host"}
    fields["machine"] = {name: value for name, value in asdict(found.machine).items() if name != "hostname"}
    measured = {"outcome": found.outcome, "headline": found.headline, "measured": fields}
    bundle = bundle.resolve()  # `.` has no name
    part = bundle.with_name(f".{bundle.name}.manifest")
    part.write_text(json.dumps(manifest | {"verdict": manifest["verdict"] | measured}, indent=2) + "\n")
    (bundle / whole.SIGNATURE).unlink(missing_ok=True)  # it would no longer fit
    part.replace(bundle / "manifest.json")
    progress.stage("verify", f"{bundle}/manifest.json now holds the verdict; sign the bundle anew")


def _fields(found: Recheck) -> dict[str, object]:
    return asdict(found) | {"golden": golden.finite(found.golden)}


def show(found: Recheck, *, as_json: bool) -> int:
    """Print what was found; give the exit code."""
    if as_json:
        print(json.dumps(_fields(found), indent=2, allow_nan=False))
        return 0 if found.outcome == "pass" else 1
    console = Console()
    console.print(f"[{STYLES[found.outcome]}]{found.outcome}[/] {escape(found.headline)}", soft_wrap=True)
    place = (_place(found.host, found.machine, found.environment),) if found.host else ()
    for line in (*found.reasons, *place):
        console.print(f"     {escape(line)}", soft_wrap=True)
    for line in suspicious(found.suspicions):
        console.print(line, soft_wrap=True)
    return 0 if found.outcome == "pass" else 1


def _place(host: str, machine: Machine, environment: Environment) -> str:
    return (
        f"measured on {machine.hostname} ({host}): {machine.cpu}, {machine.cpus} usable CPUs, {environment.runtime} "
        f"{environment.version}, {machine.system}, Python {machine.python}, NumPy {machine.numpy}"
    )


def _outcome(change: Change | None, verified: Built, manifest: dict[str, Any]) -> tuple[Outcome, tuple[str, ...]]:
    """Judge the drop as the recipe's budget does; unmeasured where its metric cannot be, for lack of float scores.

    Without images it is what verification found, which a bundle that was built unmeasured lacks. Gives the reason of a
    doubt besides.
    """
    if change is None:
        return (verified.outcome if isinstance(verified, Verdict) else "undecided"), ()
    allowed = verified.budget_drop_pp
    if change.metric != verified.budget_metric:
        return "unmeasured", ()
    if change.drop_upper_pp > allowed:
        return ("fail" if change.drop_lower_pp > allowed else "undecided"), ()
    doubt = doubted(change, allowed, float(budget(manifest).get("accuracy_gain_pp", GAIN_PP)))
    return ("undecided", (doubt,)) if doubt else ("pass", ())


def _headline(passed: bool, change: Change | None, here: Environment, verified: Built, outcome: Outcome) -> str:
    same = "the same runtime and processor" if here == verified.environment else _differs(here, verified.environment)
    inside = outcome == "pass"
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
        else f"the budget is about {judged}, which takes the float model's scores, and this bundle has none"
    )
    what = "right" if change.method == "tango" else change.metric
    right = f"{change.percent:.2f} % {what}, float {change.float_percent:.2f} %"
    return (f"{right}; at most {change.drop_upper_pp:.2f} pp worse, {budget}",)
