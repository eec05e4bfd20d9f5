"""What a command line asks for → the recipe and the targets to make it for, checked before anything is made."""

from pathlib import Path

from bitferry import targets
from bitferry.device.errors import InputError, TargetUnavailable
from bitferry.pipeline import progress
from bitferry.pipeline.onnx_in import asked as onnx_in
from bitferry.pipeline.recipe import Recipe, read


def asked(
    path: Path, names: str | None, *, precision: str | None = None, minutes: float | None = None
) -> tuple[Recipe, list[str]]:
    """Read a recipe, with what stands in place of its own, and choose its targets."""
    recipe = read(path, precision=precision, minutes=minutes)
    return recipe, choose_targets(names, recipe)


def choose_targets(text: str | None, recipe: Recipe) -> list[str]:
    """Turn `openvino,onnxruntime`, `all` or nothing (the recipe's own list) into targets that are ready here.

    A target that was named must be ready; `all` leaves out those that are not, and says so.
    """
    if text == "all":
        wanted = [name for name in targets.names() if _ready(name, recipe)]
    elif text is None:
        wanted = list(recipe.targets)
    else:
        wanted = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not wanted:
        raise InputError(f"no target: name some of {', '.join(targets.names())}")
    for name in wanted:
        schemes = targets.get(name).SCHEMES
        if recipe.precision not in (*schemes, "auto"):
            raise InputError(f"target '{name}' cannot run {recipe.precision}; it runs {', '.join(schemes)}")
        onnx_in.refuse(recipe, name)
    return wanted


def _ready(name: str, recipe: Recipe) -> bool:
    try:
        target = targets.get(name)
        target.environment(options=target.Options())
    except TargetUnavailable as error:
        progress.stage("skip", str(error))
        return False
    able = recipe.precision in (*target.SCHEMES, "auto")
    if not able:
        progress.stage("skip", f"target '{name}' does not run {recipe.precision}")
    elif not onnx_in.takes(recipe, name):
        able = False
        progress.stage("skip", f"target '{name}' does not compile from ONNX, which the recipe gives")
    return able
