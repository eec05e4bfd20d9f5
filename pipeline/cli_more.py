"""Commands that build nothing: answer with a bundle, compare two, list the targets, write a first recipe."""

# Each command imports what it runs when it runs: torch takes seconds, `--help` must not.
# ruff: noqa: PLC0415

import json
from pathlib import Path
from typing import Annotated

import typer

from bitferry.pipeline import completion as completed
from bitferry.pipeline.cli_words import Json

commands = typer.Typer()


@commands.command()
def predict(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.", autocompletion=completed.bundles)
    ],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    top: Annotated[int, typer.Option(help="How many classes to print.", min=1)] = 3,
    out: Annotated[Path | None, typer.Option(help="Segmentation: a folder to write masks to.")] = None,
    json_: Json = False,
) -> None:
    """Answer for image files with a bundle, as its own run.pyz does.

    Example: bitferry predict dist/fashion-resnet18-openvino-1.0.0 photo.png
    """
    from bitferry import targets as registry
    from bitferry.device import runner

    loaded = runner.Runner(bundle, registry.get(runner.read_manifest(bundle)["target"]))
    for answer in loaded.answers(images, top=top, out=out):
        typer.echo(json.dumps(runner.fields(answer)) if json_ else runner.text(answer))


@commands.command()
def targets(json_: Json = False) -> None:
    """List every target in short: ready on this machine or not, its version, its precisions and what is missing.

    Example: bitferry targets
    """
    from bitferry.device.errors import TargetUnavailable
    from bitferry.pipeline import doctor as examined
    from bitferry.pipeline.report import doctor as report

    try:
        found = examined.states()
    except ImportError as error:
        raise TargetUnavailable(f"bitferry cannot be loaded: {error}; `bitferry doctor` says what helps") from error
    report.show_targets(found, as_json=json_)


@commands.command()
def doctor(
    build: Annotated[Path, typer.Option("--build", help="Where stages would keep their output.")] = Path("build"),
    json_: Json = False,
) -> None:
    """Examine this machine: packages, CPU, GPU, settings that disturb timings, and every target.

    Installs nothing: says what would stop a deployment, and the command that helps. Exit code 2 where none can run.

    Example: bitferry doctor
    """
    from bitferry.pipeline import doctor as examined
    from bitferry.pipeline.report import doctor as report

    found = examined.examine(build)
    report.show(found, as_json=json_)
    raise typer.Exit(0 if found.able else 2)


@commands.command()
def init(
    model: Annotated[Path, typer.Argument(help="A state dict (.pt, .pth, .safetensors), an .onnx or a .pt2 file.")],
    images: Annotated[
        Path, typer.Argument(help="One folder per class, train/ and val/, images/ and masks/, a list, or an .npz.")
    ],
    source: Annotated[
        str | None,
        typer.Option(help="torchvision:NAME, timm:NAME or module:package.file:factory. Default: guessed."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The recipe to write.")] = Path("recipe.toml"),
    size: Annotated[
        str | None, typer.Option(help="The model's input in pixels: 224, or HEIGHTxWIDTH. Default: guessed.")
    ] = None,
    classes: Annotated[
        Path | None, typer.Option(help="A text file of the class names in the model's order, one per line.")
    ] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Load a .pt2 program, which can run code.")] = False,
) -> None:
    """Write a commented recipe for a model and labelled images, its preprocessing guessed and the guess tried.

    Example: bitferry init weights.pth photos/ --source torchvision:mobilenet_v2
    """
    from bitferry.pipeline import init as init_

    sides = init_.sides(size) if size is not None else None
    for written in init_.init(init_.Asked(model, images, output, source, sides, classes, trust)):
        typer.echo(written)


@commands.command()
def quickstart(
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder for all that is made.")] = Path("quickstart"),
    target: Annotated[
        str, typer.Option("--target", "-t", help="One that is ready here.", autocompletion=completed.target_names)
    ] = "openvino",
    explain: Annotated[
        bool | None, typer.Option("--explain/--no-explain", help="Say what happens; by default to a terminal only.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes/--pause", "-y", help="Go on by itself, or wait for Enter.")] = True,
    json_: Json = False,
) -> None:
    """Show the whole path in a few minutes, on embedded images: train, quantize, compile, verify, bundle, predict.

    Each stage says what it does and why, what it wrote, and the command that does it alone.

    Example: bitferry quickstart --out tour
    """
    import sys

    from bitferry import targets

    targets.check_name(target)
    targets.get(target)  # told before torch is imported
    from bitferry.pipeline import tour

    def pause() -> None:
        if not yes and sys.stdin.isatty():
            input("\n[Enter] ")

    talks = sys.stderr.isatty() if explain is None else explain
    done = tour.tour(out, target, explain=talks, pause=pause)
    raise typer.Exit(tour.show(done, as_json=json_))


@commands.command()
def completion(
    shell: Annotated[completed.Shell, typer.Argument(metavar="bash|zsh|fish", help="Whose script.")],
) -> None:
    """Print the script that lets a shell complete commands, options, recipes, targets and precisions.

    Example: bitferry completion bash > ~/.local/share/bash-completion/completions/bitferry
    """
    typer.echo(completed.script(shell))


@commands.command()
def pick(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="Its model looks at the images.", autocompletion=completed.recipes)
    ],
    images: Annotated[Path, typer.Argument(metavar="FOLDER", help="Images without labels, in any folders.")],
    count: Annotated[int, typer.Option(help="How many to pick.", min=1)] = 256,
    output: Annotated[Path, typer.Option("--output", "-o", help="The list to write.")] = Path("calibration.tsv"),
    build: Annotated[Path, typer.Option("--build", help="Where stages keep their output.")] = Path("build"),
    trust: Annotated[bool, typer.Option("--trust", help="Load a model that can run code of its own.")] = False,
) -> None:
    """Pick calibration images out of a larger folder: as many of each class, by the float model, and unlike each other.

    Example: bitferry pick recipes/imagenet-mobilenetv2.toml photos/ --count 256 -o calibration.tsv
    """
    from bitferry.pipeline.pick import pick as pick_

    pick_(recipe, images, count, output, build=build, trust=trust)


@commands.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="A bundle, or a report folder with its verdict.json.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    json_: Json = False,
) -> None:
    """Set two bundles or two verified builds side by side, with intervals; two bundles are timed here, interleaved.

    Example: bitferry compare build/m/reports/openvino-int8 build/m/reports/onnxruntime-int8
    """
    from bitferry.pipeline.report import comparison

    comparison.show(comparison.compare(first, second), as_json=json_)
