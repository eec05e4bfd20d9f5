"""A cell that became worse, rebuilt with an earlier night's packages: whose fault is it, a package's or ours?"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal

from bitferry.device.errors import InputError, StageFailed
from bitferry.pipeline import progress
from bitferry.pipeline.cache import own
from bitferry.pipeline.nightly import inputs, perform
from bitferry.pipeline.nightly.accept import HISTORY
from bitferry.pipeline.nightly.changes import changed
from bitferry.pipeline.nightly.history import History
from bitferry.pipeline.nightly.night import Cell, Result, disturbed
from bitferry.pipeline.nightly.work import TRIALS
from bitferry.pipeline.recipe import read
from bitferry.pipeline.report import record
from bitferry.pipeline.verdict import Built
from bitferry.pipeline.verdict import Verdict as Measured

Verdict = Literal["good", "bad", "unsure", "does not run"]
"""unsure: other processes were busy whenever it was timed."""
FIGURES = ("accuracy", "float accuracy", "latency", "size", "memory")
"""Kinds of findings that have a figure, the surest first."""
Fault = Literal["package", "ours", "gone", "unclear"]
TIMED = {"latency", "memory"}


@dataclass(frozen=True)
class Trial:
    """The cell rebuilt with some of the packages as they were."""

    packages: tuple[str, ...]
    """As in `pillow==12.0.0`; none: as they are installed here."""
    verdict: Verdict
    told: str
    """What came of it."""


@dataclass(frozen=True)
class Blame:
    """Whose fault it is."""

    cell: str
    good: str
    bad: str
    """The nights."""
    fault: Fault
    """gone: today the cell is as it was; unclear: it cannot be told, and the sentence says why."""
    sentence: str
    packages: tuple[str, ...]
    """The fewest that, as they were, make it good again."""
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class Case:
    """Two nights of a cell, and what is needed to try it again."""

    cell: Cell
    recipe: Path
    build: Path
    good: tuple[str, Result]
    bad: tuple[str, Result]
    kinds: frozenset[str]
    """Of the findings that are asked about."""
    trust: bool

    @property
    def older(self) -> dict[str, str]:
        """Give the packages that can matter and differ, as they were in the good night."""
        was, now = self.good[1].inputs.packages, inputs.installed()
        return {name: was[name] for name in sorted(self._used & was.keys()) if was[name] != now.get(name)}

    @property
    def added(self) -> list[str]:
        """Give the packages that can matter and were not there in the good night; nothing takes them away."""
        return sorted(self._used & (inputs.installed().keys() - self.good[1].inputs.packages.keys()))

    @property
    def _used(self) -> set[str]:
        return inputs.used(self.cell, self.good[1].inputs) | inputs.used(self.cell, self.bad[1].inputs)


def bisect(  # noqa: PLR0913
    name: str, recipe: Path, out: Path, build: Path, *, bad: str | None, good: str | None, trust: bool,
    agreed: bool | Callable[[list[str]], bool],
) -> Blame:  # fmt: skip
    """Try the cell with today's packages, with all of the good night's, then with ever fewer of them.

    `agreed` says, or is asked, whether they may be installed. Raises InputError for nights and cells that are not
    there, and where nothing was found to be worse.
    """
    case = _case(Cell.parse(name), recipe, out, build, bad, good, trust)
    older = case.older
    if not older:
        return _ours(case, (), "no package that the cell depends on differs from that night's")
    if not (agreed if isinstance(agreed, bool) else agreed([*_pins(older)])):
        raise InputError("nothing was installed, so nothing was tried; --yes agrees beforehand")
    today = _tried(case, {})
    if today.verdict != "bad":
        told = f"today the cell is as it was on {case.good[0]}: what made it worse on {case.bad[0]} is gone"
        fault: Fault = "gone" if today.verdict == "good" else "unclear"
        return _blame(case, fault, told if fault == "gone" else today.told, (today,))
    trials = [today, _tried(case, older)]
    whole = trials[-1]
    if whole.verdict == "bad":
        return _ours(case, tuple(trials), f"with all {len(older)} packages as they were it is as bad")
    if whole.verdict != "good":
        return _blame(case, "unclear", f"with the packages of {case.good[0]}: {whole.told}", tuple(trials))
    fewest = fewest_that(older, lambda some: _good(case, some, trials))
    now = inputs.installed()
    changes = ", ".join(f"{one} {version} → {now.get(one, 'none')}" for one, version in fewest.items())
    told = f"it is {changes}: with {'that' if len(fewest) == 1 else 'those'} as before the cell is as on {case.good[0]}"
    return _blame(case, "package", told, tuple(trials), _pins(fewest))


def _blame(case: Case, fault: Fault, sentence: str, trials: tuple[Trial, ...], packages: tuple[str, ...] = ()) -> Blame:
    return Blame(case.cell.name, case.good[0], case.bad[0], fault, sentence, packages, trials)


def fewest_that(all_of: Mapping[str, str], good: Callable[[Mapping[str, str]], bool]) -> dict[str, str]:
    """Find a smallest part that is still good, of which nothing can be left out (delta debugging, Zeller 1999).

    The whole is known to be good. Takes about 2·log₂ n trials where one package is to blame.
    """
    rest, parts = dict(all_of), 2
    while len(rest) > 1:
        names, size = [*rest], -(-len(rest) // parts)
        chunks = [names[at : at + size] for at in range(0, len(names), size)]
        others = [[name for name in names if name not in chunk] for chunk in chunks] if parts > 2 else []
        smaller = next((some for some in [*chunks, *others] if some and good({one: rest[one] for one in some})), None)
        if smaller is not None:
            rest, parts = {one: rest[one] for one in smaller}, max(2, parts - 1 if smaller in others else 2)
        elif parts >= len(rest):
            break
        else:
            parts = min(len(rest), 2 * parts)
    return rest


def text(found: Blame) -> str:
    """Say it in words, trial by trial."""
    lines = [f"  {one.verdict:<12} {', '.join(one.packages) or 'as installed'}: {one.told}" for one in found.trials]
    return "\n".join([f"{found.cell}: {found.sentence}", *lines])


def fields(found: Blame) -> dict[str, object]:
    """Give it as what JSON can hold."""
    return asdict(found)


def _case(cell: Cell, recipe: Path, out: Path, build: Path, bad: str | None, good: str | None, trust: bool) -> Case:
    if read(recipe).name != cell.recipe:
        raise InputError(f"{recipe} is the recipe '{read(recipe).name}'; the cell is of '{cell.recipe}'")
    with History(out / HISTORY, read_only=True) as history:
        nights = history.nights(finished=True)
        last = bad or (nights[-1] if nights else "")
        now = history.result(last, cell) if last in nights else None
        first = good or history.reference(cell)
        then = history.result(first, cell) if first in nights else None
        if now is None or then is None or first is None:
            lacking = last if now is None else first
            raise InputError(f"{cell.name} has no result in the night '{lacking}' of {out / HISTORY}")
        found = [one for one in history.night(last).findings if one.cell == cell and one.severity == "regression"]
    if not found:
        raise InputError(f"in the night {last} nothing was found to be worse about {cell.name}")
    kinds = frozenset(one.kind for one in found)
    here = perform.probe().kind
    if kinds <= TIMED and here != now.kind:
        raise InputError(
            f"{last} was measured on {now.kind}, and this is {here}: a latency is compared on one kind only"
        )
    if here != now.kind:
        kinds -= TIMED
    return Case(cell, recipe.resolve(), build.resolve(), (first, then), (last, now), kinds, trust)


def _ours(case: Case, trials: tuple[Trial, ...], why: str) -> Blame:
    """Say that no package is to blame, and what else changed."""
    then, now = case.good[1].inputs, case.bad[1].inputs
    others = changed(then, replace(now, packages=then.packages))
    rest = "; ".join(others) or "nothing else that is recorded"
    if case.added:
        told = f"{why}; but {', '.join(case.added)} came since {case.good[0]}, and cannot be taken away here"
        return _blame(case, "unclear", f"{told}. What else changed: {rest}", trials)
    return _blame(case, "ours", f"no package's fault: {why}. What else changed since {case.good[0]}: {rest}", trials)


def _good(case: Case, some: Mapping[str, str], trials: list[Trial]) -> bool:
    trials.append(_tried(case, some))
    return trials[-1].verdict == "good"


def _pins(packages: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(f"{name}=={version}" for name, version in packages.items())


def _tried(case: Case, packages: Mapping[str, str]) -> Trial:
    """Build and verify the cell in a process of its own, with some packages as they were."""
    pins = _pins(packages)
    progress.stage("bisect", f"{case.cell.name} with {', '.join(pins) or 'the packages as installed'}")
    try:
        overlay = _overlay(case.build, pins)
        timed = bool(TIMED & case.kinds)
        for _ in range(TRIALS if timed else 1):
            result = _verified(case, overlay)
            if not (timed and disturbed(result)):
                break
    except StageFailed as error:
        bad = "failure" in case.kinds and not packages
        return Trial(pins, "bad" if bad else "does not run", str(error))
    if timed and disturbed(result):
        return Trial(pins, "unsure", "other processes were busy whenever it was timed; try again when it is quiet")
    return Trial(pins, *_judged(case, result))


def _judged(case: Case, found: Built) -> tuple[Verdict, str]:
    """Say whether the cell is nearer to the good night or to the bad one, in the surest figure that was worse."""
    kind = next((one for one in FIGURES if one in case.kinds), None)
    if kind is None:  # another verdict, or none at all in the bad night
        good, bad = (result.verdict.outcome if result.verdict else None for _, result in (case.good, case.bad))
        return "good" if found.outcome == good or found.outcome != bad else "bad", found.headline
    good_figure, bad_figure, now = (
        _figure(one, kind) for one in (case.good[1].verdict, case.bad[1].verdict, found)
    )  # fmt: skip
    if good_figure is None or bad_figure is None or now is None:
        return "unsure", f"{kind} was not measured in one of them"
    told = f"{kind} {now:.4g}; {good_figure:.4g} on {case.good[0]}, {bad_figure:.4g} on {case.bad[0]}"
    return "good" if abs(now - good_figure) < abs(now - bad_figure) else "bad", told


def _figure(verdict: Built | None, kind: str) -> float | None:
    """Give the figure that findings of a kind are about."""
    if not isinstance(verdict, Measured):
        return None
    speedup, footprint = verdict.latency.runtime_speedup or verdict.latency.speedup, verdict.latency.artifact.footprint
    memory = footprint.peak_memory_bytes - footprint.base_memory_bytes if footprint else None
    judged = verdict.accuracy.judged
    return {
        "accuracy": judged.percent,
        "float accuracy": judged.float_percent,
        "latency": 1 / speedup.value,
        "size": footprint.file_bytes if footprint else None,
        "memory": memory,
    }[kind]


def _overlay(build: Path, pins: Sequence[str]) -> Path | None:
    """Install packages into a folder of their own, without what they need; it goes before the installed ones."""
    if not pins:
        return None
    folder = build / "bisect" / sha256("\n".join(pins).encode()).hexdigest()[:16]
    if folder.exists():
        return folder
    own(folder.parent)
    part = folder.with_name(f".{folder.name}")
    shutil.rmtree(part, ignore_errors=True)
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    tool = [uv, "pip", "install", "--python", sys.executable] if uv else [sys.executable, "-m", "pip", "install"]
    done = subprocess.run(
        [*tool, "--quiet", "--no-deps", "--target", part, *pins], capture_output=True, text=True, check=False
    )  # fmt: skip
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise StageFailed(f"{', '.join(pins)} cannot be installed: {last}")
    part.rename(folder)
    return folder


def _verified(case: Case, overlay: Path | None) -> Built:
    """Run `bitferry verify`; raise StageFailed with its last line when it gives no verdict."""
    words = ["verify", str(case.recipe), "--target", case.cell.target, "--precision", case.cell.precision]
    words += ["--build", str(case.build), "--json", *(["--trust"] if case.trust else [])]
    paths = [str(overlay)] if overlay else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])}
    done = subprocess.run(
        [sys.executable, "-P", "-c", "from bitferry.pipeline.cli import main; main()", *words],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    try:
        told = json.loads(done.stdout)[0]
    except (ValueError, IndexError, KeyError):
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise StageFailed(last.removeprefix("error: ")) from None
    folder = case.build / case.cell.recipe / "reports" / f"{told['target']}-{told['precision']}"
    return record.read_built(folder / record.VERDICT)
