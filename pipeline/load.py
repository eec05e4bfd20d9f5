"""A recipe's model source and weights → the float model, with the contract's arithmetic inside."""

import hashlib
import importlib
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from device.errors import InputError, TargetUnavailable
from device.preprocess import Preprocessing
from pipeline import cache, checkpoint
from pipeline.artifacts import FloatModel
from pipeline.recipe import Recipe


class Deployable(nn.Module):
    """The graph that is shipped: uint8 N×H×W×3 in, (pixel · scale − mean) / std as N×3×H×W into the model."""

    multiplier: Tensor
    offset: Tensor

    def __init__(self, model: nn.Module, contract: Preprocessing) -> None:
        super().__init__()
        self.model = model
        mean, std = torch.tensor(contract.mean), torch.tensor(contract.std)
        self.register_buffer("multiplier", (contract.scale / std).view(1, 3, 1, 1))
        self.register_buffer("offset", (-mean / std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        pixels = images.permute(0, 3, 1, 2).to(torch.float32)
        scores: Tensor = self.model(pixels * self.multiplier + self.offset)
        return scores


def load(recipe: Recipe, weights: Path | None, *, folder: Path = Path(), trust: bool = False) -> FloatModel:
    """Build the recipe's architecture and put `weights` in; `folder` is where a `module:` source is looked for.

    Raises InputError when the source is unknown, the weights do not fit it, or it does not give one score per class.
    """
    kind, _, name = recipe.model.source.partition(":")
    if kind == "pt2":
        if weights is not None:
            raise InputError(f"the exported program {name} holds its weights; take `weights` out of the recipe")
        model, digest = _exported(folder / name, trust)
    else:
        model = architecture(recipe, folder)
        digest = _code_hash(model)
        if weights is not None:
            checkpoint.fill(model, checkpoint.read(weights), weights)
            digest += hashlib.sha256(weights.read_bytes()).hexdigest()
        model.eval()  # which an exported program refuses; it is what it was exported as
    deployable = Deployable(model, recipe.preprocessing)
    _check_scores(deployable, recipe)
    return FloatModel(
        eager=deployable,
        preprocessing=recipe.preprocessing,
        classes=recipe.classes,
        key=cache.key(
            "load",
            code=__file__,
            packages=("torch", "torchvision"),
            model=recipe.model.model_dump(mode="json", exclude={"weights"}),
            classes=recipe.classes,
            contract=recipe.preprocessing,
            weights=digest,
        ),
    )


def architecture(recipe: Recipe, folder: Path = Path()) -> nn.Module:
    """Build the recipe's untrained architecture; nothing is downloaded."""
    kind, _, name = recipe.model.source.partition(":")
    options = dict(recipe.model.options)
    try:
        if kind == "torchvision":
            return _torchvision(name, {"num_classes": len(recipe.classes)} | options)
        if kind == "timm":
            return _timm(name, {"num_classes": len(recipe.classes)} | options)
        return _factory(name, options, folder)
    except (TypeError, ValueError, RuntimeError, KeyError, AssertionError) as error:
        raise InputError(f"the model '{recipe.model.source}' cannot be built with {options}: {error}") from error


def _torchvision(name: str, options: dict[str, Any]) -> nn.Module:
    from torchvision import models  # noqa: PLC0415 - a second to import, for this source only

    _check_known("torchvision", name, models.list_models(module=models))
    model: nn.Module = models.get_model(name, weights=None, **options)
    return model


def _timm(name: str, options: dict[str, Any]) -> nn.Module:
    try:
        import timm  # noqa: PLC0415 - an optional package
    except ModuleNotFoundError as error:
        raise TargetUnavailable("model source 'timm' needs the package timm: pip install 'bitferry[timm]'") from error
    _check_known("timm", name, timm.list_models())
    model: nn.Module = timm.create_model(name, pretrained=False, **options)
    return model


def _check_known(library: str, name: str, known: list[str]) -> None:
    if name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f", did you mean '{library}:{close[0]}'?" if close else ""
        raise InputError(f"{library} has no image classifier called '{name}'{hint}")


def _factory(name: str, options: dict[str, Any], folder: Path) -> nn.Module:
    """Call the user's own `package.file:function`; this runs their code because the recipe names it."""
    module_name, _, function = name.partition(":")
    if not function:
        raise InputError(f"model source 'module:{name}' names no function; expected module:package.file:function")
    if str(folder.resolve()) not in sys.path:
        sys.path.insert(0, str(folder.resolve()))
    try:
        factory = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"model source 'module:{name}' cannot be imported (looked in {folder} first): {error}"
        ) from error
    model = factory(**options)
    if not isinstance(model, nn.Module):
        raise InputError(f"module:{name} gave a {type(model).__name__}, expected a torch.nn.Module")
    return model


def _code_hash(model: nn.Module) -> str:
    """Hash the source file of the model's class, so that a user's edit is a new model."""
    file = getattr(sys.modules.get(type(model).__module__), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""


def _exported(path: Path, trust: bool) -> tuple[nn.Module, str]:
    if not trust:
        raise InputError(f"{path}: an exported program can run code when it is loaded; pass --trust if you trust it")
    try:
        program = torch.export.load(path)
    except FileNotFoundError:
        raise InputError(f"the model {path} does not exist") from None
    except Exception as error:
        raise InputError(f"{path} is not an exported program (.pt2): {error}") from error
    return program.module(), hashlib.sha256(path.read_bytes()).hexdigest()


def _check_scores(model: nn.Module, recipe: Recipe) -> None:
    contract = recipe.preprocessing
    images = torch.zeros(2, contract.height, contract.width, 3, dtype=torch.uint8)
    try:
        with torch.no_grad():
            scores: object = model(images)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise InputError(
            f"the model '{recipe.model.source}' cannot take 2 images of {contract.height}×{contract.width}: {error}"
        ) from error
    wanted = (2, len(recipe.classes))
    if not isinstance(scores, Tensor) or tuple(scores.shape) != wanted:
        found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise InputError(
            f"the model '{recipe.model.source}' gives {found} for 2 images; the recipe has "
            f"{len(recipe.classes)} classes, so {wanted} was expected"
        )
    if not bool(torch.isfinite(scores).all()):
        raise InputError(f"the model '{recipe.model.source}' answers a black image with NaN or infinity")
