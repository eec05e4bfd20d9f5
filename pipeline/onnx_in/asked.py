"""What cannot be asked of a recipe that gives an ONNX file, told before anything is made, and what is left out."""

from collections.abc import Iterator

from bitferry import targets
from bitferry.device.errors import InputError, TargetUnavailable
from bitferry.pipeline.artifacts import Baseline, FloatOnnx
from bitferry.pipeline.recipe import Quantization, Recipe
from bitferry.targets import Options

PREFIX = "onnx:"
REMEDY = "give the PyTorch model that the file was exported from (torchvision:, timm:, module: or pt2:)"
FORMS = {"torchscript": "TorchScript", "exported": "a torch.export program"}
OBSERVERS = ("minmax", "mean-minmax", "percentile", "histogram")
"""Of the recipe's, those that ONNX Runtime has; its histogram is the one of least entropy."""


def is_onnx(recipe: Recipe) -> bool:
    """Say whether a recipe gives an ONNX file."""
    return recipe.model.source.startswith(PREFIX)


def takes(recipe: Recipe, name: str) -> bool:
    """Say whether a target compiles from what the recipe gives."""
    return not is_onnx(recipe) or targets.get(name).CONSUMES == "onnx"


def refuse(recipe: Recipe, name: str) -> None:
    """Raise InputError for a target or a setting that a recipe's ONNX file cannot serve."""
    if is_onnx(recipe):
        refuse_besides(recipe)
        refuse_target(recipe, name)
        refuse_settings(recipe.quantization)


def refuse_besides(recipe: Recipe) -> None:
    """Raise InputError for weights or options beside a file that has both inside."""
    if recipe.model.weights or recipe.model.options:
        file = recipe.model.source.removeprefix(PREFIX)
        raise InputError(f"the ONNX file {file} is whole; take `weights` and `options` out of the recipe")


def refuse_target(recipe: Recipe, name: str) -> None:
    """Raise InputError for a target that compiles from what only PyTorch gives."""
    if not takes(recipe, name):
        others = [one for one in targets.names() if _fed_by_onnx(one)]
        raise InputError(
            f"target '{name}' compiles {FORMS[targets.get(name).CONSUMES]}, which cannot be made of an ONNX file as "
            f"'{recipe.model.source}' is; {REMEDY}, or take a target that ONNX feeds: {', '.join(others)}"
        )


def _fed_by_onnx(name: str) -> bool:
    try:
        return targets.get(name).CONSUMES == "onnx"
    except TargetUnavailable:
        return False


def refuse_stage(recipe: Recipe) -> None:
    """Raise InputError for a stage that works on a PyTorch program."""
    if is_onnx(recipe):
        raise InputError(
            f"recipe '{recipe.name}' gives an ONNX file ('{recipe.model.source}'), which cannot be traced: there is no "
            f"PyTorch program of it; {REMEDY}, or go on with `bitferry export` and `compile`"
        )


def refuse_batch(model: Baseline, name: str, options: Options) -> None:
    """Raise InputError where a target is to have another batch than the one the file fixes."""
    if isinstance(model, FloatOnnx) and model.batch is not None and options.batch != model.batch:
        raise InputError(
            f"{model.given} fixes its batch at {model.batch}, and [targets.{name}] asks for {options.batch}; set "
            f"batch = {model.batch} there, or export the model with a dynamic batch"
        )


def usable(settings: Quantization) -> Quantization:
    """Give the settings as they are used for an ONNX file; raise InputError for what a recipe asks for in vain."""
    refuse_settings(settings)
    return settings.model_copy(update={"equalize": False})


def refuse_settings(settings: Quantization) -> None:
    """Raise InputError for steps that need PyTorch's graph, where a recipe asks for them."""
    faults = list(_faults(settings))
    if faults:
        raise InputError(f"{'; '.join(faults)}: not for an ONNX file, whose graph is not PyTorch's; {REMEDY}")


def _faults(settings: Quantization) -> Iterator[str]:
    if settings.method == "qat":
        yield "quantization.method = 'qat'"
    if settings.equalize and "equalize" in settings.model_fields_set:
        yield "quantization.equalize = true"
    if settings.observer not in (*OBSERVERS, "best"):
        yield f"quantization.observer = '{settings.observer}' (there are {', '.join(OBSERVERS)} and best)"
    if settings.rounding == "layers":
        yield "quantization.rounding = 'layers'"
    if settings.ranges == "learned":
        yield "quantization.ranges = 'learned'"
    if settings.bias_correction == "full":
        yield "quantization.bias_correction = 'full' (there are none and fast)"
