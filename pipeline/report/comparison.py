"""Two bundles or two verified builds side by side: accuracy paired by image, latency as a ratio, with intervals."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bitferry import targets
from bitferry.device import machine, runner
from bitferry.device.errors import InputError, TargetUnavailable
from bitferry.device.timing import Call
from bitferry.pipeline.figures import Change, Ratio
from bitferry.pipeline.measure import latency, segmentation
from bitferry.pipeline.measure.accuracy import paired_change
from bitferry.pipeline.measure.suspicion import suspicions
from bitferry.pipeline.report import record
from bitferry.pipeline.report.record import Recorded
from bitferry.pipeline.statistics import ratio_interval
from bitferry.pipeline.verdict import Verdict

REMEDY = "compare two bundles, which are timed here"
MOST_APART = 1.25
"""Of the two medians of the same eager float model, before their ratio is doubted."""


@dataclass(frozen=True)
class Side:
    """One of the two."""

    path: Path
    verdict: Verdict
    answers: Recorded


@dataclass(frozen=True)
class Comparison:
    """What B changes, compared with A."""

    a: str
    b: str
    a_name: str
    b_name: str
    common_images: int
    """Evaluation images that both answered, by their pixels."""
    accuracy: Change | None
    """`float_percent` is A's share of right answers or its mIoU, `percent` B's; None without a common image."""
    a_median_ms: float
    b_median_ms: float
    speedup: Ratio
    """A's latency over B's."""
    timed: str
    """How the ratio was found."""
    a_bytes: int | None
    b_bytes: int | None
    suspicions: tuple[str, ...]
    """Why the ratio may be off, each with its remedy."""


def compare(first: Path, second: Path, *, seconds: float = latency.SECONDS["default"]) -> Comparison:
    """Pair the answers image by image, and time both here if both are bundles that this machine can run.

    Otherwise their recorded speed-ups over the same kind of eager float model are divided, with the interval that
    follows from both. Raises InputError when one is neither a bundle nor a report.
    """
    a, b = _side(first), _side(second)
    live = _interleaved(a, b, seconds)
    ours, theirs = _common(a.answers, b.answers)
    change = None
    if len(ours):
        confidence = a.verdict.accuracy.judged.confidence
        change = _change(a.answers, b.answers, ours, theirs, confidence)
    medians = [side.verdict.latency.artifact.timing.median_ms for side in (a, b)]
    return Comparison(
        a=str(first),
        b=str(second),
        a_name=_name(a.verdict),
        b_name=_name(b.verdict),
        common_images=len(ours),
        accuracy=change,
        a_median_ms=live.medians_ms[0] if live else medians[0],
        b_median_ms=live.medians_ms[1] if live else medians[1],
        speedup=live.ratio if live else _divided(a.verdict.latency.speedup, b.verdict.latency.speedup),
        timed="both timed here, interleaved"
        if live
        else f"from each one's recorded ratio to {a.verdict.latency.baseline}",
        a_bytes=_bytes(a.verdict),
        b_bytes=_bytes(b.verdict),
        suspicions=live.suspicions if live else tuple(_doubts(a.verdict, b.verdict)),
    )


def _change(a: Recorded, b: Recorded, ours: list[int], theirs: list[int], confidence: float) -> Change:
    """Compare the answers of these rows: right or wrong, or the overlap of maps."""
    if a.labels.ndim < 3 or a.answers is None or b.answers is None:
        return paired_change("right answers", a.right[ours], b.right[theirs], confidence)
    before, after = (segmentation.unpacked(a.labels[ours], rows) for rows in (a.answers[ours], b.answers[theirs]))
    return segmentation.change("mIoU", before, after, confidence)


def show(found: Comparison, *, as_json: bool) -> None:
    """Print the two columns, and what B changes."""
    if as_json:
        print(json.dumps(asdict(found), indent=2, allow_nan=False))
        return
    table = Table("", f"A  {found.a_name}", f"B  {found.b_name}", "B compared with A")
    change, ratio = found.accuracy, found.speedup
    if change:
        told = f"{0 - change.drop_pp:+.2f} pp ({-change.drop_upper_pp:+.2f} to {-change.drop_lower_pp:+.2f})"
        table.add_row(change.metric, f"{change.float_percent:.2f} %", f"{change.percent:.2f} %", told)
    told = f"{ratio.value:.2f}× as fast ({ratio.lower:.2f} to {ratio.upper:.2f})"
    table.add_row("latency, median", f"{found.a_median_ms:.2f} ms", f"{found.b_median_ms:.2f} ms", told)
    if found.a_bytes and found.b_bytes:
        told = f"{found.b_bytes / found.a_bytes:.2f}× the size"
        table.add_row("size", f"{found.a_bytes / 1e6:.1f} MB", f"{found.b_bytes / 1e6:.1f} MB", told)
    console = Console()
    console.print(table)
    sure = f"{100 * change.confidence:g}% on either side" if change else "no common image, so accuracy is not compared"
    for doubt in found.suspicions:
        console.print(f"[yellow]suspicious:[/] {escape(doubt)}", soft_wrap=True)
    console.print(f"{found.common_images} common images ({sure}); {found.timed}, 95 % interval", soft_wrap=True)


def _side(path: Path) -> Side:
    folder = path.parent if path.name == record.VERDICT else path
    if not (folder / record.VERDICT).is_file():
        raise InputError(f"{path} is neither a bundle nor a report folder: it has no {record.VERDICT}")
    if (folder / "manifest.json").exists():
        runner.check(folder, runner.read_manifest(folder))
    return Side(folder, record.read_verdict(folder / record.VERDICT), record.read_answers(folder / record.ANSWERS))


def _common(a: Recorded, b: Recorded) -> tuple[list[int], list[int]]:
    """Pair the rows of the same image with the same label."""
    rows = {
        (digest.tobytes(), label.tobytes()): i
        for i, (digest, label) in enumerate(zip(b.digests, b.labels, strict=True))
    }
    keys = [(digest.tobytes(), label.tobytes()) for digest, label in zip(a.digests, a.labels, strict=True)]
    pairs = [(i, rows[key]) for i, key in enumerate(keys) if key in rows]
    return [i for i, _ in pairs], [j for _, j in pairs]


@dataclass(frozen=True)
class Live:
    """Two bundles timed here, interleaved."""

    ratio: Ratio
    medians_ms: tuple[float, float]
    suspicions: tuple[str, ...]


def _interleaved(a: Side, b: Side, seconds: float) -> Live | None:
    """Time both if both are bundles that this machine can run."""
    if not all((side.path / "manifest.json").exists() for side in (a, b)):
        return None
    try:
        loaded = [runner.Runner(side.path, targets.get(runner.read_manifest(side.path)["target"])) for side in (a, b)]
    except TargetUnavailable:
        return None
    with machine.other_load() as others:
        series = latency.interleave(dict(zip("ab", map(_call, loaded), strict=True)), seconds=seconds)
    threads = max(side.verdict.latency.threads for side in (a, b))
    told = suspicions(series, threads=threads, conditions=machine.conditions(others()))
    first, second = (float(np.median(series[name].seconds)) * 1e3 for name in "ab")
    ratio = Ratio(*ratio_interval(series["a"].block_medians, series["b"].block_medians))
    doubts = tuple(f"{one.finding}; {one.remedy}" for one in told if one.kind == "other load")
    return Live(ratio, (first, second), doubts)


def _call(loaded: runner.Runner) -> Call:
    image = np.full((1, *loaded.preprocessing.shape), 127, np.uint8)
    return lambda: loaded.predict(image)


def _divided(a: Ratio, b: Ratio) -> Ratio:
    """Divide two independent ratios; their logarithms' half-widths add as errors do."""
    centre = math.log(b.value / a.value)
    reach = math.hypot(math.log(a.upper / a.lower) / 2, math.log(b.upper / b.lower) / 2)
    return Ratio(math.exp(centre), math.exp(centre - reach), math.exp(centre + reach))


def _doubts(a: Verdict, b: Verdict) -> Iterator[str]:
    """Say why dividing two speed-ups over eager float may mislead: their float models were not timed alike."""
    first, second = a.latency, b.latency
    if (first.eager.name, first.threads) != (second.eager.name, second.threads):
        told = f"{first.eager.name} with {first.threads} threads, and {second.eager.name} with {second.threads}"
        yield f"the speed-ups are over different things: {told}; {REMEDY}"
    medians = sorted((first.eager.timing.median_ms, second.eager.timing.median_ms))
    if medians[1] > MOST_APART * medians[0]:
        yield f"the eager float model took {medians[0]:.2f} ms in one and {medians[1]:.2f} ms in the other; {REMEDY}"
    for name, latency_ in (("A", first), ("B", second)):
        if any(one.kind == "other load" for one in latency_.suspicions):
            yield f"{name} was timed beside other load; {REMEDY}"


def _name(verdict: Verdict) -> str:
    return f"{verdict.recipe} {verdict.version} {verdict.target} {verdict.precision}"


def _bytes(verdict: Verdict) -> int | None:
    footprint = verdict.latency.artifact.footprint
    return footprint.file_bytes if footprint else None
