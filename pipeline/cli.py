"""The `bitferry` command: reads arguments, calls one function, prints its value. No logic."""

# Each command imports what it runs when it runs: torch takes seconds, `--help` must not.
# ruff: noqa: PLC0415

import re
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitferry.device.errors import BitferryError, InputError, StageFailed
from bitferry.pipeline import cli_nightly, cli_ship, cli_train, completion, failing, interrupt, pages
from bitferry.pipeline.cli_more import commands
from bitferry.pipeline.cli_train import Processes
from bitferry.pipeline.cli_words import (
    AllowUnmeasured,
    BuildFolder,
    Host,
    Json,
    Minutes,
    OutFolder,
    PrecisionName,
    PythonThere,
    Quick,
    RecipePath,
    Said,
    Ssh,
    Subject,
    TargetNames,
    Thorough,
    Trust,
    Version,
    print_paths,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from bitferry.pipeline.measure.latency import Effort
    from bitferry.pipeline.recipe import Recipe
    from bitferry.pipeline.run import Deployment, Run

DEFAULT_RECIPE = Path("recipes/fashion-resnet18.toml")

app = typer.Typer(
    help="Take PyTorch vision models to edge devices as 8-bit, and prove what is shipped.\n\n"
    "Exit codes: 0 inside the budget, 1 missed, undecided or unmeasured, 2 cannot run, be it one of several targets.",
    epilog="Example: bitferry deploy recipes/fashion-resnet18.toml --target openvino",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback()
def options(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but the result and errors.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    download: Annotated[bool, typer.Option("--download", help="Let libraries fetch data and weights named.")] = False,
    version: Version = False,
) -> None:
    from bitferry.pipeline import progress

    progress.console.quiet = quiet
    Said.debug, Said.download = debug, download


def _run(recipe: "Recipe", path: Path, build: Path, trust: bool, effort: "Effort" = "default") -> "Run":
    from bitferry.pipeline import memory
    from bitferry.pipeline.cache import Cache
    from bitferry.pipeline.run import Run

    memory.keep_freed()
    return Run(recipe, path, Cache(build / recipe.name), trust, effort, download=Said.download)


def _each(
    recipe: Path,
    names: str | None,
    build: Path,
    trust: bool,
    precision: str | None,
    made: "Callable[[Deployment], Path]",
    as_json: bool,
) -> None:
    """Print a path for each target; where the precision is left open, of its int8, or the first it has."""
    from bitferry import targets
    from bitferry.pipeline.asked import asked

    read, chosen = asked(recipe, names, precision=precision)  # faults in these are told before torch is imported
    from bitferry.pipeline.deploy import each
    from bitferry.pipeline.run import Deployment
    from bitferry.pipeline.verdict import Failed

    run = _run(read, recipe, build, trust)
    firsts = {name: next(iter(targets.get(name).SCHEMES)) for name in chosen}
    ways = {n: Deployment(run, n, firsts[n] if read.precision == "auto" else read.precision) for n in chosen}
    found = each(run, chosen, lambda name: made(ways[name]))
    print_paths({name: path for name, path in zip(chosen, found, strict=True) if isinstance(path, Path)}, as_json)
    for one in (one for one in found if isinstance(one, Failed)):
        typer.echo(f"error: {one.target}: {one.error}", err=True)
    if any(isinstance(one, Failed) for one in found):
        raise typer.Exit(2)


def _effort(quick: bool, thorough: bool) -> "Effort":
    if quick and thorough:
        raise InputError("--quick and --thorough exclude each other")
    return "quick" if quick else "thorough" if thorough else "default"


@app.command()
def deploy(
    recipe: RecipePath = DEFAULT_RECIPE,
    target: TargetNames = None,
    out: OutFolder = Path("dist"),
    build: BuildFolder = Path("build"),
    precision: PrecisionName = None,
    search_minutes: Minutes = None,
    trust: Trust = False,
    quick: Quick = False,
    thorough: Thorough = False,
    allow_unmeasured: AllowUnmeasured = False,
    processes: Processes = 1,
    json_: Json = False,
) -> None:
    """Build, verify and bundle for every target named.

    Example: bitferry deploy recipes/fashion-resnet18.toml --target openvino
    """
    from bitferry.pipeline.asked import asked
    from bitferry.pipeline.bundle import check_output

    chosen, names = asked(recipe, target, precision=precision, minutes=search_minutes)
    check_output(chosen, names, out)  # these faults are told before torch is imported
    from bitferry.pipeline.deploy import deploy as deploy_
    from bitferry.pipeline.report import terminal

    run = _run(chosen, recipe, build, trust, _effort(quick, thorough))
    results = deploy_(replace(run, processes=processes), names, out)
    terminal.show(results, as_json=json_)
    raise typer.Exit(terminal.exit_code(results, allow_unmeasured=allow_unmeasured))


app.command()(cli_train.train)


@app.command()
def quantize(
    recipe: RecipePath = DEFAULT_RECIPE,
    target: TargetNames = None,
    build: BuildFolder = Path("build"),
    trust: Trust = False,
    json_: Json = False,
) -> None:
    """Quantize to int8, in PyTorch or of a given ONNX file, once for each different scheme of the targets.

    Example: bitferry quantize recipes/fashion-resnet18.toml --target openvino
    """
    _each(recipe, target, build, trust, "int8", lambda one: one.quantized.path, json_)


@app.command()
def trace(
    recipe: RecipePath = DEFAULT_RECIPE,
    target: TargetNames = None,
    build: BuildFolder = Path("build"),
    precision: PrecisionName = None,
    trust: Trust = False,
    json_: Json = False,
) -> None:
    """Trace to TorchScript and compare with PyTorch.

    Example: bitferry trace recipes/fashion-resnet18.toml --target openvino
    """
    _each(recipe, target, build, trust, precision, lambda one: one.traced.path, json_)


@app.command()
def export(
    recipe: RecipePath = DEFAULT_RECIPE,
    target: TargetNames = None,
    build: BuildFolder = Path("build"),
    precision: PrecisionName = None,
    trust: Trust = False,
    json_: Json = False,
) -> None:
    """Export to ONNX, simplify, and compare with PyTorch; a given ONNX file is simplified, or quantized.

    Example: bitferry export recipes/fashion-resnet18.toml --target openvino
    """
    _each(recipe, target, build, trust, precision, lambda one: one.simplified.path, json_)


@app.command(name="compile")
def compile_(
    recipe: RecipePath = DEFAULT_RECIPE,
    target: TargetNames = None,
    build: BuildFolder = Path("build"),
    precision: PrecisionName = None,
    trust: Trust = False,
    json_: Json = False,
) -> None:
    """Compile for each target.

    Example: bitferry compile recipes/fashion-resnet18.toml --target openvino,onnxruntime
    """
    _each(recipe, target, build, trust, precision, lambda one: one.compiled.path, json_)


@app.command()
def verify(
    subject: Subject = DEFAULT_RECIPE,
    target: TargetNames = None,
    build: BuildFolder = Path("build"),
    precision: PrecisionName = None,
    search_minutes: Minutes = None,
    trust: Trust = False,
    quick: Quick = False,
    thorough: Thorough = False,
    data: Annotated[
        Path | None, typer.Option(help="For a bundle: labelled images, as in a recipe, to measure its accuracy on.")
    ] = None,
    host: Host = None,
    ssh: Ssh = "ssh",
    python: PythonThere = "python3",
    allow_unmeasured: AllowUnmeasured = False,
    json_: Json = False,
) -> None:
    """Measure accuracy and latency of each target against the float model; or prove a bundle anew on this machine.

    Example: bitferry verify recipes/fashion-resnet18.toml --target openvino --thorough
    """
    effort = _effort(quick, thorough)
    if subject.is_dir():
        if target or precision or allow_unmeasured:
            raise InputError(f"{subject} is a bundle; leave out --target, --precision and --allow-unmeasured")
        raise typer.Exit(cli_ship.verify(subject, data, effort, (host, ssh, python), as_json=json_))
    if data is not None or host is not None:
        raise InputError(f"--{'host' if data is None else 'data'} is for a bundle; a recipe names its own data")
    from bitferry.pipeline.asked import asked

    recipe, names = asked(subject, target, precision=precision, minutes=search_minutes)
    from bitferry.pipeline.deploy import verify as verify_
    from bitferry.pipeline.report import terminal

    results = verify_(_run(recipe, subject, build, trust, effort), names)
    terminal.show(results, as_json=json_)
    raise typer.Exit(terminal.exit_code(results, allow_unmeasured=allow_unmeasured))


app.command(name="bundle")(deploy)


app.command()(cli_train.tune)
app.add_typer(commands)
app.add_typer(cli_ship.commands)
app.add_typer(cli_nightly.commands)


def _fail(error: Exception, cause: Exception | None = None) -> None:
    if Said.debug:
        traceback.print_exception(cause or error)
    typer.echo(f"error: {pages.told(error)}", err=True)
    sys.exit(2)


def main() -> None:
    """Run the command line; --quiet, --debug and --download may stand anywhere, and --targets is --target."""
    interrupt.end_on_interrupt()
    completion.prepare()
    anywhere = [a for a in sys.argv[1:] if a in ("--quiet", "-q", "--debug", "--download")]
    others = [re.sub(r"^--targets(?==|$)", "--target", a) for a in sys.argv[1:] if a not in anywhere]
    try:
        app([*anywhere, *others])
    except (BitferryError, OSError) as error:  # OSError: a full disk, a folder that may not be read
        if not interrupt.ending():  # Ctrl-C reaches what was started, too
            _fail(error)
    except Exception as error:  # noqa: BLE001 - 1, which Python would end with, says that a budget was missed
        if not interrupt.ending():
            _fail(
                StageFailed(f"{failing.told(error)}; bitferry did not expect this: --debug shows the traceback"), error
            )
    finally:
        if interrupt.ending():
            interrupt.leave()


if __name__ == "__main__":
    main()
