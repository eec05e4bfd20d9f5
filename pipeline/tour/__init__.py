"""`bitferry quickstart`: the whole path on embedded images, a stage at a time, each with what it does and why."""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from bitferry.device.errors import InputError, StageFailed
from bitferry.pipeline import memory, progress, recipe
from bitferry.pipeline.artifacts import Bundle, Quantized, Unmeasured, Verified
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.report import terminal
from bitferry.pipeline.run import Deployment, Run
from bitferry.pipeline.tour import project, words
from bitferry.pipeline.verdict import Verdict


@dataclass(frozen=True)
class Step:
    """One stage of the tour."""

    name: str
    why: str
    do: Callable[[Deployment], Path]
    command: str
    """What does it alone."""


@dataclass(frozen=True)
class Toured:
    """What the tour made."""

    result: Bundle | Verified | Unmeasured
    seconds: dict[str, float]
    """By step."""
    written: dict[str, str]
    """By step."""
    answer: str | None
    """What the bundle's own program said of one image; None where there is no bundle."""


def _data(way: Deployment) -> Path:
    way.run.check_data()
    return way.run.build.root


def _program(way: Deployment) -> Path:
    if not isinstance(way.program, Quantized):
        raise InputError(f"target '{way.name}' has no int8 to show; name another with --target")
    return way.program.path


def _report(way: Deployment) -> Path:
    found = way.verified
    return way.run.build.root / "reports" / f"{found.verdict.target}-{found.verdict.precision}" / "report.html"


STEPS = (
    Step("data", words.DATA, _data, ""),
    Step("train", words.TRAIN, lambda way: way.run.weights.path, "bitferry train {recipe} --build {build}"),
    Step("quantize", words.QUANTIZE, _program, "bitferry quantize {recipe} {rest}"),
    Step("trace", words.TRACE, lambda way: way.traced.path, "bitferry trace {recipe} {rest}"),
    Step("export", words.EXPORT, lambda way: way.simplified.path, "bitferry export {recipe} {rest}"),
    Step("compile", words.COMPILE, lambda way: way.compiled.path, "bitferry compile {recipe} {rest}"),
    Step("verify", words.VERIFY, _report, "bitferry verify {recipe} {rest} --quick"),
)


def tour(folder: Path, target: str, *, explain: bool, pause: Callable[[], None]) -> Toured:
    """Take a small model from training to a verified bundle in `folder`, and ask the bundle about an image.

    Every stage's output is kept there: a tour that was stopped is gone on with. With `explain`, say what happens.
    """
    console = progress.console if explain else Console(quiet=True)
    path = project.write(folder, target)
    memory.keep_freed()
    run = Run(recipe.read(path), path, Cache(folder / "build" / project.NAME), effort="quick")
    way = Deployment(run, target, "int8")
    rest = f"--target {target} --build {folder / 'build'}"
    console.print(Markdown(words.BEGIN.format(recipe=path, folder=folder, target=target)))
    seconds: dict[str, float] = {}
    written: dict[str, str] = {}
    for number, step in enumerate(STEPS, start=1):
        pause()
        _title(console, number, step)
        start = time.perf_counter()
        written[step.name] = str(step.do(way))
        seconds[step.name] = round(time.perf_counter() - start, 3)
        command = step.command.format(recipe=path, build=folder / "build", rest=rest)
        _done(console, seconds[step.name], written[step.name], command)
    return _ended(console, way, folder, seconds, written)


def _ended(
    console: Console, way: Deployment, folder: Path, seconds: dict[str, float], written: dict[str, str]
) -> Toured:
    """Explain the verdict, bundle what passed, and let it answer."""
    verdict = way.verified.verdict
    if isinstance(verdict, Verdict):
        console.print(Markdown(words.figures(verdict)))
    start = time.perf_counter()
    result = way.ship(folder / "dist")
    seconds["bundle"] = round(time.perf_counter() - start, 3)
    answer = None
    if isinstance(result, Bundle):
        written["bundle"] = str(result.path)
        console.print(Markdown(words.BUNDLE))
        command = "bitferry deploy {} --target {} --build {} --out {} --quick".format(
            way.run.path, way.name, folder / "build", folder / "dist"
        )
        _done(console, seconds["bundle"], str(result.path), command)
        answer = _asked(result, folder) if isinstance(verdict, Verdict) else None
        shown = f"python {result.path / 'run.pyz'} predict {folder / project.PHOTO}"
        console.print(Markdown(words.ANSWER.format(command=shown, answer=answer, truth=project.TRUTH)))
    console.print(Markdown(words.NEXT.format(seconds=sum(seconds.values()), recipe=way.run.path, folder=folder)))
    return Toured(result, seconds, written, answer)


def _asked(result: Bundle, folder: Path) -> str:
    """Give what the bundle's own program says of an image, in a process without bitferry's pipeline."""
    command = [sys.executable, str(result.path / "run.pyz"), "predict", str(folder / project.PHOTO)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise StageFailed(f"the bundle does not answer: {done.stderr.strip()}")
    return done.stdout.strip()


def _title(console: Console, number: int, step: Step) -> None:
    console.print()
    console.rule(f"[bold]{number} of {len(STEPS) + 1}: {step.name}[/]", align="left")
    console.print(Markdown(step.why))


def _done(console: Console, seconds: float, written: str, command: str) -> None:
    console.print(f"[green]done[/] in {seconds:.1f} s: {written}", soft_wrap=True)
    if command:
        console.print(f"  alone: [bold]{command}[/]", soft_wrap=True, highlight=False)


def show(done: Toured, *, as_json: bool) -> int:
    """Print the verdict and where the bundle is; give the exit code."""
    if as_json:
        terminal.show_json([done.result], seconds=done.seconds, written=done.written, answer=done.answer)
    else:
        terminal.show([done.result], as_json=False)
        if done.answer is not None:
            print(done.answer)
    return terminal.exit_code([done.result])
