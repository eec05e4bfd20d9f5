"""Commands about nights: run the matrix, look back, move the reference, and find whose fault a change is."""

# Each command imports what it runs when it runs: torch takes seconds, `--help` must not.
# ruff: noqa: PLC0415

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitferry.device.errors import InputError
from bitferry.pipeline import completion
from bitferry.pipeline.cli_words import Json

if TYPE_CHECKING:
    from bitferry.pipeline.measure.latency import Effort

commands = typer.Typer()

Nightly = Annotated[Path, typer.Option("--out", "-o", help="The folder of the history and the dashboard.")]


RecipePaths = Annotated[
    list[Path], typer.Argument(metavar="RECIPE...", help="The recipes to build.", autocompletion=completion.recipes)
]
TargetNames = Annotated[
    str,
    typer.Option(
        "--target",
        "-t",
        help="As openvino,onnxruntime; all takes those that are ready.",
        autocompletion=completion.target_names,
    ),
]
Precisions = Annotated[str, typer.Option(help="Those of these that a target runs; also auto.")]
BuildFolder = Annotated[Path, typer.Option("--build", help="Where stages keep their output.")]
Ray = Annotated[str | None, typer.Option(help="A Ray cluster's address, or auto; default: this machine.")]
Store = Annotated[
    str | None, typer.Option(help="Where nodes without a common disk exchange files: a folder's path, s3://…, …")
]
MaxAge = Annotated[float, typer.Option(min=0, help="Days after which an unchanged cell is measured again.")]
Remeasure = Annotated[bool, typer.Option("--remeasure", help="Measure unchanged cells as well.")]
New = Annotated[bool, typer.Option("--new", help="Begin a night even if the last one was stopped.")]
Minutes = Annotated[float | None, typer.Option(min=0, help="Of precision auto: how long to look for mixes.")]
Quick = Annotated[bool, typer.Option("--quick", help="Time each cell for a second and a half.")]
Thorough = Annotated[bool, typer.Option("--thorough", help="Time each cell for a minute.")]
Trust = Annotated[bool, typer.Option("--trust", help="Load .pt2 programs, which can run code.")]
KeepDays = Annotated[
    float,
    typer.Option(min=0, help="Days that answers and timed calls are kept, and unused files in the store; 0: all."),
]
Mlflow = Annotated[str | None, typer.Option(help="Log the night to this MLflow server, too.")]


@commands.command()
def matrix(
    recipes: RecipePaths,
    targets: TargetNames = "all",
    precisions: Precisions = "float32,bfloat16,int8",
    out: Nightly = Path("nightly"),
    build: BuildFolder = Path("build"),
    ray: Ray = None,
    store: Store = None,
    max_age: MaxAge = 7,
    remeasure: Remeasure = False,
    new: New = False,
    search_minutes: Minutes = None,
    quick: Quick = False,
    thorough: Thorough = False,
    trust: Trust = False,
    mlflow: Mlflow = None,
    keep_days: KeepDays = 90,
    json_: Json = False,
) -> None:
    """Measure every recipe on every target in every precision, and say what changed since the accepted nights.

    Unchanged cells are reused, a stopped night is gone on with. Exit codes: 0 nothing regressed, 1 something did,
    2 cannot run, 130 stopped.

    Example: bitferry matrix recipes/fashion-*.toml --target openvino,onnxruntime --precisions float32,int8,auto
    """
    if quick and thorough:
        raise InputError("--quick and --thorough exclude each other")
    from bitferry.pipeline.nightly.matrix import Asked
    from bitferry.pipeline.nightly.matrix import matrix as run
    from bitferry.pipeline.nightly.shown import show

    effort: Effort = "quick" if quick else "thorough" if thorough else "default"
    names, paths = _listed(precisions), tuple(recipes)
    age = 0 if remeasure else max_age
    night = run(
        Asked(paths, targets, names, out, build, ray, store, effort, search_minutes, age, new, trust, mlflow, keep_days)
    )
    show(night, as_json=json_)
    raise typer.Exit(130 if not night.finished else int(night.regressed))


def _listed(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


@commands.command()
def history(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A recipe's name.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="As openvino.")],
    precision: Annotated[str | None, typer.Option(help="Default: all of them.")] = None,
    last: Annotated[int, typer.Option(min=1, help="How many nights.")] = 30,
    out: Nightly = Path("nightly"),
    json_: Json = False,
) -> None:
    """Show how a model did on a target, night by night, and what changed between the nights.

    Example: bitferry history fashion-resnet18 openvino --precision int8
    """
    from bitferry.pipeline.nightly import told
    from bitferry.pipeline.nightly.history import History

    with History(out / "history.sqlite", read_only=True) as kept:
        told.show_history(kept, told.chosen(kept.cells(), model, target, precision), last, as_json=json_)


@commands.command()
def accept(
    cells: Annotated[list[str], typer.Argument(metavar="CELL...", help="As RECIPE/TARGET/PRECISION, or all.")],
    why: Annotated[str, typer.Option(help="For whoever asks later.")],
    night: Annotated[str | None, typer.Option(help="Default: the last finished one.")] = None,
    out: Nightly = Path("nightly"),
) -> None:
    """Compare later nights of these cells with this one: a change was looked at and is wanted.

    Example: bitferry accept fashion-resnet18/openvino/int8 --why "OpenVINO 2026.5 is 4 % slower, and needed"
    """
    from bitferry.pipeline.nightly.accept import accept as accept_

    for line in accept_(out, cells, night, why):
        typer.echo(line)


@commands.command()
def bisect(
    cell: Annotated[str, typer.Argument(metavar="CELL", help="As RECIPE/TARGET/PRECISION.")],
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Its recipe's file.")],
    night: Annotated[str | None, typer.Option(help="The night to blame; default: the last.")] = None,
    good: Annotated[str | None, typer.Option(help="The night that was right; default: the accepted one.")] = None,
    out: Nightly = Path("nightly"),
    build: Annotated[Path, typer.Option("--build", help="Where stages keep their output.")] = Path("build"),
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Install the older packages without asking.")] = False,
    trust: Annotated[bool, typer.Option("--trust", help="Load a .pt2 program, which can run code.")] = False,
    json_: Json = False,
) -> None:
    """Rebuild a cell with an earlier night's packages, to tell a package's fault from ours, and name the package.

    The older packages are installed into the build folder, for this alone, after asking.

    Example: bitferry bisect fashion-resnet18/openvino/int8 recipes/fashion-resnet18.toml
    """
    from bitferry.pipeline.nightly import bisect as bisect_

    found = bisect_.bisect(cell, recipe, out, build, bad=night, good=good, trust=trust, agreed=yes or _agree)
    typer.echo(json.dumps(bisect_.fields(found), indent=2) if json_ else bisect_.text(found))


def _agree(packages: list[str]) -> bool:
    return typer.confirm(f"install {', '.join(packages)} into the build folder?", err=True)
