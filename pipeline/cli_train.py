"""Commands that learn: train the recipe's model, and search for the settings that train it best."""

# Each command imports what it runs when it runs: torch takes seconds, `--help` must not.
# ruff: noqa: PLC0415

import json
from pathlib import Path
from typing import Annotated

import typer

from bitferry.pipeline.cli_words import BuildFolder, Json, RecipePath, Said

DEFAULT_RECIPE = Path("recipes/fashion-resnet18.toml")
Processes = Annotated[
    int, typer.Option(min=1, help="Train on so many processes, each with its share of every batch; a GPU each.")
]


def train(
    recipe: RecipePath = DEFAULT_RECIPE,
    build: BuildFolder = Path("build"),
    processes: Processes = 1,
    json_: Json = False,
) -> None:
    """Train or fine-tune the recipe's model on its training images; killed, it goes on where it was.

    Example: bitferry train recipes/fashion-resnet18.toml --processes 2
    """
    from bitferry.pipeline import memory
    from bitferry.pipeline.cache import Cache
    from bitferry.pipeline.recipe import read
    from bitferry.pipeline.run import Run

    asked = read(recipe)
    memory.keep_freed()
    made = Run(asked, recipe, Cache(build / asked.name), processes=processes, download=Said.download)
    path = str(made.weights.path)
    typer.echo(json.dumps({"weights": path}) if json_ else f"weights\t{path}")


def tune(
    recipe: RecipePath = DEFAULT_RECIPE,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the recipe with the best settings, beside it.")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="How many settings to try, the recipe's own first.")] = 16,
    minutes: Annotated[float | None, typer.Option(min=0, help="End after so long with the best so far.")] = None,
    space: Annotated[
        list[str] | None,
        typer.Option(help="KEY=LOW..HIGH or KEY=A,B,… of [training]; may be given several times."),
    ] = None,
    build: BuildFolder = Path("build"),
    json_: Json = False,
) -> None:
    """Search for the training settings that validate best, on training images held out; killed, it goes on.

    Needs Ray Tune: pip install 'bitferry[tune]'. What trains badly is ended early. The evaluation images are not
    looked at.

    Example: bitferry tune recipes/fashion-resnet18.toml --trials 12 --space learning_rate=1e-4..1e-2 -o tuned.toml
    """
    from bitferry.pipeline.tune import Wanted
    from bitferry.pipeline.tune import tune as tune_

    found = tune_(recipe, Wanted(trials, minutes, tuple(space or ())), output, build=build, download=Said.download)
    typer.echo(found.json() if json_ else found.text())
