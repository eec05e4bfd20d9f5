"""Options and arguments that several commands share, each with its help and what completes it."""

import json
from pathlib import Path
from typing import Annotated

import typer

from bitferry.pipeline import completion

RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="The recipe to build.", autocompletion=completion.recipes)
]
TargetNames = Annotated[
    str | None,
    typer.Option(
        "--target",
        "-t",
        help="As openvino,onnxruntime, or all. Default: the recipe's.",
        autocompletion=completion.target_names,
    ),
]
BuildFolder = Annotated[Path, typer.Option("--build", help="Where stages keep their output.")]
OutFolder = Annotated[Path, typer.Option("--out", "-o", help="Where bundles are written.")]
Quick = Annotated[bool, typer.Option("--quick", help="Time for a second and a half; no throughput.")]
Thorough = Annotated[bool, typer.Option("--thorough", help="Time for a minute, enough for a 99th percentile.")]
Trust = Annotated[bool, typer.Option("--trust", help="Load a .pt2 program, which can run code.")]
AllowUnmeasured = Annotated[
    bool, typer.Option("--allow-unmeasured", help="Exit 0 also where this machine builds a target and cannot run it.")
]
Minutes = Annotated[
    float | None, typer.Option("--search-minutes", min=0, help="Of precision auto: how long to look for mixes.")
]
Host = Annotated[
    str | None, typer.Option(help="For a bundle: verify it there, over ssh, as user@device; needs Python 3.11.")
]
Ssh = Annotated[str, typer.Option(help="With --host: how to call ssh, as 'ssh -p 2222 -i key'.")]
PythonThere = Annotated[str, typer.Option("--python", help="With --host: the Python there that has the runtime.")]
PrecisionName = Annotated[
    str | None, typer.Option(help="Instead of the recipe's: auto, int8, …", autocompletion=completion.precisions)
]


Subject = Annotated[
    Path, typer.Argument(metavar="RECIPE|BUNDLE", help="What to verify.", autocompletion=completion.recipes)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


class Said:
    """What was said beside a command, and holds for any."""

    debug = False
    download = False
    """A library may fetch data and weights that a recipe names and that are not there."""


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version  # noqa: PLC0415 - for this alone

        typer.echo(f"bitferry {version('bitferry')}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)]


def print_paths(paths: dict[str, Path], as_json: bool) -> None:
    """Print where each target's file is."""
    if as_json:
        typer.echo(json.dumps({name: str(path) for name, path in paths.items()}))
    else:
        for name, path in paths.items():
            typer.echo(f"{name}\t{path}")
